"""Ollama's environment variables: those its server reads, and those that pages recommend although no server reads them.

Source of the first: the "server config" line that `ollama serve` writes into its log, and envconfig/config.go of
ollama/ollama; `ollama serve --help` names the common ones. A variable that is not read is ignored without a word, which is why a list of the wrong ones is worth having.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from labkit.serve.modelfile import Problem

READ: Mapping[str, str] = {
    "OLLAMA_HOST": "address and port to listen on, or to ask (127.0.0.1:11434)",
    "OLLAMA_MODELS": "folder of the models",
    "OLLAMA_KEEP_ALIVE": "how long a model stays loaded after its last request (5m)",
    "OLLAMA_NUM_PARALLEL": "requests a model answers at once; each has a context of its own",
    "OLLAMA_MAX_LOADED_MODELS": "models that may be loaded at once",
    "OLLAMA_MAX_QUEUE": "requests that may wait before new ones get 503 (512)",
    "OLLAMA_CONTEXT_LENGTH": "context of a model whose request and Modelfile name none",
    "OLLAMA_FLASH_ATTENTION": "flash attention on or off",
    "OLLAMA_KV_CACHE_TYPE": "type of the KV cache: f16, q8_0, q4_0",
    "OLLAMA_GPU_OVERHEAD": "bytes of each GPU's memory that stay free",
    "OLLAMA_SCHED_SPREAD": "spread a model over all GPUs",
    "OLLAMA_LOAD_TIMEOUT": "how long loading may stall (5m)",
    "OLLAMA_LLM_LIBRARY": "choose the GPU library by name",
    "OLLAMA_ORIGINS": "pages of which sites may ask",
    "OLLAMA_DEBUG": "more in the log",
    "OLLAMA_NOPRUNE": "keep unused parts of models at the start",
    "OLLAMA_NOHISTORY": "no history of what was typed",
    "OLLAMA_NO_CLOUD": "no models in the publisher's cloud",
    "OLLAMA_MAX_TRANSFER_STREAMS": "parallel streams when a model is fetched",
    "OLLAMA_DEBUG_LOG_REQUESTS": "keep the requests for debugging",
    "OLLAMA_EDITOR": "editor that the terminal's chat opens",
    "OLLAMA_GO_TEMPLATE": "render the model's Go template",
    "OLLAMA_IGPU_ENABLE": "use integrated GPUs",
}
NOT_READ: Mapping[str, str] = {
    "OLLAMA_NUM_GPU": "layers on the GPU are PARAMETER num_gpu, or options.num_gpu of a request",
    "OLLAMA_GPU_LAYERS": "layers on the GPU are PARAMETER num_gpu, or options.num_gpu of a request",
    "OLLAMA_NUM_THREAD": "threads are PARAMETER num_thread, or options.num_thread of a request",
    "OLLAMA_NUM_THREADS": "threads are PARAMETER num_thread, or options.num_thread of a request",
    "OLLAMA_NUM_CTX": "the server's default is OLLAMA_CONTEXT_LENGTH, a model's own PARAMETER num_ctx",
    "OLLAMA_MAX_VRAM": "versions of 2024 read it; today OLLAMA_GPU_OVERHEAD keeps memory free",
    "OLLAMA_PORT": "the port is a part of OLLAMA_HOST",
    "OLLAMA_API_KEY_REQUIRED": "the server knows no keys; a reverse proxy in front of it asks for them",
}
OPEN = re.compile(r"^(https?://)?(0\.0\.0\.0|\[?::\]?)(:\d+)?/?$")


def lint(environment: Mapping[str, str]) -> list[Problem]:
    """What is wrong with a server's environment: variables it does not read, and settings that open it to everybody.

    Variables without the prefix OLLAMA_ are other programs' business. `line` of a problem is the variable's place, from 1.
    """
    problems = []
    for place, (name, value) in enumerate(environment.items(), 1):
        if not name.startswith("OLLAMA_"):
            continue
        if name not in READ:
            why = NOT_READ.get(name, "it is in neither of labkit's lists; look for it in the server's own log")
            problems.append(Problem(place, f"Ollama does not read {name}: {why}."))
        elif name == "OLLAMA_HOST" and OPEN.match(value.strip()):
            problems.append(Problem(place, f"OLLAMA_HOST={value} listens to every network, and Ollama asks for no key; put a proxy that does in front.", "warning"))  # fmt: skip
        elif name == "OLLAMA_ORIGINS" and "*" in value.split(","):
            problems.append(Problem(place, "OLLAMA_ORIGINS=* lets every page a browser opens use the model; name the sites.", "warning"))
    return problems

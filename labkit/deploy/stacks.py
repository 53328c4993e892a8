"""The four servers a template can be filled for: what their images hold, where they answer, what they count.

Sources: docs/modelfile and envconfig of ollama/ollama, tools/server/README of ggml-org/llama.cpp, docs.vllm.ai (serve arguments,
metrics), and labkit's own gateway. Tags were current when this file was written; a digest is a fact of a registry and must be looked up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from labkit.types import LabkitError

PROBE = "import urllib.request; urllib.request.urlopen('http://127.0.0.1:{port}{path}', timeout=3)"


@dataclass(frozen=True)
class Stack:
    """One server. `check` is its health check, made of programs its image holds; `waiting` the metric that says it is behind."""

    name: str
    title: str
    image: str  # name:tag of the image that is run, or built upon
    port: int
    health: str
    check: tuple[str, ...]
    holds: tuple[str, ...]  # programs of the image that a health check may call
    metrics: str | None
    waiting: str | None
    key: str | None  # environment variable that carries its API keys
    gpu_image: str | None = None


STACKS = {
    "onnxruntime": Stack(
        "onnxruntime", "ONNX Runtime behind labkit's gateway", "python:3.11.14-slim-bookworm", 8000, "/health",
        ("python", "-c", PROBE.format(port=8000, path="/health")), ("python", "python3", "labkit"), "/metrics",
        "labkit_queue_length", "LABKIT_API_KEYS",
    ),
    "llamacpp": Stack(
        "llamacpp", "llama.cpp's own server", "ghcr.io/ggml-org/llama.cpp:server-b11176", 8080, "/health",
        ("curl", "-fsS", "http://127.0.0.1:8080/health"), ("curl", "/app/llama-server"), "/metrics",
        "llamacpp:requests_deferred", "LLAMA_API_KEY", "ghcr.io/ggml-org/llama.cpp:server-cuda-b11176",
    ),
    "vllm": Stack(
        "vllm", "vLLM", "public.ecr.aws/q9t5s3a7/vllm-cpu-release-repo:v0.29.0", 8000, "/health",
        ("python3", "-c", PROBE.format(port=8000, path="/health")), ("python3", "curl", "vllm"), "/metrics",
        "vllm:num_requests_waiting", "VLLM_API_KEY", "vllm/vllm-openai:v0.29.0",
    ),
    "ollama": Stack(
        "ollama", "Ollama", "ollama/ollama:0.12.0", 11434, "/api/tags", ("ollama", "list"), ("ollama",), None, None, None, "ollama/ollama:0.12.0",
    ),
}  # fmt: skip
WEBUI = "ghcr.io/open-webui/open-webui:v0.6.32"
# Ollama reads these (envconfig/config.go); the rest of what tutorials set are request or Modelfile parameters.
OLLAMA_VARIABLES = (
    "OLLAMA_HOST", "OLLAMA_MODELS", "OLLAMA_KEEP_ALIVE", "OLLAMA_NUM_PARALLEL", "OLLAMA_MAX_LOADED_MODELS", "OLLAMA_MAX_QUEUE",
    "OLLAMA_FLASH_ATTENTION", "OLLAMA_KV_CACHE_TYPE", "OLLAMA_CONTEXT_LENGTH", "OLLAMA_LOAD_TIMEOUT", "OLLAMA_ORIGINS", "OLLAMA_DEBUG",
    "OLLAMA_NOPRUNE", "OLLAMA_NOHISTORY", "OLLAMA_SCHED_SPREAD", "OLLAMA_GPU_OVERHEAD", "OLLAMA_LLM_LIBRARY", "OLLAMA_MULTIUSER_CACHE",
    "OLLAMA_NEW_ENGINE", "OLLAMA_INTEL_GPU", "OLLAMA_VULKAN", "OLLAMA_REMOTES", "OLLAMA_AUTH", "OLLAMA_EDITOR", "OLLAMA_TMPDIR",
)  # fmt: skip
OLLAMA_NEVER = {
    "OLLAMA_NUM_GPU": "it is the parameter num_gpu of a request or Modelfile", "OLLAMA_GPU_LAYERS": "it is the parameter num_gpu of a request or Modelfile",
    "OLLAMA_NUM_THREAD": "it is the parameter num_thread of a request or Modelfile", "OLLAMA_NUM_THREADS": "it is the parameter num_thread of a request or Modelfile",
    "OLLAMA_MAX_VRAM": "OLLAMA_GPU_OVERHEAD reserves memory instead", "OLLAMA_API_KEY": "the server asks for no key; put a proxy with keys before it",
}  # fmt: skip
ENDPOINTS = {  # addresses tutorials probe or scrape, and what is true of each server
    "ollama": {"/api/health": "/api/tags", "/health": "/api/tags", "/metrics": "no address: Ollama counts nothing", "/api/embeddings": "/api/embed"},
    "foundry": {"/api/metrics": "no address: Foundry Local counts nothing"},
}  # fmt: skip


def stack(name: str) -> Stack:
    """A stack by its name. LabkitError names those there are."""
    if name not in STACKS:
        raise LabkitError(f"There is no template for the engine {name!r}; expected one of {', '.join(STACKS)}.")
    return STACKS[name]


def which(image: str) -> Stack | None:
    """The stack an image belongs to, by its repository; None for a stranger."""
    repository = image.partition("@")[0].rpartition(":")[0] if ":" in image.rsplit("/", 1)[-1] else image.partition("@")[0]
    known = {"ollama/ollama": "ollama", "ghcr.io/ggml-org/llama.cpp": "llamacpp", "vllm/vllm-openai": "vllm", "vllm/vllm-openai-cpu": "vllm",
             "public.ecr.aws/q9t5s3a7/vllm-cpu-release-repo": "vllm", "labkit-gateway": "onnxruntime"}  # fmt: skip
    name = known.get(repository) or ("onnxruntime" if repository.endswith("/labkit-gateway") else None)
    return STACKS[name] if name else None


def launch(name: str, values: dict[str, Any]) -> tuple[list[str], list[str]]:
    """(entry point, arguments) of a server in its container."""
    model, context, slots, cpus = values["model"], values["context"], values["slots"], values["threads"]
    if name == "onnxruntime":
        arguments = ["serve", model, "--engine", "onnxruntime", "--precision", values["precision"], "--host", "0.0.0.0", "--port", "8000"]
        return ["python", "-m", "labkit"], [*arguments, "--threads", str(cpus)]
    if name == "llamacpp":
        arguments = ["-m", f"/models/{values['file']}", "--host", "0.0.0.0", "--port", "8080", "-c", str(context * slots)]
        return ["/app/llama-server"], [*arguments, "-np", str(slots), "-t", str(cpus), "--metrics"]
    if name == "vllm":
        arguments = [f"/models/{values['file']}", "--served-model-name", values["name"], "--host", "0.0.0.0", "--port", "8000"]
        arguments += ["--max-model-len", str(context), "--max-num-seqs", str(slots)]
        return ["vllm", "serve"], arguments + ({"f32": ["--dtype", "float32"], "f16": ["--dtype", "float16"], "bf16": ["--dtype", "bfloat16"]}.get(values["precision"]) or ["--quantization", values["precision"]])
    return ["/bin/ollama"], ["serve"]

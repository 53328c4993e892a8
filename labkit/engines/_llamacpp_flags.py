"""What a llama.cpp build can do, and commands of old tutorials in today's words.

Source of the renamed options: common/arg.cpp, CMakeLists.txt, Makefile and tools/ of the llama.cpp tree that
llama-cpp-python 0.3.36 is built from.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from labkit.engines import _ggml


class Renamed(NamedTuple):
    """One piece of an old command: what you read, what it is today, and why."""

    old: str
    today: str
    why: str


RENAMED = (
    Renamed("make LLAMA_METAL=1", "cmake -B build -DGGML_METAL=ON && cmake --build build --config Release", "and the option is ggml's now"),
    Renamed("make LLAMA_CUBLAS=1", "cmake -B build -DGGML_CUDA=ON && cmake --build build --config Release", "renamed twice since"),
    Renamed("make", "cmake -B build && cmake --build build --config Release", "the Makefile only prints an error now"),
    Renamed("-DLLAMA_METAL", "-DGGML_METAL", "still understood, with a warning"),
    Renamed("-DLLAMA_CUBLAS", "-DGGML_CUDA", "refused: the configuration stops"),
    Renamed("-DLLAMA_CUDA", "-DGGML_CUDA", "still understood, with a warning"),
    Renamed("convert-hf-to-gguf.py", "convert_hf_to_gguf.py", "underscores since the scripts became a package"),
    Renamed("convert.py", "convert_hf_to_gguf.py", "one converter per source format; this one reads Hugging Face folders"),
    Renamed("./quantize", "build/bin/llama-quantize", "all programs begin with llama- and live in build/bin"),
    Renamed("./perplexity", "build/bin/llama-perplexity", "all programs begin with llama- and live in build/bin"),
    Renamed("./server", "build/bin/llama-server", "all programs begin with llama- and live in build/bin"),
    Renamed("./main", "build/bin/llama-completion", "llama-cli is a chat client now; plain completion has its own program"),
    Renamed("-temp", "--temp", "long options take two dashes"),
    Renamed("--no-mmap", "--load-mode none", "mapping and pinning became one option: auto, none, mmap, mlock, mmap+mlock, dio"),
    Renamed("--mlock", "--load-mode mmap+mlock", "it pins pages in memory; it is not what switches mapping on"),
    Renamed("-fa", "-fa on", "flash attention takes on, off or auto; auto is the default"),
)


def modernise(command: str) -> dict[str, Any]:
    """An old command line in today's words: {"today": command, "changes": the rows of RENAMED that applied}.

    It rewrites names; it does not check that a file exists or that a model fits. A later rule sees the work of an
    earlier one, and a piece is only replaced where it stands as a whole word.
    """
    changes = []
    for rule in RENAMED:
        boundary = rf"(?<![\w./-]){re.escape(rule.old)}(?![\w.-])(?! (?:on|off|auto)\b)"
        command, count = re.subn(boundary, lambda _, text=rule.today: text, command)
        if count:
            changes.append(rule)
    return {"today": command, "changes": changes}


def build_flags() -> dict[str, str]:
    """The features compiled into this machine's llama.cpp, as its library reports them: {"AVX512": "1", …}."""
    report = _ggml.library().llama_print_system_info().decode()
    flags = {}
    for part in report.split("|"):
        device, _, rest = part.rpartition(":")
        name, _, value = rest.partition("=")
        if name.strip():
            flags[name.strip()] = value.strip()
        if device.strip():
            flags = {"device": device.strip(), **flags}
    return flags

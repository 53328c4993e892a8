"""vLLM on a CPU, in the environment `labkit env vllm` made: its command, what is wrong with a command, and the running server.

    with serve(checkpoint.path) as server:
        load.run(server.url, bodies, due)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from labkit import env, host, planner
from labkit.serve.supervisor import Child, supervise

GIB = 2**30


def command(folder: Path | str, *, context: int = 512, sequences: int = 64, name: str = "edgehome", cache_bytes: int = 2**27) -> list[str]:
    """The server's command for a Hugging Face folder; {port} stands for the port. NotInstalled without the environment."""
    return [
        str(env.require("vllm")), "-m", "vllm.entrypoints.cli.main", "serve", str(folder), "--served-model-name", name,
        "--host", "127.0.0.1", "--port", "{port}", "--dtype", "float32", "--max-model-len", str(context),
        "--max-num-seqs", str(sequences), "--kv-cache-memory-bytes", str(cache_bytes), "--enforce-eager",
    ]  # fmt: skip


@contextlib.contextmanager
def serve(folder: Path | str, *, wait: float = 300.0, **options: Any) -> Iterator[Child]:
    """vLLM for the folder until the block ends. It starts three processes, all ended with the block."""
    quiet = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    threads = {"OMP_NUM_THREADS": str(host.cpus())}
    with supervise(command(folder, **options), wait=wait, grace=20, environment={**quiet, **threads}) as child:
        yield child


def problems(arguments: Sequence[str], config: Mapping[str, Any], memory: float) -> list[str]:
    """What is wrong with the arguments of `vllm serve` for a model of `config` in `memory` bytes, a sentence each.

    Checked: tool choice without a parser, a quantization the checkpoint does not have, a context beyond the model's, weights and
    cache beyond the memory. Unknown flags are vLLM's own business.
    """
    given, found = _flags(arguments), []
    if "enable-auto-tool-choice" in given and "tool-call-parser" not in given:
        found.append("--enable-auto-tool-choice needs --tool-call-parser: vLLM stops at the start without it.")
    stored = (config.get("quantization_config") or {}).get("quant_method")
    if (wanted := given.get("quantization")) and wanted != stored and wanted in ("awq", "gptq"):
        found.append(f"--quantization {wanted}, but the checkpoint is {stored or 'not quantized'}: quantize it first, or leave the flag out.")
    context, longest = int(given.get("max-model-len", 0) or 0), config["max_position_embeddings"]
    if context > longest:
        found.append(f"--max-model-len {context} is beyond the model's {longest} positions.")
    needed = _needed(given, config, context or longest)
    if needed > memory:
        found.append(f"Weights and caches take {needed / GIB:.1f} GiB of {memory / GIB:.1f} GiB: fewer or shorter sequences, or fewer bits.")
    return found


def _flags(arguments: Sequence[str]) -> dict[str, str]:
    """--name value, --name=value and --name alone; the name without dashes."""
    words, found = [str(word) for word in arguments], {}
    for i, word in enumerate(words):
        if word.startswith("--"):
            name, sign, value = word[2:].partition("=")
            following = words[i + 1] if i + 1 < len(words) and not words[i + 1].startswith("--") else ""
            found[name] = value if sign else following
    return found


def _needed(given: Mapping[str, str], config: Mapping[str, Any], context: int) -> float:
    """Bytes of 16-bit (or 32-bit) weights and of as many full caches as sequences are admitted; 4.5 bits where quantized."""
    wide = 32 if given.get("dtype") in ("float32", "float") else 16
    bits = 4.5 if config.get("quantization_config") else wide
    weights = sum(planner.weights(config).values()) * bits / 8
    return weights + int(given.get("max-num-seqs", 1) or 1) * context * planner.cache_per_token(config, wide)

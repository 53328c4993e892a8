"""vLLM's arguments, checked before a container is started for minutes only to refuse them.

Source: vllm/engine/arg_utils.py and vllm/entrypoints/openai/cli_args.py of vllm-project/vllm 0.33, whose start-up checks these repeat.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from labkit import planner
from labkit.deploy.finding import Finding
from labkit.deploy.sizing import BITS, GIB

VALUE = {  # arguments with a value that a small deployment needs
    "--model", "--served-model-name", "--host", "--port", "--max-model-len", "--max-num-seqs", "--gpu-memory-utilization", "--dtype", "--quantization",
    "--tool-call-parser", "--api-key", "--tensor-parallel-size", "--kv-cache-dtype", "--chat-template", "--max-num-batched-tokens", "--seed",
    "--tokenizer", "--revision", "--load-format", "--reasoning-parser", "--swap-space", "--cpu-offload-gb", "--block-size", "--hf-overrides",
    "--download-dir", "--root-path", "--kv-cache-memory-bytes", "--device", "--max-log-len", "--ssl-keyfile", "--ssl-certfile", "--limit-mm-per-prompt", "--speculative-config", "--generation-config",
}  # fmt: skip
SWITCH = {"--enable-auto-tool-choice", "--trust-remote-code", "--enforce-eager", "--enable-prefix-caching", "--no-enable-prefix-caching",
          "--enable-chunked-prefill", "--disable-log-requests", "--no-enable-log-requests", "--disable-log-stats"}  # fmt: skip
METHODS = ("awq", "gptq", "awq_marlin", "gptq_marlin", "fp8", "mxfp4", "compressed-tensors", "torchao", "quark", "bitsandbytes", "gguf", "modelopt")
OWN = ("fp8", "torchao", "bitsandbytes")  # vLLM can do these itself when it loads an unquantized checkpoint


def parse(arguments: str | Sequence[str]) -> dict[str, str | None]:
    """Argument -> value, None for a switch; what comes before the first one is under ""."""
    words = shlex.split(arguments) if isinstance(arguments, str) else [str(word) for word in arguments]
    found: dict[str, str | None] = {}
    at = 0
    while at < len(words):
        name, sign, value = words[at].partition("=")
        at += 1
        if not name.startswith("--"):
            found.setdefault("", name)
        elif sign:
            found[name] = value
        elif name in SWITCH or at == len(words) or words[at].startswith("--"):
            found[name] = None
        else:
            found[name], at = words[at], at + 1
    return found


def lint(
    arguments: str | Sequence[str], config: Mapping[str, Any] | None = None, *, memory: float | None = None, gpu: float | None = None, place: str = "vllm"
) -> list[Finding]:
    """What vLLM would refuse, or what would end in a killed container. `config`: the checkpoint's; `memory`/`gpu`: bytes there are."""
    given = parse(arguments)
    said = [Finding("vllm-argument", place, f"{name} is no argument this check knows; look it up in `vllm serve --help`.", "warning")
            for name in given if name and name not in VALUE | SWITCH]  # fmt: skip
    said += [Finding("vllm-argument", place, f"{name} has no value; write one behind it.") for name in given if name in VALUE and not given[name]]
    if "--enable-auto-tool-choice" in given and "--tool-call-parser" not in given:
        said.append(Finding("vllm-tools", place, "--enable-auto-tool-choice is refused at the start without --tool-call-parser; name the parser of this model."))
    if "--trust-remote-code" in given:
        said.append(Finding("vllm-remote-code", place, "--trust-remote-code runs Python of the checkpoint's authors; architectures vLLM knows need none: leave it out.", "warning"))
    if looks := given.get("--api-key"):
        said += [Finding("secret", place, "--api-key is readable in the process list; give VLLM_API_KEY from a secret.")] * (not looks.startswith("$"))
    longest = (config or {}).get("max_position_embeddings")
    if longest and str(given.get("--max-model-len") or "").isdigit() and int(given["--max-model-len"] or 0) > longest:
        said.append(Finding("vllm-context", place, f"--max-model-len {given['--max-model-len']} is beyond the {longest} positions of the model; vLLM stops at the start."))
    said += _quantization(given, config, place) + _memory(given, config, memory, gpu, place)
    return said


def _quantization(given: Mapping[str, str | None], config: Mapping[str, Any] | None, place: str) -> list[Finding]:
    method = given.get("--quantization")
    if not method:
        return []
    if method not in METHODS:
        return [Finding("vllm-quantization", place, f"--quantization {method} is none of vLLM's methods; expected one of {', '.join(METHODS)}.")]
    if config is None or method in OWN:
        return []
    has = (config.get("quantization_config") or {}).get("quant_method")
    if has is None or str(has).replace("-", "_") not in (method, method.removesuffix("_marlin")):
        what = "is not quantized" if has is None else f"is {has}"
        return [Finding("vllm-quantization", place, f"--quantization {method} needs a checkpoint stored in that form; this one {what}: take such a checkpoint, or leave it out.")]
    return []


def _memory(given: Mapping[str, str | None], config: Mapping[str, Any] | None, memory: float | None, gpu: float | None, place: str) -> list[Finding]:
    if config is None or (memory is None and gpu is None):
        return []
    context, slots = int(given.get("--max-model-len") or config["max_position_embeddings"]), int(given.get("--max-num-seqs") or 1)
    bits = BITS.get(str(given.get("--quantization") or {"float32": "f32"}.get(str(given.get("--dtype")), "bf16")), 16)
    stored = sum(planner.weights(config).values()) * bits / 8
    each = planner.cache_per_token(config) * context
    said = []
    if gpu is not None:
        room = gpu * float(given.get("--gpu-memory-utilization") or 0.9) - stored
        if room < each:
            said.append(Finding("vllm-memory", place, f"Weights of {stored / GIB:.2f} GiB leave {room / GIB:.2f} GiB of the GPU's share; one sequence of {context:,} tokens takes {each / GIB:.2f}: vLLM ends at the start."))
        return said
    if stored + slots * each > (memory or 0):
        said.append(Finding("vllm-memory", place, f"Weights of {stored / GIB:.2f} GiB and {slots} x {each / GIB:.2f} GiB of cache are more than the {(memory or 0) / GIB:.2f} GiB there are."))
    return said


def kv_blocks(config: Mapping[str, Any], gpu: float, utilization: float = 0.9, *, bits: float = 16, block: int = 16) -> int:
    """Blocks of `block` tokens that fit beside the weights into the share of a GPU (bytes) vLLM may take; 0 when none does."""
    left = gpu * utilization - sum(planner.weights(config).values()) * bits / 8
    return max(0, int(left // (planner.cache_per_token(config) * block)))


def in_command(text: str) -> str | None:
    """The arguments behind `vllm serve` or the image in a line of shell; None when there is no vLLM in it."""
    found = re.search(r"(?:vllm serve|vllm/vllm-openai(?:-cpu)?(?::\S+)?|vllm-cpu-release-repo(?::\S+)?)\s+(.*)", text.replace("\\\n", " "), re.DOTALL)
    return found[1].strip() if found else None

"""llama.cpp: one GGUF file, written by labkit, quantized and run by llama.cpp's own library.

The steps, in its words: write_gguf, collect_imatrix, quantize_gguf; tensors and metadata look into the file.
Where other programs share the processors, set the variables of `labkit.host.waiting("short")` before Python starts: the
library's threads otherwise spin for long while they wait for each other.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from labkit.engines._gguf import metadata, own_type, tensor_data, tensors, write_gguf
from labkit.engines._gguf_imatrix import collect_imatrix, load_imatrix, save_imatrix
from labkit.engines._gguf_lora import AdaptedLlama
from labkit.engines._gguf_quantize import BITS, FILE_TYPES, bounds, quantize_gguf
from labkit.engines._gguf_tokenizer import differences, gguf_encode
from labkit.engines._llamacpp_flags import RENAMED, build_flags, modernise
from labkit.engines._llamacpp_python import open_llama
from labkit.engines._llamacpp_runner import LlamaRunner
from labkit.types import Artifact, Built, LabkitError, Recipe

__all__ = [
    "BITS", "FILE", "FILE_TYPES", "PRECISIONS", "RENAMED", "LlamaRunner", "build", "build_flags",
    "collect_imatrix", "gguf_encode", "load", "load_imatrix", "metadata", "modernise", "open_llama",
    "quantize_gguf", "save_imatrix", "tensor_data", "tensors", "write_gguf",
]  # fmt: skip

TITLE = "llama.cpp"
PACKAGE = "llama-cpp-python"
EXTRA = "llamacpp"
SCRATCH_BITS_PER_WEIGHT = 16.0  # the float file that is quantized from lies beside the result for a while
PRECISIONS: Mapping[str, tuple[float, float]] = {name: bounds(kind) for name, kind in FILE_TYPES.items()}

FILE, IMATRIX = "model.gguf", "imatrix.gguf"
OPTIONS = {
    "imatrix": False,  # weigh errors by an importance matrix (types that need one get it anyway)
    "calibration": None,  # text file it is collected from; the house text by default
    "calibration_tokens": 16384,
    "pure": False,  # every matrix of the same type
    "tensor_types": None,  # {regular expression: block type}
    "output_type": None,
    "embedding_type": None,
    "base": None,  # float type quantized from; the checkpoint's own by default, so that nothing is lost before
}


def build(checkpoint: Any, recipe: Recipe, out: Path) -> Built:
    """Write `out/model.gguf` (and `imatrix.gguf` when one was collected). Options are those of OPTIONS."""
    options = _options(recipe)
    target, kind = Path(out) / FILE, FILE_TYPES[recipe.precision]
    mix = {key: options[key] for key in ("pure", "tensor_types", "output_type", "embedding_type")}
    settings = {"precision": recipe.precision, "base": options["base"] or own_type(checkpoint), **mix}
    if options["imatrix"] or options["base"] or kind.needs_imatrix:
        made, more = _build_in_steps(checkpoint, recipe.precision, options, settings["base"], mix, target)
        settings |= more
    else:
        made = write_gguf(checkpoint, target, recipe.precision, **mix)
    print(made["log"])  # into build.log
    settings |= {"types": made["types"], "fallbacks": made["fallbacks"]}
    return Built(made["weight_bytes"], settings, (*made["notes"], *differences(checkpoint, target)))


def _build_in_steps(
    checkpoint: Any, precision: str, options: Mapping[str, Any], base: str, mix: Mapping[str, Any], target: Path
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Float file, importance matrix where asked, quantized file; returns the quantizer's report and settings."""
    between = target.with_name(f"base-{base}.gguf")
    imatrix, settings, notes = None, {}, []
    try:
        notes += write_gguf(checkpoint, between, base)["notes"]
        if options["imatrix"] or FILE_TYPES[precision].needs_imatrix:
            imatrix, settings, note = _importance(checkpoint, between, options, target.with_name(IMATRIX))
            notes += [] if options["imatrix"] else [note]
        made = quantize_gguf(between, target, precision, imatrix=imatrix, **mix)
    finally:
        between.unlink(missing_ok=True)
    return {**made, "notes": notes + made["notes"]}, settings


def load(artifact: Artifact, *, exact: bool = False, threads: int | None = None) -> LlamaRunner:
    """Open an artifact. `exact=True`: float32 KV cache, no flash attention, no repacked weights."""
    path = Path(artifact.path) / FILE
    if not path.exists():
        raise LabkitError(f"{path} is missing; build {artifact.name} again with force=True.")
    return LlamaRunner(path, exact=exact, threads=threads)


def load_adapted(
    artifact: Artifact, adapters: Mapping[str, Any], *, exact: bool = False, threads: int | None = None
) -> AdaptedLlama:
    """As `load`, with adapters (name -> labkit.adapters.Adapter) beside the weights; see labkit.adapters.load."""
    return AdaptedLlama(Path(artifact.path) / FILE, artifact.checkpoint, adapters, exact=exact, threads=threads)


def _options(recipe: Recipe) -> dict[str, Any]:
    if recipe.precision not in FILE_TYPES:
        raise LabkitError(f"llama.cpp has no precision {recipe.precision!r}; expected one of {', '.join(FILE_TYPES)}.")
    unknown = set(recipe.options) - set(OPTIONS)
    if unknown:
        raise LabkitError(f"llama.cpp has no option {min(unknown)!r}; expected one of {', '.join(OPTIONS)}.")
    options = {**OPTIONS, **recipe.options}
    if options["base"] not in (None, "f32", "f16", "bf16"):
        raise LabkitError(f"base={options['base']!r} was given; expected f32, f16 or bf16.")
    return options


def _importance(
    checkpoint: Any, gguf_path: Path, options: Mapping[str, Any], keep: Path
) -> tuple[dict[str, np.ndarray], dict[str, Any], str]:
    """Collect an importance matrix from the calibration text; returns it, the settings, and a note on it."""
    text, source = _calibration(options["calibration"])
    ids = checkpoint.encode(text)[: int(options["calibration_tokens"])]
    imatrix = collect_imatrix(gguf_path, ids)
    save_imatrix(imatrix, keep, tokens=len(ids), text=source)
    note = f"This type needs an importance matrix; one was collected from {len(ids)} tokens of {source}."
    return imatrix, {"imatrix_tokens": len(ids), "calibration": source}, note


def _calibration(path: str | Path | None) -> tuple[str, str]:
    if path is None:
        from labkit import house

        return house.calibration_text(), "the house calibration text"
    try:
        return Path(path).read_text(encoding="utf-8"), Path(path).name
    except (OSError, UnicodeDecodeError) as error:
        raise LabkitError(f"The calibration text {path} cannot be read ({error}); expected UTF-8 text.") from None

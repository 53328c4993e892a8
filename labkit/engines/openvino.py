"""OpenVINO: a stateful IR written from safetensors, compressed by NNCF, run by the CPU plugin and OpenVINO GenAI.

The steps are `convert_ir` (checkpoint -> IR), `compress_ir` (IR -> smaller IR) and `ir_constants` (what an IR stores);
`pipeline` opens an artifact as the text pipeline that applications use.
"""

from __future__ import annotations

import shutil
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from labkit.engines import _ir, _ir_weights, _nncf
from labkit.engines._ir_run import calibration_inputs, ir_logits, quiet_nncf
from labkit.engines._openvino_runner import MODEL, Runner, core, open_pipeline, properties
from labkit.types import Artifact, Built, LabkitError, Recipe

__all__ = [
    "FAMILIES", "FLOATS", "PRECISIONS", "Constant", "build", "calibration_inputs", "compress_ir", "constant_data", "convert_ir",
    "core", "ir_constants", "ir_logits", "load", "pipeline", "quiet_nncf", "restored_weights", "weight_bytes",
]  # fmt: skip
TITLE, PACKAGE, EXTRA = "OpenVINO", "openvino", "openvino"
MODULES = ("openvino", "openvino_genai")  # what a loaded model has imported
FAMILIES = _ir.FAMILIES
# Lowest and highest bits a weight. Arrays of equal content, such as norms nobody trained, are stored once. Scales add
# 16 / group (or 8 / group) bits; embeddings and head stay at 8 bits unless all_layers is set, so the upper bound of the
# small formats is that of a model which is mostly embedding.
PRECISIONS: Mapping[str, tuple[float, float]] = {
    "f32": (31.9, 32.1),
    "bf16": (15.9, 16.1),
    "f16": (15.9, 16.1),
    "int8_sym": (8.0, 8.4),
    "int8_asym": (8.0, 8.4),
    "fp8_e4m3": (8.0, 9.0),
    "mxfp8_e4m3": (8.2, 8.4),
    "int4_sym": (4.1, 8.4),
    "int4_asym": (4.1, 8.4),
    "nf4": (4.1, 8.4),
    "nvfp4": (4.4, 8.4),
    "mxfp4": (4.2, 8.4),
    "int3_sym": (3.1, 8.4),
    "int2_sym": (2.1, 8.4),
}
FLOATS = ("f32", "bf16", "f16")
BUILD_BYTES_PER_WEIGHT = 4.5  # the widest constants are float32, made in memory before they are written
SHAPE_TYPES = ("i32", "i64")  # axes and lengths of the graph, not weights


@dataclass(frozen=True)
class Constant:
    """One array stored in an IR's .bin file."""

    name: str
    dtype: str  # OpenVINO's name: f32, bf16, u4, nf4, f8e8m0 ...
    shape: tuple[int, ...]
    offset: int  # first byte in the .bin
    bytes: int


def build(checkpoint: Any, recipe: Recipe, out: Path) -> Built:
    """Write the IR (.xml, .bin) and the checkpoint's config into `out`; weights are compressed by NNCF."""
    precision, options = recipe.precision, dict(recipe.options)
    settings: dict[str, Any] = {}
    notes: list[str] = []
    if precision in FLOATS:
        if options:
            raise LabkitError(f"OpenVINO {precision} takes no options; {', '.join(options)} was given.")
        model = _ir.graph(checkpoint.config, checkpoint.tensors(), precision)
    else:
        model = _ir.graph(checkpoint.config, checkpoint.tensors())
        model, settings, notes = _nncf.compress(model, precision, checkpoint, options)
    path = _save(model, out, checkpoint.path)
    stored = ir_constants(path)
    settings["bytes_by_type"] = dict(sorted(Counter(_by_type(stored)).items()))
    return Built(weight_bytes(stored), settings, tuple(notes))


def convert_ir(checkpoint: Any, folder: Path, precision: str = "f32") -> Path:
    """Write a checkpoint as a stateful IR with f32, f16 or bf16 weights; the path of its .xml."""
    if precision not in FLOATS:
        raise LabkitError(f"An IR is converted at {', '.join(FLOATS)}; {precision!r} was given. Then use compress_ir.")
    return _save(_ir.graph(checkpoint.config, checkpoint.tensors(), precision), folder, checkpoint.path)


def compress_ir(path: Path, folder: Path, precision: str, *, checkpoint: Any = None, **options: Any) -> Path:
    """Compress the weights of an IR with NNCF into `folder`; the path of the new .xml.

    `options` are those of a recipe (see `labkit.engines._nncf.accepted`); `checkpoint` is needed for calibration.
    """
    if precision not in PRECISIONS or precision in FLOATS:
        known = ", ".join(p for p in PRECISIONS if p not in FLOATS)
        raise LabkitError(f"NNCF compresses to {known}; {precision!r} was given.")
    if Path(folder).resolve() == Path(path).resolve().parent:
        raise LabkitError(f"{folder} holds the IR to compress; give another folder for the result.")
    model, _, _ = _nncf.compress(core().read_model(path), precision, checkpoint, options)
    return _save(model, folder, Path(path).parent)


def ir_constants(path: Path) -> list[Constant]:
    """Every array stored beside an IR's .xml, in file order, each stored once however often it is used."""
    found: dict[tuple[int, int], Constant] = {}
    for layer in ElementTree.parse(path).getroot().iter("layer"):
        if layer.get("type") == "Const":
            data = layer.find("data").attrib
            shape = tuple(int(n) for n in data.get("shape", "").split(",") if n.strip())
            place = int(data["offset"]), int(data["size"])
            found.setdefault(place, Constant(layer.get("name", ""), data["element_type"], shape, *place))
    return [found[place] for place in sorted(found)]


def constant_data(path: Path, name: str) -> Any:
    """The array that an IR stores under a name, as numpy: codes of compressed weights as integers, bf16 as float32."""
    found = [c for c in ir_constants(path) if c.name == name]
    if not found:
        raise LabkitError(f"{Path(path).name} stores no {name!r}; `ir_constants` lists what it does.")
    one = found[0]
    with Path(path).with_suffix(".bin").open("rb") as file:
        file.seek(one.offset)
        return _ir_weights.values(file.read(one.bytes), one.dtype, one.shape)


def restored_weights(path: Path) -> dict[str, Any]:
    """Tensor name -> float32 weights (out, in) as an IR's .bin holds them, int8 and int4 codes restored in numpy."""
    return _ir_weights.restored(ir_constants(path), Path(path).with_suffix(".bin").read_bytes())


def weight_bytes(constants: Sequence[Constant]) -> int:
    """Bytes of the tensors among an IR's constants, scales and zero points included, shape arithmetic left out."""
    return sum(c.bytes for c in constants if c.dtype not in SHAPE_TYPES)


def load(artifact: Artifact, *, exact: bool = False, threads: int | None = None) -> Runner:
    """Open an IR. Exact: float32 arithmetic and KV cache, activations never quantized; else the plugin's own choice."""
    return Runner(artifact, exact, threads)


def pipeline(artifact: Artifact, *, exact: bool = False, threads: int | None = None, backend: str = "SDPA") -> Any:
    """The artifact as an `openvino_genai.LLMPipeline` that takes text: `pipeline(artifact).generate("...")`.

    The IR of its tokenizer is written beside the model at first use, which needs transformers.
    """
    _write_tokenizer(artifact)
    return open_pipeline(artifact.path, properties(exact, threads), backend)


def _save(model: Any, folder: Path, source: Path) -> Path:
    import openvino as ov

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    ov.save_model(model, folder / MODEL, compress_to_fp16=False)
    for name in ("config.json", "generation_config.json"):  # GenAI reads the ids that end a text from these
        if (Path(source) / name).exists():
            shutil.copyfile(Path(source) / name, folder / name)
    return folder / MODEL


def _by_type(constants: Sequence[Constant]) -> dict[str, int]:
    sums: Counter[str] = Counter()
    for c in constants:
        if c.dtype not in SHAPE_TYPES:
            sums[c.dtype] += c.bytes
    return sums


def _write_tokenizer(artifact: Artifact) -> None:
    if (artifact.path / "openvino_tokenizer.xml").exists():
        return
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise LabkitError('The text pipeline needs transformers once. Try:  pip install "labkit[train]"') from None
    import openvino as ov
    from openvino_tokenizers import convert_tokenizer

    source = AutoTokenizer.from_pretrained(artifact.checkpoint.path, local_files_only=True)
    for model, name in zip(convert_tokenizer(source, with_detokenizer=True), ("tokenizer", "detokenizer"), strict=True):
        ov.save_model(model, artifact.path / f"openvino_{name}.xml")

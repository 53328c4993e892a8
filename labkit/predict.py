"""How large will the file be? Bytes predicted from the shape and the engine's storage rules, before anything is converted.

    predict.size(labkit.checkpoint("edgehome"), "llamacpp", "q4_0")     # Size(tensors=…, container=…)

Every rule is one line of what an engine writes for a matrix of (rows, columns): codes, scales, zero points. What an engine does
otherwise for some tensors (a tied embedding, a fallback, tables of positions) is in its function. `container` is what the file
holds besides tensors: GGUF's metadata with the whole vocabulary, the header of a safetensors file; other engines keep their
graph in a file of its own, which is not predicted. Measured against every precision of every engine by tests/test_predict.py.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from labkit import _shapes
from labkit.types import LabkitError

WEIGHTS = {  # engine -> the file that holds the weights
    "llamacpp": "model.gguf", "onnxruntime": "model.onnx.data", "olive": "model.onnx.data", "openvino": "openvino_model.bin",
    "mlx": "model.safetensors",
}  # fmt: skip
ENTRY = 115  # bytes a tensor takes in a safetensors header: name, type, shape, offsets


class Size(NamedTuple):
    """Bytes of the stored tensors, and of what the same file holds besides (negative: small tensors are kept in the graph's)."""

    tensors: int
    container: int = 0

    @property
    def file(self) -> int:
        return self.tensors + self.container


class Matrix(NamedTuple):
    """One stored tensor: its kind ("embedding", "head", "norm" or "body"), name, rows and columns."""

    kind: str
    name: str
    rows: int
    columns: int
    layer: int

    @property
    def weights(self) -> int:
        return self.rows * self.columns


def size(checkpoint: Any, engine: str, precision: str) -> Size:
    """The predicted size of `labkit.build(checkpoint, Recipe(engine, precision))` with default options.

    LabkitError for an engine or precision without a rule, or an architecture whose shapes are unknown.
    """
    rules = {"llamacpp": _llamacpp, "onnxruntime": _onnxruntime, "olive": _olive, "openvino": _openvino, "mlx": _mlx}
    if engine not in rules:
        raise LabkitError(f"No storage rule is known for {engine!r}; expected one of {', '.join(rules)}.")
    found = rules[engine](checkpoint, precision)
    if found is None:
        raise LabkitError(f"No storage rule is known for {precision!r} of {engine}; build it and look.")
    return found


def stored(config: Mapping[str, Any]) -> Iterator[Matrix]:
    """The tensors of a decoder of this config, in storage order; vectors are matrices of one row."""
    shapes = _shapes.shapes(config)
    if shapes is None:
        raise LabkitError(f"{(config.get('architectures') or ['This architecture'])[0]} is unknown here; see labkit models.")
    for name, shape in shapes.items():
        parts = name.split(".")
        kind = "embedding" if "embed_tokens" in name else "head" if name.startswith("lm_head") else "body" if len(shape) > 1 else "norm"
        yield Matrix(kind, name, prod(shape[:-1]), shape[-1], int(parts[2]) if parts[1:2] == ["layers"] else -1)


def blocks(weights: int, columns: int, bits: float, block: int, overhead: float) -> int:
    """Bytes of a matrix in blocks along its rows: `bits` a code, `overhead` bytes a block of `block` weights."""
    count = weights // columns * -(-columns // block)
    return int(count * (block * bits / 8 + overhead))


# --- llama.cpp ---------------------------------------------------------------------------------------------------------


def _llamacpp(checkpoint: Any, precision: str) -> Size | None:
    from labkit.engines import _ggml, _gguf, _gguf_quantize

    if precision not in _gguf_quantize.FILE_TYPES:
        return None
    plan = list(_gguf.stored_tensors(checkpoint))
    kind = _gguf_quantize.FILE_TYPES[precision]
    with tempfile.TemporaryDirectory() as folder:  # metadata and tensor table without weights: their data is a hole
        file, floats = Path(folder) / "outline.gguf", ["f32" if len(t.shape) == 1 else "bf16" for t in plan]
        _, offsets = _gguf._outline(checkpoint, file, kind.number, plan, floats)
        if precision in _gguf.DIRECT:
            kinds = [_gguf._kind(t, precision) for t in plan]
        else:  # a mixture: llama.cpp tells what it would do
            pretended = {t.name: _ones(t) for t in plan if len(t.shape) > 1} if kind.needs_imatrix else None
            chosen, _ = _gguf_quantize.planned_types(file, precision, imatrix=pretended)
            kinds = [chosen.get(t.name, k) for t, k in zip(plan, floats, strict=True)]
    sizes = [prod(t.shape[:-1]) * _ggml.row_bytes(k, t.shape[-1]) for t, k in zip(plan, kinds, strict=True)]
    aligned = sum(-(-n // _gguf.ALIGNMENT) * _gguf.ALIGNMENT for n in sizes)
    return Size(sum(sizes), offsets[0] + aligned - sum(sizes))


def _ones(tensor: Any) -> Any:
    import numpy as np

    return np.ones(tensor.shape[-1], np.float32)


# --- ONNX Runtime and Olive ----------------------------------------------------------------------------------------------


def _tables(config: Mapping[str, Any]) -> tuple[int, int]:
    """Bytes of the cosines and sines of all positions, float32: (stored like weights, kept in the graph's file).

    Positions stretched by LongRoPE have two pairs of tables, in the two branches of a choice inside the graph.
    """
    from labkit.engines import _rope

    kinds = {_shapes.slides(config, i) for i in range(config["num_hidden_layers"])} if _shapes.family(config) == "gemma3" else {False}
    rope, longest = _rope.turns(config, 0), config["max_position_embeddings"]
    a_position = 2 * len(rope.near) * 4
    if rope.far is not None and longest > rope.original:
        return 0, (longest + rope.original) * a_position
    return longest * a_position * len(kinds), 0


def _onnxruntime(checkpoint: Any, precision: str) -> Size | None:
    """Float16 or blocks of 32 with a float32 scale; a tied matrix once, except where no kernel looks rows up in it."""
    config, tied = checkpoint.config, _shapes.tied(checkpoint.config)
    bits = {"int8": 8, "int4": 4, "int2": 2}.get(precision)
    if precision == "int8_dynamic":
        return _per_row(config)
    if precision not in ("fp32", "fp16") and bits is None:
        return None
    total, inside = _tables(config)
    for m in stored(config):
        if m.kind == "norm":
            total += 4 * m.weights
        elif bits is None:
            total += (4 if precision == "fp32" else 2) * m.weights
        else:
            looked_up = m.kind == "embedding" and (not tied or bits == 2)  # by row: kept as float32
            total += 4 * m.weights if looked_up else 0
            total += 0 if m.kind == "embedding" and not tied else blocks(m.weights, m.columns, bits, 32, 4)
    return Size(total + inside, -inside)


def _per_row(config: Mapping[str, Any]) -> Size:
    """int8 by onnxruntime.quantization: a float32 scale and a zero point a row, in the graph; one of each for the embedding."""
    total, inside = _tables(config)
    for m in stored(config):
        total += m.weights * (4 if m.kind == "norm" else 1)
        inside += {"norm": 0, "embedding": 5}.get(m.kind, 5 * m.rows)
        if m.kind == "embedding" and _shapes.tied(config):  # the head is a matrix of its own
            total, inside = total + m.weights, inside + 5 * m.rows
    return Size(total + inside, -inside)


def _olive(checkpoint: Any, precision: str) -> Size | None:
    """From the model builder's graph, in which embedding and head are two matrices even when they are tied."""
    config, tied = checkpoint.config, _shapes.tied(checkpoint.config)
    bits = {"int8": 8, "int4": 4}.get(precision)
    if precision in ("int8_dynamic", "int8_static"):
        return _per_row(config)
    if precision != "fp32" and bits is None:
        return None
    total, inside = _tables(config)
    for m in stored(config):
        one = 4 * m.weights if bits is None or m.kind == "norm" else blocks(m.weights, m.columns, bits, 32, 4)
        total += one * (2 if m.kind == "embedding" and tied else 1)
    return Size(total + inside, -inside)


# --- OpenVINO --------------------------------------------------------------------------------------------------------------

NNCF = {  # precision -> bits a code, group (None: a row; 128: the largest of 128, 64, 32 that fits), bytes a group
    "int8_sym": (8, None, 2), "int8_asym": (8, None, 3), "fp8_e4m3": (8, 128, 2), "mxfp8_e4m3": (8, 32, 1),
    "int4_sym": (4, 128, 2), "int4_asym": (4, 128, 2.5), "nf4": (4, 128, 2), "nvfp4": (4, 16, 1), "mxfp4": (4, 32, 1),
    "int3_sym": (3, 128, 2), "int2_sym": (2, 128, 2),
}  # fmt: skip
KEPT = {"mxfp4": "mxfp8_e4m3"} | dict.fromkeys(("int4_sym", "int4_asym", "nf4", "nvfp4", "int3_sym", "int2_sym"), "int8_asym")


def _openvino(checkpoint: Any, precision: str) -> Size | None:
    """NNCF keeps embedding and head at eight bits below eight; norms stay as the checkpoint has them."""
    config = checkpoint.config
    if precision in ("f32", "f16", "bf16"):
        return Size(sum(m.weights for m in stored(config)) * (4 if precision == "f32" else 2))
    if precision not in NNCF:
        return None
    total, own, columns = 0, _float_bytes(checkpoint), {m.columns for m in stored(config) if m.kind == "body"}
    for m in stored(config):
        if m.kind == "norm":
            total += own * m.weights
            continue
        bits, group, extra = NNCF[precision if m.kind == "body" else KEPT.get(precision, precision)]
        group = m.columns if group is None else _group(columns | {m.columns}, (128, 64, 32)) if group == 128 else group
        total += blocks(m.weights, m.columns, bits, group, extra)
    return Size(int(total))


def _float_bytes(checkpoint: Any) -> int:
    """Bytes a weight takes in the checkpoint itself: what norms, and MLX's scales, keep."""
    return 4 if checkpoint.tensors()["model.embed_tokens.weight"].dtype == "F32" else 2


def _group(columns: set[int], choice: tuple[int, ...]) -> int:
    """The first group size that divides all rows."""
    found = next((size for size in choice if all(n % size == 0 for n in columns)), None)
    if found is None:
        raise LabkitError(f"Rows of {min(columns)} weights do not divide into groups of {choice[-1]}.")
    return found


# --- MLX -------------------------------------------------------------------------------------------------------------------


def _mlx(checkpoint: Any, precision: str) -> Size | None:
    """Groups of 64 with a scale and an offset as wide as the checkpoint's floats, or microscaling; a mixture varies by layer."""
    from labkit.engines import mlx

    config = checkpoint.config
    width = {"f32": 4, "f16": 2, "bf16": 2}.get(precision)
    all_stored = list(stored(config))
    if width:
        return Size(width * sum(m.weights for m in all_stored), ENTRY * len(all_stored))
    if precision not in mlx.PRECISIONS:
        return None
    layers, own, columns = config["num_hidden_layers"], _float_bytes(checkpoint), {m.columns for m in all_stored if m.kind != "norm"}
    total = entries = 0
    for m in all_stored:
        if m.kind == "norm":
            total, entries = total + own * m.weights, entries + 1
            continue
        if precision in mlx.MICRO:
            bits, group = mlx.MICRO[precision]
            extra, parts = 1.0, 2
        else:
            bits, group, extra, parts = _affine(mlx, m, precision, layers), _group(columns, mlx.GROUPS), 2.0 * own, 3
        total, entries = total + blocks(m.weights, m.columns, bits, group, extra), entries + parts
    return Size(int(total), ENTRY * entries)


def _affine(mlx: Any, m: Matrix, precision: str, layers: int) -> int:
    """Bits of a matrix: a mixture raises the head, and value and down matrices of some layers (mlx_lm.convert)."""
    if precision not in mlx.MIXED:
        return mlx.AFFINE[precision]
    low, high = (int(n) for n in precision.split("_")[1:])
    i, eighth = m.layer, layers // 8
    more = i >= 0 and (i < eighth or i >= 7 * layers // 8 or (i - eighth) % 3 == 2)
    return high if m.kind == "head" or (more and ("v_proj" in m.name or "down_proj" in m.name)) else low

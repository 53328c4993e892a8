"""Quantize an ONNX graph step by step: static int8 from a calibration set, and any block-wise codes as MatMulNBits.

`static` is ONNX Runtime's own tool, called as one would; `ranges` shows what it learnt. `store_blocks` puts what labkit's
methods made (GPTQ, HQQ, anything with one scale and one offset a block) into the operator that ONNX Runtime multiplies with, and
`restore_blocks` reads it back, so that methods can be compared in one and the same container.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np

from labkit import blocks, onnx_graphs
from labkit.types import LabkitError

METHODS = ("MinMax", "Entropy", "Percentile")
FORMS = ("QDQ", "QOperator")


def static(
    source: str | Path, out: str | Path, windows: Sequence[Sequence[int]], *, method: str = "MinMax", form: str = "QDQ",
    percentile: float | None = None, per_channel: bool = True, keep: Sequence[str] = (),
) -> Path:  # fmt: skip
    """float32 graph -> `out` with int8 matrices and uint8 activations, whose ranges are those met in `windows` of token ids.

    Nodes whose name holds one of `keep` stay float32. `percentile`: of values that method "Percentile" keeps (the tool's default is
    99.999). What the tool prints is dropped. Errors: an unknown method or form, no windows.
    """
    from onnxruntime import quantization as tool

    if method not in METHODS or form not in FORMS or not windows:
        raise LabkitError(
            f"method={method!r}, form={form!r} and {len(windows)} windows were given; expected one of {', '.join(METHODS)}, "
            f"one of {', '.join(FORMS)}, and at least one window."
        )
    Path(f"{out}.data").unlink(missing_ok=True)  # onnx appends to a file that is there
    reader = _Reader(source, windows)
    matrices = [n.name for n in onnx_graphs.read(source).graph.node if n.op_type == "MatMul" and not any(k in n.name for k in keep)]
    extra = {} if percentile is None else {"CalibPercentile": percentile}
    with _quiet():
        tool.quantize_static(
            str(source), str(out), reader, quant_format=tool.QuantFormat[form], nodes_to_quantize=matrices,
            per_channel=per_channel, activation_type=tool.QuantType.QUInt8, weight_type=tool.QuantType.QInt8,
            calibrate_method=tool.CalibrationMethod[method], use_external_data_format=True, extra_options=extra,
        )  # fmt: skip
    return Path(out)


def ranges(graph: str | Path) -> dict[str, tuple[float, int]]:
    """Activation -> (scale, zero point), of all that a statically quantized graph (QDQ form) rounds while it runs."""
    from onnx import numpy_helper

    model = onnx_graphs.read(graph, weights=True)
    stored = {t.name: t for t in model.graph.initializer}
    found = {}
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear" and node.input[0] not in stored:
            scale, zero = (numpy_helper.to_array(stored[name]) for name in node.input[1:3])
            found[node.input[0]] = (float(scale), int(zero))
    return found


def store_blocks(source: str | Path, out: str | Path, matrices: Mapping[str, blocks.Quantized], level: int = 1) -> Path:
    """float32 graph -> `out`, in which the matrices of the named MatMul nodes are MatMulNBits.

    `matrices`: node name -> codes (out, in) of 4 or 8 bits with a scale and an offset a block, as `blocks.affine` and the
    methods give them. A weight is scale * (code - zero): whole zero points are stored packed, as the codes are; a bias becomes a
    float32 zero point, which ONNX Runtime multiplies in float32 whatever `level` says.
    """
    import onnx
    from onnx import helper, numpy_helper

    model = onnx_graphs.read(source, weights=True)
    graph = model.graph
    unknown = set(matrices) - {node.name for node in graph.node if node.op_type == "MatMul"}
    if unknown:
        raise LabkitError(f"The graph has no MatMul named {sorted(unknown)[0]!r}.")
    readers = [name for node in graph.node for name in node.input]
    for place, node in enumerate(graph.node):
        if node.name not in matrices:
            continue
        codes, scales, zeros, facts = _packed(matrices[node.name])
        names = [f"{node.name}.{part}" for part in ("codes", "scales", "zeros")]
        made = zip(names, (codes, scales, zeros), strict=True)
        graph.initializer.extend(numpy_helper.from_array(values, name) for name, values in made)
        if readers.count(node.input[1]) == 1:  # the embedding may read the same matrix
            graph.initializer.remove(next(t for t in graph.initializer if t.name == node.input[1]))
        inputs = [node.input[0], *names]
        new = helper.make_node(
            "MatMulNBits", inputs, list(node.output), name=node.name, domain="com.microsoft", accuracy_level=level, **facts
        )
        graph.node[place].CopyFrom(new)
    out = Path(out)
    data = out.with_name(f"{out.name}.data")
    data.unlink(missing_ok=True)  # onnx appends to a file that is there
    onnx.save_model(model, str(out), save_as_external_data=True, location=data.name, size_threshold=256)
    return out


def matmul_of(site: Sequence[str]) -> list[tuple[str, list[str]]]:
    """The MatMul nodes that stand for the matrices of a site (names as in the checkpoint): node, the matrices it stacks.

    Queries, keys and values are one node, as they read one input; all other matrices have one each.
    """
    at = "/" + site[0].rpartition("_proj")[0].rpartition(".")[0].replace("model.layers", "model/layers").replace(".self_attn", "/attn")
    at = at.replace(".mlp", "/mlp")
    if site[0].endswith("q_proj.weight"):
        return [(f"{at}/qkv_proj/MatMul", list(site))]
    return [(f"{at}/{name.split('.')[-2]}/MatMul", [name]) for name in site]


def alone(graph: str | Path, name: str, level: int | None = None) -> Any:
    """One MatMulNBits node of a graph as a graph of its own, x (rows, K) -> y (rows, N), with its stored bytes: a ModelProto.

    `level`: another accuracy level than the stored one.
    """
    from onnx import TensorProto, helper

    model = onnx_graphs.read(graph, weights=True)
    node = next((n for n in model.graph.node if n.name == name and n.op_type == "MatMulNBits"), None)
    if node is None:
        raise LabkitError(f"The graph has no MatMulNBits named {name!r}.")
    facts = {a.name: a.i for a in node.attribute} | ({} if level is None else {"accuracy_level": level})
    tensors = [t for t in model.graph.initializer if t.name in node.input]
    made = helper.make_node("MatMulNBits", ["x", *node.input[1:]], ["y"], name=name, domain="com.microsoft", **facts)
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["rows", facts[size]]) for n, size in (("x", "K"), ("y", "N"))]
    sets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(helper.make_graph([made], "alone", ends[:1], ends[1:], tensors), ir_version=10, opset_imports=sets)


def restore_blocks(graph: str | Path) -> dict[str, np.ndarray]:
    """MatMulNBits node -> its weights (out, in) float32, computed from the stored bytes with numpy alone."""
    from onnx import numpy_helper

    model = onnx_graphs.read(graph, weights=True)
    stored = {t.name: t for t in model.graph.initializer}
    found = {}
    for node in model.graph.node:
        if node.op_type == "MatMulNBits":
            facts = {a.name: a.i for a in node.attribute}
            parts = [numpy_helper.to_array(stored[name]) for name in node.input[1:] if name]
            found[node.name] = dequantize(*parts, bits=facts["bits"], block=facts["block_size"], columns=facts["K"])
    return found


def dequantize(
    codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray | None = None, *, bits: int, block: int, columns: int
) -> np.ndarray:
    """The operator's arithmetic: packed codes (N, blocks, bytes of a block) -> weights (N, columns) float32.

    Zero points: packed like the codes, floats, or absent, which means the middle code.
    """
    rows, count = len(codes), -(-columns // block)
    values = _unpacked(codes, rows, bits)[:, : count * block].reshape(rows, count, block).astype(np.float32)
    if zeros is None:
        zeros = np.full((rows, count), 2 ** (bits - 1), np.float32)
    elif zeros.dtype == np.uint8:
        zeros = _unpacked(zeros, rows, bits)[:, :count]
    middle = zeros.reshape(rows, count, 1).astype(np.float32)
    return ((values - middle) * scales.reshape(rows, count, 1)).reshape(rows, -1)[:, :columns]


def _unpacked(packed: np.ndarray, rows: int, bits: int) -> np.ndarray:
    """Codes (rows, as many as fit) of bytes whose rows begin at whole bytes."""
    return blocks.unpack(packed.ravel(), bits, packed.size * 8 // bits).reshape(rows, -1)


def _packed(found: blocks.Quantized) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[str, int]]:
    """Codes (N, blocks, bytes), scales (N, blocks), zero points (packed, or floats), and the operator's attributes."""
    rows, columns = found.shape
    count = len(found.scales) // rows
    block, bits = columns // count, 8 if "int8" in found.scheme or found.codes.max(initial=0) > 15 else 4
    if found.levels is not None or found.codes.min(initial=0) < 0 or count * block != columns:
        raise LabkitError(f"{found.scheme} of shape {found.shape} was given; expected unsigned codes in whole blocks.")
    if bits == 8 and found.bias is not None:
        raise LabkitError(f"{found.scheme} with a bias was given; ONNX Runtime multiplies 8-bit blocks with whole zero points only.")
    scales = np.where(found.scales == 0, 1, found.scales).astype(np.float32)
    codes = found.codes.astype(np.uint8).reshape(rows, count, block)
    if found.bias is None and found.zeros is not None:
        zeros = found.zeros.astype(np.uint8).reshape(rows, count)
        zeros = np.pad(zeros, ((0, 0), (0, count % 2))) if bits == 4 else zeros
    else:
        bias = 0 if found.bias is None else found.bias
        zeros = np.broadcast_to((0 if found.zeros is None else found.zeros) - bias / scales, scales.shape)
        zeros = zeros.astype(np.float32).reshape(rows, count)
    if bits == 4:
        codes = codes[..., ::2] | codes[..., 1::2] << 4
        zeros = zeros if zeros.dtype != np.uint8 else zeros[:, ::2] | zeros[:, 1::2] << 4
    facts = {"K": columns, "N": rows, "bits": bits, "block_size": block}
    return codes, scales.reshape(rows, count), zeros, facts


class _Reader:
    """What the tool asks for its data, one window after another."""

    def __init__(self, graph: str | Path, windows: Sequence[Sequence[int]]):
        opened = onnx_graphs.session(graph)
        self._feeds = iter([onnx_graphs.feed(opened, window) for window in windows])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._feeds, None)

    def set_range(self, start_index: int, end_index: int) -> None:
        raise NotImplementedError


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the tool's progress, and its advice to preprocess, which a graph of fused operators does not need."""
    logging.disable(logging.WARNING)
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(logging.NOTSET)

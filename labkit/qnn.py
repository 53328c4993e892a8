"""Qualcomm's QNN: the grids its tools write down, and strict runs on the emulation of its neural processor.

QNN keeps codes unsigned and adds an offset that is zero or negative: real = scale * (code + offset). ONNX subtracts a
zero point, real = scale * (code - zero_point), and its codes may be signed. Encodings are written in version 1.0.0 of the
format that AIMET exports and QNN's converters read. The runs need the package onnxruntime-qnn (MIT; the QNN libraries
inside come under Qualcomm's own licence, Qualcomm_LICENSE.pdf in the package) and happen in a process of their own.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from labkit.i18n import tr
from labkit.types import LabkitError

PACKAGE, VARIABLE = "onnxruntime-qnn", "LABKIT_QNN_PYTHON"
CHILD = Path(__file__).with_name("_qnn_child.py")
WIDTHS = (4, 8, 16, 32)  # bits of an integer encoding


class Grid(NamedTuple):
    """real = scale * (code + offset), code from 0 to 2**bits - 1."""

    scale: float
    offset: int
    bits: int

    @property
    def ends(self) -> tuple[float, float]:
        """The smallest and the largest real number with a code."""
        return self.scale * self.offset, self.scale * (2**self.bits - 1 + self.offset)


def grid(low: float, high: float, bits: int, *, symmetric: bool = False) -> Grid:
    """The grid for numbers from `low` to `high`, stretched to hold 0, which then has an exact code.

    `symmetric` spends the lowest code: offset -2**(bits - 1), and the codes above it reach as far to both sides.
    """
    low, high = min(low, 0.0), max(high, 0.0)
    if not np.isfinite([low, high]).all() or low == high or bits not in WIDTHS:
        raise LabkitError(f"A grid from {low} to {high} in {bits} bits was asked for; expected numbers and {WIDTHS} bits.")
    if symmetric:
        return Grid(max(-low, high) / (2 ** (bits - 1) - 1), -(2 ** (bits - 1)), bits)
    scale = (high - low) / (2**bits - 1)
    return Grid(scale, round(low / scale), bits)


def encodings(model: Any) -> dict[str, Any]:
    """What the quantize and dequantize nodes of an ONNX model (ModelProto) say, as an encodings document.

    One entry a tensor. Weights are those stored as codes; a signed code c with zero point z becomes the unsigned code
    c + 2**(bits - 1) with offset -(z + 2**(bits - 1)).
    """
    from onnx import numpy_helper

    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    found: dict[str, dict[str, dict]] = {"activation_encodings": {}, "param_encodings": {}}
    for node in model.graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear") or node.input[1] not in stored:
            continue
        weight = node.op_type == "DequantizeLinear" and node.input[0] in stored
        if weight or node.op_type == "QuantizeLinear":
            name = node.input[0].removesuffix("_quantized") if weight else node.input[0]
            scale, zero = (np.atleast_1d(numpy_helper.to_array(stored[part])) for part in node.input[1:3])
            kind = "param_encodings" if weight else "activation_encodings"
            found[kind][name] = {"name": name, **_entry(scale, zero, stored[node.input[2]].data_type)}
    return {"version": "1.0.0", **{kind: list(entries.values()) for kind, entries in found.items()}}


def _entry(scale: np.ndarray, zero: np.ndarray, data_type: int) -> dict[str, Any]:
    from onnx import TensorProto

    kind = TensorProto.DataType.Name(data_type)  # INT8, UINT16, INT4 ...
    bits = int(kind.lstrip("UINT"))
    half = 0 if kind.startswith("U") else 2 ** (bits - 1)
    offset = [-(int(z) + half) for z in zero]
    return {
        "bw": bits, "dtype": "INT", "enc_type": "PER_TENSOR" if len(scale) == 1 else "PER_CHANNEL",
        "is_sym": all(o == -(2 ** (bits - 1)) for o in offset), "scale": [float(s) for s in scale], "offset": offset,
    }  # fmt: skip


def faults(entry: Mapping[str, Any]) -> list[str]:
    """What is wrong with one entry, one sentence each; also reads the older form (`bitwidth`, `min`, `max`, plain numbers)."""
    bits = entry.get("bw", entry.get("bitwidth"))
    scale, offset = (np.atleast_1d(entry[key]) if key in entry else None for key in ("scale", "offset"))
    if bits not in WIDTHS or scale is None or offset is None:
        return [tr("bw, scale and offset must be there, and bw one of {widths}", widths=", ".join(map(str, WIDTHS)))]
    said = []
    if len(scale) != len(offset):
        said.append(tr("{scales} scales and {offsets} offsets", scales=len(scale), offsets=len(offset)))
    if not (np.isfinite(scale).all() and (scale > 0).all()):
        said.append(tr("a scale is not a positive number"))
    if (offset != np.rint(offset)).any():
        said.append(tr("an offset is not a whole number"))
    if (offset > 0).any():
        said.append(tr("offset {offset} is positive: QNN adds the offset, so it is minus the zero point", offset=f"{offset.max():g}"))
    elif (offset < -(2**bits - 1)).any():
        said.append(tr("offset {offset} leaves 0 without a code", offset=f"{offset.min():g}"))
    return said or _ends(entry, Grid(float(scale[0]), int(offset[0]), bits))


def _ends(entry: Mapping[str, Any], own: Grid) -> list[str]:
    """Stated ends must be those of the grid, within half a step; a symmetric grid has its offset in the middle."""
    said = []
    if entry.get("is_sym") in (True, "True") and own.offset != -(2 ** (own.bits - 1)):
        said.append(tr("it is called symmetric, and its offset is {offset}", offset=own.offset))
    for key, end in zip(("min", "max"), own.ends, strict=True):
        if key in entry and abs(float(np.atleast_1d(entry[key])[0]) - end) > 0.51 * own.scale:
            said.append(tr("{key} is {stated:g}, and the grid ends at {end:.6g}", key=key, stated=float(entry[key]), end=end))
    return said


@dataclass(frozen=True)
class Outcome:
    """What the HTP backend did with a model. `refused` is empty when it ran; `parts`: (provider, nodes) of the graph, in order."""

    refused: str
    outputs: Mapping[str, np.ndarray] = field(default_factory=dict, repr=False)
    parts: tuple[tuple[str, int], ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return not self.refused


def interpreter() -> str:
    """The Python that has onnxruntime-qnn: this one, else the one that $LABKIT_QNN_PYTHON names; LabkitError without."""
    given = os.environ.get(VARIABLE)
    if given:
        if Path(given).is_file():
            return given
        raise LabkitError(tr("{variable} names {given}, which is no file; give a Python that has {package}.",
                             variable=VARIABLE, given=given, package=PACKAGE))  # fmt: skip
    if importlib.util.find_spec("onnxruntime_qnn"):
        return sys.executable
    raise LabkitError(tr(
        "The emulation of Qualcomm's HTP is not installed; pip install {package} (Linux x86-64 or Windows; read "
        "Qualcomm_LICENSE.pdf in it), or let {variable} name a Python that has it.", package=PACKAGE, variable=VARIABLE,
    ))  # fmt: skip


def run(
    model: str | Path,
    feeds: Mapping[str, np.ndarray],
    *,
    strict: bool = True,
    context: str | Path | None = None,
    options: Mapping[str, str] | None = None,
    seconds: float = 120.0,
) -> Outcome:
    """Open an ONNX file on the HTP backend and run it once on `feeds`, in a child process. Says what was refused, if so.

    `strict`: every node must run there (session.disable_cpu_ep_fallback). `context`: also write the compiled graph: this
    .onnx file, which holds one EPContext node, and a _qnn.bin beside it; both open like a model. `options`: the provider's,
    such as {"htp_graph_finalization_optimization_mode": "3"}. Errors: the plug-in is absent, or the child died.
    """
    python = interpreter()
    for old in [Path(context), Path(context).with_name(f"{Path(context).stem}_qnn.bin")] if context else []:
        old.unlink(missing_ok=True)  # the runtime refuses to write over them
    with tempfile.TemporaryDirectory() as folder:
        np.savez(Path(folder, "feeds.npz"), **feeds)
        job = {"model": str(model), "feeds": str(Path(folder, "feeds.npz")), "out": folder, "strict": strict,
               "context": str(context) if context else None, "options": dict(options or {})}  # fmt: skip
        command = [python, "-P", str(CHILD), json.dumps(job)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=seconds)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise LabkitError(tr("The run on the HTP emulation did not end well: {error}", error=error)) from None
        if done.returncode or not Path(folder, "said.json").is_file():
            last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
            raise LabkitError(tr("The run on the HTP emulation did not end well: {error}", error=last))
        said = json.loads(Path(folder, "said.json").read_text(encoding="utf-8"))
        outputs = {}
        if Path(folder, "outputs.npz").is_file():
            with np.load(Path(folder, "outputs.npz")) as found:
                outputs = dict(found)
    parts = tuple((name, nodes) for name, nodes in said.get("parts", ()))
    return Outcome(said.get("refused", ""), outputs, parts, {k: said[k] for k in ("plug_in", "runtime", "sdk")})


def size(path: str | Path, checkpoint: Any, part: str, precision: str) -> Any:
    """Measurement of the bytes of all tensors in a one-file ONNX graph that holds `part` of a checkpoint.

    Bits are counted over the weights, as scales and zero points are stored for them; the record carries the part's name, so
    that nobody takes it for a whole model.
    """
    import onnx

    from labkit import engines
    from labkit.engines import _genai
    from labkit.measure.record import record
    from labkit.types import Artifact, Recipe

    stored = onnx.load(str(path), load_external_data=False).graph.initializer
    weights = sum(int(np.prod(tensor.dims)) for tensor in stored if len(tensor.dims) == 2)
    held = _genai.weight_bytes(path)
    whole = {"path": Path(path).parent, "checkpoint": checkpoint, "seconds": 0.0, "engine_version": engines.available()["onnxruntime"] or ""}
    artifact = Artifact(
        recipe=Recipe("onnxruntime", precision, part=part), weight_bytes=held, weights=weights, bits_per_weight=8 * held / weights, **whole
    )
    details = {"file_bytes": Path(path).stat().st_size, "bits_per_weight": 8 * held / weights, "reduction_against_16_bits": 1 - held / weights / 2}
    taken = record(artifact, "size", "bytes", [held], workload={"part": part}, details=details)
    return replace(taken, artifact={**taken.artifact, "checkpoint": f"{checkpoint.name}: {part}"})

"""The importance matrix: mean squared input of every weight column, collected while llama.cpp reads a text.

Quantizers weigh the error of each column by it. Format and meaning follow llama.cpp's tools/imatrix, so the files
can be exchanged with llama-imatrix and llama-quantize.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from labkit.engines import _ggml
from labkit.engines._llamacpp_runner import LlamaRunner
from labkit.types import LabkitError

WINDOW = 512


class _Tensor(ctypes.Structure):
    """struct ggml_tensor of ggml.h, up to its name; checked against the library's own accessors before use."""

    _fields_ = [
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * 4),
        ("nb", ctypes.c_size_t * 4),
        ("op", ctypes.c_int),
        ("op_params", ctypes.c_int32 * 16),
        ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * 10),
        ("view_src", ctypes.c_void_p),
        ("view_offs", ctypes.c_size_t),
        ("data", ctypes.c_void_p),
        ("name", ctypes.c_char * 64),
    ]


class _Collector:
    """Sums of squared inputs per weight, filled by llama.cpp's evaluation callback."""

    def __init__(self) -> None:
        self.sums: dict[str, np.ndarray] = {}
        self.counts: dict[str, int] = {}
        self.failed: BaseException | None = None

    def __call__(self, address: int, ask: bool, _: Any) -> bool:
        try:
            return self._wanted(address) if ask else self._take(address)
        except BaseException as error:  # an exception must not cross into C
            self.failed = self.failed or error
            return False

    def _wanted(self, address: int) -> bool:
        if _ggml.symbol("ggml_op_desc")(address) != b"MUL_MAT":
            return False
        name = _name(_Tensor.from_address(address).src[0])
        return name == "output.weight" or (name.startswith("blk.") and name.endswith(".weight"))

    def _take(self, address: int) -> bool:
        node = _Tensor.from_address(address)
        weight, inputs = node.src[0], _Tensor.from_address(node.src[1])
        if _ggml.symbol("ggml_get_data")(node.src[1]) != inputs.data or inputs.type != _ggml.TYPES["f32"]:
            raise LabkitError("This llama.cpp lays tensors out otherwise; labkit cannot collect an importance matrix.")
        columns, rows = inputs.ne[0], inputs.ne[1] * inputs.ne[2] * inputs.ne[3]
        values = np.ctypeslib.as_array(ctypes.cast(inputs.data, ctypes.POINTER(ctypes.c_float)), (rows, columns))
        squares = np.einsum("rc,rc->c", values, values, dtype=np.float64)
        name = _name(weight)
        self.sums[name] = self.sums.get(name, 0.0) + squares
        self.counts[name] = self.counts.get(name, 0) + rows
        return True


def _name(address: int) -> str:
    return ctypes.string_at(_ggml.symbol("ggml_get_name")(address)).decode()


def collect_imatrix(
    gguf_path: str | Path, token_ids: Sequence[int], *, window: int = WINDOW, threads: int | None = None
) -> dict[str, np.ndarray]:
    """Tensor name -> mean squared input of each column, (columns,) float32, over `token_ids` in windows.

    The text should be like what the model will do; a few thousand tokens are enough for a small model.
    Raises LabkitError for fewer than 32 tokens. Source: tools/imatrix of llama.cpp, without its expert handling.
    """
    ids = [int(i) for i in token_ids]
    if len(ids) < 32:
        raise LabkitError(f"{len(ids)} calibration tokens were given; expected at least 32, better some thousands.")
    collector = _Collector()
    with LlamaRunner(gguf_path, threads=threads, callback=collector, repack=False) as runner:
        window = min(window, runner.context)
        for first in range(0, len(ids), window):
            if len(ids) - first >= 16 or first == 0:  # a tiny last window would weigh its first tokens too much
                runner.logits(ids[first : first + window])  # all rows: else the last layer sees one token
            if collector.failed:
                raise collector.failed
    return {n: (collector.sums[n] / collector.counts[n]).astype(np.float32) for n in sorted(collector.sums)}


def save_imatrix(imatrix: Mapping[str, np.ndarray], path: str | Path, *, tokens: int = 1, text: str = "") -> Path:
    """Write an importance matrix in llama.cpp's GGUF form (sums and counts); `tokens` is how many it was made from."""
    import gguf

    writer = gguf.GGUFWriter(path, "imatrix")
    writer.kv_data[0].pop("general.architecture")  # this kind of file has none
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", [text or "unknown"])
    writer.add_uint32("imatrix.chunk_count", max(1, tokens // WINDOW))
    writer.add_uint32("imatrix.chunk_size", WINDOW)
    for name in sorted(imatrix):
        writer.add_tensor(f"{name}.in_sum2", (imatrix[name] * np.float32(tokens)).astype(np.float32)[None, :])
        writer.add_tensor(f"{name}.counts", np.full((1, 1), tokens, dtype=np.float32))
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
    return Path(path)


def load_imatrix(path: str | Path) -> dict[str, np.ndarray]:
    """Read an importance matrix written by save_imatrix or by llama-imatrix in its GGUF form."""
    from labkit.engines._gguf import _reader

    found = {tensor.name: np.asarray(tensor.data, dtype=np.float32) for tensor in _reader(path).tensors}
    names = [name.removesuffix(".in_sum2") for name in found if name.endswith(".in_sum2")]
    if not names:
        raise LabkitError(f"{path} holds no importance matrix; expected a GGUF file with .in_sum2 tensors.")
    return {n: (found[f"{n}.in_sum2"].ravel() / max(float(found[f"{n}.counts"].ravel()[0]), 1.0)) for n in names}

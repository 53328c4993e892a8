"""Weights of an ONNX graph: rounded, packed and streamed from safetensors into one file beside the graph.

Tensors are declared while the graph is built and written afterwards, a slab of rows at a time, so that memory does not
grow with the model. The two ways of rounding give the bytes of ONNX Runtime's own quantizers: "rtn" is arithmetic in
float64 as its weight-only tool does it (labkit.blocks rounds scales and codes otherwise), "default" is its C++ kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from labkit._tensors import TensorView
from labkit.types import LabkitError

SLAB = 2_000_000  # weights in memory at once
PAGE, LARGE = 65_536, 1 << 20  # tensors of LARGE bytes and more start on a page, so that the file can be mapped
RTN = "rtn"
Packed = tuple[np.ndarray, np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Blocks:
    """How matrices become MatMulNBits: `block` weights of a row share a scale and, unless symmetric, a zero point."""

    bits: int  # 2, 4 or 8; rtn knows 4 and 8
    block: int
    symmetric: bool
    level: int  # accuracy level: 4 multiplies with int8 activations, 1 with float32 ones
    algorithm: str = RTN  # or "default"

    def names(self, weight: str) -> list[str]:
        """Names of codes, scales and (unless symmetric) zero points, as the tool of the algorithm has them."""
        if self.algorithm == RTN:
            names = [f"{weight}_Q{self.bits}G{self.block}", f"{weight}_scale", f"{weight}_zp"]
        else:
            names = [f"{weight}_Q{self.bits}", f"{weight}_scales", f"{weight}_zero_points"]
        return names[: 2 if self.symmetric else 3]


@dataclass(frozen=True)
class Rows:
    """Rows of stored matrices, one above the other: (N, K)."""

    pieces: tuple[tuple[TensorView, int, int], ...]  # tensor, first row, last row + 1

    @classmethod
    def of(cls, *views: TensorView) -> Rows:
        return cls(tuple((view, 0, view.shape[0]) for view in views))

    @property
    def shape(self) -> tuple[int, int]:
        return sum(last - first for _, first, last in self.pieces), self.pieces[0][0].shape[1]

    def slabs(self) -> Iterator[tuple[int, np.ndarray]]:
        """(first row, float32 values) for all rows in order, at most about SLAB weights each."""
        place, step = 0, max(1, SLAB // self.shape[1])
        for view, first, last in self.pieces:
            for row in range(first, last, step):
                values = view.rows(row, min(row + step, last))
                yield place, values
                place += len(values)


class Data:
    """The tensors of one external data file. `tensors` goes into the graph, `write` makes the file."""

    def __init__(self, location: str):
        self.location, self.tensors, self._end = location, [], 0
        self._writers: list[Callable[[BinaryIO], None]] = []

    def inline(self, name: str, values: np.ndarray) -> str:
        """A tensor inside the graph itself, where shapes must be read from."""
        from onnx import numpy_helper

        self.tensors.append(numpy_helper.from_array(values, name))
        return name

    def array(self, name: str, values: np.ndarray) -> str:
        """A small tensor, held in memory until it is written."""
        start = self._declare(name, values.dtype, values.shape)
        self._writers.append(lambda file: _put(file, start, np.ascontiguousarray(values)))
        return name

    def rows(self, name: str, rows: Rows, dtype: str, *, turned: bool) -> str:
        """A matrix of floats ("f4", "f2"): (N, K) as stored, or turned to (K, N), the way MatMul reads it."""
        kind, (height, width) = np.dtype(dtype), rows.shape
        start = self._declare(name, kind, (width, height) if turned else (height, width))

        def write(file: BinaryIO) -> None:
            for row, values in rows.slabs():
                stored = _narrow(values, kind, name)
                if not turned:
                    _put(file, start + row * width * kind.itemsize, stored)
                    continue
                for column, piece in enumerate(np.ascontiguousarray(stored.T)):
                    _put(file, start + (column * height + row) * kind.itemsize, piece)

        self._writers.append(write)
        return name

    def blocks(self, name: str, rows: Rows, how: Blocks) -> list[str]:
        """A quantized matrix: codes (N, blocks, bytes of a block), scales (N, blocks), packed zero points."""
        height, width = rows.shape
        count = -(-width // how.block)
        shapes = [(height, count, how.block * how.bits // 8), (height, count), (height, -(-count * how.bits // 8))]
        kinds = [np.dtype(t) for t in ("u1", "f4", "u1")]
        names = how.names(name)
        starts = [self._declare(*facts) for facts in zip(names, kinds, shapes, strict=False)]
        strides = [int(np.prod(shape[1:])) * kind.itemsize for shape, kind in zip(shapes, kinds, strict=True)]

        def write(file: BinaryIO) -> None:
            for row, values in rows.slabs():
                parts = (round_to_nearest if how.algorithm == RTN else _by_kernel)(values, how)
                for start, stride, part in zip(starts, strides, parts, strict=False):
                    _put(file, start + row * stride, part)

        self._writers.append(write)
        return names

    def write(self, path: Path) -> None:
        """Write every declared tensor, in order of declaration."""
        with open(path, "wb", buffering=0) as file:
            file.truncate(self._end)
            for writer in self._writers:
                writer(file)

    def _declare(self, name: str, kind: np.dtype, shape: tuple[int, ...]) -> int:
        """Make the tensor's entry for the graph and give the place of its first byte."""
        from onnx import TensorProto, helper

        length = int(np.prod(shape)) * kind.itemsize
        start = -(-self._end // PAGE) * PAGE if length >= LARGE else self._end
        self._end = start + length
        tensor = TensorProto(name=name, data_type=helper.np_dtype_to_tensor_dtype(kind), dims=shape)
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", self.location), ("offset", start), ("length", length)):
            tensor.external_data.add(key=key, value=str(value))
        self.tensors.append(tensor)
        return start


def round_to_nearest(values: np.ndarray, how: Blocks) -> Packed:
    """Rows (n, K) -> codes, scales, zero points (all packed), 4 or 8 bits, as ONNX Runtime's weight-only tool rounds.

    Symmetric blocks span -m..m with m the largest size, around the middle code; others span lowest..highest.
    """
    top, groups = 2**how.bits - 1, _pad(values, how.block).reshape(-1, how.block)
    low, high = groups.min(axis=1, keepdims=True), groups.max(axis=1, keepdims=True)
    span = np.maximum(np.abs(low), np.abs(high)) * np.float32(2) if how.symmetric else high - low
    scale = np.where(span > 0, span.astype(np.float64) / top, 1.0)
    zero = np.full(scale.shape, 2.0 ** (how.bits - 1)) if how.symmetric else np.clip(np.round(-low / scale), 0, top)
    codes = groups / scale
    codes += zero
    np.round(codes, out=codes)
    np.clip(codes, 0, top, out=codes)
    per_row = (len(values), -1)
    return (
        _pack(codes.astype(np.uint8).reshape(per_row), how.bits),
        scale.astype(np.float32).reshape(per_row),
        _pack(zero.astype(np.uint8).reshape(per_row), how.bits),
    )


def _by_kernel(values: np.ndarray, how: Blocks) -> Packed:
    """The same with ONNX Runtime's C++ kernel, for 2, 4 or 8 bits."""
    from onnxruntime.capi import _pybind_state

    kernel = getattr(_pybind_state, f"quantize_matmul_{how.bits}bits")
    height, width = values.shape
    padded = _pad(values, how.block)
    count = padded.shape[1] // how.block
    codes = np.zeros((height, count, how.block * how.bits // 8), np.uint8)
    scales, zeros = np.zeros((height, count), np.float32), np.zeros((height, -(-count * how.bits // 8)), np.uint8)
    kernel(codes, np.ascontiguousarray(padded.T), scales, zeros, how.block, height, width, how.symmetric)
    return codes, scales, zeros


def _pad(values: np.ndarray, block: int) -> np.ndarray:
    """Rows filled up with zeros to whole blocks."""
    missing = -values.shape[1] % block
    return np.pad(values, ((0, 0), (0, missing))) if missing else values


def _pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Two 4-bit codes a byte along the rows, the first in the low half, an odd last one alone; 8-bit codes are bytes already."""
    if bits == 8:
        return codes
    packed = codes[:, ::2].copy()
    packed[:, : codes.shape[1] // 2] |= codes[:, 1::2] << 4
    return packed


def _narrow(values: np.ndarray, kind: np.dtype, name: str) -> np.ndarray:
    if kind == np.float16 and np.abs(values).max(initial=0) > np.finfo(np.float16).max:
        raise LabkitError(f"Tensor {name!r} has values beyond 65504, the largest float16; choose fp32 or int8.")
    return values.astype(kind, copy=False)


def _put(file: BinaryIO, start: int, values: Any) -> None:
    file.seek(start)
    view = memoryview(values).cast("B")
    while len(view):  # an unbuffered write may stop short
        view = view[file.write(view) :]

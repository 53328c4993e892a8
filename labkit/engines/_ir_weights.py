"""What an IR stores, read back by numpy alone: codes unpacked, zero points subtracted, scales multiplied.

NNCF stores a compressed matrix as up to three arrays, `NAME`, `NAME/zero_point` and `NAME/scale`, of shape (out, groups,
group) and (out, groups, 1); restored = (code - zero_point) * scale. Types and layout: openvino/core/type/element_type.hpp
(two four-bit codes a byte, the first in the low half).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from labkit import blocks
from labkit.types import LabkitError

PLAIN = {"f32": np.float32, "f16": np.float16, "u8": np.uint8, "i8": np.int8, "i32": np.int32, "i64": np.int64}
RESTORED = ("f32", "f16", "bf16", "u8", "i8", "u4", "i4")


def values(data: bytes, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """The numbers of one stored array: as its own numpy type; bf16 as float32, four-bit codes as int8 (i4) or uint8 (u4)."""
    if dtype in PLAIN:
        return np.frombuffer(data, PLAIN[dtype]).reshape(shape)
    raw = np.frombuffer(data, np.uint8)
    if dtype == "bf16":
        return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(shape)
    if dtype not in ("u4", "i4"):
        raise LabkitError(f"Arrays of type {dtype} are not read back here; expected one of {', '.join([*PLAIN, *RESTORED[-2:]])}.")
    codes = blocks.unpack(raw, 4, int(np.prod(shape)))
    return (codes if dtype == "u4" else ((codes ^ 8).astype(np.int8) - 8)).reshape(shape)


def restored(constants: Iterable[Any], data: bytes) -> dict[str, np.ndarray]:
    """Tensor name -> float32 weights, of the float and integer arrays among an IR's constants; groups joined to rows again."""
    found = {c.name: values(data[c.offset : c.offset + c.bytes], c.dtype, c.shape) for c in constants if c.dtype in RESTORED}
    weights = {}
    for name, codes in found.items():
        if name.endswith(("/scale", "/zero_point")) or codes.ndim == 0:
            continue
        scale, zero = found.get(f"{name}/scale"), found.get(f"{name}/zero_point", 0)
        full = codes.astype(np.float32)
        if scale is not None:
            full = (full - np.asarray(zero, np.float32)) * scale.astype(np.float32)
        weights[name] = full.reshape(full.shape[0], -1) if full.ndim == 3 else full
    return weights

"""What an MLX folder stores, read back by numpy alone: words unpacked, scales multiplied, offsets added.

A quantized matrix NAME of shape (out, in) is `NAME.weight`, uint32 words (out, in * bits / 32), the first code in the
lowest bits; affine groups have `NAME.scales` and `NAME.biases` (out, in / group): value = scale * code + bias.
Microscaling groups have `NAME.scales` only, bytes: a power of two (E8M0, mxfp4 and mxfp8) or E4M3 (nvfp4), and codes
that are small floats (E2M1, E4M3). OCP Microscaling Formats v1.0, 2023; mlx/backend/cpu/quantized.cpp.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from labkit import blocks, formats
from labkit.types import LabkitError

ELEMENT = {"mxfp4": "fp4_e2m1", "nvfp4": "fp4_e2m1", "mxfp8": "fp8_e4m3"}


def quantization(folder: Path) -> dict[str, Any]:
    """The map `quantization` of config.json: group_size, bits, mode, and a map of its own for each exception."""
    config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    return config.get("quantization", {})


def arrays(folder: Path) -> dict[str, np.ndarray]:
    """Every stored array by name: packed words uint32, microscaling scales uint8, floats (16 bits or 32) as float32."""
    found: dict[str, np.ndarray] = {}
    for file in sorted(Path(folder).glob("model*.safetensors")):
        data = file.read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        for name, entry in json.loads(data[8:start]).items():
            if name != "__metadata__":
                first, last = entry["data_offsets"]
                found[name] = _array(data[start + first : start + last], entry["dtype"]).reshape(entry["shape"])
    return found


def restored(folder: Path) -> dict[str, np.ndarray]:
    """Tensor name, as the checkpoint has it -> float32 weights of an MLX folder, quantized or not."""
    stored, settings, found = arrays(folder), quantization(folder), {}
    for name, array in stored.items():
        base, _, part = name.rpartition(".")
        if part == "weight" and f"{base}.scales" in stored:
            own = settings.get(base)
            parts = array, stored[f"{base}.scales"], stored.get(f"{base}.biases")
            found[name] = matrix(*parts, **{**settings, **(own if isinstance(own, dict) else {})})
        elif part not in ("scales", "biases"):
            found[name] = array
    return found


def matrix(
    words: np.ndarray, scales: np.ndarray, biases: np.ndarray | None = None, *, bits: int, group_size: int,
    mode: str = "affine", **_: Any,
) -> np.ndarray:  # fmt: skip
    """The float32 matrix (out, in) behind packed words and the scales (and offsets) of its groups."""
    code = codes(words, bits)
    grouped = code.reshape(code.shape[0], -1, group_size)
    if mode == "affine":
        return (grouped * scales[..., None] + biases[..., None]).astype(np.float32).reshape(code.shape)
    if mode not in ELEMENT:
        raise LabkitError(f"Groups of mode {mode!r} are not read back here; expected affine, {', '.join(ELEMENT)}.")
    powers = mode != "nvfp4"
    scales = np.ldexp(np.float32(1), scales.astype(int) - 127) if powers else formats.decode(scales, "fp8_e4m3")
    return (formats.decode(grouped, ELEMENT[mode]) * scales[..., None]).astype(np.float32).reshape(code.shape)


def codes(words: np.ndarray, bits: int) -> np.ndarray:
    """Codes (out, in) uint8 of packed uint32 words (out, in * bits / 32), the first in the lowest bits."""
    words = np.ascontiguousarray(words, dtype="<u4")
    count = words.shape[1] * 32 // bits
    return np.stack([blocks.unpack(row.view(np.uint8), bits, count) for row in words])


def _array(data: bytes, dtype: str) -> np.ndarray:
    if dtype == "BF16":
        return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
    kinds = {"U32": "<u4", "U8": "u1", "F16": "<f2", "F32": "<f4"}
    if dtype not in kinds:
        raise LabkitError(f"Arrays of type {dtype} are not read back here; expected one of {', '.join([*kinds, 'BF16'])}.")
    found = np.frombuffer(data, kinds[dtype])
    return found.astype(np.float32) if dtype == "F16" else found

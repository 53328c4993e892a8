"""The block formats inside a GGUF file, byte for byte as llama.cpp writes them, from a map of their bits.

Each format is a table that says at which bits of the block every scale and every code lies. Packing scatters bits by
that table, unpacking gathers them, and `describe_block` reads it out loud so that a chart can draw the block.
Bit k of a block is bit k % 8 (least significant first) of byte k // 8. Reference: ggml-common.h and ggml-quants.c in
llama.cpp.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from labkit.blocks import Error, error, weights_of
from labkit.types import LabkitError

Bits = np.ndarray  # (fields, width) bit positions, least significant bit first


@dataclass(frozen=True)
class Layout:
    """Where everything lies in one block: `block` weights in `size` bytes."""

    name: str
    block: int
    size: int
    halves: dict[str, int]  # float16 fields -> first bit
    codes: Bits  # of the weights, in order of the weights
    offset: int = 0  # subtracted from a code
    scales: Bits | None = None  # of the small integer scales of a super-block
    mins: Bits | None = None
    scale_offset: int = 0
    trits: tuple[np.ndarray, np.ndarray] | None = field(default=None)  # TQ1_0: (byte, digit) of each weight

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.size / self.block


@dataclass(frozen=True)
class Packed:
    """A tensor in a GGUF block format: `data` is (..., bytes a row) uint8, exactly what the file holds."""

    scheme: str
    data: np.ndarray
    shape: tuple[int, ...]
    error: Error

    @property
    def stored_bytes(self) -> int:
        return self.data.size

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.data.size / int(np.prod(self.shape))

    def dequantize(self) -> np.ndarray:
        return dequantize(self.data, self.scheme)


def _run(first: np.ndarray | int, width: int) -> Bits:
    """Fields of adjacent bits: one row of positions for each first bit."""
    return np.atleast_1d(first)[:, None] + np.arange(width)


def _layouts() -> dict[str, Layout]:
    i, e = np.arange(32), np.arange(256)
    nibble = 8 * (i % 16) + 4 * (i // 16)  # weight i and i + 16 share a byte
    high = i[:, None]
    crumb = 8 * (32 * (e // 128) + e % 32) + 2 * (e % 128 // 32)  # four weights, 32 apart, share a byte
    half = 8 * (32 * (e // 64) + e % 32) + 4 * (e % 64 // 32)  # two weights, 32 apart, share a byte
    mask = 8 * (e % 32) + e // 32  # one bit a weight; the bits of a byte belong to weights 32 apart
    six_low = 8 * (64 * (e // 128) + e % 64) + 4 * (e % 128 // 64)
    j, k = np.arange(8), np.arange(16)
    # Twelve bytes hold eight 6-bit scales and eight 6-bit minima: four whole ones each, the others cut in 4 + 2 bits.
    def packed_six(row: int, nib: int) -> Bits:
        whole = _run(8 * (row + j[:4]), 6)
        cut = np.hstack([_run(8 * (8 + j[:4]) + nib, 4), _run(8 * (row + j[:4]) + 6, 2)])
        return np.vstack([whole, cut]) + 32

    three = np.hstack([_run(8 * (k % 8) + 4 * (k // 8), 4), _run(8 * (8 + k % 4) + 2 * (k // 4), 2)]) + 768
    k_head, sc, mn = {"d": 0, "dmin": 16}, packed_six(0, 0), packed_six(4, 4)
    trits = (
        np.concatenate([e[:160] % 32, 32 + e[:80] % 16, 48 + e[:16] % 4]),
        np.concatenate([e[:160] // 32, e[:80] // 16, e[:16] // 4]),
    )
    rows = (
        Layout("q8_0", 32, 34, {"d": 0}, _run(16 + 8 * i, 8), offset=0),
        Layout("q4_0", 32, 18, {"d": 0}, _run(16 + nibble, 4), offset=8),
        Layout("q4_1", 32, 20, {"d": 0, "m": 16}, _run(32 + nibble, 4)),
        Layout("q5_0", 32, 22, {"d": 0}, np.hstack([_run(48 + nibble, 4), 16 + high]), offset=16),
        Layout("q5_1", 32, 24, {"d": 0, "m": 16}, np.hstack([_run(64 + nibble, 4), 32 + high])),
        Layout("tq1_0", 256, 54, {"d": 416}, _run(8 * trits[0], 8), offset=1, trits=trits),
        Layout("tq2_0", 256, 66, {"d": 512}, _run(crumb, 2), offset=1),
        Layout("q2_k", 256, 84, {"d": 640, "dmin": 656}, _run(128 + crumb, 2), 0, _run(8 * k, 4), _run(8 * k + 4, 4)),
        # q3_k: a mask bit of 1 means "do not subtract 4", which is a third code bit and an offset of 4.
        Layout("q3_k", 256, 110, {"d": 864}, np.hstack([_run(256 + crumb, 2), mask[:, None]]), 4, three, None, 32),
        Layout("q4_k", 256, 144, k_head, _run(128 + half, 4), 0, sc, mn),
        Layout("q5_k", 256, 176, k_head, np.hstack([_run(384 + half, 4), 128 + mask[:, None]]), 0, sc, mn),
        Layout("q6_k", 256, 210, {"d": 1664}, np.hstack([_run(six_low, 4), _run(1024 + crumb, 2)]), 32,
               _run(1536 + 8 * k, 8)),
    )  # fmt: skip
    return {row.name: row for row in rows}


LAYOUTS = _layouts()
SIGNED = {"q8_0": "codes", "q6_k": "scales"}  # these eight-bit fields are two's complement


def layout(name: str) -> Layout:
    """The layout by GGUF type name, any case: "Q4_0", "q4_k" ..."""
    if name.lower() not in LAYOUTS:
        raise LabkitError(f"Unknown GGUF block format {name!r}; expected one of {', '.join(LAYOUTS)}.")
    return LAYOUTS[name.lower()]


def _gather(bits: np.ndarray, where: Bits, signed: bool = False) -> np.ndarray:
    """(n, block bits) and positions (f, w) -> integers (n, f)."""
    value = np.zeros((len(bits), len(where)), np.int32)
    for place, column in enumerate(where.T):  # over the bits of a code, not over blocks
        value |= np.take(bits, column, axis=1).astype(np.int32) << place
    return np.where(value > 127, value - 256, value) if signed else value


def _half(blocks: np.ndarray, first_bit: int) -> np.ndarray:
    """The float16 at a byte of every block, as float32 (n, 1)."""
    first = first_bit // 8
    return blocks[:, first : first + 2].copy().view("<f2").astype(np.float32)


def unpack(data: np.ndarray, name: str) -> dict[str, np.ndarray]:
    """The fields of every block: `codes` (n, block) with the offset taken off, `d`, `m`, `dmin`, `scales`, `mins`."""
    form, blocks = layout(name), _blocks(data, name)
    bits = np.unpackbits(blocks, axis=1, bitorder="little")
    fields = {key: _half(blocks, bit) for key, bit in form.halves.items()}
    if form.trits:
        byte, digit = form.trits
        shifted = (blocks[:, byte].astype(np.int32) * 3**digit) & 255  # a fraction of 256; times 3 gives the next digit
        fields["codes"] = (shifted * 3 >> 8) - form.offset
    else:
        fields["codes"] = _gather(bits, form.codes, SIGNED.get(form.name) == "codes") - form.offset
    if form.scales is not None:
        fields["scales"] = _gather(bits, form.scales, SIGNED.get(form.name) == "scales") - form.scale_offset
    if form.mins is not None:
        fields["mins"] = _gather(bits, form.mins)
    return fields


def _blocks(data: np.ndarray, name: str) -> np.ndarray:
    raw, size = np.ascontiguousarray(data, dtype=np.uint8), layout(name).size
    if raw.size % size:
        raise LabkitError(f"{raw.size} bytes are not whole {name} blocks; expected a multiple of {size} bytes.")
    return raw.reshape(-1, size)


def dequantize(data: np.ndarray, name: str) -> np.ndarray:
    """Bytes (..., row bytes) uint8 -> weights (..., row length) float32, in llama.cpp's order of operations."""
    form, raw = layout(name), np.asarray(data, dtype=np.uint8)
    part = unpack(raw, name)
    codes = part["codes"].astype(np.float32)
    if form.scales is None:
        weights = part["d"] * codes + part["m"] if "m" in part else part["d"] * codes
    else:
        codes = codes.reshape(len(codes), part["scales"].shape[1], -1)
        weights = (part["d"] * part["scales"].astype(np.float32))[..., None] * codes
        if form.mins is not None:
            weights = weights - (part["dmin"] * part["mins"].astype(np.float32))[..., None]
    return weights.reshape(*raw.shape[:-1], -1).astype(np.float32)


def quantize(weights: np.ndarray, name: str) -> Packed:
    """Weights (..., row length) -> the bytes llama.cpp's reference quantizer writes (its K-quants are decoded only).

    Refuses NaN and infinity, rows that are not whole blocks, and scales beyond float16 (65504), which no file can hold.
    """
    form, array = layout(name), weights_of(weights)
    if name.lower() not in _CODERS:
        raise LabkitError(f"{name} is only decoded here; expected one of {', '.join(_CODERS)}, or use labkit.build.")
    if array.shape[-1] % form.block:
        row = array.shape[-1]
        raise LabkitError(f"Rows of {row} weights are not whole {name} blocks of {form.block}; choose another format.")
    blocks = array.reshape(-1, form.block)
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        codes, halves = _CODERS[name.lower()](blocks)
    data = _pack(form, codes, halves).reshape(*array.shape[:-1], -1)
    return Packed(form.name, data, array.shape, error(array, dequantize(data, name)))


def _pack(form: Layout, codes: np.ndarray, halves: dict[str, np.ndarray]) -> np.ndarray:
    """Unsigned codes (n, block) and float16 fields -> blocks (n, size) uint8."""
    if form.trits:
        data = _pack_trits(form, codes)
    else:
        bits = np.zeros((len(codes), 8 * form.size), dtype=np.uint8)
        for place, column in enumerate(form.codes.T):  # over the bits of a code, not over blocks
            bits[:, column] = (codes >> place) & 1
        data = np.packbits(bits, axis=1, bitorder="little")
    for key, bit in form.halves.items():
        if not (np.abs(halves[key]) < 65520).all():  # from here on float16 rounds to infinity
            raise LabkitError(f"A block's {key} is beyond float16 (65504), so {form.name} cannot hold it; scale down.")
        data[:, bit // 8 : bit // 8 + 2] = halves[key].astype("<f2").view(np.uint8).reshape(-1, 2)
    return data


def _pack_trits(form: Layout, codes: np.ndarray) -> np.ndarray:
    """Five base-3 digits a byte, kept as a fraction of 256 (rounded up) so that decoding is multiply and shift."""
    byte, digit = form.trits
    data = np.zeros((len(codes), form.size), dtype=np.int32)
    for place in range(5):  # over digits, not blocks
        here = digit == place
        data[:, byte[here]] += codes[:, here].astype(np.int32) * 3 ** (4 - place)
    return ((data * 256 + 242) // 243).astype(np.uint8)


def _inverse(scale: np.ndarray) -> np.ndarray:
    """1 / scale; 0 where the block is empty or so small that the inverse overflows: such a block decodes to zeros."""
    inverse = np.float32(1) / scale
    return np.where(np.isfinite(inverse), inverse, np.float32(0))


def _away(x: np.ndarray) -> np.ndarray:
    """Round to nearest, halves away from zero, as C's roundf."""
    whole = np.trunc(x)
    return whole + np.trunc(2 * (x - whole))


def _by_peak(blocks: np.ndarray, bits: int):
    """Q4_0 and Q5_0: the weight of largest size lands exactly on the lowest code, -2^(bits-1)."""
    where = np.abs(blocks).argmax(axis=1)[:, None]
    d = np.take_along_axis(blocks, where, axis=1) / np.float32(-(2 ** (bits - 1)))
    codes = np.trunc(blocks * _inverse(d) + np.float32(2 ** (bits - 1) + 0.5))
    return np.clip(codes, 0, 2**bits - 1).astype(np.int32), {"d": d}


def _by_range(blocks: np.ndarray, bits: int):
    """Q4_1 and Q5_1: lowest and highest weight land on the first and last code."""
    low = blocks.min(axis=1, keepdims=True)
    d = (blocks.max(axis=1, keepdims=True) - low) / np.float32(2**bits - 1)
    codes = np.trunc((blocks - low) * _inverse(d) + np.float32(0.5))
    return np.clip(codes, 0, 2**bits - 1).astype(np.int32), {"d": d, "m": low}


def _by_size(blocks: np.ndarray, top: int, shift: int):
    """Q8_0 (top 127) and TQ (top 1): the largest size lands on the top code."""
    d = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(top)
    codes = np.clip(_away(blocks * _inverse(d)), -top, top)
    return codes.astype(np.int32) + shift, {"d": d}


_CODERS: dict[str, Callable] = {
    "q8_0": lambda b: _by_size(b, 127, 0),
    "q4_0": lambda b: _by_peak(b, 4),
    "q4_1": lambda b: _by_range(b, 4),
    "q5_0": lambda b: _by_peak(b, 5),
    "q5_1": lambda b: _by_range(b, 5),
    "tq1_0": lambda b: _by_size(b, 1, 1),
    "tq2_0": lambda b: _by_size(b, 1, 1),
}


@dataclass(frozen=True)
class Field:
    """One value inside a block: its name, its runs of bits (first, last; lowest run first), and what it says."""

    name: str
    bits: tuple[tuple[int, int], ...]
    value: float


def _runs(where: np.ndarray) -> tuple[tuple[int, int], ...]:
    cuts = np.flatnonzero(np.diff(where) != 1) + 1
    return tuple((int(run[0]), int(run[-1])) for run in np.split(where, cuts))


def describe_block(data: bytes | np.ndarray, name: str) -> list[Field]:
    """The fields of one block in bit order: float16 scales, small scales and minima, then one code a weight.

    In TQ1_0 five weights name the same eight bits: a byte holds one number in base 3.
    """
    form = layout(name)
    raw = np.frombuffer(bytes(data), dtype=np.uint8)
    if raw.size != form.size:
        raise LabkitError(f"{raw.size} bytes given; expected the {form.size} bytes of one {name} block.")
    part = unpack(raw, name)
    fields = [Field(key, ((bit, bit + 15),), float(part[key][0, 0])) for key, bit in form.halves.items()]
    tables = {"scale": ("scales", form.scales), "min": ("mins", form.mins), "q": ("codes", form.codes)}
    for label, (key, where) in tables.items():
        if where is not None:
            fields += [Field(f"{label}[{n}]", _runs(w), int(part[key][0, n])) for n, w in enumerate(where)]
    return sorted(fields, key=lambda f: f.bits[0][0])

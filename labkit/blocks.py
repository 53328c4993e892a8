"""Value quantizers in numpy: choose scales, round, pack, and report the error made. Weights may have any shape.

Every quantizer returns a frozen `Quantized`: integer codes, scales as they are stored, bytes, error. `per` says how
many weights share a scale: "tensor" (all), "channel" (a row along the last axis) or a number (a group within a row).
Byte-exact GGUF blocks live in gguf_blocks, number formats in formats. Nothing here loops over groups.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from labkit import formats
from labkit.types import LabkitError

# The 16 levels of NormalFloat4, from the QLoRA paper (Dettmers et al. 2023, appendix E).
NF4_LEVELS = np.array(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
     -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
     0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0], dtype=np.float32,
)  # fmt: skip
SCALE_BITS = {"f16": 16, "f32": 32}


@dataclass(frozen=True)
class Error:
    """How far restored weights are from the originals."""

    rmse: float  # root mean square, in units of the weights
    sqnr_db: float  # 10 log10(signal power / error power); infinite when exact
    max: float  # largest absolute difference


@dataclass(frozen=True)
class Quantized:
    """A quantized tensor. Restored weight = scale * (code - zero) + bias, or scale * levels[code] with a table."""

    scheme: str
    codes: np.ndarray  # integers, shape of the weights
    scales: np.ndarray  # (groups, 1) float32, as rounded for storage
    shape: tuple[int, ...]
    stored_bytes: int  # codes packed, scales, zero points: everything needed to restore
    error: Error
    zeros: np.ndarray | None = field(default=None)  # (groups, 1) integers
    bias: np.ndarray | None = field(default=None)  # (groups, 1) float32
    levels: np.ndarray | None = field(default=None)  # table of values, when codes are indices

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.stored_bytes / int(np.prod(self.shape))

    def dequantize(self) -> np.ndarray:
        """Restored weights, float32, in the original shape."""
        return _restore(self.codes, self.scales, self.zeros, self.bias, self.levels).reshape(self.shape)


def weights_of(weights: np.ndarray) -> np.ndarray:
    """The weights as float32, refusing what no quantizer can hold: nothing at all, NaN, infinity."""
    array = np.asarray(weights)
    if array.ndim == 0 or array.size == 0 or array.dtype.kind not in "fiu":
        raise LabkitError(f"Got shape {array.shape} of {array.dtype}; expected a non-empty array of real weights.")
    array = array.astype(np.float32, copy=False)
    if not np.isfinite(array).all():
        bad = int(array.size - np.isfinite(array).sum())
        raise LabkitError(f"{bad} of {array.size} weights are NaN or infinite; expected finite ones: check the source.")
    return array


def error(weights: np.ndarray, restored: np.ndarray) -> Error:
    """The error of `restored` against `weights`, in float64."""
    original = np.asarray(weights, dtype=np.float64)
    wrong = original - np.asarray(restored, dtype=np.float64)
    noise, signal = float(np.mean(wrong**2)), float(np.mean(original**2))
    sqnr = np.inf if noise == 0 else 10 * np.log10(signal / noise) if signal else -np.inf
    return Error(noise**0.5, float(sqnr), float(np.abs(wrong).max()))


def symmetric(weights: np.ndarray, bits: int = 8, per: str | int = "channel", clip: str | float = "minmax",
              scale: str = "f16") -> Quantized:  # fmt: skip
    """Signed codes from -top to top, top = 2^(bits-1) - 1, zero is exact; one bit means sign times mean size.

    `clip`: "minmax" keeps everything, a percentile such as 99.9 saturates the rest, "mse" searches for the least
    squared error.
    """
    array, groups = _grouped(weights, bits, per)
    if bits == 1:  # two levels: the least-squares scale is the mean size (XNOR-Net, Rastegari et al. 2016)
        scales = _stored(np.abs(groups).mean(axis=1, keepdims=True), scale)
        codes = np.where(groups < 0, -1, 1)
    else:
        top = 2 ** (bits - 1) - 1
        limit = _limit(groups, clip, lambda edge: _signed(groups, _stored(edge / top, scale), top))
        codes, scales = _signed(groups, _stored(limit / top, scale), top)
    return _record(f"int{bits} symmetric", array, codes, scales, bits, SCALE_BITS[scale])


def affine(weights: np.ndarray, bits: int = 8, per: str | int = "channel", clip: str | float = "minmax",
           scale: str = "f16", zero: str = "integer") -> Quantized:  # fmt: skip
    """Unsigned codes 0 .. 2^bits - 1 between the lowest and highest weight.

    zero="integer": weight = scale * (code - zero), the range is stretched so that 0 stays exact (ONNX, OpenVINO);
    zero="bias": weight = scale * code + lowest, the lowest kept as a float (GGUF's _1 formats);
    zero="edge": likewise, but from the end of larger size, and the scale adjusted so that 0 is exact (MLX).
    """
    if zero not in ("integer", "bias", "edge"):
        raise LabkitError(f"zero={zero!r} given; expected 'integer', 'bias' or 'edge'.")
    array, groups = _grouped(weights, bits, per)
    if clip == "mse":
        ratio = _limit(groups, clip, lambda r: _affine(groups, *_edges(groups, r), bits, scale, zero), ratios=True)
        low, high = _edges(groups, ratio)
    else:
        inside = 0.0 if clip == "minmax" else 100 - _percentile(clip)
        low, high = (np.percentile(groups, p, axis=1, keepdims=True).astype(np.float32) for p in (inside, 100 - inside))
    codes, scales, zeros, bias = _affine(groups, low, high, bits, scale, zero)
    extra = SCALE_BITS[scale] + (bits if zero == "integer" else SCALE_BITS[scale])
    return _record(f"int{bits} affine", array, codes, scales, bits, extra, zeros=zeros, bias=bias)


def ternary(weights: np.ndarray, scale_by: str = "absmean", per: str | int = "tensor", scale: str = "f16") -> Quantized:
    """Codes -1, 0, 1, five of them in a byte (1.6 bits a weight) plus scales.

    "absmean" divides by the mean size (BitNet b1.58, Ma et al. 2024, meant for training); "absmax" by the largest
    (TQ1_0, TQ2_0).
    """
    if scale_by not in ("absmean", "absmax"):
        raise LabkitError(f"scale_by={scale_by!r} given; expected 'absmean' or 'absmax'.")
    array, groups = _grouped(weights, 2, per)
    size = np.abs(groups)
    shared = size.mean(axis=1, keepdims=True) if scale_by == "absmean" else size.max(axis=1, keepdims=True)
    scales = _stored(shared, scale)
    codes, _ = _signed(groups, scales, 1)
    return _record(f"ternary {scale_by}", array, codes, scales, 8 / 5, SCALE_BITS[scale])


def nf4(weights: np.ndarray, group: int = 64, double: bool = False) -> Quantized:
    """NormalFloat4: the nearest of 16 published levels times the group's largest size, kept as float32.

    double=True stores those sizes, less their mean, as FP8 E4M3 in sets of 256 with one float32 scale each (the paper
    says only "8-bit float").
    """
    array, groups = _grouped(weights, 4, group)
    scales = np.abs(groups).max(axis=1, keepdims=True)
    scale_bytes = 4 * scales.size
    if double:
        scales, scale_bytes = _double(scales)
    middles = (NF4_LEVELS[1:] + NF4_LEVELS[:-1]) / 2
    codes = np.searchsorted(middles, _divided(groups, scales)).astype(np.uint8)
    name = "nf4 double" if double else "nf4"
    return _record(name, array, codes, scales, 4, 0, levels=NF4_LEVELS, more_bytes=scale_bytes)


def mxfp4(weights: np.ndarray) -> Quantized:
    """OCP MXFP4: 32 weights as E2M1 floats share one power of two (E8M0, 8 bits): 4.25 bits a weight."""
    array, groups = _grouped(weights, 4, 32)
    peak = np.abs(groups).max(axis=1, keepdims=True)
    power = np.where(peak > 0, np.frexp(peak)[1] - 1 - 2, -127)  # 2: the exponent of E2M1's largest power of two, 4
    scales = np.ldexp(np.float32(1), np.clip(power, -127, 127)).astype(np.float32)
    codes = formats.encode(groups / scales.astype(np.float64), "fp4_e2m1").astype(np.uint8)
    levels = formats.decode(np.arange(16), "fp4_e2m1")
    return _record("mxfp4", array, codes, scales, 4, 8, levels=levels)


def fp8(weights: np.ndarray, kind: str = "e4m3", per: str | int = "channel", scale: str = "f32") -> Quantized:
    """FP8 codes (kind "e4m3" or "e5m2") of weights scaled so that the largest meets the format's largest value."""
    if kind not in ("e4m3", "e5m2"):
        raise LabkitError(f"kind={kind!r} given; expected 'e4m3' or 'e5m2'.")
    array, groups = _grouped(weights, 8, per)
    top = formats.limits(f"fp8_{kind}")[1]
    scales = _stored(np.abs(groups).max(axis=1, keepdims=True) / np.float32(top), scale)
    codes = formats.encode(np.clip(_divided(groups, scales), -top, top), f"fp8_{kind}").astype(np.uint8)
    levels = np.nan_to_num(formats.decode(np.arange(256), f"fp8_{kind}"), posinf=0, neginf=0)
    return _record(f"fp8 {kind}", array, codes, scales, 8, SCALE_BITS[scale], levels=levels)


def cast(weights: np.ndarray, name: str) -> Quantized:
    """Plain rounding to a floating-point format, e.g. "bf16" or "fp16", with no scale at all."""
    array = weights_of(weights)
    codes = formats.encode(array, name)
    restored = formats.decode(codes, name)
    if not np.isfinite(restored).all():
        raise LabkitError(f"The largest weight, {np.abs(array).max():g}, is beyond {name}; scale the weights down.")
    scales = np.ones((1, 1), np.float32)
    size = _packed_size(array.size, formats.format(name).bits)
    return Quantized(name, restored, scales, array.shape, size, error(array, restored))


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Unsigned codes below 2^bits -> uint8, least significant bits first, no gaps: ceil(n * bits / 8) bytes."""
    flat = np.asarray(codes).ravel()
    if not 1 <= bits <= 8 or (flat.size and (flat.min() < 0 or flat.max() >= 2**bits)):
        raise LabkitError(f"Codes {flat.min()} to {flat.max()} do not fit; expected 0 to 2^{bits} - 1 and 1 to 8 bits.")
    spread = (flat[:, None].astype(np.uint8) >> np.arange(bits, dtype=np.uint8)) & 1
    return np.packbits(spread, bitorder="little")


def unpack(data: np.ndarray, bits: int, count: int) -> np.ndarray:
    """The first `count` codes (uint8) of bytes made by `pack`."""
    if not 1 <= bits <= 8 or 8 * np.size(data) < count * bits:
        need = _packed_size(count, bits)
        raise LabkitError(f"{np.size(data)} bytes given; expected at least {need} for {count} codes of {bits} bits.")
    spread = np.unpackbits(np.asarray(data, np.uint8), count=count * bits, bitorder="little").reshape(count, bits)
    return np.packbits(spread, axis=1, bitorder="little")[:, 0]


# ---- shared arithmetic: groups are always (groups, weights a group) ----


def _grouped(weights: np.ndarray, bits: int, per: str | int) -> tuple[np.ndarray, np.ndarray]:
    array = weights_of(weights)
    if not isinstance(bits, (int, np.integer)) or not 1 <= bits <= 8:
        raise LabkitError(f"bits={bits!r} given; expected a whole number from 1 to 8.")
    if per in ("tensor", "channel"):
        return array, array.reshape(1 if per == "tensor" else -1, array.size if per == "tensor" else array.shape[-1])
    if isinstance(per, str) or int(per) < 1:
        raise LabkitError(f"per={per!r} given; expected 'tensor', 'channel' or a group size such as 32.")
    if array.shape[-1] % int(per):
        raise LabkitError(f"Rows of {array.shape[-1]} weights are not whole groups of {per}; choose a divisor.")
    return array, array.reshape(-1, int(per))


def _stored(scales: np.ndarray, kind: str) -> np.ndarray:
    """Scales as they come back from storage: codes must be chosen with these, not with the unrounded ones."""
    if kind not in SCALE_BITS:
        raise LabkitError(f"scale={kind!r} given; expected 'f16' or 'f32'.")
    if kind == "f16" and np.abs(scales).max() > 65504:
        raise LabkitError(f"A scale of {np.abs(scales).max():g} is beyond float16 (65504); use scale='f32'.")
    return scales.astype(np.float16 if kind == "f16" else np.float32).astype(np.float32)


def _divided(groups: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """groups / scales, and 0 where the scale is 0: such a group restores to zeros."""
    return np.divide(groups, scales, out=np.zeros_like(groups), where=scales != 0)


def _signed(groups: np.ndarray, scales: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray]:
    return np.clip(np.rint(_divided(groups, scales)), -top, top).astype(np.int8), scales


def _affine(groups, low, high, bits, scale, zero):
    top = 2**bits - 1
    if zero == "integer":
        low, high = np.minimum(low, 0), np.maximum(high, 0)
    scales = (high - low) / np.float32(top)
    if zero == "edge":
        bias = np.where(-low > high, low, high)
        scales = np.where(-low > high, 1, -1) * np.maximum(scales, np.float32(1e-7))  # the smallest step MLX allows
        steps = np.rint(bias / scales)
        scales = np.where(steps == 0, scales, bias / np.where(steps == 0, 1, steps)).astype(np.float32)
        bias = np.where(steps == 0, np.float32(0), bias)
    scales = _stored(scales, scale)
    if zero != "integer":
        bias = _stored(low if zero == "bias" else bias, scale)
        return np.clip(np.rint(_divided(groups - bias, scales)), 0, top).astype(np.uint8), scales, None, bias
    zeros = np.clip(np.rint(_divided(-low, scales)), 0, top).astype(np.int32)
    return np.clip(np.rint(_divided(groups, scales)) + zeros, 0, top).astype(np.uint8), scales, zeros, None


def _restore(codes, scales, zeros=None, bias=None, levels=None) -> np.ndarray:
    values = levels[codes] if levels is not None else codes.astype(np.float32)
    values = values.reshape(len(scales), -1)
    if zeros is not None:
        values = values - zeros
    return (values * scales if bias is None else values * scales + bias).astype(np.float32)


def _percentile(clip: str | float) -> float:
    if isinstance(clip, str) or not 50 < float(clip) <= 100:
        raise LabkitError(f"clip={clip!r} given; expected 'minmax', 'mse' or a percentile above 50 and up to 100.")
    return float(clip)


def _limit(groups, clip, quantize, ratios: bool = False) -> np.ndarray:
    """The largest size (or, with `ratios`, the share of the range) that each group keeps, (groups, 1)."""
    peak = np.ones((len(groups), 1), np.float32) if ratios else np.abs(groups).max(axis=1, keepdims=True)
    if clip == "minmax":
        return peak
    if clip != "mse":
        return np.percentile(np.abs(groups), _percentile(clip), axis=1, keepdims=True).astype(np.float32)
    best, least = peak, np.full((len(groups), 1), np.inf)
    for ratio in np.linspace(1.0, 0.2, 41, dtype=np.float32):  # over candidates, never over groups
        wrong = ((_restore(*quantize(peak * ratio)) - groups) ** 2).sum(axis=1, keepdims=True)
        best, least = np.where(wrong < least, peak * ratio, best), np.minimum(wrong, least)
    return best


def _edges(groups: np.ndarray, ratio: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return groups.min(axis=1, keepdims=True) * ratio, groups.max(axis=1, keepdims=True) * ratio


def _double(scales: np.ndarray) -> tuple[np.ndarray, int]:
    """Scales after QLoRA's second quantization, and the bytes they take: one each, 4 per 256, 4 for the mean."""
    mean = scales.mean(dtype=np.float32)
    sets = np.zeros((-(-scales.size // 256), 256), np.float32)
    sets.ravel()[: scales.size] = scales.ravel() - mean
    second = fp8(sets, "e4m3", "channel")
    restored = np.maximum(second.dequantize().ravel()[: scales.size].reshape(-1, 1) + mean, 0)
    return restored.astype(np.float32), scales.size + 4 * len(sets) + 4


def _packed_size(count: int, bits: float) -> int:
    return int(np.ceil(count * bits / 8 - 1e-9))


def _record(scheme, array, codes, scales, bits, extra_bits, *, zeros=None, bias=None, levels=None, more_bytes=0):
    """`extra_bits` are stored a group, beside `bits` a weight and `more_bytes` a tensor."""
    size = _packed_size(array.size, bits) + _packed_size(len(scales), extra_bits) + more_bytes
    wrong = error(array, _restore(codes, scales, zeros, bias, levels).reshape(array.shape))
    return Quantized(scheme, codes.reshape(array.shape), scales, array.shape, size, wrong, zeros, bias, levels)

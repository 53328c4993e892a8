"""Number formats as bits: how a real number becomes sign, exponent and mantissa, and what range and step that buys.

Floating point here means IEEE 754 binary32/binary16, bfloat16, the OCP 8-bit formats E4M3 and E5M2 (OFP8, 2023) and the
OCP microscaling element E2M1 (MX v1.0, 2023). One rounding rule serves all: to nearest, ties to even.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from labkit.types import LabkitError


@dataclass(frozen=True)
class Format:
    """A number format. Floats have `exponent` and `mantissa` bits; fixed-point formats have neither."""

    name: str
    bits: float  # of storage a value; log2(3) for ternary
    exponent: int = 0
    mantissa: int = 0
    top: int = 0  # code of the largest finite float
    infinite: bool = False  # overflow becomes infinity, else it saturates

    @property
    def is_float(self) -> bool:
        return self.exponent > 0

    @property
    def bias(self) -> int:
        return 2 ** (self.exponent - 1) - 1


def _ieee(name: str, exponent: int, mantissa: int) -> Format:
    top = ((2**exponent - 1) << mantissa) - 1  # the all-ones exponent is kept for infinity and NaN
    return Format(name, 1 + exponent + mantissa, exponent, mantissa, top, True)


FORMATS = {
    f.name: f
    for f in (
        _ieee("fp32", 8, 23),
        _ieee("bf16", 8, 7),
        _ieee("fp16", 5, 10),
        _ieee("fp8_e5m2", 5, 2),
        Format("fp8_e4m3", 8, 4, 3, 0x7E),  # no infinity; only the all-ones code is NaN
        Format("fp4_e2m1", 4, 2, 1, 0x7),  # neither infinity nor NaN
        Format("int8", 8),
        Format("int4", 4),
        Format("int2", 2),
        Format("ternary", float(np.log2(3))),
    )
}


def format(name: str) -> Format:
    """The format by name, e.g. "fp16", "fp8_e4m3", "int4", "ternary"."""
    if name not in FORMATS:
        raise LabkitError(f"Unknown number format {name!r}; expected one of {', '.join(FORMATS)}.")
    return FORMATS[name]


def _float_format(name: str) -> Format:
    if not format(name).is_float:
        raise LabkitError(f"{name!r} is a fixed-point format; expected a floating-point one such as 'fp16'.")
    return FORMATS[name]


def encode(values: np.ndarray, name: str) -> np.ndarray:
    """Codes (uint32, same shape) of real numbers in a floating-point format; ties go to even.

    Too large: infinity where the format has one, else the largest finite value (the OCP saturating mode).
    NaN keeps being NaN, and is an error in E2M1, which has none.
    """
    f, x = _float_format(name), np.asarray(values, dtype=np.float64)
    if f.name == "fp4_e2m1" and np.isnan(x).any():
        raise LabkitError("fp4_e2m1 has no code for NaN; remove the NaN values first.")
    size = np.abs(np.where(np.isfinite(x), x, 0.0))
    lowest = 1 - f.bias  # subnormals and zero share the exponent of the smallest normal number
    power = np.where(size > 0, np.maximum(np.frexp(size)[1] - 1, lowest), lowest)  # floor(log2)
    steps = np.rint(np.ldexp(size, f.mantissa - power))  # np.rint rounds ties to even
    # A mantissa that rounds up to the next power of two carries into the exponent by this very sum.
    code = ((power + f.bias - 1).astype(np.int64) << f.mantissa) + steps.astype(np.int64)
    code = np.where((code > f.top) | np.isinf(x), f.top + f.infinite, code)
    code = np.where(np.isnan(x), 2 ** (f.exponent + f.mantissa) - 1, code)
    return (code | (np.signbit(x).astype(np.int64) << (f.exponent + f.mantissa))).astype(np.uint32)


def decode(codes: np.ndarray, name: str) -> np.ndarray:
    """Real numbers (float32, same shape) behind the codes of a floating-point format."""
    f, code = _float_format(name), np.asarray(codes, dtype=np.int64)
    size = code & (2 ** (f.exponent + f.mantissa) - 1)
    exponent, mantissa = size >> f.mantissa, size & (2**f.mantissa - 1)
    hidden = np.where(exponent > 0, 2**f.mantissa, 0)
    value = np.ldexp((mantissa + hidden).astype(np.float64), np.maximum(exponent, 1) - f.bias - f.mantissa)
    value = np.where(size > f.top, np.nan, value)
    if f.infinite:
        value = np.where(size == f.top + 1, np.inf, value)
    return np.where(code >> (f.exponent + f.mantissa) & 1, -value, value).astype(np.float32)


def rounded(values: np.ndarray, name: str) -> np.ndarray:
    """The nearest values the format can hold (float32, same shape)."""
    return decode(encode(values, name), name)


def bit_fields(value: float, name: str) -> list[tuple[str, str]]:
    """(field, bits) from the most significant bit on: sign, exponent, mantissa; or sign and magnitude of an integer.

    Integers are shown in two's complement, as processors store them.
    >>> bit_fields(1.5, "fp8_e4m3")
    [('sign', '0'), ('exponent', '0111'), ('mantissa', '100')]
    """
    f = format(name)
    if f.name == "ternary":
        raise LabkitError("A ternary value has no bits of its own: five of them share a byte, see gguf_blocks 'tq1_0'.")
    if not f.is_float:
        low, high = limits(name)
        if value != int(value) or not low <= value <= high:
            raise LabkitError(f"{value} is not a value of {name}; expected a whole number from {low:g} to {high:g}.")
        text = np.binary_repr(int(value), int(f.bits))
        return [("sign", text[0]), ("integer", text[1:])]
    text = np.binary_repr(int(encode(np.array(value), name)), int(f.bits))
    return [("sign", text[0]), ("exponent", text[1 : 1 + f.exponent]), ("mantissa", text[1 + f.exponent :])]


def limits(name: str) -> tuple[float, float]:
    """Lowest and highest finite value, before any scale."""
    f = format(name)
    if f.name == "ternary":
        return -1.0, 1.0
    if f.is_float:
        high = float(decode(np.array(f.top), name))
        return -high, high
    return -float(2 ** (f.bits - 1)), float(2 ** (f.bits - 1) - 1)


def facts(name: str) -> dict[str, float | str]:
    """Range and step of a format: storage bits, finite values, largest, smallest above zero, step next to 1."""
    f, (_, high) = format(name), limits(name)
    if f.is_float:
        count, tiny, step = 2 * f.top + 1, float(decode(np.array(1), name)), 2.0**-f.mantissa
    else:
        count, tiny, step = 3 if f.name == "ternary" else int(2**f.bits), 1.0, 1.0
    return {"format": name, "bits": f.bits, "values": count, "largest": high, "smallest": tiny, "step at 1": step}


def values(name: str) -> np.ndarray:
    """Every finite value of a format of at most 8 bits, ascending and without doubles: what a number line can show."""
    f = format(name)
    if f.bits > 8:
        raise LabkitError(f"{name} has about {2 ** f.bits:.0f} values; expected a format of at most 8 bits to list.")
    if not f.is_float:
        low, high = limits(name)
        return np.arange(low, high + 1, dtype=np.float32)
    positive = decode(np.arange(f.top + 1), name)
    return np.unique(np.concatenate([-positive, positive]) + 0.0)

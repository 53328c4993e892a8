"""Lab module04/01, number formats and quantizers: each answer is judged against labkit's own blocks."""

from __future__ import annotations

from typing import Any

import numpy as np

from labkit import blocks, formats, gguf_blocks
from labkit.course.compare import NotStarted, NotYet, close, function, same, unfinished
from labkit.course.exercises import exercise
from labkit.i18n import noop, tr


def _weights(seed: int, shape: tuple[int, int] = (4, 64)) -> np.ndarray:
    return (np.random.default_rng(seed).standard_t(4, size=shape) * 0.05).astype(np.float32)


def _parts(got: Any, expected: tuple, *, what: str, names: tuple[str, ...]) -> None:
    """Compare a tuple of results one by one, by name."""
    if got is None or got is ...:
        raise NotStarted
    if not isinstance(got, tuple) or len(got) != len(expected):
        kind, wanted = type(got).__name__, ", ".join(map(tr, names))
        raise NotYet(tr("{what}: expected a tuple ({names}), got {kind}", what=what, names=wanted, kind=kind))
    unfinished(list(got))
    for name, mine, theirs in zip(names, got, expected, strict=True):
        close(np.squeeze(mine), np.squeeze(theirs), rel=1e-5, abs=1e-9, what=tr("{part} of {whole}", part=tr(name), whole=what))


@exercise(
    "04.1.1",
    "Decode a byte of FP8 E4M3",
    hints=(
        "One sign bit, four exponent bits, three mantissa bits: shift right, then keep the low bits with &.",
        "The exponent's bias is 7, and a hidden 1 stands before the mantissa: 1 + mantissa / 8.",
        "Exponent 0 is special: no hidden 1, and the power is that of exponent 1, which is 2 ** -6.",
    ),
)
def _(answer: Any) -> None:
    bytes_ = [0x38, 0x3C, 0xB8, 0x7E, 0x08, 0x07, 0x01, 0x00, 0x81]
    function(answer, lambda byte: float(formats.decode(np.array(byte), "fp8_e4m3")), [(b,) for b in bytes_])


@exercise(
    "04.1.2",
    "Symmetric quantization, one scale a tensor",
    hints=(
        "The largest code is top = 2 ** (bits - 1) - 1.",
        "The scale is the largest size among the weights divided by top.",
        "codes = np.clip(np.rint(w / scale), -top, top)",
    ),
)
def _(answer: Any) -> None:
    def reference(w: np.ndarray, bits: int) -> tuple:
        made = blocks.symmetric(w, bits, per="tensor", scale="f32")
        return made.codes, made.scales

    cases = [(_weights(seed), bits) for seed, bits in ((1, 8), (2, 4), (3, 3), (4, 2))]
    function(answer, reference, cases, compare=_codes_and_scale)


def _codes_and_scale(got: Any, expected: tuple, *, what: str) -> None:
    _parts(got, expected, what=what, names=(noop("codes"), noop("scale")))


@exercise(
    "04.1.3",
    "Affine quantization with a zero point",
    hints=(
        "Stretch the range to hold zero first: low = min(w.min(), 0), high = max(w.max(), 0).",
        "The scale is (high - low) / (2 ** bits - 1), the zero point np.rint(-low / scale).",
        "codes = np.clip(np.rint(w / scale) + zero, 0, 2 ** bits - 1)",
    ),
)
def _(answer: Any) -> None:
    def reference(w: np.ndarray, bits: int) -> tuple:
        made = blocks.affine(w, bits, per="tensor", scale="f32")
        return made.codes, made.scales, made.zeros

    cases = [(_weights(5), 8), (np.abs(_weights(6)), 4), (_weights(7) + np.float32(0.1), 3)]
    function(answer, reference, cases, compare=_codes_scale_zero)


def _codes_scale_zero(got: Any, expected: tuple, *, what: str) -> None:
    _parts(got, expected, what=what, names=(noop("codes"), noop("scale"), noop("zero point")))


@exercise(
    "04.1.4",
    "One scale for each group",
    hints=(
        "View the matrix as groups: w.reshape(-1, group).",
        "Take the largest size along axis 1 with keepdims=True, so that it divides every row of the view.",
        "Restore with codes * scales and reshape back to w.shape.",
    ),
)
def _(answer: Any) -> None:
    def reference(w: np.ndarray, bits: int, group: int) -> np.ndarray:
        return blocks.symmetric(w, bits, per=group, scale="f32").dequantize()

    cases = [(_weights(8), 4, 32), (_weights(9), 3, 16), (_weights(10), 8, 64)]
    function(answer, reference, cases, rel=1e-5, abs=1e-7)


@exercise(
    "04.1.5",
    "Effective bits per weight",
    hints=(
        "A group stores group * bits bits of codes, and once a scale and perhaps a minimum or zero point.",
        "Divide what is stored a group by the weights a group.",
    ),
)
def _(answer: Any) -> None:
    cases = [(4, 32, 16, 0), (4, 32, 16, 16), (5, 32, 16, 16), (8, 32, 16, 0), (4, 128, 16, 4), (4, 32, 8, 0)]
    function(answer, lambda bits, group, scale_bits, other_bits: bits + (scale_bits + other_bits) / group, cases)


@exercise(
    "04.1.6",
    "A matrix product in integers",
    hints=(
        "Widen both sets of codes to int32 before the product: sums of products do not fit int8 or int16.",
        "x_codes is (tokens, inputs) and w_codes (outputs, inputs): the product is x_codes @ w_codes.T.",
        "x_scales is (tokens, 1); w_scales is (outputs, 1) and must be turned to multiply the columns.",
    ),
)
def _(answer: Any) -> None:
    def reference(x_codes: np.ndarray, x_scales: np.ndarray, w_codes: np.ndarray, w_scales: np.ndarray) -> np.ndarray:
        return (x_codes.astype(np.int32) @ w_codes.astype(np.int32).T) * x_scales * w_scales.T

    cases = []
    for seed, inputs in ((11, 64), (12, 512)):
        x = blocks.symmetric(_weights(seed, (5, inputs)), 8, scale="f32")
        w = blocks.symmetric(_weights(seed + 50, (7, inputs)), 8, scale="f32")
        cases.append((x.codes, x.scales, w.codes, w.scales))
    function(answer, reference, cases, rel=1e-5, abs=1e-9)


@exercise(
    "04.1.7",
    "Ternary by the mean size",
    hints=(
        "The scale is the mean of the sizes, not the largest: np.abs(w).mean().",
        "codes = np.clip(np.rint(w / scale), -1, 1)",
    ),
)
def _(answer: Any) -> None:
    def reference(w: np.ndarray) -> tuple:
        made = blocks.ternary(w, scale="f32")
        return made.codes, made.scales

    function(answer, reference, [(_weights(seed),) for seed in (13, 14)], compare=_codes_and_scale)


@exercise(
    "04.1.8",
    "Decode a Q4_1 block by hand",
    hints=(
        'Twenty bytes: float16 d, float16 m, sixteen bytes of codes. struct.unpack("<2e", block[:4]) reads d and m.',
        "Weight i is the low nibble of byte i, weight i + 16 its high nibble: & 15 and >> 4.",
        "weight = d * code + m; there is no offset of 8 here.",
    ),
)
def _(answer: Any) -> None:
    cases = [(gguf_blocks.quantize(_weights(seed, (1, 32)), "q4_1").data.tobytes(),) for seed in (15, 16)]

    def reference(block: bytes) -> np.ndarray:
        return gguf_blocks.dequantize(np.frombuffer(block, np.uint8), "q4_1")

    function(answer, reference, cases, rel=1e-3, abs=1e-5)


@exercise(
    "04.1.9",
    "Choose a precision by memory and bandwidth",
    hints=(
        "A precision fits when weights * bits / 8 is at most the memory allowed.",
        "Each token reads all weights once, so tokens per second are at most bandwidth / bytes.",
        'Of those that pass both tests, the one with most bits; the word "none" when there is none.',
    ),
)
def _(answer: Any) -> None:
    def reference(weights: float, memory: float, bandwidth: float, tokens_per_second: float, ladder: dict) -> str:
        size = {name: weights * bits / 8 for name, bits in ladder.items()}
        good = [n for n, b in size.items() if b <= memory and bandwidth / b >= tokens_per_second]
        return max(good, key=ladder.get) if good else "none"

    ladder = {"f16": 16.0, "q8_0": 8.5, "q4_k_m": 4.85, "q2_k": 3.16}
    cases = [
        (1e9, 8e9, 50e9, 10, ladder),
        (4e9, 3e9, 50e9, 10, ladder),
        (4e9, 8e9, 30e9, 10, ladder),
        (4e9, 2e9, 10e9, 5, ladder),
        (9e9, 2e9, 50e9, 10, ladder),
    ]
    function(answer, reference, cases, compare=_choice)


def _choice(got: Any, expected: str, *, what: str) -> None:
    same(got, expected, what)

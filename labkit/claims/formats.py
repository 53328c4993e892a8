"""Claims about number formats: bits per weight from the blocks' own layout, scales from the ranges they cover."""

from __future__ import annotations

from functools import cache, partial
from math import log2

from labkit.claims import Found, computed

BLOCK = {"q4_0": 4, "q5_1": 5, "q8_0": 8, "q2_k": 2}  # nominal bits, as the chapters count


@cache
def bits(name: str) -> float:
    """Bits per weight of a GGUF block type, from the table of the `gguf` package."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[name.upper()]]
    return 8 * size / block


def _width(name: str, stated: float) -> Found:
    return Found(f"{bits(name):g} bits per weight, scales included", bits(name) == stated)


for _id, _name, _stated in (
    ("C011", "q4_0", 4), ("C012", "q5_1", 5), ("C013", "q8_0", 8), ("C087", "q8_0", 8), ("C088", "q4_0", 4), ("C089", "q2_k", 2),
    ("C090", "f16", 16),
):  # fmt: skip
    computed(_id)(partial(_width, _name, _stated))


def _reduction(name: str, stated: float) -> Found:
    half, full = 1 - bits(name) / 16, 1 - bits(name) / 32
    return Found(f"{half:.1%} against 16 bits, {full:.1%} against 32", abs(half - stated) < 0.01)


for _id, _name, _stated in (
    ("C023", "q4_0", 0.737), ("C024", "q8_0", 0.487), ("C079", "q4_0", 0.75), ("C080", "q5_1", 0.70), ("C081", "q8_0", 0.50),
):  # fmt: skip
    computed(_id)(partial(_reduction, _name, _stated))


@computed("C003")
def ternary_states() -> Found:
    return Found(
        f"three states are log2(3) = {log2(3):.3f} bits; packed they take {bits('tq1_0')} (TQ1_0) or {bits('tq2_0')} (TQ2_0)",
        False,
    )


@computed("C062")
def every_width() -> Found:
    import numpy as np

    from labkit.blocks import symmetric, ternary

    rows = np.random.default_rng(0).normal(size=(64, 256)).astype(np.float32)
    widths = {1.58: ternary(rows).error.sqnr_db, **{n: symmetric(rows, n, 32).error.sqnr_db for n in range(2, 9)}}
    said = ", ".join(f"{n:g}: {db:.0f}" for n, db in widths.items())
    rising = list(widths.values())[1:]
    return Found(f"signal to noise in dB by bits, on random weights: {said}", rising == sorted(rising))


@computed("C082")
def q8_share() -> Found:
    return Found(f"{bits('q8_0') / 16:.1%} of 16 bits", abs(bits("q8_0") / 16 - 0.5) < 0.01)


@computed("C086", "C176")
def widths() -> Found:
    from gguf.constants import GGMLQuantizationType

    known = [
        n
        for n in GGMLQuantizationType.__members__
        if n.startswith(("Q", "IQ", "TQ")) and not n.startswith("Q8_1") and n != "Q8_K"
    ]
    low, high = min(known, key=bits), max(known, key=bits)
    return Found(
        f"{len(known)} block types, from {low} with {bits(low):g} to {high} with {bits(high):g} bits",
        bits(low) <= 1.5625 < 8 <= bits(high),
    )


@computed("C096")
def olive_reduction() -> Found:
    eight, four = 8 + 32 / 128, 4 + 16 / 32
    return Found(
        f"weights of matrices: INT8 {1 - eight / 32:.0%} and INT4 {1 - four / 32:.0%} against float32, {1 - eight / 16:.0%} and "
        f"{1 - four / 16:.0%} against 16 bits",
        None,
    )


@computed("C104")
def group_size() -> Found:
    import numpy as np

    from labkit.blocks import symmetric

    rows = np.random.default_rng(0).standard_t(4, size=(64, 512)).astype(np.float32)  # tails as weights have them
    made = {group: symmetric(rows, 4, group) for group in (32, 64, 128, "channel")}
    said = ", ".join(
        f"{group}: {one.bits_per_weight:.2f} bits, signal to noise {one.error.sqnr_db:.1f} dB" for group, one in made.items()
    )
    return Found(f"4 bits by group on heavy-tailed weights: {said}", None)


@computed("C131")
def relu_encoding() -> Found:
    return Found(f"6 / 255 = {6 / 255:.6f}", round(6 / 255, 6) == 0.023529)


@computed("C132")
def weight_encoding() -> Found:
    scale, zero = 5 / 255, 2.5 / (5 / 255)
    return Found(f"5 / 255 = {scale:.6f}, but the zero point would be {zero:g}: the grid cannot hold both ends", zero == 127)


@computed("C133")
def bias_width() -> Found:
    return Found(
        "a bias is added to sums of int8 products: 255 x 127 x 4,096 terms need 28 bits, so 32", 2**31 > 255 * 127 * 4096
    )


@computed("C137", "C164")
def int4_reduction() -> Found:
    bare, real = 1 - 4 / 16, 1 - (4 + 16 / 32) / 16
    return Found(
        f"{bare:.1%} against 16 bits without scales, {real:.1%} with one 16-bit scale a block of 32", abs(real - 0.75) < 0.01
    )


@computed("C165", "C172")
def half_size() -> Found:
    return Found("16 / 32 = 0.5 against float32; 1.0 against the 16 bits in which small models are published", True)


@computed("C166")
def int8_factor() -> Found:
    return Found(f"8 / 32 = 0.25 without scales, {bits('q8_0') / 32:.4f} as Q8_0", abs(bits("q8_0") / 32 - 0.25) < 0.01)


@computed("C167")
def int4_factor() -> Found:
    sizes = {block: (4 + 32 / block) / 32 for block in (32, 128)}
    return Found(
        ", ".join(f"block {block}: {factor:.4f}" for block, factor in sizes.items()) + " of float32",
        all(abs(f - 0.125) < 0.01 for f in sizes.values()),
    )


@computed("C169")
def olive_block() -> Found:
    return Found(f"block 128 with a float32 scale and a 4-bit zero point: {4 + 32 / 128 + 4 / 128:.2f} bits per weight", True)


def _ratio(group: int) -> Found:
    four, eight = 4 + 16 / group, 8 + 16 / 512
    return Found(f"0.6 x {four:g} + 0.4 x {eight:.2f} = {0.6 * four + 0.4 * eight:.2f} bits per weight", None)


computed("C181")(partial(_ratio, 128))
computed("C182")(partial(_ratio, 64))


@computed("C184", "C126")
def mlx_default() -> Found:
    return Found(f"4 bits with a 16-bit scale and offset for every 64 weights: {4 + 32 / 64:g} bits per weight", True)


@computed("C103")
def ratio_is_a_share() -> Found:
    bits = 0.8 * (4 + 16 / 128) + 0.2 * (8 + 16 / 512)
    return Found(f"the share of weights in 4 bits: 0.8 x 4.125 + 0.2 x 8.03 = {bits:.2f} bits, {bits / 16:.2f} of the 16-bit size", False)


@computed("C068")
def openvino_sizes() -> Found:
    eight, four = 1 - (8 + 16 / 512) / 16, 1 - (4 + 16 / 128) / 16
    return Found(f"against 16 bits: INT8 with a scale a channel {eight:.1%}, INT4 with one for every 128 weights {four:.1%}", True)


@computed("C075")
def full_precision() -> Found:
    from labkit.checkpoint import checkpoint

    kinds = {view.dtype for view in checkpoint("edgehome").tensors().values()}
    said = ", ".join(sorted(kinds))
    return Found(f"the model in this package is published as {said}, as most are: against float32 a ratio is twice as large", kinds == {"F32"})

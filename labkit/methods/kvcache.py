"""KV-cache quantization: keys with one scale a channel, values with one scale a token.

KIVI (Liu et al. 2024, arXiv 2402.02750). Where keys have a few channels that are loud at all positions, a scale shared along
positions keeps each of them to itself; values rarely have any. Keys and values are (K, T, D): K heads, T positions, D
channels, keys after their rotation by position. A scale covers `group` values: of one channel for keys, which therefore wait
in full precision until their group is full, and of one position for values. Rounding is `blocks.affine(zero="bias")`.
"""

from __future__ import annotations

import numpy as np

from labkit import blocks
from labkit.types import LabkitError


def by_token(x: np.ndarray, bits: int, group: int = 32) -> np.ndarray:
    """Restored x (K, T, D) after rounding in groups of `group` channels within a position."""
    return blocks.affine(x, bits, per=min(group, x.shape[-1]), zero="bias").dequantize()


def by_channel(x: np.ndarray, bits: int, group: int = 32) -> np.ndarray:
    """Restored x (K, T, D) after rounding in groups of `group` positions within a channel; the last T mod group stay."""
    whole = x.shape[1] // group * group
    if not whole:
        return x
    turned = np.ascontiguousarray(x[:, :whole].swapaxes(1, 2))  # (K, D, whole): a channel's positions in a row
    restored = blocks.affine(turned, bits, per=group, zero="bias").dequantize().swapaxes(1, 2)
    return np.concatenate([restored, x[:, whole:]], axis=1)


def bits_per_value(bits: int, group: int = 32) -> float:
    """Bits a cached value takes: the code, and a float16 scale and lowest value a group."""
    return bits + 2 * blocks.SCALE_BITS["f16"] / group


def cache(key_bits: int, value_bits: int, group: int = 32, keys_by: str = "channel"):
    """A hook for `forward.Llama.with_(cache=…)`: (layer, keys, values) -> what attention reads back.

    All positions of a text are rounded at once, also those that a running engine would still hold in full precision, so
    its loss is if anything overstated.
    """
    rules = {"channel": by_channel, "token": by_token}
    if keys_by not in rules:
        raise LabkitError(f"keys_by={keys_by!r} given; expected 'channel' or 'token'.")

    def hook(layer: int, keys: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return rules[keys_by](keys, key_bits, group), by_token(values, value_bits, group)

    return hook

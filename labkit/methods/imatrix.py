"""Importance-weighted rounding: a weight that meets large inputs is rounded with more care than one that meets none.

The idea of llama.cpp's importance matrix (llama.cpp, pull request 4861) for its grids with a scale s and a lowest value m
a group. GPTQ's curvature with its diagonal only, h_j = mean of x_j², turns the output error into a weighted sum:

    minimise  Σ_j h_j (s c_j + m - w_j)²  over s, m and codes c_j

Each candidate scale gives codes; for these codes s and m are a weighted straight-line fit; the best candidate is kept.
"""

from __future__ import annotations

import numpy as np

from labkit import blocks
from labkit.methods._grid import checked, nearest, steps, stored


def importance(inputs: np.ndarray) -> np.ndarray:
    """h (in,) float32: the mean squared input of every column of X (n, in)."""
    return np.mean(np.square(inputs, dtype=np.float32), axis=0)


def quantize(weights: np.ndarray, inputs: np.ndarray, bits: int = 4, group: int = 64, *, scale: str = "f16",
             candidates: int = 24) -> blocks.Quantized:  # fmt: skip
    """W (out, in) and X (n, in) -> Quantized with a scale and a bias a group, chosen for the weighted error."""
    weights, inputs = checked(weights, inputs, bits, group)
    groups, top = weights.reshape(-1, group), 2**bits - 1
    h = np.tile(importance(inputs).reshape(-1, group), (len(weights), 1))  # (groups, group), as the weights
    h = np.maximum(h, 1e-8 * h.max(initial=1e-30))  # columns never used still need some code
    low, high = groups.min(axis=1, keepdims=True), groups.max(axis=1, keepdims=True)
    best, least = (low, low), np.full((len(groups), 1), np.inf)
    for stretch in np.linspace(0.7, 1.1, candidates, dtype=np.float32):  # over candidates, never over groups
        bias, scales = low, stored((high - low) * stretch / top, scale)
        for _ in range(2):  # fit, then again with the codes that suit the fit
            codes = np.clip(np.rint(steps(groups, scales, bias)), 0, top)
            scales, bias = (stored(part, scale) for part in _line(codes, groups, h))
        codes = np.clip(np.rint(steps(groups, scales, bias)), 0, top)
        wrong = (h * (scales * codes + bias - groups) ** 2).sum(axis=1, keepdims=True)
        best = tuple(np.where(wrong < least, new, old) for new, old in zip((scales, bias), best, strict=True))
        least = np.minimum(wrong, least)
    return nearest(weights, *best, bits, f"imatrix int{bits}", scale)


def _line(codes: np.ndarray, groups: np.ndarray, h: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The weighted least-squares line groups = slope * codes + offset, one a row: two (groups, 1) arrays."""
    total = h.sum(axis=1, keepdims=True)
    mean_code, mean = ((h * part).sum(axis=1, keepdims=True) / total for part in (codes, groups))
    spread = (h * (codes - mean_code) ** 2).sum(axis=1, keepdims=True)
    shared = (h * (codes - mean_code) * (groups - mean)).sum(axis=1, keepdims=True)
    slope = np.divide(shared, spread, out=np.zeros_like(spread), where=spread > 0)
    return slope, mean - slope * mean_code

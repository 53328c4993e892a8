"""Half-quadratic quantization (HQQ): choose zero points so that errors are few and large rather than many; no data needed.

Badri and Shaji 2023, mobiusml.github.io/hqq_blog. Minimise Σ |w - s (c - z)|^p with p < 1, which forgives outliers. Scales
s stay those of the smallest and largest weight of a group. An extra variable e takes the outliers, and two steps with
known answers alternate, b growing a little each time:

    e <- shrink(w - s (c - z))        shrink(x) = sign(x) max(0, |x| - |x|^(p-1) / b)
    z <- mean over the group of  c - (w - e) / s

Errors below b^(-1 / (2 - p)), 0.17 for the defaults, shrink to 0. A model's weights are mostly smaller than that: then e stays
0 and z is the least-squares answer for its codes.
"""

from __future__ import annotations

import numpy as np

from labkit import blocks
from labkit.methods._grid import checked, nearest


def quantize(weights: np.ndarray, bits: int = 4, group: int = 64, *, p: float = 0.7, b: float = 10.0, growth: float = 1.01,
             rounds: int = 20, scale: str = "f16") -> blocks.Quantized:  # fmt: skip
    """W (out, in) -> Quantized with a scale s and a bias -s z a group: z is a real number here, not an integer.

    Stops before `rounds` when the mean absolute error of the whole matrix no longer falls.
    """
    weights, _ = checked(weights, weights, bits, group)
    groups, top = weights.reshape(-1, group), 2**bits - 1
    low, high = groups.min(axis=1, keepdims=True), groups.max(axis=1, keepdims=True)
    per_step = np.minimum(top / np.where(high > low, high - low, top), 2e4).astype(np.float32)  # 1 / s
    zeros, least = np.rint(-low * per_step), np.inf
    for _ in range(rounds):
        codes = np.clip(np.rint(groups * per_step + zeros), 0, top)
        wrong = groups - (codes - zeros) / per_step
        zeros = np.mean(codes - (groups - shrink(wrong, b, p)) * per_step, axis=1, keepdims=True)
        b *= growth
        error = float(np.abs(wrong).mean())
        if error >= least:
            break
        least = error
    return nearest(weights, 1 / per_step, -zeros / per_step, bits, f"hqq int{bits}", scale)


def shrink(x: np.ndarray, b: float, p: float) -> np.ndarray:
    """Small values become 0, large ones stay nearly as they are: the step that takes outliers out of the fit."""
    size = np.abs(x)
    return np.sign(x) * np.maximum(0, size - (size + np.float32(1e-8)) ** np.float32(p - 1) / np.float32(b))

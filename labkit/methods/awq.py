"""AWQ: columns that meet large inputs are stretched before rounding, so their steps become finer, and shrunk afterwards.

Lin et al. 2023, arXiv 2306.00978. With one factor a column, X W' = (X / s) (W s)': the function does not change, but the
rounding of W s does. The factors follow the mean size of the inputs, and one exponent is searched for:

    s = size^r / sqrt(max size^r · min size^r)        r in 0, 1/20, … 19/20 with the least ||X W' - (X / s) Q(W s)'||²

The division by s is free: it goes into the norm or the matrix before. (The paper then also clips; that is left out here.)
"""

from __future__ import annotations

import numpy as np

from labkit import blocks
from labkit.methods._grid import checked


def factors(weights: np.ndarray, inputs: np.ndarray, bits: int = 4, group: int = 64, *, points: int = 20,
            zero: str = "bias", scale: str = "f16") -> np.ndarray:  # fmt: skip
    """s (in,) float32 for W (out, in), which may be several matrices that read the same X (n, in), stacked."""
    weights, inputs = checked(weights, inputs, bits, group)
    size = np.abs(inputs).mean(axis=0)
    gram = inputs.T @ inputs  # ||X D'||² = Σ (D X'X) * D: no need to go through all n inputs for each exponent
    best, least = np.ones_like(size), np.inf
    for ratio in np.arange(points) / points:
        s = np.maximum(size**ratio, 1e-4).astype(np.float32)
        s /= np.sqrt(s.max() * s.min())
        difference = blocks.affine(weights * s, bits, per=group, zero=zero, scale=scale).dequantize() / s - weights
        error = float(((difference @ gram) * difference).sum())
        if error < least:
            best, least = s, error
    return best


def quantize(weights: np.ndarray, inputs: np.ndarray, bits: int = 4, group: int = 64, *, zero: str = "bias",
             scale: str = "f16") -> tuple[blocks.Quantized, np.ndarray]:  # fmt: skip
    """The quantized W s, and s: outputs are (X / s) @ quantized.dequantize().T."""
    s = factors(weights, inputs, bits, group, zero=zero, scale=scale)
    return blocks.affine(weights * s, bits, per=group, zero=zero, scale=scale), s

"""SmoothQuant: hand the outliers of the inputs over to the weights, so that both can be small integers.

Xiao et al. 2022, arXiv 2211.10438. Inputs are quantized while the model runs, one scale a token, so one loud column costs
all the others their steps. As in AWQ, X W' = (X / s) (W s)', but here s balances the largest input against the largest
weight of each column; a = 0.5 shares the burden equally:

    s_j = max|X_j|^a / max|W_j|^(1 - a)
"""

from __future__ import annotations

import numpy as np

from labkit import blocks
from labkit.methods._grid import checked


def factors(weights: np.ndarray, inputs: np.ndarray, a: float = 0.5) -> np.ndarray:
    """s (in,) float32 for W (out, in), which may be several matrices that read the same X (n, in), stacked."""
    weights, inputs = checked(weights, inputs)
    loud, heavy = np.abs(inputs).max(axis=0), np.abs(weights).max(axis=0)
    s = loud**a / np.maximum(heavy, 1e-5) ** (1 - a)
    return np.where(loud > 0, np.clip(s, 1e-5, 1e5), 1).astype(np.float32)  # a column never used stays as it is


def quantize_inputs(inputs: np.ndarray, bits: int = 8) -> blocks.Quantized:
    """Inputs (n, in) as signed integers with one float32 scale a token, as an engine does while it runs."""
    return blocks.symmetric(inputs, bits, per="channel", scale="f32")


def product(inputs: blocks.Quantized, weights: blocks.Quantized) -> np.ndarray:
    """Outputs (n, out) float32 of integers times integers, scaled once at the end: the point of quantizing both.

    Both come from `blocks.symmetric(per="channel")`: one scale a token, one a row of W.
    """
    whole = inputs.codes.astype(np.int32) @ weights.codes.astype(np.int32).T  # exact
    return whole * inputs.scales * weights.scales.T

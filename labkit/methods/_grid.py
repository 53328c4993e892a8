"""What the methods share: a check of their arguments, and rounding to an affine grid that is already chosen."""

from __future__ import annotations

import numpy as np

from labkit import blocks
from labkit.types import LabkitError

stored = blocks._stored  # scales or biases as they come back from storage ("f16" or "f32")


def checked(weights: np.ndarray, inputs: np.ndarray, bits: int = 8, group: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """W (out, in) and X (n, in) as float32. Errors: other shapes, numbers that are not finite, bits, rows of broken groups."""
    weights, inputs = blocks.weights_of(weights), blocks.weights_of(inputs)
    if weights.ndim != 2 or inputs.ndim != 2 or weights.shape[1] != inputs.shape[1]:
        raise LabkitError(
            f"Weights of shape {weights.shape} and inputs of shape {inputs.shape} were given; expected (out, in) and (n, in)."
        )
    blocks._grouped(weights, bits, group)
    return weights, inputs


def steps(values: np.ndarray, scales: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """(values - bias) / scales, and 0 where the scale is 0."""
    return blocks._divided(values - bias, scales)


def nearest(weights: np.ndarray, scales: np.ndarray, bias: np.ndarray, bits: int, scheme: str, scale: str) -> blocks.Quantized:
    """The nearest codes of W (out, in) for one scale and bias a group: weight = scale * code + bias.

    `scales` and `bias` are (groups, 1); they are rounded for storage first, because codes must suit what is stored.
    """
    scales, bias = stored(scales, scale), stored(bias, scale)
    codes = np.clip(np.rint(steps(weights.reshape(len(scales), -1), scales, bias)), 0, 2**bits - 1).astype(np.uint8)
    return blocks._record(scheme, weights, codes, scales, bits, 2 * blocks.SCALE_BITS[scale], bias=bias)

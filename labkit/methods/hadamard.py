"""Hadamard rotation: turn the axes at random, so that an outlier in one column becomes a little in every column.

QuaRot (Ashkboos et al. 2024, arXiv 2404.00456) and QuIP# (Tseng et al. 2024, arXiv 2402.04396). R is orthogonal, so
X W' = (X R) (W R)' and rounding sees W R and X R, whose entries are nearly normal. R = S H / sqrt(n), S random signs on a
diagonal, H Sylvester's matrix of 1 and -1: H_1 = (1), H_2n = (H_n H_n; H_n -H_n). Nothing is stored for it but a seed, and
X R takes n log2 n additions instead of n². Where n is no power of two, blocks of the largest one that divides n are turned.
"""

from __future__ import annotations

import numpy as np

from labkit import blocks


def signs(columns: int, seed: int = 0) -> np.ndarray:
    """The diagonal of S: (columns,) float32 of 1 and -1."""
    return np.random.default_rng(seed).choice(np.array([-1, 1], np.float32), columns)


def rotate(x: np.ndarray, seed: int = 0) -> np.ndarray:
    """x (…, n) times R, float32, by butterflies: sums and differences of halves, log2 of the block size times."""
    columns = x.shape[-1]
    block = columns & -columns  # the largest power of two that divides it
    turned = (x * signs(columns, seed)).reshape(-1, block).astype(np.float32)
    width = 1
    while width < block:
        pairs = turned.reshape(-1, block // (2 * width), 2, width)
        left, right = pairs[:, :, 0], pairs[:, :, 1]
        turned = np.stack([left + right, left - right], axis=2)
        width *= 2
    return (turned.reshape(x.shape) / np.sqrt(block)).astype(np.float32)


def matrix(columns: int, seed: int = 0) -> np.ndarray:
    """R itself, (columns, columns) float32: for looking at it and for turning back, y @ R.T."""
    return rotate(np.eye(columns, dtype=np.float32), seed)


def peak(x: np.ndarray) -> float:
    """Largest size over root mean square: what a grid with one scale suffers from; 1 is the least there can be."""
    return float(np.abs(x).max() / np.sqrt(np.mean(np.square(x, dtype=np.float64))))


def quantize(weights: np.ndarray, bits: int = 4, group: int = 64, *, seed: int = 0, zero: str = "bias",
             scale: str = "f16") -> blocks.Quantized:  # fmt: skip
    """The quantized W R of W (out, in): outputs are rotate(X, seed) @ quantized.dequantize().T."""
    return blocks.affine(rotate(blocks.weights_of(weights), seed), bits, per=group, zero=zero, scale=scale)

"""GPTQ: round column by column, and let the columns still to come make up for each rounding error.

Frantar et al. 2022, arXiv 2210.17323. For W (out, in) and inputs X (n, in), find codes whose Q minimises ||X W' - X Q'||².
The curvature of that error along any row of W is H = X'X. Once column j is rounded to q_j, the best answer of the columns
k behind it is a row of the upper Cholesky factor U of H's inverse (H^-1 = U'U):

    e = (w_j - q_j) / U_jj        w_k <- w_k - e U_jk
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from labkit import blocks
from labkit.methods._grid import checked, steps


def quantize(weights: np.ndarray, inputs: np.ndarray, bits: int = 4, group: int = 64, *, damp: float = 0.01,
             zero: str = "bias", scale: str = "f16") -> blocks.Quantized:  # fmt: skip
    """W and X -> Quantized on the grid of `blocks.affine(zero=…, scale=…)`: the bytes of plain rounding, other codes.

    A group's scale is chosen when its first column is reached, from weights already corrected. `damp`: share of the mean
    of H's diagonal that is added to it, so that inputs that hardly vary do not make the inverse explode. At 2 bits corrected weights can
    widen the range of the groups behind so far that plain rounding does better.
    """
    weights, inputs = checked(weights, inputs, bits, group)
    upper = inverse_factor(inputs, damp)
    left = np.where(inputs.any(axis=0), weights, 0)  # still to be rounded; a column never used must not widen the grid
    codes, grids = np.empty(weights.shape, np.uint8), []
    for start in range(0, weights.shape[1], group):
        end = start + group
        grid = blocks.affine(left[:, start:end], bits, per=group, zero=zero, scale=scale)  # one group a row
        zeros, bias = (0 if part is None else part for part in (grid.zeros, grid.bias))
        errors = np.empty((len(left), group), np.float32)
        for j in range(start, end):
            column = left[:, j : j + 1]  # (out, 1), as the scales
            code = np.clip(np.rint(steps(column, grid.scales, bias)) + zeros, 0, 2**bits - 1)
            error = (column - (grid.scales * (code - zeros) + bias)) / upper[j, j]
            left[:, j + 1 : end] -= error * upper[j, j + 1 : end]
            codes[:, j], errors[:, j - start] = code[:, 0], error[:, 0]
        left[:, end:] -= errors @ upper[start:end, end:]  # the columns behind the group, all at once
        grids.append(grid)
    plain = blocks.affine(weights, bits, per=group, zero=zero, scale=scale)
    parts = {name: [getattr(grid, name) for grid in grids] for name in ("scales", "zeros", "bias")}
    chosen = {name: None if part[0] is None else np.hstack(part).reshape(-1, 1) for name, part in parts.items()}
    found = replace(plain, scheme=f"gptq int{bits}", codes=codes, **chosen)
    return replace(found, error=blocks.error(weights, found.dequantize()))


def inverse_factor(inputs: np.ndarray, damp: float) -> np.ndarray:
    """U (in, in) float32, upper triangular, with U'U the inverse of the damped H. Computed in float64."""
    hessian = inputs.T.astype(np.float64) @ inputs
    diagonal = np.diagonal(hessian)
    np.fill_diagonal(hessian, np.where(diagonal > 0, diagonal, 1) + damp * max(diagonal.mean(), np.finfo(float).tiny))
    return np.linalg.cholesky(np.linalg.inv(hessian), upper=True).astype(np.float32)

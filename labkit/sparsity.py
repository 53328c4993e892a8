"""Zeros in weights: which to set, and what they save once they are stored as zeros and not as numbers that happen to be 0.

Magnitude pruning keeps the largest weights of a matrix; 2:4 keeps two of every four neighbours, which some accelerators can
multiply at twice the rate. A dense file holds sixteen bits for a zero as for any other number.
"""

from __future__ import annotations

import numpy as np

from labkit.types import LabkitError


def magnitude(weights: np.ndarray, kept: float) -> np.ndarray:
    """Mask of the share `kept` of weights with the largest absolute value; bool, as `weights`. Ties: the earlier is kept."""
    if not 0 <= kept <= 1:
        raise LabkitError(f"kept={kept} was given; expected a share from 0 to 1.")
    order = np.argsort(-np.abs(weights), axis=None, kind="stable")
    mask = np.zeros(weights.size, dtype=bool)
    mask[order[: round(kept * weights.size)]] = True
    return mask.reshape(weights.shape)


def two_of_four(weights: np.ndarray) -> np.ndarray:
    """Mask of the two largest of every four neighbours in a row. LabkitError when a row is no multiple of four."""
    groups = _groups(weights)
    order = np.argsort(-np.abs(groups), axis=-1, kind="stable")
    mask = np.zeros(groups.shape, dtype=bool)
    np.put_along_axis(mask, order[..., :2], True, axis=-1)
    return mask.reshape(weights.shape)


def pack(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A 2:4 matrix as its values and places: float16 (rows, columns / 2) and 4 bits a group, two groups a byte (uint8).

    A place is the two positions within the group, two bits each, the first in the low bits. Groups with fewer than two
    weights that are not zero keep zeros as values. LabkitError when a group has more than two.
    """
    groups = _groups(np.asarray(weights, dtype=np.float16))
    if (np.count_nonzero(groups, axis=-1) > 2).any():
        raise LabkitError("A group of four has more than two weights that are not zero; apply the mask of two_of_four first.")
    where = np.sort(np.argsort(groups == 0, axis=-1, kind="stable")[..., :2], axis=-1)
    values = np.take_along_axis(groups, where, axis=-1)
    codes = (where[..., 0] | where[..., 1] << 2).astype(np.uint8).reshape(-1)
    codes = np.append(codes, np.zeros(codes.size % 2, np.uint8))
    return values.reshape(len(weights), -1), codes[::2] | codes[1::2] << 4


def unpack(values: np.ndarray, places: np.ndarray) -> np.ndarray:
    """The matrix `pack` was given: float16 (rows, columns)."""
    pairs = values.reshape(-1, 2)
    codes = np.stack([places & 15, places >> 4], axis=-1).reshape(-1)[: len(pairs)]
    groups = np.zeros((len(pairs), 4), dtype=values.dtype)
    at = np.arange(len(pairs))
    groups[at, codes & 3], groups[at, codes >> 2] = pairs[:, 0], pairs[:, 1]
    return groups.reshape(len(values), -1)


def stored_bits(kept: float, value_bits: float, form: str = "bitmap", index_bits: float = 16) -> float:
    """Bits for each weight of the matrix, zeros counted. form: "dense", "bitmap" (one bit says whether a value follows),
    "2:4" (four bits for every two of four), "index" (each value with its column, `index_bits`).
    """
    forms = {
        "dense": value_bits,
        "bitmap": kept * value_bits + 1,
        "2:4": 0.5 * value_bits + 1,
        "index": kept * (value_bits + index_bits),
    }
    if form not in forms:
        raise LabkitError(f"form={form!r} was given; expected one of {', '.join(forms)}.")
    return forms[form]


def _groups(weights: np.ndarray) -> np.ndarray:
    if weights.ndim != 2 or weights.shape[1] % 4:
        raise LabkitError(f"A matrix of shape {weights.shape} was given; expected rows of a multiple of four weights.")
    return weights.reshape(len(weights), -1, 4)

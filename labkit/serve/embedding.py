"""A vector for a text, from the checkpoint alone: the mean of its tokens' rows of the embedding matrix, of length 1.

It is the oldest sentence embedding there is: near texts share words, order and context do not count. It needs no engine and
is the same for all of them. For search that matters, serve a model trained for embeddings.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from labkit.checkpoint import Checkpoint
from labkit.types import LabkitError

NAMES = ("model.embed_tokens.weight", "language_model.model.embed_tokens.weight", "transformer.wte.weight")


def mean_rows(checkpoint: Checkpoint, texts: Sequence[Sequence[int]]) -> np.ndarray:
    """(number of texts, hidden size) float32; a text without tokens is all zeros. LabkitError without such a matrix."""
    matrix = _matrix(checkpoint)
    out = np.zeros((len(texts), matrix.shape[1]), dtype=np.float32)
    for row, ids in zip(out, texts, strict=True):
        if len(ids):
            mean = matrix[list(ids)].mean(axis=0)
            row[:] = mean / max(float(np.linalg.norm(mean)), 1e-12)
    return out


def _matrix(checkpoint: Checkpoint) -> np.ndarray:
    found = _kept.get(checkpoint.path)
    if found is None:
        tensors = checkpoint.tensors()
        name = next((name for name in NAMES if name in tensors), None)
        if name is None:
            raise LabkitError(f"{checkpoint.name} has no token embedding under a known name; /api/embed needs one.")
        _kept.clear()  # one model a server: a second replaces the first
        found = _kept[checkpoint.path] = tensors[name].float32()
    return found


_kept: dict = {}

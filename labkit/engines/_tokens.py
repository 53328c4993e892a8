"""The one check every call with token ids needs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from labkit.types import LabkitError


def checked(tokens: Sequence[int], vocabulary: int, context: int, more: int = 0) -> np.ndarray:
    """`tokens` as (T,) int64. Raises LabkitError when there are none, one is no id, or they and `more` are too many."""
    ids = np.asarray(tokens, dtype=np.int64).reshape(-1)
    if not ids.size:
        raise LabkitError("No tokens were given; expected at least one id.")
    wrong = ids[(ids < 0) | (ids >= vocabulary)]
    if wrong.size:
        raise LabkitError(f"Token id {wrong[0]} is out of range; this model has ids 0 to {vocabulary - 1}.")
    if more < 0 or ids.size + more > context:
        raise LabkitError(f"{ids.size} tokens and {more} new ones were asked for; the context is {context} tokens.")
    return ids

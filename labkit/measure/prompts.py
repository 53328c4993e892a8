"""Prompts for timing: random ids, never the same twice, so that no engine can answer from a cached prefix."""

from __future__ import annotations

from typing import Any

import numpy as np

from labkit.types import LabkitError


def fresh_prompt(checkpoint: Any, tokens: int, new: int, rng: np.random.Generator) -> list[int]:
    """`tokens` random ids, the first being begin-of-text where the tokenizer uses one.

    Error: no room for them and `new` more in the context, fewer than 1 and 2.
    """
    if tokens < 1 or new < 2:
        raise LabkitError(f"A prompt of {tokens} and {new} new tokens was asked for; expected at least 1 and 2.")
    if tokens + new > checkpoint.context:
        raise LabkitError(
            f"{tokens} prompt tokens and {new} new ones exceed {checkpoint.name}'s context of {checkpoint.context}; "
            "ask for fewer."
        )
    ids = rng.integers(0, checkpoint.vocab_size, tokens).tolist()
    if checkpoint.bos_id is not None:
        ids[0] = checkpoint.bos_id
    return ids

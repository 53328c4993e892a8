"""The state of an interrupted training run: one file, replaced in one step, with everything that decides the next step."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from labkit._files import sync
from labkit.types import LabkitError


def write_state(state: dict[str, Any], path: Path) -> None:
    """Write `state` (tensors, numbers, strings, lists, dicts) so that a reader sees the old file or the new one."""
    partial = path.with_suffix(".tmp")
    torch.save(state, partial)
    sync(partial)
    os.replace(partial, path)


def read_state(path: Path) -> dict[str, Any] | None:
    """The state in `path`, None when there is none. Only plain data is unpickled; LabkitError for a damaged file."""
    if not path.exists():
        return None
    try:
        return torch.load(path, weights_only=True)
    except Exception as error:
        raise LabkitError(f"{path} is damaged ({error}); delete it to begin this training again.") from None


def generators() -> dict[str, Any]:
    """Where the random generators of torch, numpy and Python stand."""
    kind, words, *rest = np.random.get_state()
    version, numbers, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "numpy": [kind, words.tolist(), *rest],
        "python": [version, list(numbers), gauss],
    }


def set_generators(kept: dict[str, Any]) -> None:
    """Put the random generators back where `generators` found them."""
    torch.set_rng_state(kept["torch"])
    kind, words, *rest = kept["numpy"]
    np.random.set_state((kind, np.array(words, np.uint32), *rest))
    version, numbers, gauss = kept["python"]
    random.setstate((version, tuple(numbers), gauss))

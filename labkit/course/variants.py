"""Personal variants: a seed for each learner, so that numbers differ and copied numbers show.

A lab that wants variants has `seed: int = 0` in its parameters cell and uses it for its own numbers; a check that wants
them calls `seed()`. `labkit new LAB --learner ANA` writes the learner's seed into the copy, and `labkit grade` runs every
submission with the seed of the learner it belongs to, whatever the notebook says.
"""

from __future__ import annotations

import hashlib
import os
import re

from labkit.course.labs import Lab
from labkit.types import LabkitError


def seed_for(learner: str) -> int:
    """The seed of a learner's id (upper and lower case are alike), from 1 to 999 999."""
    digest = hashlib.sha256(learner.strip().casefold().encode()).digest()
    return 1 + int.from_bytes(digest[:8], "big") % 999_999


def seed() -> int:
    """The seed in force: the grader's LABKIT_SEED, else the open notebook's variable `seed`, else 0."""
    if given := os.environ.get("LABKIT_SEED"):
        return int(given)
    from IPython import get_ipython

    shell = get_ipython()
    found = shell.user_ns.get("seed", 0) if shell else 0
    return found if isinstance(found, int) else 0


def with_seed(lab: Lab, learner: str) -> str:
    """The text of a lab's notebook with the learner's seed in its parameters cell; LabkitError when the lab has none."""
    import nbformat

    notebook = nbformat.read(lab.path, as_version=4)
    for cell in notebook.cells:
        if "parameters" in cell.metadata.get("tags", []):
            cell.source, changed = re.subn(r"(?m)^(seed\s*(?::\s*int)?\s*=\s*)\d+", rf"\g<1>{seed_for(learner)}", cell.source)
            if changed:
                return nbformat.writes(notebook).rstrip("\n") + "\n"
    raise LabkitError(f"Lab {lab.id} has no parameter `seed`, so it is the same for everybody; leave out --learner.")

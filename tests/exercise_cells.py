"""The exercises of a solved lab, cell by cell."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import nbformat

SOLUTIONS = Path(__file__).parent / "solutions"


def cells(lab: str) -> list[tuple[str, str, str]]:
    """(exercise, name of the answer, source) of every exercise cell of a notebook under `solutions`."""
    found = nbformat.read(SOLUTIONS / lab, as_version=4).cells
    pairs = [(a.source, b.source) for a, b in pairwise(found) if "exercise" in a.metadata.get("tags", [])]
    return [(check.split('"')[1], check.split(", ")[1].rstrip(")"), source) for source, check in pairs]

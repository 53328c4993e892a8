"""What may be done with a teacher's answers: the terms of the teachers the course names, each with its source.

A reading aid and no legal advice: terms change, and the text at `source` is what counts. Facts are in data/teachers.json.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from labkit.i18n import tr
from labkit.types import LabkitError

FILE = Path(__file__).parents[1] / "data" / "teachers.json"
OUTPUTS = ("free", "conditions", "not for rivals")  # what training another model on the answers is


@dataclass(frozen=True)
class Terms:
    """One teacher. kind: "weights" you run yourself, or a "service"; duty: what comes with training on its answers."""

    teacher: str
    kind: str
    licence: str
    outputs: str
    duty: str
    source: str


@cache
def teachers() -> tuple[Terms, ...]:
    return tuple(Terms(**row) for row in json.loads(FILE.read_text(encoding="utf-8")))


def check(teacher: str, *, general: bool) -> str:
    """The duty that comes with training a student on this teacher's answers, "" for none. `teacher`: part of a listed name.

    general: the student is a general model to be offered to others, which a service may see as a rival. LabkitError for a
    teacher that is not listed, or one whose terms forbid it.
    """
    found = [one for one in teachers() if teacher.casefold() in one.teacher.casefold()]
    if not found:
        known = ", ".join(one.teacher for one in teachers())
        raise LabkitError(
            tr("The terms of {teacher} are not listed ({known}); read its licence first.", teacher=teacher, known=known)
        )
    if general and found[0].outputs == "not for rivals":
        raise LabkitError(
            tr("{teacher}: {duty} ({source}).", teacher=found[0].teacher, duty=found[0].duty, source=found[0].source)
        )
    return found[0].duty

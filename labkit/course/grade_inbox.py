"""Submissions as they lie in a folder: whose they are, which lab each notebook is, and what is in it.

One entry of the folder is one learner: a sub-folder (its name is the learner's id, notebooks anywhere below it) or a
notebook `ID.ipynb`. A notebook's lab is told by its metadata, by its `labkit.start("...")`, or by its file name.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from labkit.course import labs as course
from labkit.types import LabkitError

MOST = 50_000_000  # bytes of a notebook, and of all other files of a learner
SKIPPED = {".ipynb_checkpoints", "__MACOSX", "__pycache__", ".git"}


@dataclass(frozen=True)
class Learner:
    """One learner's part of the folder."""

    id: str
    place: Path  # the sub-folder, or the notebook itself
    notebooks: tuple[Path, ...]


@dataclass(frozen=True)
class Notebook:
    """What matters of a submitted notebook. `problem` is a sentence when it cannot be read; then nothing else is known."""

    path: Path
    lab: str | None = None
    cells: tuple[str, ...] = ()  # sources of the code cells that are to be run
    parameters_at: int = -1  # which of them is the parameters cell, -1 for none
    problem: str = ""


def learners(folder: Path, leave_out: Path | None = None) -> list[Learner]:
    """Every learner in `folder`, by id. Links are not followed: they could lead into another learner's work."""
    if not folder.is_dir():
        raise LabkitError(f"{folder} is not a folder; expected a folder of submissions, one sub-folder or notebook a learner.")
    found: dict[str, Learner] = {}
    for entry in sorted(folder.iterdir(), key=lambda one: (not one.is_dir(), one.name)):  # sub-folders first
        if entry.is_symlink() or entry.name.startswith(".") or entry.name in SKIPPED or entry == leave_out:
            continue
        if entry.is_dir():
            found[entry.name] = Learner(entry.name, entry, tuple(p for p in _files(entry) if p.suffix == ".ipynb"))
        elif entry.suffix == ".ipynb" and entry.is_file():
            known = found.get(entry.stem, Learner(entry.stem, entry, ()))
            found[entry.stem] = Learner(known.id, known.place, (*known.notebooks, entry))
    if not found:
        raise LabkitError(f"{folder} holds no submissions; expected one sub-folder or one ID.ipynb for each learner.")
    readable = [replace(one, id=name.encode("utf-8", "replace").decode()) for name, one in sorted(found.items())]
    if len({one.id for one in readable}) < len(readable):
        raise LabkitError(f"{folder} holds names that are not UTF-8 and become equal; rename them.")
    return readable


def read(path: Path) -> Notebook:
    """Read a notebook as leniently as can be: only the sources of its cells matter."""
    try:
        if path.stat().st_size > MOST:
            return Notebook(path, _named(path), problem=f"The file is larger than {MOST // 1_000_000} MB.")
        data = json.loads(path.read_text(encoding="utf-8"))
        cells = data["cells"]
        kept = [c for c in cells if c["cell_type"] == "code" and "skip-execution" not in _tags(c)]
        sources = tuple("".join(c["source"]) for c in kept)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        reason = "it is not JSON" if isinstance(error, ValueError) else f"its form is wrong ({type(error).__name__})"
        return Notebook(path, _named(path), problem=f"The notebook could not be read: {reason}.")
    tagged = [i for i, c in enumerate(kept) if "parameters" in _tags(c)]
    return Notebook(path, _lab(data, sources, path), sources, tagged[0] if tagged else -1)


def chosen(notebooks: Sequence[Notebook], lab: course.Lab) -> tuple[Notebook | None, list[str]]:
    """The one notebook of `lab` that counts, and a note on the others: the one with most work in it, then by name."""
    mine = [one for one in notebooks if one.lab == lab.id]
    mine.sort(key=lambda one: (-changed(one, lab), one.path.name != lab.path.name, one.path.as_posix()))
    notes = [f"{one.path.name} is this lab too and was not graded." for one in mine[1:] if one.problem or changed(one, lab)]
    return (mine[0] if mine else None), notes


def changed(notebook: Notebook, lab: course.Lab) -> int:
    """How many code cells are not the course's own; 0 for a copy nobody worked in, and for an unreadable file."""
    return sum(source not in _own_cells(lab) for source in notebook.cells)


@cache
def _own_cells(lab: course.Lab) -> frozenset[str]:
    return frozenset(read(lab.path).cells)


def copy_beside(learner: Learner, target: Path) -> None:
    """Copy the learner's ordinary files (helpers, data) into `target`, up to a limit; links and devices are left out."""
    if learner.place.is_file():
        return
    left = MOST
    for path in _files(learner.place):
        left -= path.stat().st_size
        if left < 0:
            return
        copy = target / path.relative_to(learner.place)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy, follow_symlinks=False)


def wanted(lab: course.Lab) -> dict[str, str]:
    """Exercise -> the expression the course's own notebook hands to its check."""
    found: dict[str, str] = {}
    for source in read(lab.path).cells:
        for call in _calls(source, "check"):
            if len(call.args) == 2 and isinstance(call.args[0], ast.Constant):
                found[str(call.args[0].value)] = ast.unparse(call.args[1])
    return found


def _files(folder: Path) -> Iterator[Path]:
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(f for f in folders if f not in SKIPPED)
        for name in sorted(names):
            path = Path(place) / name
            if not path.is_symlink() and path.is_file():
                yield path


def _tags(cell: dict[str, Any]) -> list[Any]:
    tags = cell.get("metadata", {}).get("tags", [])
    return tags if isinstance(tags, list) else []


def _lab(data: dict[str, Any], sources: Sequence[str], path: Path) -> str | None:
    about = (data.get("metadata") or {}).get("labkit") or {}
    if isinstance(about, dict) and isinstance(about.get("lab"), str):
        return about["lab"]
    for source in sources:
        for call in _calls(source, "start"):
            if call.args and isinstance(call.args[0], ast.Constant):
                return str(call.args[0].value)
    return _named(path)


def _named(path: Path) -> str | None:
    matches = [lab.id for lab in course.labs() if re.sub(r"\W", "_", path.stem) in (lab.path.stem, lab.key)]
    return matches[0] if len(matches) == 1 else None


def _calls(source: str, name: str) -> list[ast.Call]:
    """Calls of `labkit.NAME(...)`; none in a cell that is not plain Python."""
    try:
        calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
        return [call for call in calls if ast.unparse(call.func) == f"labkit.{name}"]
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []

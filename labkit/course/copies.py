"""A learner's own copies of the labs: updates never collide with their work, and every link leads to a file.

All labs are copied, as each links to others. What was copied is noted with its checksum, so that a copy nobody changed
follows an update, and one that was worked in is left alone.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

from labkit._files import PARTIAL, read_json, write_json
from labkit.course.labs import Lab, folder
from labkit.types import LabkitError

NOTED = ".labkit-copies.json"  # in the folder of copies: file -> its SHA-256 when it was copied


def copy(lab: Lab, into: Path, *, force: bool = False) -> Path:
    """The learner's copy of a lab below `into`, made if need be; `force` replaces one that was worked in."""
    target = into / lab.relative
    if worked_in(target, into) and not force:
        raise LabkitError(f"{target} is there already; go on with it, or replace it with --force.")
    if force:
        target.unlink(missing_ok=True)
    fill(into, lab.root)
    return target


def fill(into: Path, root: Path | None = None) -> list[Path]:
    """Copy what is absent below `into` and bring untouched copies up to date; returns the files written."""
    root = root or folder()
    noted, written = _noted(into), []
    for source in sorted(root.rglob("*")):
        relative = source.relative_to(root)
        if not source.is_file() or any(part.startswith(".") for part in relative.parts):
            continue
        target, digest = into / relative, _digest(source)
        if target.exists() and (worked_in(target, into) or _digest(target) == digest):
            continue
        _write(source, target)
        noted[relative.as_posix()] = digest
        written.append(target)
    if written:
        write_json(into / NOTED, noted)
    return written


def worked_in(target: Path, into: Path) -> bool:
    """Whether a copy is there and differs from what was copied."""
    return target.exists() and _noted(into).get(target.relative_to(into).as_posix()) != _digest(target)


def _noted(into: Path) -> dict[str, str]:
    file = into / NOTED
    return read_json(file, "Note of copies") if file.exists() else {}


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _write(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{PARTIAL}{target.name}-{os.getpid()}")
    try:
        shutil.copyfile(source, partial)
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)

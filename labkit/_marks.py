"""Text between two marks of a Markdown file, <!-- MARK --> and <!-- /MARK -->, replaced and the rest left alone."""

from __future__ import annotations

from pathlib import Path

from labkit._files import write_text
from labkit.types import LabkitError


def write_into(path: Path, text: str, mark: str) -> None:
    """Put `text` between the two marks; raises LabkitError when they are not there."""
    before, after = around(path, mark)
    write_text(path, before + text + after)


def around(path: Path, mark: str) -> tuple[str, str]:
    """What stands up to the first mark, itself included, and from the second on."""
    begin, end = f"<!-- {mark} -->", f"<!-- /{mark} -->"
    if not path.is_file():
        raise LabkitError(f"There is no file {path}; expected a Markdown file with {begin} and {end}.")
    parts = path.read_text(encoding="utf-8").split(begin + "\n")
    if len(parts) != 2 or parts[1].count(end) != 1:
        raise LabkitError(f"{path} does not hold {begin} and, further down, {end}; put both there, once.")
    return f"{parts[0]}{begin}\n", end + parts[1].split(end)[1]

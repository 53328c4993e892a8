"""Learners' notebooks from the hand-written ones: `python -m labkit.course.generate [--check]`.

The source of a lab is `tests/solutions/<path>.ipynb`; its learner's form is `notebooks/<path>.ipynb`.
 - In a cell tagged `exercise` and `solution`, the lines from `# BEGIN SOLUTION` to `# END SOLUTION` become the
   text behind the `# STUB: ` lines among them (or `...`), at the indentation of the BEGIN line.
 - A cell tagged `solution` only is left out.
 - `<!-- labkit:facts -->` becomes the table of time and memory of the last recorded run,
   `<!-- labkit:links -->` the links to the previous lab, the index and the next one,
   `<!-- labkit:index -->` the list of all labs.
Cell ids are kept and the text written is a function of the sources alone, so a second run changes nothing.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from labkit.course import facts
from labkit.course.labs import Lab, folder, labs, neighbours
from labkit.types import LabkitError

BEGIN, END, STUB = "# BEGIN SOLUTION", "# END SOLUTION", "# STUB: "
KERNEL = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
MARKER = re.compile(r"<!-- labkit:(facts|links|index) -->")


def stub(source: str, where: str = "a cell") -> str:
    """The learner's form of one exercise cell."""
    lines, inside, dots, indent = [], False, True, ""
    for line in source.split("\n"):
        text = line.strip()
        if text == BEGIN:
            inside, dots, indent = True, True, line[: line.index("#")]
        elif text == END:
            if dots:
                lines.append(f"{indent}...")
            inside = False
        elif inside:
            if text.startswith(STUB.strip()):
                lines.append(indent + text.removeprefix(STUB.strip()).removeprefix(" "))
                dots = False
        else:
            lines.append(line)
    if inside or BEGIN not in source:
        raise LabkitError(f"{where}: an exercise needs a {BEGIN!r} line and an {END!r} line after it.")
    return "\n".join(lines)


def learner(lab: Lab) -> NotebookNode:
    """The learner's notebook of a lab under tests/solutions."""
    from labkit import __version__

    source = nbformat.read(lab.path, as_version=4)
    cells = []
    for cell in source.cells:
        tags = cell.metadata.get("tags", [])
        if "solution" in tags and "exercise" not in tags:
            continue
        cells.append(_cell(cell, tags, lab))
    metadata = {"kernelspec": KERNEL, "language_info": {"name": "python"}}
    metadata["labkit"] = {"lab": lab.id, "version": __version__}
    return nbformat.from_dict({"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5})


def _cell(cell: NotebookNode, tags: list[str], lab: Lab) -> dict:
    text = cell.source
    if "solution" in tags:
        text = stub(text, f"{lab.relative}, cell {cell.id}")
    if cell.cell_type == "markdown":
        text = MARKER.sub(lambda found: f"{found.group(0)}\n{_fill(found.group(1), lab)}", text)
    kept = [t for t in tags if t != "solution"]
    new = {"cell_type": cell.cell_type, "id": cell.id, "metadata": {"tags": kept} if kept else {}, "source": text}
    return new | ({"outputs": [], "execution_count": None} if cell.cell_type == "code" else {})


def _fill(kind: str, lab: Lab) -> str:
    if kind == "facts":
        return facts.table(lab.id)
    return links(lab) if kind == "links" else index(lab)


def links(lab: Lab) -> str:
    """Previous, index and next, as links that also work on GitHub."""
    before, after = neighbours(lab)
    home = next(one for one in labs(lab.root))
    parts = [f"[Previous: {before.title}]({_to(lab, before)})" if before else None]
    parts.append(f"[Index]({_to(lab, home)}#All-labs)" if home.id != lab.id else "[Index](#All-labs)")
    parts.append(f"[Next: {after.title}]({_to(lab, after)})" if after else None)
    return " | ".join(p for p in parts if p)


def index(lab: Lab) -> str:
    """Every lab as a list of links."""
    return "\n".join(f"- [{one.title}]({_to(lab, one)}) (`{one.id}`)" for one in labs(lab.root))


def _to(lab: Lab, other: Lab) -> str:
    return Path(os.path.relpath(other.relative, lab.relative.parent)).as_posix()


def text(notebook: NotebookNode) -> str:
    """The exact text of the file: sorted keys, one space of indentation, a final newline."""
    return nbformat.writes(notebook, version=4).rstrip("\n") + "\n"


def generate(source: Path | None = None, out: Path | None = None, *, check: bool = False) -> list[Path]:
    """Write every learner's notebook and return those that changed; `check` only looks. Orphans count as changed."""
    source = source or folder(solutions=True)
    out = out or source.parents[1] / "notebooks"
    changed, wanted = [], set()
    for lab in labs(source):
        target = out / lab.relative
        wanted.add(target)
        new = text(learner(lab))
        if not target.exists() or target.read_text(encoding="utf-8") != new:
            changed.append(target)
            if not check:
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_text(new, encoding="utf-8", newline="\n")
    orphans = [p for p in out.glob("**/[0-9]*.ipynb") if p not in wanted and ".ipynb_checkpoints" not in p.parts]
    return changed + orphans


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m labkit.course.generate", description="Learners' notebooks from solutions."
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when a notebook is stale")
    check = parser.parse_args(argv).check
    changed = generate(check=check)
    for path in changed:
        print(("stale: " if check else "written: ") + str(path))
    return 1 if check and changed else 0


if __name__ == "__main__":
    sys.exit(main())

"""Learners' notebooks from the hand-written ones: `python -m labkit.course.generate [--check]`.

The source of a lab is `tests/solutions/<path>.ipynb`; its learner's form is `notebooks/<path>.ipynb`.
 - In a cell tagged `exercise` and `solution`, the lines from `# BEGIN SOLUTION` to `# END SOLUTION` become the
   text behind the `# STUB: ` lines among them (or `...`), at the indentation of the BEGIN line.
 - A cell tagged `solution` only is left out.
 - `<!-- labkit:facts -->` becomes the table of time and memory of the last recorded run,
   `<!-- labkit:links -->` the links to the previous lab, the index and the next one,
   `<!-- labkit:index -->` the list of all labs and the glossary, a page made from its terms.
Cell ids are kept and the text written is a function of the sources alone, so a second run changes nothing.

A lab's edition in another language has the same code cells and prose of its own: `tests/solutions/pt_BR/<path>.md` becomes
`notebooks/pt_BR/<path>.ipynb`. In it, each text stands behind `<!-- cell: ID 1a2b3c4d -->`, where the eight digits are
the fingerprint of the English text it was translated from: a translation that has fallen behind is named.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from labkit.course import facts
from labkit.course.labs import Lab, folder, labs, neighbours
from labkit.i18n import ENGLISH, LANGUAGES, speaking, tr
from labkit.terms import page
from labkit.types import LabkitError

BEGIN, END, STUB = "# BEGIN SOLUTION", "# END SOLUTION", "# STUB: "
KERNEL = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
MARKER = re.compile(r"<!-- labkit:(facts|links|index) -->")
GLOSSARY = "glossary.md"  # beside the labs
PROSE = re.compile(r"^<!-- cell: (\S+) (\w+) -->$", re.M)


@dataclass(frozen=True)
class Translated(Lab):
    """The sources of an edition in another language: `path` is the file with its prose, `english` the lab itself."""

    english: Lab | None = None

    @property
    def relative(self) -> Path:
        return super().relative.with_suffix(".ipynb")

    @property
    def title(self) -> str:
        found = re.search(r"^# +(.+)$", self.path.read_text(encoding="utf-8"), re.M)
        return found.group(1).strip() if found else self.path.stem

    def prose(self) -> dict[str, tuple[str, str]]:
        """Cell id -> (text, fingerprint of the English text it was translated from)."""
        _, *parts = PROSE.split(self.path.read_text(encoding="utf-8"))
        return {cell: (text.strip(), mark) for cell, mark, text in zip(*[iter(parts)] * 3, strict=True)}


def course(source: Path, code: str = ENGLISH) -> list[Lab]:
    """The sources of every lab in course order, in language `code` where it has been translated, else in English."""
    return [_in(code, lab) for lab in labs(source, ENGLISH)]


def _in(code: str, lab: Lab) -> Lab:
    file = lab.root / code / lab.relative.with_suffix(".md")
    return Translated(lab.id, file, lab.root, code, lab) if file.exists() else lab


def behind(source: Path) -> list[str]:
    """What the translations lack or have too much, one line each; empty when all are up to date."""
    return [
        f"{lab.path.relative_to(source)}: {line}"
        for code in LANGUAGES
        for lab in course(source, code)
        if isinstance(lab, Translated)
        for line in _behind(lab)
    ]


def _behind(lab: Translated) -> list[str]:
    english = {c.id: c.source for c in nbformat.read(lab.english.path, as_version=4).cells if c.cell_type == "markdown"}
    have = lab.prose()
    said = [f"cell {cell} is not translated; begin it with <!-- cell: {cell} {mark(english[cell])} -->"
            for cell in english if cell not in have]  # fmt: skip
    said += [f"the lab has no text cell {cell} any more; take it out" for cell in have if cell not in english]
    said += [f"the English text of cell {cell} has changed; look it over and write {mark(english[cell])} in its marker"
             for cell in have if cell in english and have[cell][1] != mark(english[cell])]  # fmt: skip
    return said


def mark(text: str) -> str:
    """The fingerprint of an English text."""
    return hashlib.sha256(text.encode()).hexdigest()[:8]


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
    """The learner's notebook of a lab under tests/solutions; a text that is not translated yet stays English."""
    from labkit import __version__

    translated = isinstance(lab, Translated)
    source = nbformat.read(lab.english.path if translated else lab.path, as_version=4)
    prose = lab.prose() if translated else {}
    cells = []
    for cell in source.cells:
        tags = cell.metadata.get("tags", [])
        if "solution" in tags and "exercise" not in tags:
            continue
        if cell.cell_type == "markdown" and cell.id in prose:
            cell.source = prose[cell.id][0]
        with speaking(lab.language):
            cells.append(_cell(cell, tags, lab))
    metadata = {"kernelspec": KERNEL, "language_info": {"name": "python"}}
    metadata["labkit"] = {"lab": lab.id, "version": __version__} | ({"language": lab.language} if translated else {})
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
    """Previous, index, next and the lab's editions in other languages, as links that also work on GitHub."""
    known = course(lab.root, lab.language)
    (before, after), home = neighbours(lab, known), known[0]
    with speaking(home.language):
        anchor = "#" + tr("All labs").replace(" ", "-")
    parts = [f"[{tr('Previous: {title}', title=_title(lab, before))}]({_to(lab, before)})" if before else None]
    parts.append(f"[{tr('Index')}]({_to(lab, home) if home.id != lab.id else ''}{anchor})")
    parts.append(f"[{tr('Next: {title}', title=_title(lab, after))}]({_to(lab, after)})" if after else None)
    others = [one for code in LANGUAGES for one in course(lab.root, code) if one.id == lab.id and one.language == code]
    parts += [f"[{LANGUAGES[one.language]}]({_to(lab, one)})" for one in others if one.language != lab.language]
    return " | ".join(p for p in parts if p)


def index(lab: Lab) -> str:
    """Every lab as a list of links."""
    listed = [f"- [{_title(lab, one)}]({_to(lab, one)}) (`{one.id}`)" for one in course(lab.root, lab.language)]
    glossary = Path(os.path.relpath(GLOSSARY, lab.relative.parent)).as_posix()
    return "\n".join([*listed, f"- [{tr('Glossary')}]({glossary})"])


def _title(lab: Lab, other: Lab) -> str:
    """What `lab` calls another one: a title in a language that is not its own is marked so."""
    return other.title if other.language == lab.language else tr("{title} (in English)", title=other.title)


def _to(lab: Lab, other: Lab) -> str:
    return Path(os.path.relpath(other.relative, lab.relative.parent)).as_posix()


def text(notebook: NotebookNode) -> str:
    """The exact text of the file: sorted keys, one space of indentation, a final newline."""
    return nbformat.writes(notebook, version=4).rstrip("\n") + "\n"


def generate(source: Path | None = None, out: Path | None = None, *, check: bool = False) -> list[Path]:
    """Write every learner's notebook and return those that changed; `check` only looks. Orphans count as changed."""
    source = source or folder(solutions=True)
    out = out or source.parents[1] / "notebooks"
    everything = dict.fromkeys(lab for code in LANGUAGES for lab in course(source, code))
    pages = {out / lab.relative: text(learner(lab)) for lab in everything}
    pages[out / GLOSSARY] = page({lab.id: lab.relative.as_posix() for lab in course(source)})
    changed = []
    for target, new in pages.items():
        if not target.exists() or target.read_text(encoding="utf-8") != new:
            changed.append(target)
            if not check:
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_text(new, encoding="utf-8", newline="\n")
    orphans = [p for p in out.glob("**/[0-9]*.ipynb") if p not in pages and ".ipynb_checkpoints" not in p.parts]
    return changed + orphans


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m labkit.course.generate", description="Learners' notebooks from solutions.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when a notebook is stale")
    check = parser.parse_args(argv).check
    changed, translations = generate(check=check), behind(folder(solutions=True))
    for path in changed:
        print(("stale: " if check else "written: ") + str(path))
    for line in translations:
        print(f"translation behind: {line}")
    return 1 if translations or (check and changed) else 0


if __name__ == "__main__":
    sys.exit(main())

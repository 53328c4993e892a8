"""Where the labs are, in which order, and what they are called.

A lab is a notebook whose file name begins with its number: `00_start_here.ipynb` is lab `00`,
`module04_quantization/02_llamacpp.ipynb` is lab `module04/02`. A lab's edition in another language has the same id and
lies under a folder of that name: `pt_BR/00_start_here.ipynb` is lab `00` too. Of each lab one edition is taken at a
time, the one in the language in use, so that a run of all labs runs none of them twice.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from labkit.i18n import ENGLISH, LANGUAGES, language, tr
from labkit.types import LabkitError

ORDER = ("", "module03", "module04", "module05", "phi_family")  # folders, in the order they are meant to be taken


@dataclass(frozen=True)
class Lab:
    """One notebook of the course, in one language."""

    id: str  # "module04/02"
    path: Path  # the notebook file
    root: Path  # the folder all labs are under
    language: str = ENGLISH

    @property
    def key(self) -> str:
        """The id as a file name: quizzes and run folders are called so."""
        return self.id.replace("/", "_")

    @property
    def relative(self) -> Path:
        return self.path.relative_to(self.root)

    @property
    def title(self) -> str:
        """The first heading of the notebook."""
        import nbformat

        for cell in nbformat.read(self.path, 4).cells:
            if found := re.search(r"^# +(.+)$", cell.source, re.M) if cell.cell_type == "markdown" else None:
                return found.group(1).strip()
        return self.path.stem


def folder(solutions: bool = False) -> Path:
    """The folder of labs: $LABKIT_NOTEBOOKS, else the checkout the package is in, else `notebooks` right here.

    `solutions` asks for the hand-written form the learners' notebooks are made from (checkout only).
    """
    checkout = Path(__file__).resolve().parents[2]
    inside = Path("tests/solutions" if solutions else "notebooks")
    given = os.environ.get("LABKIT_NOTEBOOKS") if not solutions else None
    for place in [Path(given)] if given else [checkout / inside, Path.cwd() / inside]:
        if any(place.glob("**/[0-9]*.ipynb")):
            return place.resolve()
    raise LabkitError(tr(
        "Cannot find the notebooks in {places}; run from a checkout of the repository, or set LABKIT_NOTEBOOKS to its "
        "notebooks folder.",
        places=given or f"{checkout / inside}, {Path.cwd() / inside}",
    ))  # fmt: skip


def labs(root: Path | None = None, code: str | None = None) -> list[Lab]:
    """Every lab under `root` once, in course order: in language `code` (default: the one in use), else in English."""
    wanted = (ENGLISH, code or language())
    found = sorted((lab for lab in editions(root) if lab.language in wanted), key=lambda lab: wanted.index(lab.language))
    return sorted({lab.id: lab for lab in found}.values(), key=_place)


def editions(root: Path | None = None) -> list[Lab]:
    """Every notebook of the course under `root`, in all languages."""
    root = root or folder()
    files = [p for p in root.glob("**/[0-9]*.ipynb") if ".ipynb_checkpoints" not in p.parts]
    return [_lab(path, root) for path in files]


def find(name: str, root: Path | None = None) -> Lab:
    """The lab called `name`: an id or a file name (in the language in use) or a path, with or without `.ipynb`."""
    known, wanted = labs(root), str(name).replace("\\", "/").removesuffix(".ipynb").strip("/")
    matches = [lab for lab in editions(root) if wanted in _paths(lab)] or [
        lab for lab in known if wanted in (lab.id, lab.key, lab.path.stem)
    ]
    if len(matches) != 1:
        names = ", ".join(lab.id for lab in known)
        raise LabkitError(tr("There is no lab {name!r}; the labs are {known}.", name=name, known=names))
    return matches[0]


def neighbours(lab: Lab, known: list[Lab] | None = None) -> tuple[Lab | None, Lab | None]:
    """The labs before and after among `known` (default: those in the lab's language), None at the ends."""
    known = known or labs(lab.root, lab.language)
    at = [one.id for one in known].index(lab.id)
    return (known[at - 1] if at else None), (known[at + 1] if at + 1 < len(known) else None)


def _lab(path: Path, root: Path) -> Lab:
    *parts, _ = path.relative_to(root).parts
    code = parts.pop(0) if parts and parts[0] in LANGUAGES else ENGLISH
    number = path.stem.split("_")[0]
    if not parts:
        return Lab(number, path, root, code)
    part = parts[0].split("_")[0] if parts[0].startswith("module") else parts[0]
    return Lab(f"{part}/{number}", path, root, code)


def _paths(lab: Lab) -> set[str]:
    relative = lab.relative.with_suffix("").as_posix()
    return {relative, f"notebooks/{relative}", lab.path.with_suffix("").as_posix().strip("/")}


def _place(lab: Lab) -> tuple[int, str, str]:
    part = lab.id.rpartition("/")[0]
    return (ORDER.index(part) if part in ORDER else len(ORDER), part, lab.id)

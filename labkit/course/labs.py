"""Where the labs are, in which order, and what they are called.

A lab is a notebook whose file name begins with its number: `00_start_here.ipynb` is lab `00`,
`module04_quantization/02_llamacpp.ipynb` is lab `module04/02`.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from labkit.types import LabkitError

ORDER = ("", "module03", "module04", "module05", "phi_family")  # folders, in the order they are meant to be taken


@dataclass(frozen=True)
class Lab:
    """One notebook of the course."""

    id: str  # "module04/02"
    path: Path  # the notebook file
    root: Path  # the folder all labs are under

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
    wanted = "the notebooks with solutions" if solutions else "the notebooks"
    raise LabkitError(
        f"Cannot find {wanted} in {given or f'{checkout / inside} or {Path.cwd() / inside}'}; "
        "run from a checkout of the repository, or set LABKIT_NOTEBOOKS to its notebooks folder."
    )


def labs(root: Path | None = None) -> list[Lab]:
    """Every lab under `root`, in course order."""
    root = root or folder()
    files = [p for p in root.glob("**/[0-9]*.ipynb") if ".ipynb_checkpoints" not in p.parts]
    found = [Lab(_id(p.relative_to(root)), p, root) for p in files]
    return sorted(found, key=_place)


def find(name: str, root: Path | None = None) -> Lab:
    """The lab called `name`: an id, a file name or a path, with or without `.ipynb`."""
    known = labs(root)
    wanted = str(name).replace("\\", "/").removesuffix(".ipynb").strip("/")
    matches = [lab for lab in known if wanted in _names(lab)]
    if len(matches) != 1:
        raise LabkitError(f"There is no lab {name!r}; the labs are {', '.join(lab.id for lab in known)}.")
    return matches[0]


def neighbours(lab: Lab) -> tuple[Lab | None, Lab | None]:
    """The lab before and the lab after, None at the ends."""
    known = labs(lab.root)
    at = [one.id for one in known].index(lab.id)
    return (known[at - 1] if at else None), (known[at + 1] if at + 1 < len(known) else None)


def _id(relative: Path) -> str:
    number = relative.stem.split("_")[0]
    if relative.parent == Path("."):
        return number
    part = relative.parts[0]
    return f"{part.split('_')[0] if part.startswith('module') else part}/{number}"


def _names(lab: Lab) -> set[str]:
    relative = lab.relative.with_suffix("").as_posix()
    return {lab.id, lab.key, relative, lab.path.stem, lab.path.with_suffix("").as_posix(), f"notebooks/{relative}"}


def _place(lab: Lab) -> tuple[int, str, str]:
    part = lab.id.rpartition("/")[0]
    return (ORDER.index(part) if part in ORDER else len(ORDER), part, lab.id)

"""What an error means and what to do about it: `labkit explain "error text"`, from `labkit/data/troubleshooting.json`.

An entry of that file holds `id`, `by` (whose words they are), `example` (the text as it appears), `pattern` (a regular
expression searched for in what was given), `means` and `do`. `means` and `do` are English and go through the catalogue.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from labkit._files import read_json
from labkit._say import emit
from labkit.i18n import tr
from labkit.types import LabkitError

TABLE = Path(__file__).parent / "data" / "troubleshooting.json"
COLOUR = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


@dataclass(frozen=True)
class Entry:
    """One row of the table."""

    id: str
    by: str  # "labkit", "pip", "Python", an engine: who writes this text
    example: str
    pattern: str
    means: str
    do: str

    def found_in(self, text: str) -> bool:
        return re.search(self.pattern, text, re.IGNORECASE) is not None


@cache
def entries() -> tuple[Entry, ...]:
    """The whole table, in its own order: the commonest troubles of each kind first."""
    return tuple(Entry(**row) for row in read_json(TABLE, "Troubleshooting table")["entries"])


def explain(text: str) -> list[Entry]:
    """The entries whose pattern occurs in an error text of any length, such as a whole traceback, in table order."""
    plain = _plain(text)
    return [entry for entry in entries() if entry.found_in(plain)]


def nearest(text: str, n: int = 3) -> list[Entry]:
    """At most `n` entries that share the most words with the text, for when none matches."""
    given = _words(text)
    scored = [(len(given & (words := _words(entry.example))) / len(given | words), entry) for entry in entries()]
    best = sorted((pair for pair in scored if pair[0] > 0), key=lambda pair: -pair[0])
    return [entry for _, entry in best[:n]]


def _plain(text: str) -> str:
    """Without terminal colours and line breaks: what is copied from a terminal breaks anywhere."""
    return " ".join(COLOUR.sub("", text).split())


def _words(text: str) -> set[str]:
    return set(re.findall(r"[a-z_]{3,}", _plain(text).lower()))


# --- the command -------------------------------------------------------------------------------------------------


def options(one: argparse.ArgumentParser) -> None:
    one.add_argument("text", nargs="*", metavar="TEXT", help="the error, in quotes; - reads it from standard input")
    one.add_argument("--all", action="store_true", help="show the whole table")
    one.add_argument("--json", action="store_true")


def command(chosen: argparse.Namespace) -> int:
    """Say what an error text means and what to do about it."""
    text = sys.stdin.read() if chosen.text == ["-"] else " ".join(chosen.text)
    if not chosen.all and not text.strip():
        raise LabkitError('No error text was given; expected it in quotes: labkit explain "Illegal instruction".')
    found = list(entries()) if chosen.all else explain(text)
    near = [] if found else nearest(text)
    said = {"found": [_shown(entry) for entry in found], "nearest": [entry.example for entry in near]}
    emit(chosen, said, _told(found, near))
    return 0 if found else 1


def _shown(entry: Entry) -> dict[str, str]:
    return {"id": entry.id, "by": entry.by, "example": entry.example, "means": tr(entry.means), "do": tr(entry.do)}


def _told(found: Sequence[Entry], near: Sequence[Entry]) -> str:
    if found:
        return "\n\n".join(f"{e.example}\n  {tr('It means:')} {tr(e.means)}\n  {tr('Do:')} {tr(e.do)}" for e in found)
    said = [tr("The table has no entry for this text. `labkit doctor` looks at the whole machine.")]
    return "\n".join(said + [f"  {tr('Near to it:')} {entry.example}" for entry in near])

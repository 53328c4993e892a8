"""The course's terms in English and Brazilian Portuguese: `labkit.glossary("KL divergence")`, or all of them.

The entries are `labkit/data/glossary.json`; `notebooks/glossary.md` is made from them with the notebooks.
"""

from __future__ import annotations

import difflib
import html
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from labkit.i18n import ENGLISH, language, tr
from labkit.types import LabkitError

FILE = Path(__file__).parent / "data" / "glossary.json"


@dataclass(frozen=True)
class Term:
    """One entry; both meanings are one sentence."""

    term: str
    pt: str
    means: str
    means_pt: str
    taught: tuple[str, ...]  # ids of the labs that teach it

    @property
    def meaning(self) -> str:
        """The meaning in the language in use."""
        return self.means if language() == ENGLISH else self.means_pt


class Terms(tuple[Term, ...]):
    """Entries that show themselves as a table."""

    def __repr__(self) -> str:
        return "\n".join(f"{one.term} | {one.pt}: {one.meaning} ({', '.join(one.taught)})" for one in self)

    def _repr_html_(self) -> str:
        head = "".join(f"<th scope='col'>{name}</th>" for name in ("English", "português", tr("meaning"), tr("labs")))
        rows = "".join(f"<tr>{''.join(_cells(one))}</tr>" for one in self)
        caption = f"<caption>{tr('Glossary')}</caption>"
        return f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


def glossary(term: str | None = None) -> Terms:
    """All terms, or those whose English or Portuguese name contains `term`. Error: none does."""
    if term is None:
        return terms()
    wanted = str(term).strip().casefold()
    names = {name.casefold(): one for one in terms() for name in (one.pt, one.term)}
    found = [names[wanted]] if wanted in names else [one for one in terms() if wanted in f"{one.term}|{one.pt}".casefold()]
    if not wanted or not found:
        close = difflib.get_close_matches(wanted, names, n=3, cutoff=0.5)
        near = ", ".join(dict.fromkeys(names[name].term for name in close))
        hint = tr("near to it: {names}", names=near) if near else tr("labkit.glossary() shows all")
        raise LabkitError(tr("The glossary has no term {term!r}; {hint}.", term=term, hint=hint))
    return Terms(found)


@cache
def terms() -> Terms:
    """Every entry, in the alphabetical order of the English terms."""
    entries = json.loads(FILE.read_text(encoding="utf-8"))
    known = [Term(**(entry | {"taught": tuple(entry["taught"])})) for entry in entries]
    return Terms(sorted(known, key=lambda one: one.term.casefold()))


def page(links: dict[str, str]) -> str:
    """The glossary as a Markdown page in both languages; `links`: lab id -> where its notebook is."""
    lines = ["# Glossary / Glossário", "", "| English | Português | Meaning | Significado | Labs |", "|---|---|---|---|---|"]
    for one in terms():
        labs = ", ".join(f"[{lab}]({links[lab]})" if lab in links else lab for lab in one.taught)
        lines.append(f"| **{one.term}** | **{one.pt}** | {one.means} | {one.means_pt} | {labs} |")
    return "\n".join(lines) + "\n"


def _cells(one: Term) -> list[str]:
    name = f"<th scope='row'>{html.escape(one.term)}</th>"
    return [name, *(f"<td>{html.escape(text)}</td>" for text in (one.pt, one.meaning, ", ".join(one.taught)))]

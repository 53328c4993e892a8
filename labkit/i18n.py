"""Learner-visible text in the learner's language: `tr("English text with {name}", name=…)`.

The English text is the key (gettext's way); translations are in `labkit/data/locale/<language>.po`, read at first use.
The language is LABKIT_LANG, else the one chosen in a lab's start cell, else that of the notebook, else English.
`python -m labkit.messages` keeps the catalogues in step with the source.
"""

from __future__ import annotations

import contextlib
import gettext
import io
import os
from collections.abc import Iterator
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import Any

from labkit.types import LabkitError

FOLDER = Path(__file__).parent / "data" / "locale"
ENGLISH = "en"
LANGUAGES = {ENGLISH: "English", "pt_BR": "Português (Brasil)"}  # code -> its own name
_speaking: ContextVar[str] = ContextVar("_speaking", default="")
_of_notebook = ENGLISH


def tr(text: str, /, **values: Any) -> str:
    """`text` in the learner's language, {placeholders} filled with `values`; without values, braces stay as they are."""
    said = _catalogue(language()).gettext(text) if text else ""
    return said.format(**values) if values else said


def trn(one: str, many: str, n: int, /, **values: Any) -> str:
    """`one` or `many`, as the language's plural rule says for `n`; {n} and `values` are filled in."""
    return _catalogue(language()).ngettext(one, many, n).format(n=n, **values)


def noop(text: str) -> str:
    """Mark a constant for translation; whoever shows it calls `tr` on it."""
    return text


def language() -> str:
    """The code of the language in use, a key of LANGUAGES."""
    if asked := _speaking.get() or os.environ.get("LABKIT_LANG"):
        return known(asked)
    return _kept(os.environ.get("LABKIT_PROGRESS"), os.environ.get("LABKIT_HOME")) or _of_notebook


def html_language() -> str:
    """The language in use as HTML's `lang` attribute wants it, for screen readers that change their voice: "pt-BR"."""
    return language().replace("_", "-")


def known(name: str) -> str:
    """The code in LANGUAGES for a name such as "pt-br", "pt_BR.UTF-8" or "pt". Error: a language we do not have."""
    wanted = str(name).partition(".")[0].replace("-", "_").lower()
    codes = [code for code in LANGUAGES if wanted in (code.lower(), code.split("_")[0])]
    if not codes:
        have = ", ".join(f"{code} ({title})" for code, title in LANGUAGES.items())
        raise LabkitError(f"There is no language {name!r}; labkit speaks {have}: set LABKIT_LANG to one of these codes.")
    return codes[0]


def choose(name: str) -> str:
    """Use this language from now on, in every lab, and return its code. LABKIT_LANG goes before the choice."""
    from labkit.course import progress

    code = known(name)
    progress.note("settings", "language", value=code)
    _kept.cache_clear()
    return code


def follow(name: str) -> None:
    """Use the language of the open notebook where the learner has not chosen any."""
    global _of_notebook
    _of_notebook = known(name)
    _kept.cache_clear()  # another notebook may have changed the choice


@contextlib.contextmanager
def speaking(name: str) -> Iterator[None]:
    """A language for the lines within, whatever the learner's is: for pages that are written in it."""
    token = _speaking.set(known(name))
    try:
        yield
    finally:
        _speaking.reset(token)


@cache
def _kept(*_where: str | None) -> str | None:
    """The choice in the progress file these variables lead to; read once, as panels ask at every step of a slider."""
    from labkit.course import progress

    try:
        choice = progress.read()["settings"].get("language", {}).get("value")
    except OSError:  # a home that cannot be read is told of by whoever needs it
        return None
    return choice if choice in LANGUAGES else None  # a later version may know more languages


@cache
def _catalogue(code: str) -> gettext.NullTranslations:
    if code == ENGLISH:
        return gettext.NullTranslations()
    from babel.messages.mofile import write_mo
    from babel.messages.pofile import read_po

    compiled = io.BytesIO()
    with open(FOLDER / f"{code}.po", "rb") as file:
        write_mo(compiled, read_po(file, locale=code))
    compiled.seek(0)
    return gettext.GNUTranslations(compiled)

"""Every learner-visible text of the package, in step with the catalogues: `python -m labkit.messages [--check]`.

Texts are the literals in `tr(…)`, `trn(…)` and `noop(…)`, titles and hints of `@exercise(…)`, titles of `Metric(…)`, and
what the quiz files and the troubleshooting table say. Writing adds what is new to `labkit/data/locale/*.po`, without a translation, and drops what is gone.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from babel.messages.catalog import Catalog
from babel.messages.pofile import read_po, write_po

from labkit.i18n import ENGLISH, FOLDER, LANGUAGES
from labkit.types import LabkitError

PACKAGE = Path(__file__).parent
ARGUMENTS = {"tr": (0,), "trn": (0, 1), "noop": (0,), "exercise": (1, "hints"), "Metric": (0,)}  # which hold texts
DATA = {"quizzes/*.json": ("ask", "text", "why"), "troubleshooting.json": ("means", "do")}  # keys that hold texts
HEADER = """msgid ""
msgstr ""
"Language: {language}\\n"
"Plural-Forms: {plurals}\\n"
"Content-Type: text/plain; charset=utf-8\\n"

"""  # babel's own has the time of writing in it, which would change the file at every run
Text = str | tuple[str, str]  # one text, or singular and plural


def source() -> dict[Text, list[str]]:
    """Every text with the files it stands in, in the order of the files."""
    found: dict[Text, list[str]] = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        for text in _python(file, _name(file)):
            found.setdefault(text, []).append(_name(file))
    for pattern, keys in DATA.items():
        for file in sorted((PACKAGE / "data").glob(pattern)):
            for text in _data(json.loads(file.read_text(encoding="utf-8")), keys):
                found.setdefault(text, []).append(_name(file))
    return {text: list(dict.fromkeys(files)) for text, files in found.items()}


def _name(file: Path) -> str:
    return file.relative_to(PACKAGE.parent).as_posix()


def catalogue(code: str) -> Catalog:
    """The translations of one language as they are on disk."""
    with open(FOLDER / f"{code}.po", "rb") as file:
        return read_po(file, locale=code)


def problems(code: str) -> list[str]:
    """What is wrong with a catalogue, one line each: texts missing, not translated, gone, or with other {placeholders}."""
    wanted, have = source(), {message.id: message for message in catalogue(code) if message.id}
    said = [f"missing: {text!r}" for text in wanted if text not in have]
    said += [f"no longer in the source: {text!r}" for text in have if text not in wanted]
    for text, message in have.items():
        translations = message.string if isinstance(message.string, tuple) else (message.string,)
        if message.fuzzy or not all(translations):
            said.append(f"not translated: {text!r}")
        originals = text if isinstance(text, tuple) else (text,)
        allowed = [placeholders(original) for original in originals]
        said += [f"other placeholders in {one!r}" for one in translations if one and placeholders(one) not in allowed]
    return said


def placeholders(text: str) -> list[str]:
    """The {fields} of a text, with their formats."""
    return sorted(re.findall(r"\{[^{}]*\}", text))


def update(code: str) -> None:
    """Add to a catalogue what is missing, untranslated, and drop what is no longer in the source."""
    template = Catalog()
    for text, files in source().items():
        template.add(text, locations=[(file, None) for file in files])
    kept = catalogue(code)
    kept.update(template, no_fuzzy_matching=True)
    with open(FOLDER / f"{code}.po", "wb") as file:
        file.write(HEADER.format(language=code, plurals=kept.plural_forms).encode())
        write_po(file, kept, width=120, omit_header=True, include_lineno=False, ignore_obsolete=True)


def _python(file: Path, name: str) -> Iterator[Text]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    for call in calls:
        texts = [_literals(part, f"{name}:{call.lineno}") for part in _parts(call, ARGUMENTS.get(call.func.id, ()))]
        if call.func.id == "trn":
            yield (texts[0][0], texts[1][0])
        else:
            yield from (text for group in texts for text in group)


def _parts(call: ast.Call, places: tuple[int | str, ...]) -> Iterator[ast.expr]:
    named = {keyword.arg: keyword.value for keyword in call.keywords}
    for place in places:
        if isinstance(place, str) and place in named:
            yield named[place]
        elif isinstance(place, int) and place < len(call.args):
            yield call.args[place]


def _literals(node: ast.expr, where: str) -> list[str]:
    """The texts written out in an argument; a variable has none, its value is marked with `noop` where it is written."""
    if isinstance(node, ast.JoinedStr | ast.BinOp):
        raise LabkitError(f"{where}: a text to translate must be a plain literal with {{placeholders}}, not put together.")
    if isinstance(node, ast.Tuple | ast.List):
        return [text for one in node.elts for text in _literals(one, where)]
    if isinstance(node, ast.IfExp):
        return [*_literals(node.body, where), *_literals(node.orelse, where)]
    return [node.value] if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value else []


def _data(part: Any, keys: tuple[str, ...]) -> Iterator[str]:
    """The texts under these keys, at any depth."""
    if isinstance(part, list):
        for one in part:
            yield from _data(one, keys)
    elif isinstance(part, dict):
        for key, value in part.items():
            yield from [value] if key in keys and isinstance(value, str) else _data(value, keys)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m labkit.messages", description="Keep the translations complete.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when a catalogue is not in step")
    check = parser.parse_args(argv).check
    left = []
    for code in (code for code in LANGUAGES if code != ENGLISH):
        if not check and any(not line.startswith(("not translated", "other")) for line in problems(code)):
            update(code)
        left += [f"{code}: {line}" for line in problems(code)]
    print("\n".join(left) or "All catalogues are complete.")
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())

"""`labkit explain`: every entry is found by its own text, and labkit's texts are still what labkit says.

`python tests/test_explain.py` writes the troubleshooting table of README from labkit/data/troubleshooting.json.
"""

from __future__ import annotations

import ast
import io
import json
import re
from pathlib import Path

import pytest

from labkit import cli
from labkit.explain import entries, explain, nearest
from labkit.types import LabkitError

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
SECTION = re.compile(r"(## Troubleshooting, by exact text\n\n).*?(?=\n## )", re.S)


def readme_table() -> str:
    rows = [f"| {_code(entry.example)} | {_cell(entry.means)} | {_cell(entry.do)} |" for entry in entries()]
    lead = '`labkit explain "error text"` looks a text up in this table; a whole traceback will do.\n'
    return "\n".join([lead, "| you see | it means | do |", "|---|---|---|", *rows, ""])


def _code(text: str) -> str:
    fence = "``" if "`" in text else "`"
    space = " " if fence == "``" else ""
    return _cell(f"{fence}{space}{text}{space}{fence}")


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def templates() -> list[re.Pattern[str]]:
    """Every longer text in labkit's source as a pattern, its {fields} matching anything."""
    found = []
    for file in (ROOT / "labkit").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [re.escape(p.value) if isinstance(p, ast.Constant) else ".+" for p in node.values]
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                parts = [".+" if i % 2 else re.escape(p) for i, p in enumerate(re.split(r"(\{[^{}]*\})", node.value))]
            else:
                continue
            if sum(len(part) for part in parts if part != ".+") >= 12:
                found.append(re.compile("".join(parts)))
    return found


@pytest.mark.parametrize("entry", entries(), ids=lambda entry: entry.id)
def test_every_entry_is_found_by_its_own_text(entry):
    assert entry in explain(entry.example)
    traceback = f"Traceback (most recent call last):\n  File x, line 3\n\x1b[31m{entry.example}\x1b[0m\n"
    assert entry in explain(traceback)
    assert entry.means and entry.do and entry.means[-1] != "." and entry.do[-1] != "."


def test_an_entry_does_not_claim_the_texts_of_many_others():
    claimed = {one.id: [other.id for other in entries() if other is not one and one.found_in(other.example)] for one in entries()}
    assert not {name: others for name, others in claimed.items() if len(others) > 1}


def test_ids_are_unique_and_ordinary_output_matches_nothing():
    assert len({entry.id for entry in entries()}) == len(entries()) >= 30
    for text in ("", "all is well", "tensor of shape (3, 4)", "Report: reports/ci/index.html", "14 passed in 3.2 s"):
        assert explain(text) == []


def test_labkits_own_texts_are_what_labkit_says():
    known = templates()
    lost = [e.id for e in entries() if e.by == "labkit" and not any(one.search(e.example) for one in known)]
    assert not lost, f"these texts are no longer in labkit's source: {lost}"


def test_a_real_error_is_explained(home: Path):
    import labkit

    with pytest.raises(LabkitError) as caught:
        labkit.checkpoint("no-such-model")
    assert [entry.id for entry in explain(str(caught.value))] == ["unknown-checkpoint"]


def test_lines_broken_by_a_terminal():
    broken = "The kernel died, probably\n   out of memory: limit 2 GB"
    assert [entry.id for entry in explain(broken)] == ["out-of-memory"]


def test_the_command(capsys, monkeypatch):
    assert cli.main(["explain", "Illegal instruction (core dumped)"]) == 0
    assert "open_llama" in capsys.readouterr().out
    assert cli.main(["explain", "--json", "Illegal", "instruction"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert [row["id"] for row in said["found"]] == ["illegal-instruction"] and said["nearest"] == []
    monkeypatch.setattr("sys.stdin", io.StringIO("E: No space left on device\n"))
    assert cli.main(["explain", "-"]) == 0 and "labkit clean" in capsys.readouterr().out
    assert cli.main(["explain", "--all"]) == 0 and capsys.readouterr().out.count("It means:") == len(entries())


def test_an_unknown_text_says_so_and_what_is_near(capsys):
    assert cli.main(["explain", "the kernel was stopped by its memory limit"]) == 1
    said = capsys.readouterr().out
    assert "no entry" in said and "labkit doctor" in said and "out of memory" in said
    assert nearest("zzz qqq") == []
    assert cli.main(["explain"]) == 2 and "in quotes" in capsys.readouterr().err


def test_readme_shows_the_same_table():
    shown = SECTION.search(README.read_text(encoding="utf-8"))
    assert shown and shown.group(0) == shown.group(1) + readme_table(), "run: python tests/test_explain.py"


if __name__ == "__main__":
    text = README.read_text(encoding="utf-8")
    README.write_text(SECTION.sub(lambda found: found.group(1) + readme_table(), text), encoding="utf-8")

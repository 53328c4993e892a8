"""The checks of lab module03/02 judge values: near misses are refused, other right ways pass."""

from __future__ import annotations

import contextlib
import hashlib
import ipaddress
import itertools
import json

import pytest

from labkit.course import exercises
from labkit.course.checks.module03_02 import NotYet, pattern


def state(name, answer):
    return exercises.judge(name, answer).state


def first_line_pace(lines):
    parts = [json.loads(line) for line in lines]
    return "".join(part["response"] for part in parts), parts[-1]["eval_count"] / parts[-1]["eval_duration"]


def milliseconds(lines):
    text, pace = first_line_pace(lines)
    return text, pace * 1e9 / 1e3


FILE = 'FROM edgehome\nPARAMETER num_ctx 512\nPARAMETER num_predict 64\nPARAMETER temperature 0\nPARAMETER stop "<|im_end|>"\nSYSTEM be brief\n'


def spaced(schema):
    if "enum" in schema:
        return "(" + " | ".join(json.dumps(json.dumps(word)) for word in schema["enum"]) + ")"
    if "properties" not in schema:
        return '"-"? [0-9]+'
    return '"{" ' + ' ", " '.join(json.dumps(json.dumps(key) + ": ") + " " + spaced(part) for key, part in schema["properties"].items()) + ' "}"'


def torn(ids, journal):
    done = set()
    for line in journal.split(b"\n"):
        with contextlib.suppress(ValueError):
            done.add(json.loads(line)["id"])
    return [one for one in dict.fromkeys(ids) if one not in done]


WRONG = {
    "03.2.1": [first_line_pace, milliseconds, lambda lines: "", lambda lines: ("", 1.0, 2.0)],
    "03.2.2": [FILE.replace("512", "2048"), FILE.replace("num_ctx", "context_length"), FILE + "FILE ./x.pdf\n", FILE.replace("SYSTEM be brief\n", ""),
               FILE.replace("edgehome", "phi4"), FILE.replace('PARAMETER stop "<|im_end|>"\n', ""), FILE + "PARAMETER mirostat 1\n", "", 7],
    "03.2.3": [lambda e, m: (e, {}), lambda e, m: ({k: v for k, v in e.items() if k not in m}, {m[k]: v for k, v in e.items() if k in m}), lambda e, m: e],
    "03.2.4": [spaced, lambda schema: '"x"', lambda schema: ".*", lambda schema: "[^z]*", lambda schema: 7],
    "03.2.5": [lambda body, most: 200, lambda body, most: 413 if len(body) >= most else 200],
    "03.2.6": [torn, lambda ids, journal: ids, lambda ids, journal: sorted(set(ids))],
    "03.2.7": [lambda limit, weights, per, context: (limit - weights) // (per * context), lambda limit, weights, per, context: limit // (weights + per * context)],
    "03.2.8": [lambda a, keep: sum(y - x > keep for x, y in itertools.pairwise(a)) / len(a), lambda a, keep: (1 + sum(y - x >= keep for x, y in itertools.pairwise(a))) / len(a)],
    "03.2.9": [lambda a: [x for x in a if x != "127.0.0.1"], lambda a: [x for x in a if not ipaddress.ip_address(x).is_private]],
    "03.2.10": [len, lambda lines: 0, lambda lines: sum(json.loads(b)["previous"] == hashlib.sha256(a.encode()).hexdigest() for a, b in itertools.pairwise(lines))],
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_near_misses_are_refused(name):
    for answer in WRONG[name]:
        assert state(name, answer) == "not yet", answer


def test_another_way_to_write_a_grammar_passes():
    def other(schema):
        quote = lambda text: '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'  # noqa: E731
        if "enum" in schema:
            return " | ".join(f"( {quote(json.dumps(word))} )" for word in schema["enum"]).join("()")
        if "properties" not in schema:
            return '("0" | "-"? [1-9] [0-9]* | "-0")'
        inner = [quote(f'{"," if i else ""}"{key}":') + " (" + other(part) + ")" for i, (key, part) in enumerate(schema["properties"].items())]
        return 'root ::= "{" ' + "\n ".join(inner) + ' "}"' if False else '"{" ' + " ".join(inner) + ' "}"'

    assert state("03.2.4", other) == "passed"


def test_other_right_answers_pass():
    assert state("03.2.1", lambda lines: [*first_line_pace(lines)[:1], 1e9 * first_line_pace(lines)[1]]) == "passed"
    reordered = "\n".join(sorted(FILE.replace("edgehome", "edgehome:latest").splitlines(), reverse=True))
    assert state("03.2.2", reordered) == "passed"


def test_what_is_no_grammar_is_said():
    for text in ("{x}", '"open', "rule", '("a"'):
        with pytest.raises(NotYet):
            pattern(text)

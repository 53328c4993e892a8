"""Lab 00, start here: sizes, answers as data, scoring, rounding."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from labkit.course.compare import function, same
from labkit.course.exercises import exercise


@exercise(
    "00.1",
    "Megabytes from weights and bits",
    hints=(
        "A weight of 32 bits takes 4 bytes, because a byte has 8 bits.",
        "Bytes = weights * bits / 8.",
        "A megabyte here is 1,000,000 bytes: divide by 1e6.",
    ),
)
def _(answer: Any) -> None:
    cases = [(1_000_000, 8), (5_000_000, 32), (5_246_208, 4.5), (3_800_000_000, 4.85)]
    function(answer, lambda weights, bits: weights * bits / 8 / 1e6, cases, rel=1e-6)


@exercise(
    "00.2",
    "Bits a weight really takes",
    hints=(
        "It is the way back from 00.1: bytes are given, bits are asked for.",
        "A byte has 8 bits; share all bits out among the weights.",
    ),
)
def _(answer: Any) -> None:
    cases = [(4_000, 1_000), (5_584_896, 5_246_208), (2_330_000_000, 3_800_000_000)]
    function(answer, lambda stored, weights: 8 * stored / weights, cases, rel=1e-6)


def _command(text: str) -> dict | None:
    try:
        found = json.loads(text)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


@exercise(
    "00.3",
    "A reply as a command",
    hints=(
        "json.loads turns text into Python values; look at what it raises for text that is not JSON.",
        "Put it in try, and return None in except ValueError.",
        "A list or a number is JSON too, but no command: isinstance(found, dict) tells.",
    ),
)
def _(answer: Any) -> None:
    texts = ['{"a": 1, "b": ["x", 2]}', '{"on": true}', "turn on", "", '{"a": 1', "[1, 2]", "7", "{}"]
    function(answer, _command, [(text,) for text in texts], compare=_same_or_none)


def _same_or_none(got: Any, expected: Any, what: str) -> None:
    """None is an answer here, not an unfinished stub."""
    same("None" if got is None else got, "None" if expected is None else expected, what)


def _share(replies: list[str], answers: list[dict]) -> float:
    return sum(_command(reply) == answer for reply, answer in zip(replies, answers, strict=True)) / len(answers)


@exercise(
    "00.4",
    "The share of exact matches",
    hints=(
        "zip(replies, answers) walks through both lists at once.",
        "Compare json.loads(reply) with the answer, not the texts: spaces and order of keys do not matter.",
        "A reply that is not JSON counts as wrong; it must not stop the count.",
    ),
)
def _(answer: Any) -> None:
    wanted = [{"on": True, "room": "hall"}, {"on": False}, {"n": 5}, {"n": 6}, {"n": 7}]
    right = ['{"room":"hall", "on":true}', '{"on": false}', '{"n": 5}', '{"n": 6}', '{"n": 7}']
    cases = [
        (right, wanted),
        ([*right[:3], "no", '{"n": 8}'], wanted),
        (["", "?", "[]", "{}", "5"], wanted),
        ([right[0], right[2]], [wanted[0], wanted[1]]),
    ]
    function(answer, _share, cases, rel=1e-9)


@exercise(
    "00.5",
    "Round to the nearest step",
    hints=(
        "How many steps fit into the value? Divide.",
        "np.round gives the nearest whole number of steps.",
        "Multiply by the step again to come back to the value's own scale.",
    ),
)
def _(answer: Any) -> None:
    rng = np.random.default_rng(5)
    cases = [
        (rng.normal(size=12), 0.25),
        (rng.normal(size=(3, 4)).astype(np.float32), 0.1),
        (np.array([-0.9, 0.0, 2.6]), 1.0),
    ]
    function(answer, lambda values, step: np.round(values / step) * step, cases, rel=1e-5, abs=1e-6)

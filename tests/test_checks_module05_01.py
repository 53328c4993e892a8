"""The exercises of lab module05/01: likely mistakes are told apart from right answers (the solution run proves those pass)."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import pytest

from labkit.course import exercises


def _in_order_of_the_dict(files):
    lines = [f"{name} {hashlib.sha256(data).hexdigest()}\n" for name, data in files.items()]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _deep_first(made_from, digest):
    return [digest, *(found for one in made_from[digest] for found in _deep_first(made_from, one))]


def _one_step_back(moves):
    points = [version for what, version in moves if what == "point"]
    return points[-1 - (moves[-1][0] == "back")]


def _whole_file(old, new, block):
    return 0 if old == new else len(new)


def _magnitude(weights):
    return np.where(np.abs(weights) >= np.median(np.abs(weights)), weights, 0)


MISTAKES = {
    "05.1.1": (lambda said, honest: said / honest, "expected"),
    "05.1.2": (_in_order_of_the_dict, "expected"),
    "05.1.3": (_deep_first, "expected"),
    "05.1.4": (_one_step_back, "expected"),
    "05.1.5": (_whole_file, "expected"),
    "05.1.6": (lambda p, q, z: math.ceil(z**2 * p * (1 - p) / (p - q) ** 2), "expected"),
    "05.1.7": (_magnitude, "differ"),
    "05.1.8": (lambda bits: 1 - 1 / bits, "expected"),
    "05.1.9": (lambda per_hour, seconds: per_hour * seconds, "expected"),
    "05.1.10": (lambda fixed, energy, cloud: fixed / (cloud / 1e6 - energy), "expected inf"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_likely_mistake_is_not_yet(name):
    answer, said = MISTAKES[name]
    verdict = exercises.judge(name, answer)
    assert verdict.state == "not yet" and said in verdict.message, verdict


@pytest.mark.parametrize("name", MISTAKES)
def test_what_was_not_begun_is_not_started(name):
    def stub(*args):
        return ...

    assert exercises.judge(name, stub).state == exercises.judge(name, ...).state == "not started"


def test_answers_in_another_style_pass():
    def depth(made_from, digest):
        seen = {digest: None}
        for one in seen_again(seen):
            seen |= dict.fromkeys(made_from[one])
        return tuple(seen)

    def seen_again(seen):
        at = 0
        while at < len(seen):
            yield list(seen)[at]
            at += 1

    assert exercises.judge("05.1.3", depth)
    assert exercises.judge("05.1.7", lambda w: w * (np.argsort(np.argsort(-abs(w.reshape(len(w), -1, 4)))) < 2).reshape(w.shape))

"""Checks of the lab on distillation: likely wrong answers are refused, other right ones pass."""

from __future__ import annotations

import numpy as np
import pytest

from labkit.course.exercises import judge


def soft(z, t):
    e = np.exp(np.asarray(z, float) / t - np.max(np.asarray(z, float) / t, -1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def no_maximum(z, t):
    with np.errstate(all="ignore"):
        e = np.exp(np.asarray(z, float) / t)
        return e / e.sum(-1, keepdims=True)


def plain_kl(p, q):
    with np.errstate(all="ignore"):
        return (p * np.log(p / q)).sum(-1)


def lengths(pieces):
    return [sum(map(len, pieces[: i + 1])) for i in range(len(pieces))]


WRONG = {
    "05.2.1": [no_maximum, lambda z, t: soft(np.asarray(z, float) * t, 1), lambda z, t: soft(z, 1),
               lambda z, t: np.exp(np.asarray(z) / t - np.max(z) / t) / np.exp(np.asarray(z) / t - np.max(z) / t).sum()],
    "05.2.2": [plain_kl, lambda p, q: plain_kl(q, np.maximum(p, 1e-12)), lambda p, q: -(p * np.log(q)).sum(-1)],
    "05.2.3": [lambda s, t, T: (soft(s, T) - soft(t, T)) / T, lambda s, t, T: T**2 * (soft(s, T) - soft(t, T)),
               lambda s, t, T: T * (soft(t, T) - soft(s, T))],
    "05.2.4": [lambda a, n: max(set(a), key=a.count), lambda a, n: a[0] if a.count(a[0]) >= n else ""],
    "05.2.5": [lambda q: sorted(set(q)), lambda q: list({x.lower(): x for x in q}.values())],
    "05.2.6": [lambda s, t, w: np.mean((s @ w - t) ** 2), lambda s, t, w: np.mean((s @ w - t) ** 2 / t**2)],
    "05.2.7": [lambda ts, T: soft(np.mean(ts, axis=0), T), lambda ts, T: soft(ts[0], T)],
    "05.2.8": [lambda a, b: sorted(set(a) & set(b)), lambda a, b: list(range(1, len("".join(a)) + 1))],
    "05.2.9": [lambda n, s: n * s, lambda n, s: 3600 / s, lambda n, s: n / 60 * s],
    "05.2.10": [lambda a, b: b / a, lambda a, b: (1 - a) / (1 - b), lambda a, b: a - b],
}  # fmt: skip
RIGHT = {
    "05.2.1": lambda z, t: soft(z, t).tolist(),
    "05.2.4": lambda a, n: next((x for x in a if a.count(x) >= n and a.count(x) == max(map(a.count, a))), ""),
    "05.2.7": lambda ts, T: sum(soft(x, T) for x in ts) / len(ts),
    "05.2.8": lambda a, b: [x for x in lengths(a) if x in lengths(b)],
}


@pytest.mark.parametrize(("name", "answer"), [(n, a) for n, answers in WRONG.items() for a in answers])
def test_a_wrong_answer_is_refused_with_a_sentence(name, answer):
    verdict = judge(name, answer)
    assert verdict.state == "not yet" and "expected" in verdict.message, verdict


@pytest.mark.parametrize("name", RIGHT)
def test_another_way_to_write_it_passes(name):
    assert judge(name, RIGHT[name]).state == "passed"

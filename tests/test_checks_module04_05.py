"""The exercises of lab module04/05: likely mistakes are told apart from right answers (the solution run proves those pass)."""

from __future__ import annotations

import numpy as np
import pytest

from labkit.course import exercises


def _twice(graph, name):  # forgets what was computed
    work, inputs = graph[name]
    return work(*(_twice(graph, one) for one in inputs))


def _symmetric(w, bits):
    return (w.max() - w.min()) / (2**bits - 1), w.min()


MISTAKES = {
    "04.5.1": (lambda g, n, b, c: g * 1e9 / (n * b + c), "expected"),
    "04.5.2": (_twice, "once each"),
    "04.5.3": (_symmetric, "scale"),
    "04.5.4": (lambda codes, bits: codes.astype(np.uint32), "shape"),
    "04.5.5": (lambda codes, exponent: codes * 2.0 ** (exponent - 127), "differ"),
    "04.5.6": (lambda bits, group, scale_bits=16: bits + scale_bits / group, "expected"),
    "04.5.7": (lambda cached, prompt: min(len(cached), len(prompt) - 1), "expected"),
    "04.5.8": (lambda w, a, b, s: w + (a @ b).T, "differ"),
    "04.5.9": (lambda shapes, r: sum(r * o * i for o, i in shapes), "expected"),
    "04.5.10": (lambda train, heldout: [t for t in heldout if t in train], "expected"),
    "04.5.11": (lambda parameters, bits, cache, limit: max(parameters, key=parameters.get), "expected"),
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


def test_an_evaluation_in_another_style_passes():
    def evaluate(graph, name):
        values = {}
        while name not in values:
            ready = [n for n, (_, inputs) in graph.items() if n not in values and all(i in values for i in inputs)]
            values |= {n: graph[n][0](*(values[i] for i in graph[n][1])) for n in ready}
        return values[name]

    assert exercises.judge("04.5.2", evaluate)

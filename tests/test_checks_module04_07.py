"""Lab module04/07: the judges pass what is right in any dress, and see the mistakes learners make."""

from __future__ import annotations

import numpy as np
import pytest

from labkit import qnn
from labkit.course import exercises


def verdict(name, answer):
    return exercises.judge(name, answer).state


def layer(x_codes, x_scale, x_offset, w_codes, w_scale, w_offset, bias):
    sums = (x_codes + x_offset) @ (w_codes + w_offset)
    return (sums + np.rint(bias / (x_scale * w_scale))) * x_scale * w_scale


def select(backends, weights):
    able = {n: b for n, b in backends.items() if b["can_run"]}
    return max(able, key=lambda n: sum(weights[m] * s for m, s in able[n]["scores"].items()), default="none")


RIGHT = {
    "04.7.1": [lambda low, high, bits: qnn.grid(low, high, bits)[:2], lambda low, high, bits: list(qnn.grid(low, high, bits)[:2])],
    "04.7.2": [lambda zero_point, bits, signed: -zero_point - signed * 2 ** (bits - 1)],
    "04.7.3": [layer],
    "04.7.5": [lambda ops, supported: 2 * sum(op in supported and (i == 0 or ops[i - 1] not in supported) for i, op in enumerate(ops))],
    "04.7.6": [select],
}
WRONG = {
    "04.7.1": [
        lambda low, high, bits: ((high - low) / (2**bits - 1), round(low / ((high - low) / (2**bits - 1)))),  # 0 left out
        lambda low, high, bits: ((qnn.grid(low, high, bits).scale), -qnn.grid(low, high, bits).offset),  # ONNX's sign
        lambda low, high, bits: (max(-low, high) / (2 ** (bits - 1) - 1), -(2 ** (bits - 1))),  # symmetric
    ],
    "04.7.2": [lambda z, bits, signed: z, lambda z, bits, signed: -z, lambda z, bits, signed: -z - 128 * signed],
    "04.7.3": [
        lambda x, xs, xo, w, ws, wo, bias: ((x + xo) @ (w + wo)) * xs * ws + bias,  # the bias not rounded
        lambda x, xs, xo, w, ws, wo, bias: ((x - xo) @ (w - wo) + np.rint(bias / (xs * ws))) * xs * ws,
        lambda x, xs, xo, w, ws, wo, bias: ((x + xo) @ (w + wo) + np.rint(bias / xs)) * xs * ws,
    ],
    "04.7.4": [lambda entry: set(), lambda entry: {"scale", "offset", "symmetry"}, lambda entry: {"offset"} if entry["offset"][0] > 0 else set()],
    "04.7.5": [lambda ops, supported: sum(op not in supported for op in ops), lambda ops, supported: 2],
    "04.7.6": [lambda backends, weights: max(backends, key=lambda n: sum(weights[m] * s for m, s in backends[n]["scores"].items()))],
}


@pytest.mark.parametrize(("name", "answer"), [(name, one) for name, ones in RIGHT.items() for one in ones])
def test_right_answers_pass(name, answer):
    assert verdict(name, answer) == "passed"


@pytest.mark.parametrize(("name", "answer"), [(name, one) for name, ones in WRONG.items() for one in ones])
def test_mistakes_are_seen(name, answer):
    assert verdict(name, answer) == "not yet"

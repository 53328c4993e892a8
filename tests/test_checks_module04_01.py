"""The exercises of lab module04/01: solutions pass, stubs are not started, and likely mistakes are told apart."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from exercise_cells import cells

from labkit.course import exercises
from labkit.course.generate import stub

LAB = "module04_quantization/01_foundations.ipynb"


@pytest.mark.parametrize("name, answer, source", cells(LAB))
def test_the_solution_passes_and_the_stub_is_not_started(name, answer, source):
    for text, state in ((source, "passed"), (stub(source), "not started")):
        space = {"np": np, "struct": struct}
        exec(text, space)
        assert exercises.judge(name, space[answer]).state == state


def symmetric_with_the_wrong_top(w, bits):
    scale = np.abs(w).max() / 2 ** (bits - 1)
    return np.rint(w / scale), scale


def affine_without_zero_in_range(w, bits):
    scale = (w.max() - w.min()) / (2**bits - 1)
    zero = np.rint(-w.min() / scale)
    return np.clip(np.rint(w / scale) + zero, 0, 2**bits - 1), scale, zero


def groups_with_one_scale(w, bits, group):
    top = 2 ** (bits - 1) - 1
    scale = np.abs(w).max() / top
    return np.clip(np.rint(w / scale), -top, top) * scale


def product_in_int8(x_codes, x_scales, w_codes, w_scales):
    return (x_codes @ w_codes.T) * x_scales * w_scales.T


def ternary_by_the_largest(w):
    scale = np.abs(w).max()
    return np.clip(np.rint(w / scale), -1, 1), scale


def q4_1_with_neighbours_sharing_a_byte(block):
    d, m = struct.unpack("<2e", block[:4])
    pairs = np.frombuffer(block[4:], np.uint8)
    return d * np.stack([pairs & 15, pairs >> 4], axis=1).ravel() + m


@pytest.mark.parametrize(
    "name, answer, said",
    [
        ("04.1.1", lambda byte: (byte & 7) / 8, "expected"),
        ("04.1.2", symmetric_with_the_wrong_top, "codes of"),
        ("04.1.3", affine_without_zero_in_range, "of affine_without_zero_in_range"),
        ("04.1.4", groups_with_one_scale, "first difference"),
        ("04.1.5", lambda bits, group, scale_bits, other_bits: bits, "expected 4.5, got 4"),
        ("04.1.6", product_in_int8, "first difference"),
        ("04.1.7", ternary_by_the_largest, "codes of"),
        ("04.1.7", lambda w: np.sign(w), "expected a tuple (codes, scale)"),
        ("04.1.8", q4_1_with_neighbours_sharing_a_byte, "first difference"),
        ("04.1.9", lambda weights, memory, bandwidth, wanted, ladder: "f16", "expected"),
    ],
)
def test_likely_mistakes_are_told(name, answer, said):
    verdict = exercises.judge(name, answer)
    assert verdict.state == "not yet" and said in verdict.message

"""Lab module04/07, Qualcomm QNN: grids, the two spellings of a zero, sums in whole numbers, encodings, fallback, selection."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np

from labkit.course.compare import NotYet, close, function, same, unfinished
from labkit.course.exercises import exercise
from labkit.i18n import tr


def _grid(low: float, high: float, bits: int) -> tuple[float, int]:
    low, high = min(low, 0.0), max(high, 0.0)
    scale = (high - low) / (2**bits - 1)
    return scale, round(low / scale)


def _whole_offset(got: Any, expected: tuple[float, int], *, what: str) -> None:
    unfinished(got)
    if not isinstance(got, (tuple, list)) or len(got) != 2:
        raise NotYet(tr("{what}: expected two numbers, scale and offset, got {got}", what=what, got=got))
    close(got[0], expected[0], rel=1e-6, what=tr("{what}: the scale", what=what))
    close(got[1], expected[1], what=tr("{what}: the offset", what=what))


@exercise(
    "04.7.1",
    "Scale and offset of a range",
    hints=(
        "A range that does not contain 0 is stretched: low is at most 0, high at least 0.",
        "2**bits codes have 2**bits - 1 steps between them.",
        "The lowest code is 0, so scale * offset is the low end: round(low / scale).",
    ),
)
def _(answer: Any) -> None:
    cases = [(0.0, 6.0, 8), (-1.3, 4.1, 8), (-7.7, 2.2, 16), (0.5, 3.0, 8), (-4.0, -1.0, 4)]
    function(answer, _grid, cases, compare=_whole_offset)


@exercise(
    "04.7.2",
    "From ONNX's zero point to QNN's offset",
    hints=(
        "ONNX subtracts, QNN adds: an unsigned zero point only changes its sign.",
        "A signed code becomes unsigned by adding half the number of codes; so does its zero point.",
        "-(zero_point + 2**(bits - 1)) for signed types",
    ),
)
def _(answer: Any) -> None:
    def reference(zero_point: int, bits: int, signed: bool) -> int:
        return -(zero_point + (2 ** (bits - 1) if signed else 0))

    function(answer, reference, [(0, 8, True), (128, 8, False), (0, 8, False), (-128, 8, True), (29471, 16, False), (3, 4, True)])


def _layer(x_codes, x_scale, x_offset, w_codes, w_scale, w_offset, bias):  # type: ignore[no-untyped-def]
    scale = x_scale * w_scale
    sums = (x_codes + x_offset) @ (w_codes + w_offset) + np.rint(bias / scale)
    return sums * scale


@exercise(
    "04.7.3",
    "A layer in whole numbers",
    hints=(
        "Add the offsets to the codes first; the product of these whole numbers is exact.",
        "A sum has the scale x_scale * w_scale, and so has the bias that is added to it.",
        "Round bias / (x_scale * w_scale), add, and multiply the sums by that scale.",
    ),
)
def _(answer: Any) -> None:
    rng = np.random.default_rng(11)

    def case(rows: int, inner: int, columns: int, scales: Any) -> tuple:
        x, w = rng.integers(0, 2**16, (rows, inner)), rng.integers(0, 2**8, (inner, columns))
        return x, 1.7e-4, -31000, w, scales, -128, 3 * rng.normal(size=columns)

    coarse = (rng.integers(0, 16, (2, 3)), 0.11, -7, rng.integers(0, 16, (3, 2)), 0.3, -8, np.array([0.52, -0.31]))
    cases = [case(3, 8, 4, 2e-3), case(2, 5, 3, np.array([1e-3, 4e-3, 7e-3])), coarse]  # one scale; one a column; a bias that rounds
    function(answer, _layer, cases, rel=1e-9, abs=1e-9)


def _validate(entry: dict[str, Any]) -> set[str]:
    top, middle = 2 ** entry["bw"] - 1, -(2 ** (entry["bw"] - 1))
    found = {"scale"} if any(s <= 0 for s in entry["scale"]) else set()
    found |= {"offset"} if any(not -top <= o <= 0 for o in entry["offset"]) else set()
    return found | ({"symmetry"} if entry["is_sym"] and any(o != middle for o in entry["offset"]) else set())


def _names(got: Any, expected: set[str], *, what: str) -> None:
    unfinished(got)
    if isinstance(got, str) or not isinstance(got, (set, frozenset, list, tuple)):
        raise NotYet(tr("{what}: expected a set of names, got {got}", what=what, got=got))
    same(sorted(map(str, got)), sorted(expected), what)


@exercise(
    "04.7.4",
    "A validator of encodings",
    hints=(
        "scale and offset are lists: one number for a tensor, several for its channels. One bad number is a fault.",
        "Zero must have a code: the offset lies between -(2**bw - 1) and 0.",
        "A symmetric entry of 8 bits has offset -128, of 16 bits -32768.",
    ),
)
def _(answer: Any) -> None:
    rows = [
        (8, False, [0.02], [0]), (8, False, [0.0196], [127]), (8, True, [0.0196], [-128]), (8, True, [0.0196], [-127]),
        (16, False, [1e-4], [-65535]), (8, False, [0.1], [-256]), (4, True, [0.1, -0.2], [-8, -8]), (16, True, [0.0], [5]),
        (8, False, [0.1, 0.2], [-128, 1]),
    ]  # fmt: skip
    cases = [({"bw": bits, "is_sym": sym, "scale": scale, "offset": offset},) for bits, sym, scale, offset in rows]
    function(answer, _validate, cases, compare=_names)


@exercise(
    "04.7.5",
    "Changes of processor",
    hints=(
        "Write down for every operator whether it runs on the HTP, and put a CPU before the first and after the last.",
        "Count the places where two neighbours differ.",
    ),
)
def _(answer: Any) -> None:
    def reference(ops: list[str], supported: set[str]) -> int:
        where = [False, *(op in supported for op in ops), False]
        return sum(a != b for a, b in pairwise(where))

    known = {"MatMul", "Mul", "Add", "Sigmoid"}
    lists = [["MatMul", "Sigmoid", "Mul"], ["MatMul", "Erf", "Mul"], ["Erf", "Erf"], [], ["Erf", "MatMul", "Erf", "Add", "Add", "Erf"]]
    function(answer, reference, [(ops, known) for ops in lists], compare=_count)


def _count(got: Any, expected: int, *, what: str) -> None:
    unfinished(got)
    close(got, expected, what=what)


@exercise(
    "04.7.6",
    "Exclude first, then weigh",
    hints=(
        "Leave out every backend that cannot run the model before any score is computed.",
        "The score is the sum of weight times score over the metrics.",
        "With nobody left, return the word none.",
    ),
)
def _(answer: Any) -> None:
    def reference(backends: dict[str, dict], weights: dict[str, float]) -> str:
        score = {name: sum(weights[m] * s for m, s in one["scores"].items()) for name, one in backends.items() if one["can_run"]}
        return max(score, key=lambda name: score[name]) if score else "none"

    def of(**rows: tuple[bool, float, float]) -> dict[str, dict]:
        return {name: {"can_run": can, "scores": {"power": p, "speed": s}} for name, (can, p, s) in rows.items()}

    weights = {"power": 25, "speed": 20}
    first = of(htp=(False, 0.9, 1.0), gpu=(True, 0.6, 0.0), cpu=(True, 0.4, 0.0))
    second = of(htp=(True, 0.9, 1.0), gpu=(True, 0.6, 0.0), cpu=(True, 0.4, 0.0))
    third = of(htp=(False, 0.9, 1.0), gpu=(False, 0.6, 0.0))
    cases = [(first, weights), (second, weights), (third, weights), (of(a=(True, 0.1, 0.9), b=(True, 0.9, 0.1)), {"power": 1, "speed": 3})]
    function(answer, reference, cases, compare=same)

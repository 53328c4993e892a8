"""Lab module05/01, SLMOps: digests, lineage, registry, updates, canaries, privacy, sparsity, capacity and cost."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import numpy as np

from labkit import capacity, lineage, release, sparsity
from labkit.course.compare import NotYet, close, function, same, unfinished
from labkit.course.exercises import exercise
from labkit.i18n import tr


@exercise(
    "05.1.1",
    "Undo the lies of randomized response",
    hints=(
        "Yes comes from true yes told honestly, and from true no turned round.",
        "said = share * honest + (1 - share) * (1 - honest); solve it for the share.",
        "(said - (1 - honest)) / (2 * honest - 1)",
    ),
)
def _(answer: Any) -> None:
    function(answer, lambda said, honest: (said - (1 - honest)) / (2 * honest - 1), [(0.5, 0.75), (0.27, 0.9), (0.4, 0.6)])


@exercise(
    "05.1.2",
    "One digest for many files",
    hints=(
        "hashlib.sha256(data).hexdigest() gives 64 digits for the bytes of one file.",
        "One line a file: name, a blank, the 64 digits, a line end. Sort by name and join.",
        "Encode the joined text and hash it once more.",
    ),
)
def _(answer: Any) -> None:
    def reference(files: dict[str, bytes]) -> str:
        return lineage.digest({name: hashlib.sha256(data).hexdigest() for name, data in files.items()})

    cases = [({"b.txt": b"two", "a.txt": b"one"},), ({"a.txt": b"one", "b.txt": b"two"},), ({"only": b""},)]
    function(answer, reference, cases, compare=_equal)


def _equal(got: Any, expected: Any, *, what: str) -> None:
    same(got, expected, what)


@exercise(
    "05.1.3",
    "Walk a lineage back to its sources",
    hints=(
        "Keep a list of digests still to look at; it begins with the one that was asked for.",
        "Take the first, keep it unless it is known, and put its inputs at the end of the list.",
        "A digest with no inputs has an empty list: it is a source.",
    ),
)
def _(answer: Any) -> None:
    line = {"release": ["small"], "small": ["model"], "model": ["base", "data"], "base": [], "data": []}
    twice = {"d": ["b", "c"], "b": ["a"], "c": ["a"], "a": [], "z": ["a"]}
    function(answer, _ancestors, [(line, "release"), (line, "data"), (twice, "d")], compare=_sequence)


def _ancestors(made_from: dict[str, list[str]], digest: str) -> list[str]:
    found: list[str] = []
    waiting = [digest]
    while waiting:
        one = waiting.pop(0)
        if one not in found:
            found.append(one)
            waiting += made_from[one]
    return found


def _sequence(got: Any, expected: list[str], *, what: str) -> None:
    unfinished(got)
    if not isinstance(got, (list, tuple)):
        raise NotYet(tr("{what}: expected a list of digests, got {kind}", what=what, kind=type(got).__name__))
    same(list(got), expected, what)


@exercise(
    "05.1.4",
    "Which version is live",
    hints=(
        "Think of a pile of versions; the live one lies on top.",
        "point puts a version on the pile, back takes the top one away.",
        "After two backs, the version from two points ago is live.",
    ),
)
def _(answer: Any) -> None:
    point = [("point", "1"), ("point", "2"), ("point", "3")]
    cases = [(point,), ([*point, ("back", None)],), ([*point, ("back", None), ("back", None)],)]
    cases.append(([*point, ("back", None), ("point", "4"), ("back", None), ("back", None)],))
    function(answer, _live, cases, compare=_equal)


def _live(moves: list[tuple[str, Any]]) -> Any:
    past: list[Any] = []
    for what, version in moves:
        past.pop() if what == "back" else past.append(version)
    return past[-1]


@exercise(
    "05.1.5",
    "Bytes of a delta update",
    hints=(
        "data[i : i + block] for i in range(0, len(data), block) cuts into blocks; the last may be shorter.",
        "A set keeps each block once; the difference of two sets is what the device lacks.",
        "Add up the lengths of those blocks.",
    ),
)
def _(answer: Any) -> None:
    old = bytes(range(64))
    cases = [(old, old, 16), (old, old[16:] + old[:16], 16), (old, old[:20] + b"!" + old[21:], 16), (old, b"xy" * 20, 8), (old, old[1:], 16)]
    function(answer, release.delta, cases)


@exercise(
    "05.1.6",
    "How many requests a canary needs",
    hints=(
        "A share p of n requests has the variance p (1 - p) / n; variances of independent shares add up.",
        "Solve z * sqrt((p (1 - p) + q (1 - q)) / n) = |p - q| for n.",
        "Round up with math.ceil.",
    ),
)
def _(answer: Any) -> None:
    def reference(p: float, q: float, z: float) -> int:
        return math.ceil(z**2 * (p * (1 - p) + q * (1 - q)) / (p - q) ** 2)

    function(answer, reference, [(0.06, 0.13, 3.0), (0.06, 0.13, 1.96), (0.3, 0.1, 2.5), (0.05, 0.055, 3.0)])


@exercise(
    "05.1.7",
    "Two of every four",
    hints=(
        "View each row as groups of four: reshape(rows, -1, 4).",
        "Rank within each group by absolute value, the largest first; keep the first two.",
        "argsort of argsort gives ranks; np.where(rank < 2, groups, 0) and reshape back.",
    ),
)
def _(answer: Any) -> None:
    rng = np.random.default_rng(4)
    signs = np.array([[-9.0, 1.0, 2.0, -3.0, 0.5, -0.25, 0.125, 4.0]])
    function(answer, lambda w: np.where(sparsity.two_of_four(w), w, 0.0), [(signs,), (rng.normal(size=(3, 12)),), (rng.normal(size=(5, 8)),)])


@exercise(
    "05.1.8",
    "When a bitmap pays",
    hints=(
        "Dense: bits for each weight. Bitmap: one bit for each weight, and bits for each that is not zero.",
        "Write both for a share z of zeros and set them equal: bits = 1 + (1 - z) * bits.",
    ),
)
def _(answer: Any) -> None:
    function(answer, lambda bits: 1 / bits, [(16,), (8,), (4,), (2,)])


@exercise(
    "05.1.9",
    "Little's law",
    hints=(
        "Requests present = arrivals in a unit of time x time each is present, in the same unit.",
        "per_hour / 3600 arrive each second.",
    ),
)
def _(answer: Any) -> None:
    function(answer, capacity.busy, [(500, 0.48), (50, 3.2), (7200, 2.0)])


@exercise(
    "05.1.10",
    "Break-even against a cloud",
    hints=(
        "Each own token saves the cloud's price of one token and costs its energy.",
        "The fixed cost of a year must be earned by what each token saves.",
        "When a token saves nothing, no number is enough: return float('inf').",
    ),
)
def _(answer: Any) -> None:
    def reference(fixed: float, energy: float, cloud: float) -> float:
        saved = cloud / 1e6 - energy
        return fixed / saved if saved > 0 else math.inf

    function(answer, reference, [(20.0, 1e-8, 1.0), (150.0, 2e-7, 0.5), (20.0, 2e-6, 1.0), (0.0, 1e-7, 4.0)], compare=_money)


def _money(got: Any, expected: float, *, what: str) -> None:
    close(got, expected, what=what)

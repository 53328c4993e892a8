"""Lab module04/06, the decision: fronts, promises, weights, search, gates, quantiles, drift and the bit-allocation game."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import product
from typing import Any

import numpy as np

from labkit.course.compare import NotYet, close, function, same, unfinished
from labkit.course.exercises import exercise
from labkit.i18n import tr


@exercise(
    "04.6.1",
    "Which candidates nobody beats",
    hints=(
        "costs is (candidates, metrics), lower is better in every column.",
        "Row j beats row i if it is no worse in all columns and better in at least one.",
        "no_worse = (costs[None] <= costs[:, None]).all(-1); better likewise with < and any; a row is kept if nobody does both.",
    ),
)
def _(answer: Any) -> None:
    rng = np.random.default_rng(4)
    cases = [(rng.integers(0, 6, (rows, columns)).astype(float),) for rows, columns in ((1, 2), (9, 2), (14, 3))]
    cases.append((np.array([[1.0, 2.0], [1.0, 2.0], [2.0, 1.0]]),))  # equal rows do not beat each other
    function(answer, _front, cases, compare=_mask)


def _front(costs: np.ndarray) -> np.ndarray:
    no_worse, better = (costs[None] <= costs[:, None]).all(-1), (costs[None] < costs[:, None]).any(-1)
    return ~(no_worse & better).any(1)


def _mask(got: Any, expected: np.ndarray, *, what: str) -> None:
    unfinished(got)
    same([bool(one) for one in np.ravel(got)], expected.tolist(), what)


@exercise(
    "04.6.2",
    "How many tasks a promise needs",
    hints=(
        "If the true loss were `loss`, all n tasks would come out right with probability (1 - loss) ** n.",
        "Find the smallest n for which that probability is at most 1 - level.",
        "math.ceil(math.log(1 - level) / math.log(1 - loss))",
    ),
)
def _(answer: Any) -> None:
    def reference(loss: float, level: float) -> int:
        return math.ceil(math.log(1 - level) / math.log(1 - loss))

    function(answer, reference, [(0.01, 0.95), (0.05, 0.95), (0.001, 0.95), (0.02, 0.99)])


@exercise(
    "04.6.3",
    "A weighted score that can be read",
    hints=(
        "Scale each column to 0 (worst) to 1 (best) first: bytes and shares cannot be added.",
        "lower[name] says the direction: for lower-is-better columns the best is the minimum.",
        "(worst - x) / (worst - best) works for both directions; divide the weights by their sum.",
    ),
)
def _(answer: Any) -> None:
    values = {"size": [5.0, 3.0, 1.0], "speed": [100.0, 150.0, 120.0], "accuracy": [0.99, 0.98, 0.90]}
    lower = {"size": True, "speed": False, "accuracy": False}
    cases = [
        (values, lower, weights) for weights in ({"size": 1, "speed": 1, "accuracy": 1}, {"size": 1, "speed": 0, "accuracy": 5})
    ]
    function(answer, _weighted, cases)


def _weighted(values: Mapping[str, list[float]], lower: Mapping[str, bool], weights: Mapping[str, float]) -> np.ndarray:
    score = np.zeros(len(next(iter(values.values()))))
    for name, column in values.items():
        x = np.array(column, dtype=float)
        best, worst = (x.min(), x.max()) if lower[name] else (x.max(), x.min())
        score += weights[name] / sum(weights.values()) * (worst - x) / (worst - best)
    return score


@exercise(
    "04.6.4",
    "A decision tree for the engine",
    hints=(
        "Ask the questions in the order they are written; the first that applies decides.",
        'sheet["apple"] and sheet["npu"] are booleans, sheet["cpu"] is "intel", "arm" or "other".',
        "Four ifs that return, and a last return without an if.",
    ),
)
def _(answer: Any) -> None:
    cases = [
        ({"apple": apple, "npu": npu, "cpu": cpu, "users": users},)
        for apple, npu, cpu, users in product((True, False), (True, False), ("intel", "arm", "other"), (1, 50))
    ]
    function(answer, _engine, cases, compare=lambda got, expected, *, what: same(got, expected, what))


def _engine(sheet: Mapping[str, Any]) -> str:
    if sheet["apple"]:
        return "mlx"
    if sheet["npu"]:
        return "onnxruntime"
    if sheet["cpu"] == "intel" and sheet["users"] > 1:
        return "openvino"
    return "llamacpp"


@exercise(
    "04.6.5",
    "What successive halving costs",
    hints=(
        "Each round asks every recipe that is left the round's number of tasks.",
        "After a round half of the recipes stay (n // 2, at least one), and the next round asks twice as many tasks.",
        "The last round has one recipe; it is asked too.",
    ),
)
def _(answer: Any) -> None:
    def reference(recipes: int, tasks: int) -> int:
        asked = recipes * tasks
        while recipes > 1:
            recipes, tasks = max(1, recipes // 2), tasks * 2
            asked += recipes * tasks
        return asked

    function(answer, reference, [(8, 15), (7, 20), (1, 30), (32, 10), (5, 1)])


@exercise(
    "04.6.6",
    "Passed, failed or unsure",
    hints=(
        "An interval is a range in which the truth may lie. Where could it lie to pass for sure?",
        "All of it at or under the limit: passed. All of it above: failed.",
    ),
)
def _(answer: Any) -> None:
    def reference(low: float, high: float, limit: float) -> str:
        return "passed" if high <= limit else "failed" if low > limit else "unsure"

    cases = [
        (0.0, 0.01, 0.02),
        (0.03, 0.05, 0.02),
        (0.01, 0.04, 0.02),
        (0.01, 0.02, 0.02),
        (0.02, 0.02, 0.02),
        (0.02, 0.03, 0.02),
    ]
    function(answer, reference, cases, compare=lambda got, expected, *, what: same(got, expected, what))


@exercise(
    "04.6.7",
    "A quantile from buckets",
    hints=(
        "Add up the counts until they reach q times their sum: the quantile is in that bucket.",
        "The first bucket begins at 0, every other at the bound before it.",
        "low + (high - low) * (q * total - counts before) / count of the bucket",
    ),
)
def _(answer: Any) -> None:
    from labkit.monitor import Histogram

    def reference(bounds: list[float], counts: list[int], q: float) -> float:
        return Histogram(bounds, [*counts, 0]).quantile(q).value

    bounds = [0.1, 0.2, 0.5, 1.0]
    cases = [(bounds, counts, q) for counts in ([50, 30, 15, 5], [0, 0, 8, 2], [4, 0, 4, 2]) for q in (0.5, 0.95)]
    function(answer, reference, cases)


@exercise(
    "04.6.8",
    "The population stability index",
    hints=(
        "Add 0.5 to every count, then divide by the sum: shares p before and q now.",
        "Sum (q - p) * log(q / p) over the bins; both factors have the same sign.",
    ),
)
def _(answer: Any) -> None:
    from labkit.monitor import psi

    function(answer, psi, [([10, 20, 30], [10, 20, 30]), ([40, 40, 20, 0], [20, 30, 40, 10]), ([5, 5], [50, 10])], abs=1e-12)


@exercise(
    "04.6.9",
    "Evidence that never falls below zero",
    hints=(
        "A right answer adds log(bad / good), which is below 0; a wrong one log((1 - bad) / (1 - good)).",
        "After each answer: evidence = max(0, evidence + step).",
        "Return the index of the first answer at which evidence >= level, or None after the last.",
    ),
)
def _(answer: Any) -> None:
    from labkit.monitor import watch

    rng = np.random.default_rng(9)
    healthy, ill = (rng.random(200) < share for share in (0.98, 0.7))
    streams = [healthy.tolist(), [*healthy.tolist(), *ill.tolist()], ill.tolist()]

    def reference(outcomes: list[bool], good: float, bad: float, level: float) -> int:
        found = watch(outcomes, good, bad, level=level).alarm
        return -1 if found is None else found

    function(answer, reference, [(stream, 0.97, 0.85, 4.0) for stream in streams], compare=_alarm)


def _alarm(got: Any, expected: int, *, what: str) -> None:
    if got is ... or got is NotImplemented:
        unfinished(got)
    same(-1 if got is None else int(got), expected, what)


@exercise(
    "04.6.10",
    "The bit-allocation game",
    hints=(
        "Which part has the highest curve in the sensitivity figure? Give it more bits than the others.",
        "Pay for it where the curves are low: a feed-forward part is three times as large as an attention part.",
        "allocation.best_sum(game, budget, sensitive) plays well; can you beat it by hand?",
    ),
    seconds=60,
)
def _(answer: Any) -> None:
    from labkit import allocation

    unfinished(answer)
    if not (isinstance(answer, tuple) and len(answer) == 3 and isinstance(answer[2], Mapping)):
        raise NotYet(tr("expected (game, budget, bits), the bits a dictionary from part to width"))
    game, budget, bits = answer
    used = allocation.size(game, bits)
    if used > budget:
        raise NotYet(tr("{used} bytes are used, the budget is {budget}", used=f"{used:,}", budget=f"{budget:,}"))
    mine, plain = (allocation.divergence(game, one).value for one in (bits, allocation.uniform(game, budget)))
    if mine >= plain:
        raise NotYet(tr("KL {mine:.5f} is not below the {plain:.5f} of the same bits for all", mine=mine, plain=plain))


@exercise(
    "04.6.11",
    "What an answer costs in energy",
    hints=(
        "Energy is power times time: watts times seconds are joules.",
        "An answer of n tokens takes n / tokens_per_second seconds.",
        "A kilowatt-hour is 3.6 million joules.",
    ),
)
def _(answer: Any) -> None:
    def reference(watts: float, tokens_per_second: float, tokens: int, grams_per_kwh: float) -> tuple[float, float]:
        joules = watts * tokens / tokens_per_second
        return joules, joules / 3.6e6 * grams_per_kwh

    function(answer, reference, [(15.0, 20.0, 100, 400.0), (4.0, 900.0, 25, 80.0)], compare=_pair)


def _pair(got: Any, expected: tuple[float, float], *, what: str) -> None:
    unfinished(got)
    close(got, expected, rel=1e-6, what=what)


@exercise(
    "04.6.12",
    "Learning together without sharing requests",
    hints=(
        "Federated averaging weighs every household's update by its number of examples.",
        "Clip first: an update longer than `clip` is scaled down to that length, so that no household counts too much.",
        "update * min(1, clip / np.linalg.norm(update))",
    ),
)
def _(answer: Any) -> None:
    def reference(updates: np.ndarray, examples: np.ndarray, clip: float) -> np.ndarray:
        length = np.linalg.norm(updates, axis=1, keepdims=True)
        return np.average(updates * np.minimum(1, clip / length), axis=0, weights=examples)

    rng = np.random.default_rng(12)
    cases = [(rng.normal(size=(n, 4)) * 2, rng.integers(1, 50, n), clip) for n, clip in ((3, 1.0), (6, 3.0), (2, 100.0))]
    function(answer, reference, cases)

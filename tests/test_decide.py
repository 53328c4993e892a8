"""Deciding: limits with reasons, the Pareto front against brute force, weights and their sensitivity, successive halving."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from labkit import LabkitError, decide
from labkit.decide import Limit
from labkit.ledger import frame_of
from labkit.types import Measurement

BOTH = {"size": "lower", "speed": "higher"}


@pytest.fixture
def table() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "engine": ["a", "b", "c", "d"], "size": [10.0, 5.0, 5.0, 3.0], "speed": [100.0, 150.0, 120.0, np.nan],
            "speed_low": [95.0, 140.0, 110.0, np.nan], "speed_high": [105.0, 160.0, 130.0, np.nan],
        }
    )  # fmt: skip


def test_candidates_are_the_newest_of_each_metric():
    def one(metric, value, when, **artifact):
        about = {"checkpoint": "m", "engine": "e", "precision": "q4", "options": {}, **artifact}
        return Measurement(
            metric=metric, unit="x", values=(value,), artifact=about, workload={}, engine_version="1", host={}, when=when
        )

    frame = frame_of([one("size", 2.0, "2026-02"), one("size", 1.0, "2026-01"), one("novel", 7.0, "2026-01", precision="q8")])
    found = decide.candidates(frame).set_index("precision")
    assert found.loc["q4", "size"] == 2.0 and np.isnan(found.loc["q8", "size"]) and found.loc["q8", "novel"] == 7.0
    with pytest.raises(LabkitError, match="ledger is empty"):
        decide.candidates(frame_of([]))


def test_every_exclusion_has_its_reasons(table):
    found = decide.matrix(table, [Limit("size", most=6.0, unit="MB"), Limit("speed", least=115.0, unit="tokens/s")])
    assert list(found["fits"]) == [False, True, False, False]
    assert found["because"][0] == "size 10 MB is above 6 MB; speed 100 tokens/s is below 115 tokens/s"
    assert found["because"][2] == "speed 120 tokens/s may be below 115 tokens/s: it lies in 110 tokens/s to 130 tokens/s"
    assert found["because"][3] == "speed was not measured" and found["because"][1] == ""
    with pytest.raises(LabkitError, match="No limit"):
        decide.matrix(table, [])


def test_the_front_equals_brute_force():
    rng = np.random.default_rng(0)
    table = pd.DataFrame(rng.integers(0, 6, (60, 3)), columns=["size", "speed", "kl"])
    metrics = {"size": "lower", "speed": "higher", "kl": "lower"}
    costs = table[["size", "speed", "kl"]].to_numpy() * [1, -1, 1]
    beaten = [any((b <= a).all() and (b < a).any() for b in costs) for a in costs]
    assert list(decide.pareto(table, metrics)) == [not b for b in beaten]


def test_the_front_leaves_out_what_was_not_measured(table):
    assert list(decide.pareto(table, BOTH)) == [False, True, False, False]
    with pytest.raises(LabkitError, match="'beauty'"):
        decide.pareto(table, {"beauty": "higher"})


def test_scores_and_how_firm_they_are(table):
    known = table.iloc[:3]
    scores = decide.weigh(known, BOTH, {"size": 1, "speed": 1})
    assert scores == pytest.approx([0.0, 1.0, 0.7])
    assert decide.weigh(known, BOTH, {"size": 3, "speed": 0}) == pytest.approx([0, 1, 1])
    assert list(decide.sensitivity(known, BOTH, {"size": 1, "speed": 1})) == [0, 1, 0]
    torn = pd.DataFrame({"size": [1.0, 2.0], "speed": [1.0, 2.0]})
    shares = decide.sensitivity(torn, BOTH, {"size": 1, "speed": 1})
    assert shares.sum() == 1 and 0.4 < shares[0] < 0.6
    for weights in ({}, {"size": -1}, {"size": 0, "speed": 0}, {"beauty": 1}):
        with pytest.raises(LabkitError):
            decide.weigh(known, BOTH, weights)


def test_a_column_in_which_all_are_equal_decides_nothing(table):
    even = table.iloc[:3].assign(size=4.0)
    assert decide.weigh(even, BOTH, {"size": 1}) == pytest.approx([1, 1, 1])


def test_halving_finds_the_best_with_few_measurements():
    truth, asked = {name: value for value, name in enumerate("hgfedcba")}, []

    def cost(name, budget):
        asked.append((name, budget))
        return truth[name] + 0.4 / budget if name != "h" else float("inf")  # the seeming best breaks a limit

    rounds = decide.halving(list(truth), cost)
    assert [len(r) for r in rounds] == [8, 4, 2, 1] and rounds[-1][0][0] == "g"
    assert sum(budget for _, budget in asked) == 32 and [b for _, b in asked][-1] == 8
    assert decide.halving(["x", "y"], lambda name, budget: float("inf")) == [[("x", np.inf), ("y", np.inf)]]
    with pytest.raises(LabkitError, match="0 recipes"):
        decide.halving([], cost)


def test_loss_counts_pairs_and_is_careful():
    nothing = decide.loss([1.0] * 90, [1.0] * 90)
    assert nothing.value == 0 and 0.03 < nothing.high < 0.05  # ninety tasks cannot promise 1 %
    assert decide.loss([1.0] * 400, [1.0] * 400).high < 0.01
    mixed = decide.loss([1, 0, 0, 1], [1, 1, 1, 0])  # two lost, one won
    assert mixed.value == 0.25 and mixed.low < 0 < mixed.high
    swapped = decide.loss([1, 1, 1, 0], [1, 0, 0, 1])
    assert swapped.value == -0.25 and swapped.low == pytest.approx(-mixed.high)
    with pytest.raises(LabkitError, match="same tasks"):
        decide.loss([1.0], [1.0, 0.0])


def test_loss_keeps_its_level():
    rng, hit = np.random.default_rng(1), 0
    for _ in range(300):
        baseline = rng.random(100) < 0.95
        candidate = np.where(rng.random(100) < 0.04, ~baseline, baseline)
        low, high = decide.loss(candidate, baseline)[1:]
        hit += low <= 0.04 * 0.95 - 0.04 * 0.05 <= high
    assert hit / 300 >= 0.95

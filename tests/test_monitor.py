"""Monitoring: quantiles and their two errors, drift that is chance and drift that is not, the sequential test, replay."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest

from labkit import LabkitError, checkpoint, house, monitor
from labkit.house.language import dumps


def test_a_quantile_of_buckets_lies_in_its_bucket():
    rng = np.random.default_rng(1)
    for _ in range(20):
        values = rng.lognormal(-2, 1, 500)
        histogram = monitor.Histogram().observe(*values)
        assert sum(histogram.counts) == 500
        for q in (0.1, 0.5, 0.95, 0.99):
            value, low, high = histogram.quantile(q)
            true = np.sort(values)[math.ceil(q * 500) - 1]
            assert low <= true <= high and low <= value <= high


def test_a_bound_belongs_to_its_bucket_and_the_last_bucket_is_open():
    histogram = monitor.Histogram([1.0, 2.0]).observe(1.0, 1.5, 9.0, 9.0)
    assert histogram.counts == [1, 1, 2]
    assert histogram.quantile(0.9) == (2.0, 2.0, math.inf)
    assert histogram.quantile(0.5).value == pytest.approx(2.0)
    with pytest.raises(LabkitError, match="of 0 observations"):
        monitor.Histogram().quantile(0.5)
    with pytest.raises(LabkitError, match="rising"):
        monitor.Histogram([2.0, 1.0])


def test_the_interval_of_a_quantile_covers_the_truth():
    rng, true, hit = np.random.default_rng(2), math.log(20), 0  # the 0.95 quantile of the exponential
    for _ in range(200):
        _, low, high = monitor.quantile(rng.exponential(size=200), 0.95)
        hit += low <= true <= high
    assert 0.92 <= hit / 200 <= 1.0


def test_too_few_requests_cannot_bound_p99():
    assert monitor.quantile(range(100), 0.99).high == math.inf
    assert monitor.quantile(range(1000), 0.99).high < math.inf
    with pytest.raises(LabkitError, match="0 < q < 1"):
        monitor.quantile([1.0], 1.0)


def test_psi_is_zero_for_equal_shares_and_symmetric():
    assert monitor.psi([10, 20, 30], [10, 20, 30]) == 0
    there, back = monitor.psi([10, 20, 30], [30, 20, 10]), monitor.psi([30, 20, 10], [10, 20, 30])
    assert there == pytest.approx(back) and there > 0.5
    with pytest.raises(LabkitError, match="same bins"):
        monitor.psi([1, 2], [1, 2, 3])


def test_the_limit_of_psi_is_kept_without_drift_and_shrinks_with_requests():
    rng, shares = np.random.default_rng(3), np.full(8, 1 / 8)
    reference = rng.multinomial(400, shares)
    limit = monitor.psi_limit(reference, 100)
    quiet = [monitor.psi(reference, rng.multinomial(100, shares)) for _ in range(300)]
    assert np.mean(np.array(quiet) > limit) < 0.04
    assert monitor.psi_limit(reference, 1000) < limit


def test_bins_are_about_equally_full():
    values = np.random.default_rng(4).normal(size=800)
    counts = monitor.counted(values, monitor.edges(values))
    assert counts.sum() == 800 and counts.min() > 90 and len(counts) == 8
    assert len(monitor.counted([1, 1, 1], monitor.edges([1, 1, 1]))) == 2


def test_the_sequential_test_rings_after_a_fall_and_not_before():
    rng = np.random.default_rng(5)
    early, delays = 0, []
    for _ in range(50):
        stream = [*(rng.random(100) < 0.97), *(rng.random(100) < 0.6)]
        alarm = monitor.watch(stream, 0.97, 0.85).alarm
        early += alarm is not None and alarm < 100
        delays += [alarm - 99] if alarm is not None and alarm >= 100 else []
    assert early <= 15 and len(delays) + early == 50 and np.median(delays) < 25
    found = monitor.watch([True, False, False], 0.9, 0.5, level=2.0)
    assert found.evidence == pytest.approx([0, math.log(5), 2 * math.log(5)]) and found.alarm == 2
    with pytest.raises(LabkitError, match="bad < good"):
        monitor.watch([True], 0.5, 0.9)


def test_hurried_requests_keep_their_answers_and_change_their_words():
    tasks = house.tasks(n=30, seed=3)
    hasty = [monitor.hurried(task) for task in tasks]
    assert [a.answer for a in hasty] == [b.answer for b in tasks] and hasty == [monitor.hurried(task) for task in tasks]
    words = [(a.messages[-1]["content"], b.messages[-1]["content"]) for a, b in zip(hasty, tasks, strict=True)]
    assert all(new == new.lower() for new, _ in words) and np.mean([new != old.lower().rstrip(".") for new, old in words]) > 0.8
    source = checkpoint("edgehome")
    assert np.mean([monitor.pieces(source, new) for new, _ in words]) > np.mean([monitor.pieces(source, old) for _, old in words])


class Echo:
    """A runner that answers every request with the same command."""

    def __init__(self, source, text):
        self.settings = {}
        self.ids = [*source.encode(text), source.eos_ids[0]]

    def generate(self, tokens, max_new):
        yield from self.ids[:max_new]


def test_replay_notes_answers_and_times():
    source, clock = checkpoint("edgehome"), iter(range(100))
    task = house.tasks(n=1, intents=["light"])[0]
    right = dumps(task.answer)
    seen = monitor.replay(SimpleNamespace(checkpoint=source), [task, task], runner=Echo(source, right), clock=lambda: next(clock))
    assert [one.right for one in seen] == [True, True] and [one.seconds for one in seen] == [1, 1]
    wrong = monitor.replay(SimpleNamespace(checkpoint=source), [task], runner=Echo(source, "{}"))[0]
    assert wrong.right is False and wrong.answer == "{}" and wrong.text == task.messages[-1]["content"]

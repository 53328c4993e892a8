import dataclasses

import pytest
from fakes import FakeClock, FakeRunner

from labkit import LabkitError
from labkit.measure import bandwidth_curve, multiply_rate, quiet, read_bandwidth, roofline, speed
from labkit.measure.roofline import bytes_per_token, matrix_weights


def test_bytes_per_token_by_hand(artifact):
    found = bytes_per_token(artifact, context=100, kv_bytes=2)
    assert found["weights"] == 50_000  # tied: the embedding is the output head, all of it is read
    assert found["kv_cache"] == 2 * 2 * 2 * 16 * 100 * 2


def test_an_untied_embedding_is_read_by_the_row(artifact):
    artifact.checkpoint.tied = False
    unused = 299 * 64
    assert bytes_per_token(artifact, 0)["weights"] == pytest.approx(50_000 * (1 - unused / 100_000))
    assert matrix_weights(artifact.checkpoint) == 100_000 - 300 * 64


def test_ceiling_and_share_reached(artifact, monkeypatch):
    monkeypatch.setattr(quiet, "shares", lambda a, b: {"others": 0.0, "steal": 0.0})
    monkeypatch.setattr(quiet, "calibrate", lambda: 0.002)
    clock = FakeClock()
    timed = speed(
        artifact, runner=FakeRunner(clock=clock, first=0.02, each=0.001), clock=clock, rounds=2, seconds=0.01,
        prompt_tokens=100, new_tokens=21,
    )  # fmt: skip
    found = roofline(artifact, timed, bandwidth=100e6, matrix_rate=2e9)
    total = 50_000 + 2 * 2 * 2 * 16 * 110 * 2
    assert found.values == pytest.approx((100e6 / total,))
    assert found.details["reached"] == pytest.approx(1000 * total / 100e6)
    assert found.details["ridge_operations_per_byte"] == 20
    assert found.details["prefill_ceiling_tokens_per_second"] == pytest.approx(2e9 / 200_000)  # bound by arithmetic
    assert found.details["prefill_reached"] == pytest.approx(5000 / 10_000)
    slow_memory = roofline(artifact, timed, bandwidth=1e6, matrix_rate=2e12)
    assert slow_memory.details["prefill_ceiling_tokens_per_second"] == pytest.approx(100 * 1e6 / total)


def test_cache_bytes_come_from_what_the_runner_said(artifact):
    runner = FakeRunner()
    runner.settings = {"kv_cache": "u8"}
    found = roofline(artifact, bandwidth=1e9, matrix_rate=1e9, runner=runner, context=100)
    assert found.details["bytes_per_token"]["kv_cache"] == 2 * 2 * 2 * 16 * 100
    assert found.workload["kv_bytes"] == 1
    assert roofline(artifact, bandwidth=1e9, matrix_rate=1e9).workload["kv_bytes"] == 2


def test_rates_are_physical(artifact):
    rate = read_bandwidth(8 << 20, seconds=0.02)
    assert 1e7 < rate < 2e12  # neither a broken clock nor a loop that was optimised away
    assert 1e6 < multiply_rate(128, seconds=0.02) < 1e14
    with pytest.raises(LabkitError, match="expected 4096"):
        read_bandwidth(100)


def test_curve_has_a_row_a_size_and_thread_count():
    rows = bandwidth_curve([1 << 16, 1 << 20], [1, 2])
    assert [(row["bytes"], row["threads"]) for row in rows] == [(1 << 16, 1), (1 << 20, 1), (1 << 16, 2), (1 << 20, 2)]
    assert all(row["bytes_per_second"] > 0 for row in rows)


def test_bandwidth_is_measured_when_not_given(artifact):
    found = roofline(artifact, threads=1)
    assert found.values[0] == pytest.approx(
        found.details["bandwidth_bytes_per_second"] / sum(found.details["bytes_per_token"].values())
    )
    assert dataclasses.asdict(found)["workload"]["threads"] == 1

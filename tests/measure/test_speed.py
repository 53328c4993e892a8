import dataclasses

import numpy as np
import pytest
from fakes import FakeClock, FakeRunner

from labkit import LabkitError, stats
from labkit.measure import compare, prefill, quiet, speed, summary, warnings

CALM = {"others": 0.0, "steal": 0.0}


@pytest.fixture
def calm(monkeypatch):
    """A machine on which nothing else runs, whatever this one does."""
    monkeypatch.setattr(quiet, "shares", lambda before, after: CALM)
    monkeypatch.setattr(quiet, "calibrate", lambda: 0.002)


def timed(artifact, first, each, **options):
    clock = FakeClock()
    runner = FakeRunner(clock=clock, first=first, each=each)
    return speed(artifact, runner=runner, clock=clock, prompt_tokens=10, new_tokens=5, **options), runner


def test_a_fake_clock_gives_known_speeds(artifact, calm):
    found, runner = timed(artifact, first=0.5, each=0.25, rounds=3, seconds=0.1)
    assert summary(found) == (4, 4, 4)  # 4 gaps of a quarter second, the prompt not in them
    assert prefill(found) == (20, 20, 20)  # 10 tokens in half a second
    assert found.details["ttft_seconds"] == [0.5] * 3
    assert found.details["first_call_seconds"] == 0.5
    assert found.details["quiet"] and found.details["reason"] == ""
    assert found.unit == "tokens/s" and len(found.values) == 3
    assert runner.closed == 0


def test_samples_last_as_long_as_asked(artifact, calm):
    _, runner = timed(artifact, first=0.5, each=0.125, rounds=1, seconds=4.0)
    warm_up = 2
    assert len(runner.prompts) == warm_up + 2 * 2  # two samples of 2 s, each generation taking one


def test_every_prompt_is_new(artifact, calm):
    _, runner = timed(artifact, first=0.1, each=0.1, rounds=4, seconds=1.0)
    assert len(set(runner.prompts)) == len(runner.prompts)
    assert all(len(prompt) == 10 for prompt in runner.prompts)


def test_compared_things_alternate_there_and_back(artifact, calm):
    clock, order = FakeClock(), []

    class Spy(FakeRunner):
        def generate(self, tokens, max_new):
            order.append(self)
            return super().generate(tokens, max_new)

    runners = [Spy(clock=clock, first=1, each=each) for each in (0.1, 0.2, 0.4)]
    found = compare([artifact] * 3, runners=runners, clock=clock, prompt_tokens=8, new_tokens=3, rounds=20, seconds=0.1)
    timed_order = [runners.index(runner) for runner in order[6:]]
    rounds = np.array(timed_order).reshape(20, 6)
    assert (rounds[:, :3] == rounds[:, :2:-1]).all()
    assert len({tuple(one) for one in rounds.tolist()}) > 1  # the order is drawn anew
    ratio = stats.ratio(found[0].values, found[1].values)
    assert ratio == pytest.approx((2, 2, 2)) and stats.differs(ratio)


def test_disturbed_rounds_are_taken_again(artifact, monkeypatch):
    monkeypatch.setattr(quiet, "calibrate", lambda: 0.002)
    others = iter([0.0, 0.4, 0.0, 0.3, 0.0])
    monkeypatch.setattr(quiet, "shares", lambda a, b: {"others": next(others), "steal": 0.0})
    found, _ = timed(artifact, 0.5, 0.25, rounds=3, seconds=0.1, retries=2)
    assert found.details["quiet"] and found.details["discarded_rounds"] == 2
    assert found.details["others_share"] == [0.0] * 3


def test_a_busy_machine_is_said_aloud(artifact, monkeypatch):
    monkeypatch.setattr(quiet, "calibrate", lambda: 0.002)
    others = iter([0.5, 0.3, 0.0, 0.4])
    monkeypatch.setattr(quiet, "shares", lambda a, b: {"others": next(others), "steal": 0.0})
    found, _ = timed(artifact, 0.5, 0.25, rounds=2, seconds=0.1, retries=2)
    assert found.details["others_share"] == [0.3, 0.0]  # the least disturbed ones
    assert not found.details["quiet"]
    assert "1 of 2 rounds disturbed: other processes took 30%" in found.details["reason"]
    assert any("busy" in warning for warning in warnings(found))


def test_verdicts():
    assert quiet.disturbed(0.01, 0.0, 1.0, 1.0) is None
    assert "hypervisor" in quiet.disturbed(0.2, 0.1, 1.0, 1.0)
    assert "slower" in quiet.disturbed(0.0, 0.0, 1.5, 1.0)


def test_shares_leave_our_own_time_out():
    before, after = quiet.Clocks(100, 40, 1, 10), quiet.Clocks(120, 58, 3, 20)
    assert quiet.shares(before, after) == {"others": (18 - 10) / 20, "steal": 0.1}
    assert quiet.shares(before, before) == {"others": 0.0, "steal": 0.0}


def test_threads_are_as_many_as_nobody_else_uses(monkeypatch):
    monkeypatch.setattr(quiet.host, "cpus", lambda: 4)
    monkeypatch.setattr(quiet.os, "cpu_count", lambda: 4)

    def free(*others):
        taken, slept = iter(others), []
        monkeypatch.setattr(quiet, "shares", lambda before, after: {"others": next(taken), "steal": 0.0})
        return quiet.free_cpus(len(others), sleep=slept.append), len(slept)

    assert free(0.0, 9.0) == (4, 1), "a free machine is asked once"
    assert free(0.5, 0.4, 0.5) == (2, 3) and free(1.0, 1.0) == (1, 2)
    assert free(0.9, 0.05, 9.0) == (4, 2), "a moment's work of others does not count"
    monkeypatch.setattr(quiet.host, "cpus", lambda: 2)  # a container with half of the machine
    assert free(0.5, 9.0) == (2, 1)


def test_clocks_count_this_process():
    import time

    before = quiet.read_clocks()
    end = time.process_time() + 0.2
    while time.process_time() < end:
        pass
    after = quiet.read_clocks()
    assert 0.15 <= after.own - before.own <= 1.0
    assert after.total > before.total


def test_unstable_timings_are_warned_of(artifact, calm):
    found, _ = timed(artifact, 0.5, 0.25, rounds=3, seconds=0.1)
    assert warnings(found) == []
    wide = dataclasses.replace(found, values=(100.0, 130.0, 101.0, 128.0))
    assert any("spreads" in warning for warning in warnings(wide))
    outlier = dataclasses.replace(found, values=(100.0,) * 9 + (10.0,))
    assert any("away from the median" in warning for warning in warnings(outlier))


def test_bad_requests(artifact, calm):
    with pytest.raises(LabkitError, match="context of 512"):
        speed(artifact, runner=FakeRunner(), prompt_tokens=500, new_tokens=100)
    with pytest.raises(LabkitError, match="at least 1 and 2"):
        speed(artifact, runner=FakeRunner(), new_tokens=1)
    with pytest.raises(LabkitError, match="at least one of each"):
        compare([])
    with pytest.raises(LabkitError, match="clock did not advance"):
        speed(artifact, runner=FakeRunner(), clock=FakeClock(), rounds=1, seconds=0)

    with pytest.raises(LabkitError, match="speed takes no exact"):
        speed(artifact, exact=True)
    with pytest.raises(LabkitError, match="short"):
        compare([artifact] * 2, wait="active")

    class Short(FakeRunner):
        def generate(self, tokens, max_new):
            return iter([1, 2])

    with pytest.raises(LabkitError, match="generated 2 tokens where 9"):
        speed(artifact, runner=Short(), new_tokens=9)

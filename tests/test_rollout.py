"""The simulated fleet: rings open in order, a worse build rolls back, a good one gets through, and seeds decide everything."""

from __future__ import annotations

import math

import pytest

from labkit import rollout
from labkit.types import LabkitError

KINDS = [rollout.Kind("hub", 0.5, 32e6, 0.7), rollout.Kind("panel", 0.4, 6e6), rollout.Kind("plug", 0.1, 5e6, 0.3)]
FINE = {"hub": 0.08, "panel": 0.08, "plug": 0.10}
WORSE = dict.fromkeys(FINE, 0.40)
PLUGS = FINE | {"plug": 0.40}


def test_each_kind_gets_the_largest_build_it_has_room_for():
    kinds = [*KINDS, rollout.Kind("tag", 0.0, 1e6)]
    assert rollout.fits(kinds, {"q8_0": 7e6, "q4": 5e6, "q2": 3e6}) == {"hub": "q8_0", "panel": "q4", "plug": "q4"}


@pytest.mark.parametrize(
    ("counts", "decision"),
    [((0, 10, 0, 10), "wait"), ((30, 60, 4, 60), "roll back"), ((40, 1000, 40, 1000), "go on"), ((4, 60, 30, 60), "go on")],
)
def test_a_canary_is_judged_beside_its_control(counts, decision):
    assert rollout.judge(*counts, margin=0.05).decision == decision


def test_the_interval_is_that_of_two_shares_with_one_added_each():
    judged = rollout.judge(9, 98, 4, 98, margin=0.1, z=2.0)
    error = 2 * math.sqrt(0.1 * 0.9 / 100 + 0.05 * 0.95 / 100)
    assert judged.difference == pytest.approx(0.05) and judged.high - judged.difference == pytest.approx(error)


def test_complaints_follow_from_wrong_answers():
    assert rollout.Users(0.5, 0.1).complaints(0.2) == pytest.approx(0.2 * 0.5 + 0.8 * 0.1)


def test_the_same_seed_gives_the_same_rollout():
    first, second, other = (rollout.simulate(KINDS, 2000, FINE, PLUGS, seed=seed) for seed in (1, 1, 2))
    assert first == second and first != other


def test_a_good_release_reaches_everybody_and_rings_open_in_order():
    found = rollout.simulate(KINDS, 2000, WORSE, FINE, seed=3)
    assert found.verdict == "released" and found.exposed == 2000
    frame = found.frame()
    assert list(frame["ring"]) == sorted(frame["ring"]) and set(frame["ring"]) == {1, 2, 3, 4}
    reached = frame.groupby("hour")["devices"].sum()
    ring = frame.groupby("hour")["ring"].max()
    for number, share in enumerate(rollout.RINGS, 1):
        assert reached[ring == number].max() <= math.ceil(share * 1000) + math.ceil(share * 800) + math.ceil(share * 200)


def test_a_worse_release_stops_in_the_first_rings():
    runs = rollout.repeat(20, KINDS, 5000, FINE, WORSE)
    assert set(runs["verdict"]) == {"rolled back"} and runs["exposed"].median() < 0.02 * 5000
    at_once = rollout.repeat(20, KINDS, 5000, FINE, WORSE, rings=(1.0,))
    assert at_once["exposed"].median() > 20 * runs["exposed"].median() and at_once["wrong"].median() > runs["wrong"].median()


def test_a_kind_that_is_a_tenth_is_found_by_kind():
    by_kind = rollout.repeat(20, KINDS, 5000, FINE, PLUGS)
    pooled = rollout.repeat(20, KINDS, 5000, FINE, PLUGS, by_kind=False)
    assert set(by_kind["verdict"]) == {"rolled back"} and by_kind["because"].str.contains("plug").all()
    assert by_kind["hours"].median() < pooled["hours"].median()


def test_an_impatient_test_rolls_good_releases_back():
    hasty, patient = (rollout.repeat(40, KINDS, 5000, FINE, FINE, z=z)["verdict"].eq("rolled back").mean() for z in (1.96, 3.5))
    assert hasty > patient + 0.1 and patient < 0.15


def test_kinds_without_a_build_are_left_alone():
    found = rollout.simulate(KINDS, 1000, FINE, {"hub": 0.05, "panel": 0.05}, seed=1)
    assert set(found.frame()["kind"]) == {"hub", "panel"}


def test_senseless_fleets_get_a_sentence():
    with pytest.raises(LabkitError, match=r"add up to 0\.9"):
        rollout.simulate(KINDS[:2], 100, FINE, FINE)
    with pytest.raises(LabkitError, match="rings"):
        rollout.simulate(KINDS, 100, FINE, FINE, rings=(0.5, 0.1))

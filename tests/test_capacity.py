"""Capacity and cost: laws against simulation, sums against their definition, the case study against its own numbers."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from labkit import capacity
from labkit.types import LabkitError

OWNED = capacity.Owned(price=400, years=4, idle_watts=2, busy_watts=12, kwh=0.25, tokens_per_second=50, care=10)


def test_littles_law_and_capacity_agree():
    assert capacity.busy(500, 0.48) == pytest.approx(500 * 0.48 / 3600)
    assert capacity.busy(capacity.most_per_hour(0.48, 3), 0.48) == pytest.approx(3)


def test_waiting_is_that_of_known_queues_and_of_a_simulation():
    assert capacity.waiting(1800, [1.0]) == pytest.approx(0.5)  # constant service at half load: half a service time
    times = np.random.default_rng(1).exponential(1.0, 200_000)
    assert capacity.waiting(1800, times) == pytest.approx(1.0, rel=0.02)  # exponential: load / (1 - load) service times
    simulated = capacity.queue(1800, [0.5, 1.5], 100_000, seed=2).mean()
    assert simulated == pytest.approx(capacity.waiting(1800, [0.5, 1.5]), rel=0.05)
    assert capacity.waiting(3600, [1.0]) == math.inf


def test_a_year_of_tokens_costs_what_its_parts_do():
    assert OWNED.joules() == pytest.approx(0.2)
    idle = 0.002 * capacity.HOURS_A_YEAR * 0.25
    assert OWNED.yearly(0) == pytest.approx(100 + 10 + idle)
    assert OWNED.yearly(1e6) - OWNED.yearly(0) == pytest.approx(1e6 * 0.2 / 3.6e6 * 0.25)
    assert OWNED.per_million(2e6) == pytest.approx(OWNED.yearly(2e6) / 2)


def test_at_break_even_both_cost_the_same():
    tokens = capacity.break_even(OWNED, 1.0)
    assert OWNED.per_million(tokens) == pytest.approx(1.0)
    assert OWNED.per_million(2 * tokens) < 1.0 < OWNED.per_million(tokens / 2)
    assert capacity.break_even(OWNED, 0.01) == math.inf, "a token costs more energy than the cloud asks"
    assert capacity.break_even(replace(OWNED, tokens_per_second=0.2, busy_watts=2), 1.0) == math.inf, "it cannot write so many"


def test_the_case_study_contradicts_itself():
    table = capacity.case_study().set_index("quantity")
    assert "85.0%" in table.loc["time saved"].iloc[1] and "92.1%" in table.loc["accuracy kept"].iloc[1]
    assert "2.36" in table.loc["errors"].iloc[1] and "6.67" in table.loc["queries, factor"].iloc[1]
    assert "1.50" in table.loc["concurrent requests"].iloc[1] and table.loc["concurrent requests", "verdict"] == "contradicts"
    assert "4.4%" in table.loc["queries an hour before"].iloc[1] and "6.7%" in table.loc["queries an hour after"].iloc[1]


def test_senseless_numbers_get_a_sentence():
    with pytest.raises(LabkitError, match="at most"):
        OWNED.yearly(1e12)
    with pytest.raises(LabkitError, match="0 service times"):
        capacity.waiting(10, [])

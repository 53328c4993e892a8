"""Noise that protects: unbiased, with the error that is promised, private by its definition, and a budget that refuses."""

from __future__ import annotations

import math

import numpy as np
import pytest

from labkit import private
from labkit.types import LabkitError


@pytest.mark.parametrize("epsilon", [0.25, 1.0, 3.0])
def test_reports_are_private_by_definition(epsilon):
    p = private.honest(epsilon)
    assert p / (1 - p) == pytest.approx(math.exp(epsilon))
    told = private.randomize(np.ones(200_000, bool), epsilon, np.random.default_rng(1)).mean()
    assert told == pytest.approx(p, abs=0.005)


@pytest.mark.parametrize("epsilon", [0.5, 1.0, 2.0])
def test_the_share_is_unbiased_and_its_error_is_the_computed_one(epsilon):
    rng, n, truth = np.random.default_rng(2), 2000, np.arange(2000) < 400
    values = [private.share(private.randomize(truth, epsilon, rng), epsilon) for _ in range(600)]
    found = np.array([one.value for one in values])
    error = private.response_error(0.2, n, epsilon)
    assert found.mean() == pytest.approx(0.2, abs=4 * error / math.sqrt(600))
    # the truth is fixed here, so only the lies vary: p (1 - p) / n, divided by 2p - 1
    p = private.honest(epsilon)
    assert found.std() == pytest.approx(math.sqrt(p * (1 - p) / n) / (2 * p - 1), rel=0.1)
    assert np.mean([one.low <= 0.2 <= one.high for one in values]) > 0.93


def test_the_error_with_drawn_truth_is_that_of_simulation():
    rng = np.random.default_rng(3)
    found = [private.share(private.randomize(rng.random(1000) < 0.3, 1.0, rng), 1.0).value for _ in range(1000)]
    assert np.std(found) == pytest.approx(private.response_error(0.3, 1000, 1.0), rel=0.1)


def test_laplace_noise_has_its_scale_and_no_bias():
    noise = private.laplace(np.zeros(200_000), 0.5, np.random.default_rng(4), sensitivity=2.0)
    assert noise.mean() == pytest.approx(0, abs=0.05) and noise.std() == pytest.approx(math.sqrt(2) * 4, rel=0.02)


def test_epsilons_add_up_until_the_budget_is_spent():
    budget = private.Budget(1.0)
    assert budget.spend(0.4) == 0.4 and budget.spend(0.6) == 0.6 and budget.left == pytest.approx(0)
    with pytest.raises(LabkitError, match="Send nothing"):
        budget.spend(0.01)
    assert budget.spent == pytest.approx(1.0)


@pytest.mark.parametrize("epsilon", [0, -1, math.inf, math.nan])
def test_a_senseless_epsilon_gets_a_sentence(epsilon):
    with pytest.raises(LabkitError, match="above 0"):
        private.honest(epsilon)
    with pytest.raises(LabkitError, match="above 0"):
        private.laplace([1], epsilon, np.random.default_rng(0))


def test_no_reports_give_no_share():
    with pytest.raises(LabkitError, match="at least one"):
        private.share([], 1.0)

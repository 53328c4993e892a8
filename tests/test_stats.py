import numpy as np
import pytest

from labkit import LabkitError, stats


def test_median_interval_brackets_and_is_repeatable():
    values = np.random.default_rng(1).normal(100, 5, 40)
    found = stats.interval(values)
    assert found.value == np.median(values)
    assert found.low < found.value < found.high
    assert found == stats.interval(values)
    assert stats.interval([3.0]) == (3.0, 3.0, 3.0)


def test_quantiles_of_t_are_those_of_the_tables():
    for p, freedom, value in ((0.975, 1, 12.706), (0.975, 2, 4.303), (0.975, 3, 3.182), (0.975, 6, 2.447), (0.975, 30, 2.042), (0.95, 5, 2.015)):
        assert stats._t(p, freedom) == pytest.approx(value, rel=2e-3)


def test_the_interval_of_seven_rounds_holds_the_truth():
    """The median of normal values, as rounds give them: quantiles not expanded hold it in about 86 of 100."""
    rng = np.random.default_rng(5)
    held = [low <= 10 <= high for _, low, high in (stats.interval(rng.normal(10, 1, 7), resamples=1000) for _ in range(400))]
    assert np.mean(held) > 0.95


def test_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(2)
    inside = sum(
        low <= 10 <= high
        for _, low, high in (stats.interval(rng.normal(10, 1, 25), np.mean, resamples=800) for _ in range(200))
    )
    assert 0.86 <= inside / 200 <= 0.99


def test_ratio_is_paired_by_round():
    slow_moments = np.random.default_rng(3).uniform(0.2, 1.0, 9)  # hit both arms of a round alike
    found = stats.ratio(20 * slow_moments, 10 * slow_moments)
    assert found == pytest.approx((2.0, 2.0, 2.0))
    assert stats.differs(found)


def test_a_against_a_is_no_difference():
    rng = np.random.default_rng(4)
    a, b = rng.normal(100, 3, (2, 11))
    assert not stats.differs(stats.ratio(a, b))
    assert not stats.differs(stats.Estimate(1.01, 1.005, 1.015))  # certain, and too small to claim


def test_ratio_refuses_unequal_rounds_and_zeros():
    with pytest.raises(LabkitError, match="equally many"):
        stats.ratio([1, 2], [1])
    with pytest.raises(LabkitError, match="positive"):
        stats.ratio([1, 0], [1, 1])


def test_block_mean_weighs_chunks_by_their_tokens():
    assert stats.block_mean([10, 2], [10, 1]).value == pytest.approx(12 / 11)


def test_block_interval_is_wider_than_the_independent_one_when_tokens_of_a_chunk_agree():
    rng = np.random.default_rng(5)
    chunk_means = rng.normal(2, 0.5, 20)
    tokens = chunk_means[:, None] + rng.normal(0, 0.1, (20, 255))
    found = stats.block_mean(tokens.sum(1), [255] * 20)
    assert found.high - found.low > 5 * 2 * 1.96 * stats.standard_error(tokens)


def test_wilson_against_published_values():
    # Newcombe 1998, table I: 81 of 263 and 0 of 20
    assert stats.wilson(81, 263)[1:] == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert stats.wilson(0, 20)[1:] == pytest.approx((0.0, 0.1611), abs=5e-5)


def test_errors_match_their_formulas():
    a, b = np.random.default_rng(6).normal(0, 1, (2, 500))
    b = a + 0.01 * b
    covariance = np.cov(a, b, bias=True)
    by_parts = np.sqrt((covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]) / 499)
    assert stats.paired_error(a, b) == pytest.approx(by_parts, rel=1e-6)
    assert stats.standard_error(a) == pytest.approx(a.std(ddof=1) / np.sqrt(500))
    assert stats.paired_error(a, b) < stats.standard_error(a) / 50


@pytest.mark.parametrize(
    "call", [lambda: stats.interval([]), lambda: stats.block_mean([], []), lambda: stats.wilson(0, 0)]
)
def test_nothing_measured_is_an_error(call):
    with pytest.raises(LabkitError):
        call()

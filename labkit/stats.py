"""Statistics of raw measurements, computed when shown and never stored.

Timings are told by their median, because a busy moment only ever adds time. Intervals are bootstrap intervals:
resample what was seen, recompute, read off the quantiles, further out the fewer values there are (Hesterberg 2015, The American
Statistician 69, 371-386, "expanded percentile"): plain quantiles of seven rounds hold the truth 86 times in 100, not 95. Quality is resampled by whole chunks of text, because the
tokens inside one chunk are correlated and resampling them singly gives an interval that is too narrow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from labkit.types import LabkitError

RESAMPLES = 10_000
WORTH_CLAIMING = 0.02  # a speed difference under 2 % is not claimed, whatever its interval


class Estimate(NamedTuple):
    """A value with the ends of its interval; the three are equal where one value is all there is."""

    value: float
    low: float
    high: float


def median(values: Sequence[float]) -> float:
    """Middle value; NaN for no values."""
    return float(np.median(values)) if len(values) else float("nan")


def interval(
    values: Sequence[float],
    statistic: Callable[..., np.ndarray] = np.median,
    *,
    level: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """`statistic` of `values` with its percentile bootstrap interval. `statistic` takes `axis=`, as numpy's do."""
    data = np.asarray(values, dtype=np.float64)
    if data.size == 0:
        raise LabkitError("An interval was asked for no values; measure at least once.")
    centre = float(statistic(data, axis=-1))
    if data.size == 1:
        return Estimate(centre, centre, centre)
    draws = np.random.default_rng(seed).integers(0, data.size, (resamples, data.size))
    return Estimate(centre, *_ends(statistic(data[draws], axis=-1), level, data.size))


def ratio(a: Sequence[float], b: Sequence[float], *, level: float = 0.95, seed: int = 0) -> Estimate:
    """a / b from rounds in which both were measured: median of the per-round log ratios, bootstrapped over rounds.

    Pairing removes what disturbed both arms of a round alike. Both sequences hold one positive value a round.
    """
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if first.shape != second.shape or first.size == 0:
        raise LabkitError(f"A paired ratio needs equally many rounds of both; given {first.size} and {second.size}.")
    if (first <= 0).any() or (second <= 0).any():
        raise LabkitError("A ratio needs positive values; one of the rounds holds zero or less.")
    return Estimate(*np.exp(interval(np.log(first / second), level=level, seed=seed)).tolist())


def differs(estimate: Estimate, worth: float = WORTH_CLAIMING) -> bool:
    """Whether a ratio may be called a difference: its interval excludes 1 and it is more than `worth` away from 1."""
    return not estimate.low <= 1 <= estimate.high and abs(estimate.value - 1) > worth


def block_mean(
    sums: Sequence[float],
    counts: Sequence[float],
    *,
    level: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """Mean over all tokens, sum(sums) / sum(counts), with an interval from resampling whole chunks.

    `sums` and `counts` hold one entry a chunk. `exp` of the three numbers is a perplexity and its interval.
    """
    total, weight = np.asarray(sums, dtype=np.float64), np.asarray(counts, dtype=np.float64)
    if total.size == 0 or total.shape != weight.shape:
        raise LabkitError(f"A mean over chunks needs a sum and a count each; given {total.size} and {weight.size}.")
    centre = float(total.sum() / weight.sum())
    if total.size == 1:
        return Estimate(centre, centre, centre)
    draws = np.random.default_rng(seed).integers(0, total.size, (resamples, total.size))
    return Estimate(centre, *_ends(total[draws].sum(-1) / weight[draws].sum(-1), level, total.size))


def wilson(successes: float, n: int, *, z: float = 1.959963984540054) -> Estimate:
    """Share of successes with Wilson's score interval, which stays honest near 0 and 1 where p ± SE does not."""
    if n <= 0:
        raise LabkitError("A share of no trials was asked for; score at least one task.")
    p = successes / n
    centre, spread = p + z * z / (2 * n), z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return Estimate(p, max(0.0, float((centre - spread) / scale)), min(1.0, float((centre + spread) / scale)))


def standard_error(values: np.ndarray) -> float:
    """sqrt((E[x²] - E[x]²) / (n - 1)): the error of a mean of independent values; 0 for fewer than two."""
    data = np.asarray(values, dtype=np.float64)
    return float(np.sqrt(data.var() / (data.size - 1))) if data.size > 1 else 0.0


def paired_error(a: np.ndarray, b: np.ndarray) -> float:
    """Standard error of mean(a - b) over the same tokens: sqrt(s_a² + s_b² - 2 cov), far below either error alone."""
    return standard_error(np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64))


def _ends(draws: np.ndarray, level: float, n: int) -> list[float]:
    """Quantiles of what was resampled from n values, as far out as a t interval of n values is wider than a normal one."""
    tail = NormalDist().cdf(-np.sqrt(n / (n - 1)) * _t((1 + level) / 2, n - 1))
    return np.quantile(draws, [tail, 1 - tail]).tolist()


def _t(p: float, freedom: int) -> float:
    """Quantile of Student's t: closed forms for 1 and 2, else Cornish-Fisher's series (Abramowitz and Stegun 26.7.5)."""
    if freedom == 1:
        return float(np.tan(np.pi * (p - 0.5)))
    if freedom == 2:
        return float((2 * p - 1) * np.sqrt(2 / (4 * p * (1 - p))))
    z = NormalDist().inv_cdf(p)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / freedom**power for power, term in enumerate(terms, 1))

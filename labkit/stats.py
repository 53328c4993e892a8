"""Statistics of raw measurements, computed when shown and never stored.

Timings are told by their median, because a busy moment only ever adds time. Intervals are bootstrap intervals:
resample what was seen, recompute, read off the quantiles. Quality is resampled by whole chunks of text, because the
tokens inside one chunk are correlated and resampling them singly gives an interval that is too narrow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    return Estimate(centre, *_ends(statistic(data[draws], axis=-1), level))


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
    return Estimate(centre, *_ends(total[draws].sum(-1) / weight[draws].sum(-1), level))


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


def _ends(draws: np.ndarray, level: float) -> list[float]:
    return np.quantile(draws, [(1 - level) / 2, (1 + level) / 2]).tolist()

"""From measurements to a decision: what fits the limits and why the rest does not, what is best in any respect, what to try next.

All functions take the wide table of `candidates`: one row an artifact, one column a metric, its interval in two more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from labkit.stats import Estimate, wilson
from labkit.types import LabkitError

if TYPE_CHECKING:
    import pandas as pd

KEYS = ["checkpoint", "engine", "precision", "options"]


def candidates(frame: pd.DataFrame) -> pd.DataFrame:
    """One row an artifact of a ledger frame; columns named by metric hold its value, METRIC_low and METRIC_high its interval.

    Of several measurements of one metric the newest counts. Metrics never taken are NaN.
    """
    import pandas as pd

    from labkit.ledger import comparable

    if frame.empty:
        raise LabkitError("There is nothing to decide from: the ledger is empty. Measure something first, or run a lab.")
    rows = comparable(frame).assign(options=[str(sorted(dict(o).items())) for o in frame["options"]]).sort_values("when")
    newest = rows.drop_duplicates([*KEYS, "metric"], keep="last")
    parts = [
        newest.pivot(index=KEYS, columns="metric", values=value).add_suffix(suffix)
        for value, suffix in (("value", ""), ("low", "_low"), ("high", "_high"))
    ]
    return pd.concat(parts, axis=1).reset_index().rename_axis(columns=None)


@dataclass(frozen=True)
class Limit:
    """One demand on a metric: at least or at most so much, both ends allowed to be missing."""

    metric: str
    least: float | None = None
    most: float | None = None
    unit: str = ""

    def missed(self, row: Mapping[str, Any]) -> str | None:
        """Why a row fails this limit, None when it meets it. The whole interval must lie inside: chance is no reason to ship."""
        value = row.get(self.metric)
        if value is None or np.isnan(value):
            return f"{self.metric} was not measured"
        low, high = (row.get(f"{self.metric}_{end}", value) for end in ("low", "high"))
        if self.least is not None and low < self.least:
            return self._why(value, "below", self.least, certain=high < self.least, low=low, high=high)
        if self.most is not None and high > self.most:
            return self._why(value, "above", self.most, certain=low > self.most, low=low, high=high)
        return None

    def _why(self, value: float, word: str, bound: float, *, certain: bool, low: float, high: float) -> str:
        if certain:
            return f"{self.metric} {self._said(value)} is {word} {self._said(bound)}"
        return f"{self.metric} {self._said(value)} may be {word} {self._said(bound)}: it lies in {self._said(low)} to {self._said(high)}"

    def _said(self, value: float) -> str:
        return f"{value:,.4g} {self.unit}".rstrip()


def matrix(table: pd.DataFrame, limits: Sequence[Limit]) -> pd.DataFrame:
    """The table with `fits` and `because`: every limit a row misses, in words."""
    if not limits:
        raise LabkitError("No limit was given; name at least one, such as Limit('size', most=1e9, unit='bytes').")
    reasons = [[why for limit in limits if (why := limit.missed(row))] for row in table.to_dict("records")]
    return table.assign(fits=[not why for why in reasons], because=["; ".join(why) for why in reasons])


def loss(candidate: Sequence[float], baseline: Sequence[float]) -> Estimate:
    """Share of right answers lost against a baseline on the same tasks, with a careful 95 % interval.

    Both hold 1 or 0 a task, in the same order. Lost and won answers get Wilson's interval each, and the ends are put together
    at their worst. A bootstrap would call "nothing lost in ten tasks" certain; this does not.
    """
    if len(candidate) != len(baseline):
        raise LabkitError(f"{len(candidate)} and {len(baseline)} answers were given; expected the same tasks for both.")
    pairs = list(zip(candidate, baseline, strict=True))
    lost, won = (wilson(sum(one < other for one, other in some), len(some)) for some in (pairs, [(b, a) for a, b in pairs]))
    return Estimate(lost.value - won.value, lost.low - won.high, lost.high - won.low)


def pareto(table: pd.DataFrame, metrics: Mapping[str, str]) -> np.ndarray:
    """Which rows no other row beats: bool (rows,). `metrics`: name -> "lower" or "higher". A row that lacks one is not on it."""
    values = _costs(table, metrics)
    known = ~np.isnan(values).any(axis=1)
    no_worse = (values[None] <= values[:, None]).all(axis=2)
    better = (values[None] < values[:, None]).any(axis=2)
    return known & ~(no_worse & better & known[None]).any(axis=1)


def weigh(table: pd.DataFrame, metrics: Mapping[str, str], weights: Mapping[str, float]) -> np.ndarray:
    """Weighted score of every row, 0 to 1: each metric scaled between the worst and the best row, then averaged by weight."""
    if not weights or min(weights.values()) < 0 or sum(weights.values()) <= 0:
        raise LabkitError(f"Weights {dict(weights)} were given; expected numbers from 0 up, not all of them 0.")
    unknown = sorted(set(weights) - set(metrics))
    if unknown:
        raise LabkitError(f"A weight was given to {unknown[0]!r}; expected one of {', '.join(metrics)}.")
    shares = np.array([weights.get(name, 0.0) for name in metrics]) / sum(weights.values())
    return _scaled(_costs(table, metrics)) @ shares


def sensitivity(
    table: pd.DataFrame, metrics: Mapping[str, str], weights: Mapping[str, float], *, spread: float = 0.5, draws: int = 2000, seed: int = 0
) -> np.ndarray:  # fmt: skip
    """How often each row wins when every weight is varied by a factor within 1 / (1 + spread) to 1 + spread: shares (rows,).

    A winner with a share near 1 does not depend on the weights; one near 0.5 does.
    """
    names = list(metrics)
    base = np.array([weights.get(name, 0.0) for name in names])
    factors = np.exp(np.random.default_rng(seed).uniform(-np.log1p(spread), np.log1p(spread), (draws, len(names))))
    scores = _scaled(_costs(table, metrics)) @ (base * factors).T  # rows x draws; the sum of weights does not change the order
    return np.bincount(scores.argmax(axis=0), minlength=len(table)) / draws


def halving(
    recipes: Sequence[Any], cost: Callable[[Any, int], float], *, budget: int = 1, keep: float = 0.5
) -> list[list[tuple[Any, float]]]:  # fmt: skip
    """Successive halving: measure all with a small budget, keep the better half, double the budget, until one is left.

    `cost(recipe, budget)`: lower is better; infinite for a recipe that misses a limit. Returns the rounds, each sorted, best
    first. The last round's first is the answer; if its cost is infinite, nothing fits. (Jamieson and Talwalkar, 2016.)
    """
    if not recipes or not 0 < keep < 1 or budget < 1:
        raise LabkitError(
            f"{len(recipes)} recipes, keep={keep} and budget={budget} were given; expected some, 0 < keep < 1, 1 or more."
        )
    left, rounds = list(recipes), []
    while True:
        scored = sorted(((one, cost(one, budget)) for one in left), key=lambda pair: pair[1])
        rounds.append(scored)
        fitting = [one for one, value in scored if np.isfinite(value)]
        left = fitting[: max(1, int(len(scored) * keep))]
        if len(scored) == 1 or not left:
            return rounds
        budget *= 2


def _costs(table: pd.DataFrame, metrics: Mapping[str, str]) -> np.ndarray:
    """(rows, metrics), lower is better."""
    for name, better in metrics.items():
        if name not in table or better not in ("lower", "higher"):
            raise LabkitError(f"{name!r}: {better!r} was given; expected a measured metric and 'lower' or 'higher'.")
    signs = np.array([1.0 if better == "lower" else -1.0 for better in metrics.values()])
    return table[list(metrics)].to_numpy(dtype=float) * signs


def _scaled(costs: np.ndarray) -> np.ndarray:
    """1 for the best row of each column, 0 for the worst and for what was not measured."""
    low, high = np.nanmin(costs, axis=0), np.nanmax(costs, axis=0)
    spread = np.where(high > low, high - low, 1.0)
    return np.nan_to_num((high - costs) / spread, nan=0.0) + (high == low) * ~np.isnan(costs)

"""What a model costs to answer with: how many requests a machine takes, joules and money a token, owned against rented.

Nothing here is measured. Speeds and service times come from measurements, watts and prices from the reader: they are arguments
without hidden defaults, so that a result can always be traced to who assumed what.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from labkit import simulate
from labkit.types import LabkitError

if TYPE_CHECKING:
    import pandas as pd

HOURS_A_YEAR = 8766.0  # 365.25 days
JOULES_A_KWH = 3.6e6


# --- capacity ----------------------------------------------------------------------------------------------------


def busy(per_hour: float, seconds: float) -> float:
    """Little's law (1961): mean number of requests present = arrivals a second x mean seconds each is present."""
    return per_hour / 3600 * seconds


def most_per_hour(seconds: float, at_once: int = 1) -> float:
    """Requests an hour that `at_once` streams of `seconds` each can answer when they never wait for work."""
    return at_once * 3600 / seconds


def waiting(per_hour: float, service: Sequence[float]) -> float:
    """Mean seconds in the queue before one server, for random (Poisson) arrivals and the given service times.

    Pollaczek and Khinchine (1930): W = a E[S²] / (2 (1 - a E[S])), with a the arrivals a second. Infinite at full load.
    """
    times, a = np.asarray(service, dtype=float), per_hour / 3600
    if times.size == 0 or times.min() < 0 or a < 0:
        raise LabkitError(f"{times.size} service times and {per_hour} requests an hour were given; expected times of 0 or more.")
    load = a * times.mean()
    return math.inf if load >= 1 else float(a * np.mean(times**2) / (2 * (1 - load)))


def queue(per_hour: float, service: Sequence[float], requests: int = 20_000, seed: int = 0) -> np.ndarray:
    """Simulated seconds in the queue (requests,): random arrivals, service times drawn from the given ones."""
    rng = np.random.default_rng(seed)
    arrivals = np.cumsum(rng.exponential(3600 / per_hour, requests)).tolist()
    served = simulate.queue(arrivals, rng.choice(np.asarray(service, dtype=float), requests).tolist())
    return np.array([one.start for one in served]) - arrivals


# --- cost --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Owned:
    """A machine of one's own. Money is in one currency, whichever; every field is the reader's assumption or measurement."""

    price: float  # of the machine
    years: float  # until it is replaced
    idle_watts: float
    busy_watts: float
    kwh: float  # price of a kilowatt-hour
    tokens_per_second: float  # while it answers
    care: float = 0.0  # money a year for maintenance and updates

    def joules(self) -> float:
        """Joules a token beyond what the machine draws idle."""
        return (self.busy_watts - self.idle_watts) / self.tokens_per_second

    def yearly(self, tokens: float) -> float:
        """Money a year for `tokens` a year: its share of the price, care, idling, and the tokens' own energy.

        LabkitError when it cannot write so many in a year.
        """
        most = self.tokens_per_second * HOURS_A_YEAR * 3600
        if not 0 <= tokens <= most:
            raise LabkitError(f"{tokens:.3g} tokens a year were asked for; this machine writes at most {most:.3g}.")
        idle = self.idle_watts * HOURS_A_YEAR / 1000 * self.kwh
        return self.price / self.years + self.care + idle + tokens * self.joules() / JOULES_A_KWH * self.kwh

    def per_million(self, tokens: float) -> float:
        """Money for a million tokens when `tokens` a year are written."""
        return self.yearly(tokens) / tokens * 1e6


def break_even(owned: Owned, cloud: float) -> float:
    """Tokens a year from which the machine is cheaper than `cloud` money a million tokens; infinite when it never is.

    A machine that would have to write more than it can is never cheaper.
    """
    own = owned.joules() / JOULES_A_KWH * owned.kwh
    saved = cloud / 1e6 - own  # a token
    if saved <= 0:
        return math.inf
    tokens = owned.yearly(0) / saved
    return tokens if tokens <= owned.tokens_per_second * HOURS_A_YEAR * 3600 else math.inf


# --- the case study ----------------------------------------------------------------------------------------------


def case_study() -> pd.DataFrame:
    """The chapters' distillation case study, stated beside what its own numbers imply (claims C136, C146 to C150)."""
    import pandas as pd

    before, after = 3.2, 0.48  # seconds an answer
    rows = [
        ("time saved", "85 %", f"{1 - after / before:.1%}", "holds"),
        ("memory saved", "95 %", f"{1 - 60 / 1200:.1%}", "holds"),
        ("accuracy kept", "92 %", f"{87.0 / 94.5:.1%}", "holds"),
        ("errors", "not stated", f"{(100 - 87.0) / (100 - 94.5):.2f} times as many", "hidden"),
        ("queries an hour before", "50", f"{most_per_hour(before):,.0f} possible: busy {busy(50, before):.1%} of the time", "no limit"),
        ("queries an hour after", "500", f"{most_per_hour(after):,.0f} possible: busy {busy(500, after):.1%} of the time", "no limit"),
        ("queries, factor", "10", f"{before / after:.2f} at equal concurrency", "contradicts"),
        ("concurrent requests", "10 times", f"{busy(500, after) / busy(50, before):.2f} times, by Little's law", "contradicts"),
    ]
    return pd.DataFrame(rows, columns=["quantity", "stated", "computed from its own numbers", "verdict"])

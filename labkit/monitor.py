"""Watching a model in use: replayed requests, latency histograms with the error of their quantiles, drift without and with answers.

Drift of the requests needs no right answers: their distribution is compared with the one the model was accepted on (`psi`).
Drift of the answers does: a sequential test (`watch`) follows right and wrong and stops as soon as the evidence suffices.
"""

from __future__ import annotations

import bisect
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any, NamedTuple

import numpy as np

from labkit import stats
from labkit.types import Artifact, LabkitError

# Upper ends of the buckets in seconds, as a Prometheus histogram has them; what is above falls into one more bucket.
BOUNDS = (0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0, 5.0)
NEW_TOKENS = 128  # of an answer, at most


class Seen(NamedTuple):
    """One replayed request. `right` is None where the right answer is not known, as in real use."""

    text: str
    answer: str
    right: bool | None
    seconds: float
    pieces_per_word: float  # tokens a word of the request: unusual spelling falls into more pieces


def replay(
    artifact: Artifact, tasks: Iterable[Any], *, runner: Any = None, threads: int | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Seen]:  # fmt: skip
    """Ask an artifact the requests of house tasks one after another, as users would."""
    from labkit import house
    from labkit.measure.accuracy import answer
    from labkit.measure.record import opened

    source, found = artifact.checkpoint, []
    with opened(artifact, runner, exact=False, threads=threads) as model:
        for task in tasks:
            began = clock()
            reply = answer(source, model, task.messages, NEW_TOKENS, frozenset(source.eos_ids))
            seconds = clock() - began
            text = task.messages[-1]["content"]
            found.append(Seen(text, reply, house.score(task, reply), seconds, pieces(source, text)))
    return found


def pieces(checkpoint: Any, text: str) -> float:
    """Tokens a word of a text, which a checkpoint's tokenizer needs; 0 for an empty text."""
    words = text.split()
    return len(checkpoint.encode(text)) / len(words) if words else 0.0


def hurried(task: Any, slips: int = 1, seed: int = 0) -> Any:
    """The task as somebody types it in a hurry: small letters, no full stop, and `slips` spelling mistakes. Its answer stays."""
    from labkit.house.language import misspell

    *before, last = task.messages
    rng, text = Random(f"{seed} {last['content']}"), last["content"].lower().rstrip(".")
    for _ in range(slips):
        text = misspell(rng, text)
    return replace(task, messages=[*before, {**last, "content": text}])


# --- latency -----------------------------------------------------------------------------------------------------


@dataclass
class Histogram:
    """Counts by bucket: all that a metrics endpoint keeps of the requests. `bounds`: upper ends, rising."""

    bounds: Sequence[float] = BOUNDS
    counts: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        if list(self.bounds) != sorted(set(self.bounds)) or not self.bounds:
            raise LabkitError(f"Bounds {list(self.bounds)} were given; expected rising numbers, each once.")
        self.counts = self.counts or [0] * (len(self.bounds) + 1)

    def observe(self, *values: float) -> Histogram:
        """Count values; a value equal to a bound belongs below it."""
        for value in values:
            self.counts[bisect.bisect_left(self.bounds, value)] += 1
        return self

    def quantile(self, q: float) -> stats.Estimate:
        """The q-quantile, guessed as if its bucket were evenly filled, with the ends of that bucket: it lies between them.

        Beyond the last bound nothing is known but that: the upper end is infinite and the guess is the last bound.
        """
        total = sum(self.counts)
        if not total or not 0 < q < 1:
            raise LabkitError(f"The {q} quantile of {total} observations was asked for; expected 0 < q < 1 and at least one.")
        rank, before = q * total, np.cumsum([0, *self.counts])  # observations below each bucket
        bucket = int(np.searchsorted(before[1:], rank))
        low = self.bounds[bucket - 1] if bucket else 0.0
        if bucket == len(self.bounds):
            return stats.Estimate(low, low, math.inf)
        high = self.bounds[bucket]
        inside = float(rank - before[bucket]) / self.counts[bucket]
        return stats.Estimate(low + (high - low) * inside, low, high)


def quantile(values: Sequence[float], q: float, level: float = 0.95) -> stats.Estimate:
    """The q-quantile of all observations with the interval that chance leaves, from order statistics.

    Where too few observations lie beyond the quantile to bound it, its upper end is infinite: no p99 from 100 requests.
    """
    data = np.sort(np.asarray(values, dtype=float))
    if not data.size or not 0 < q < 1:
        raise LabkitError(f"The {q} quantile of {data.size} observations was asked for; expected 0 < q < 1 and at least one.")
    below = np.cumsum([math.comb(data.size, k) * q**k * (1 - q) ** (data.size - k) for k in range(data.size + 1)])
    low = int(np.searchsorted(below, (1 - level) / 2, side="right"))  # order statistics with binomial ranks
    high = int(np.searchsorted(below, (1 + level) / 2))
    ends = (data[low - 1] if low else 0.0, data[high] if high < data.size else math.inf)
    return stats.Estimate(float(np.quantile(data, q)), float(ends[0]), float(ends[1]))


# --- drift -------------------------------------------------------------------------------------------------------


def edges(reference: Sequence[float], bins: int = 8) -> np.ndarray:
    """Inner bin edges that cut the reference into `bins` about equal parts; fewer where values repeat."""
    return np.unique(np.quantile(np.asarray(reference, dtype=float), np.arange(1, bins) / bins))


def counted(values: Sequence[float], inner: np.ndarray) -> np.ndarray:
    """How many values fall into each bin: (len(inner) + 1,)."""
    return np.bincount(np.searchsorted(inner, values, side="left"), minlength=len(inner) + 1)


def psi(reference: Sequence[int], observed: Sequence[int]) -> float:
    """Population stability index of two sets of counts over the same bins: sum of (p - q) ln(p / q).

    Half an observation is added to every bin, so that an empty one is unlikely and not impossible.
    """
    first, second = (np.asarray(counts, dtype=float) + 0.5 for counts in (reference, observed))
    if first.shape != second.shape:
        raise LabkitError(f"Counts over {first.size} and over {second.size} bins were given; expected the same bins.")
    p, q = first / first.sum(), second / second.sum()
    return float(np.sum((q - p) * np.log(q / p)))


def psi_limit(reference: Sequence[int], n: int, *, level: float = 0.99, draws: int = 2000, seed: int = 0) -> float:
    """What `n` requests without any drift stay below `level` of the time: chance alone moves the index, most when n is small."""
    counts = np.asarray(reference)
    shares, rng = (counts + 0.5) / (counts + 0.5).sum(), np.random.default_rng(seed)
    pairs = zip(rng.multinomial(counts.sum(), shares, draws), rng.multinomial(n, shares, draws), strict=True)
    return float(np.quantile([psi(old, new) for old, new in pairs], level))


class Watched(NamedTuple):
    """A sequential test: evidence after each answer in nats, the alarm's level, and where it rang (None: never)."""

    evidence: np.ndarray  # (answers,)
    level: float
    alarm: int | None


def watch(outcomes: Sequence[bool], good: float, bad: float, *, level: float = math.log(100)) -> Watched:
    """Page's test (1954): does the share of right answers fall from `good` to `bad`?

    Every answer moves the evidence by the logarithm of how much likelier it is under `bad`; evidence never falls below 0, so
    a long healthy time does not hide a change. With level ln(N), a healthy stream rings at most once in N answers on average.
    """
    if not 0 < bad < good < 1:
        raise LabkitError(f"good={good} and bad={bad} were given; expected 0 < bad < good < 1.")
    right, wrong = math.log(bad / good), math.log((1 - bad) / (1 - good))
    path, now = [], 0.0
    for outcome in outcomes:
        now = max(0.0, now + (right if outcome else wrong))
        path.append(now)
    evidence = np.array(path)
    over = np.flatnonzero(evidence >= level)
    return Watched(evidence, level, int(over[0]) if over.size else None)

"""Rounds, A/A, ratios and verdicts. Nothing here knows what is measured."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np

from labkit import stats
from labkit.measure import quiet

RETRIES = 3  # disturbed rounds that may be taken again; `--retries` sets it


class Arm(NamedTuple):
    """One side of a comparison. `sample` gives one positive number a call; `pids`: live processes that work for it."""

    name: str
    sample: Callable[[], float]
    pids: tuple[int, ...] = ()


@dataclass
class Taken:
    """What the rounds gave: arm -> one value a round (the geometric mean of its two samples), and how quiet it was."""

    values: dict[str, list[float]]
    reasons: list[str | None]
    discarded: int = 0

    @property
    def state(self) -> dict[str, Any]:
        return quiet.verdict(self.reasons) | {"discarded_rounds": self.discarded}


class Goal(NamedTuple):
    """What must hold: low <= ratio <= high; None leaves a side open. With both open the figure is shown and not judged."""

    id: str
    text: str
    low: float | None = None
    high: float | None = None

    def holds(self, value: float) -> bool:
        return (self.low is None or value >= self.low) and (self.high is None or value <= self.high)


@dataclass
class Row:
    """One line of a table."""

    goal: str
    target: str
    what: str
    value: float
    low: float
    high: float
    rounds: int
    met: bool | None  # None: shown only
    sure: bool  # the whole interval agrees with `met`
    unit: str = "x"
    quiet: bool = True
    reason: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def interleaved(arms: Sequence[Arm], rounds: int, *, retries: int | None = None, seed: int = 0) -> Taken:
    """A random order and its reverse in every round (A B B A), after one untimed sample each; disturbed rounds again.

    Of at most rounds + retries the least disturbed are kept, in the order taken.
    """
    retries = RETRIES if retries is None else retries
    rng, pids = np.random.default_rng(seed), [pid for arm in arms for pid in arm.pids]
    for arm in arms:
        arm.sample()
    taken: list[dict[str, Any]] = []
    before = best = quiet.calibrate()
    while sum(one["reason"] is None for one in taken) < rounds and len(taken) < rounds + retries:
        order, clocks = rng.permutation(len(arms)), read_clocks(pids)
        samples: list[list[float]] = [[] for _ in arms]
        for i in [*order, *order[::-1]]:
            samples[i].append(arms[i].sample())
        share, after = quiet.shares(clocks, read_clocks(pids)), quiet.calibrate()
        best, slower, before = min(best, after), max(before, after), after
        reason = quiet.disturbed(share["others"], share["steal"], slower, best)
        taken.append({"values": [float(np.exp(np.mean(np.log(one)))) for one in samples], "reason": reason, **share})
    ranked = sorted(range(len(taken)), key=lambda i: (taken[i]["reason"] is not None, taken[i]["others"]))[:rounds]
    kept = [taken[i] for i in sorted(ranked)]
    values = {arm.name: [one["values"][i] for one in kept] for i, arm in enumerate(arms)}
    return Taken(values, [one["reason"] for one in kept], len(taken) - len(kept))


def read_clocks(pids: Sequence[int] = ()) -> quiet.Clocks:
    """`quiet.read_clocks`, with the time of our children that have ended: a peer is a program of its own every time."""
    clocks, ended = quiet.read_clocks(pids), os.times()
    return clocks._replace(own=clocks.own + ended.children_user + ended.children_system)


def ratio_row(goal: Goal, what: str, taken: Taken, ours: str, theirs: str, *, lower_is_better: bool = False) -> Row:
    """ours / theirs (theirs / ours of a cost, so that more is better either way), judged."""
    a, b = taken.values[ours], taken.values[theirs]
    found = stats.ratio(b, a) if lower_is_better else stats.ratio(a, b)
    return judged(goal, what, found, len(a), details={"ours": a, "theirs": b}, **_state(taken))


def value_row(goal: Goal, what: str, values: Sequence[float], *, unit: str = "", taken: Taken | None = None, **details: Any) -> Row:
    """A quantity with its own interval (one value: no interval), judged."""
    state = _state(taken) if taken else {}
    return judged(goal, what, stats.interval(values), len(values), unit=unit, details={"values": list(values), **details}, **state)


def judged(goal: Goal, what: str, found: stats.Estimate, rounds: int, **more: Any) -> Row:
    met = goal.holds(found.value) if (goal.low, goal.high) != (None, None) else None
    sure = met is None or all(goal.holds(end) == met for end in (found.low, found.high))
    return Row(goal.id, goal.text, what, *found, rounds, met, sure, **more)


def _state(taken: Taken) -> dict[str, Any]:
    return {"quiet": taken.state["quiet"], "reason": taken.state["reason"]}


def same_against_itself(arm: Arm, rounds: int, **options: Any) -> Row:
    """The A/A run: its ratio is 1 but for the machine's unrest. Met when the interval holds 1 and the median is within 2 %."""
    first, second = arm._replace(name="A"), arm._replace(name="A again")
    taken = interleaved([first, second], rounds, **options)
    found = stats.ratio(taken.values["A"], taken.values["A again"])
    met = found.low <= 1 <= found.high and abs(found.value - 1) <= stats.WORTH_CLAIMING
    goal = Goal("A/A", "the interval holds 1, |median - 1| <= 2 %")
    return Row(goal.id, goal.text, f"{arm.name} against itself", *found, rounds, met, met, **_state(taken), details=dict(taken.values))


class Once:
    """The A/A row that goes before a group's table: `yield from once(arm)` gives it for the first arm only."""

    def __init__(self, rounds: int):
        self.rounds, self.done = rounds, False

    def __call__(self, arm: Arm) -> Iterator[Row]:
        if not self.done:
            self.done = True
            yield same_against_itself(arm, self.rounds)


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table."""
    lines = ["| goal | what | median | 95 % interval | rounds | target | verdict |", "|---|---|---:|---|---:|---|---|"]
    for row in rows:
        verdict = {True: "met", False: "**not met**", None: "shown only"}[row.met] + ("" if row.sure else ", interval crosses")
        verdict += "" if row.quiet else " (busy machine)"
        interval = "" if row.low == row.high else f"{row.low:.4g} to {row.high:.4g}"
        value = f"{row.value:.4g} {row.unit}".strip()
        lines.append(f"| {row.goal} | {row.what} | {value} | {interval} | {row.rounds} | {row.target} | {verdict} |")
    return "\n".join(lines)

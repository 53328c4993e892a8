"""How many servers, and when: Kubernetes' horizontal autoscaler step by step, and a queue to try it on.

    hpa = Hpa(target=0.6, high=8)
    run = simulate(arrivals, service_seconds, hpa)          # also Fixed(3), or Fixed(1) with a faster machine
    run.latency(0.95), run.server_seconds

The algorithm is the published one (Kubernetes, "Horizontal Pod Autoscaling", algorithm details): desired = ceil(current x
metric / target); no change while the ratio is within the tolerance; the highest wish of the last five minutes holds when
scaling down; at most so many pods are added or removed within a period. Not modelled: pods that miss metrics.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from labkit.types import LabkitError

SYNC = 15.0  # seconds between two looks of the controller


def desired(current: int, metric: float, target: float, tolerance: float = 0.1) -> int:
    """Replicas the ratio asks for: ceil(current x metric / target), or `current` while the ratio is within the tolerance."""
    if target <= 0:
        raise LabkitError(f"A target of {target} was given; expected one above 0.")
    ratio = metric / target
    return current if abs(ratio - 1) <= tolerance + 1e-9 else max(0, math.ceil(current * ratio - 1e-9))


class Policy(Protocol):
    """Looks at the metric every SYNC seconds and says how many replicas there should be."""

    start: int

    def step(self, now: float, current: int, metric: float) -> int: ...


@dataclass
class Fixed:
    """Always the same number."""

    start: int = 1

    def step(self, now: float, current: int, metric: float) -> int:
        return self.start


@dataclass
class Hpa:
    """The controller. `metric` and `target` are means over the replicas: the share of time busy, or requests in the system.

    `up` and `down` are the stabilization windows in seconds; within `period` seconds at most `pods` or `percent` (whichever is
    more) may be added, and any number removed: the defaults of autoscaling/v2.
    """

    target: float
    low: int = 1
    high: int = 10
    tolerance: float = 0.1
    up: float = 0.0
    down: float = 300.0
    pods: int = 4
    percent: float = 100.0
    period: float = 15.0
    start: int = 1
    _wishes: deque[tuple[float, int]] = field(default_factory=deque, repr=False)
    _added: deque[tuple[float, int]] = field(default_factory=deque, repr=False)

    def step(self, now: float, current: int, metric: float) -> int:
        wish = min(self.high, max(self.low, desired(current, metric, self.target, self.tolerance)))
        return self._limited(now, current, self._stabilized(now, current, wish))

    def _stabilized(self, now: float, current: int, wish: int) -> int:
        """Down: the highest wish of the window; up: the lowest. Between the two nothing changes."""
        self._wishes.append((now, wish))
        while self._wishes and self._wishes[0][0] < now - max(self.up, self.down):
            self._wishes.popleft()
        highest = max(one for when, one in self._wishes if when >= now - self.down)
        lowest = min(one for when, one in self._wishes if when >= now - self.up)
        return lowest if lowest > current else highest if highest < current else current

    def _limited(self, now: float, current: int, wish: int) -> int:
        """Growth is counted from the replicas there were at the beginning of the period."""
        while self._added and self._added[0][0] <= now - self.period:
            self._added.popleft()
        if wish <= current:
            return wish
        before = current - sum(count for _, count in self._added)
        most = max(before + self.pods, math.ceil(before * (1 + self.percent / 100)))
        allowed = max(current, min(wish, most))
        if allowed > current:
            self._added.append((now, allowed - current))
        return allowed


@dataclass(frozen=True)
class Run:
    """What a simulation saw. Arrays of (requests,) seconds, and `replicas`: (moment, count) whenever the count changed."""

    arrived: np.ndarray
    latencies: np.ndarray
    replicas: tuple[tuple[float, int], ...]
    server_seconds: float  # paid for, starting up included

    def latency(self, q: float) -> float:
        """The q-quantile of the latencies in seconds."""
        return float(np.quantile(self.latencies, q))

    def over(self, limit: float) -> float:
        """Share of requests that took longer than `limit` seconds."""
        return float((self.latencies > limit).mean())


def simulate(
    arrivals: Sequence[float], service: Sequence[float], policy: Policy, *, ready: float = 30.0, speed: float = 1.0,
    metric: str = "busy", sync: float = SYNC, seed: int = 0,
) -> Run:  # fmt: skip
    """One queue, replicas that take one request at a time, service times drawn from those measured (divided by `speed`).

    A new replica works `ready` seconds after it was asked for (it loads a model). One that is to go takes no new request and
    leaves when it is done. The policy sees `metric`, a mean over the working replicas since its last look: "busy", the share
    of time they worked, or "inside", the requests in the system at this moment.
    """
    if metric not in ("busy", "inside"):
        raise LabkitError(f"There is no metric {metric!r}; expected 'busy' or 'inside'.")
    moments = np.sort(np.asarray(arrivals, dtype=float))
    if not moments.size or not len(service):
        raise LabkitError("No arrivals or no service times were given; expected at least one of each.")
    work = np.random.default_rng(seed).choice(np.asarray(service, dtype=float), moments.size) / speed
    return _Simulation(moments, work, policy, ready, metric, sync).run()


class _Simulation:
    """Events in order of time: a replica is free, a request arrives, the controller looks."""

    def __init__(self, moments: np.ndarray, work: np.ndarray, policy: Policy, ready: float, metric: str, sync: float):
        self.moments, self.work, self.policy, self.ready, self.metric, self.sync = moments, work, policy, ready, metric, sync
        self.begun = {name: 0.0 for name in range(policy.start)}  # replica -> when it was asked for
        self.free = [(0.0, name) for name in self.begun]  # when each may take work: a heap
        self.names, self.paid = policy.start, 0.0
        self.spans: list[tuple[float, float]] = []  # work done: from, to
        self.told = [(0.0, policy.start)]

    def run(self) -> Run:
        ended, look, queue = np.zeros(self.moments.size), self.sync, 0
        while queue < self.moments.size:
            free, name = self.free[0]
            starts = max(self.moments[queue], free)
            if look <= starts:
                self._look(look, ended[:queue])
                look += self.sync
                continue
            ended[queue] = starts + self.work[queue]
            heapq.heapreplace(self.free, (ended[queue], name))
            self.spans.append((starts, ended[queue]))
            queue += 1
        end = float(ended.max())
        paid = self.paid + sum(max(0.0, end - since) for since in self.begun.values())
        return Run(self.moments, ended - self.moments, tuple(self.told), paid)

    def _look(self, now: float, ended: np.ndarray) -> None:
        """Replicas that are not ready count as idle ones, as the controller takes it."""
        asked = len(self.begun)
        if self.metric == "busy":
            self.spans = [one for one in self.spans if one[1] > now - self.sync]
            seen = sum(max(0.0, min(to, now) - max(since, now - self.sync)) for since, to in self.spans) / self.sync
        else:
            seen = int(np.searchsorted(self.moments, now, side="right")) - int((ended <= now).sum())
        wanted = max(1, self.policy.step(now, asked, seen / asked))
        for _ in range(wanted - asked):
            self._add(now)
        for _ in range(asked - wanted):
            self._drop(now)
        if wanted != asked:
            self.told.append((now, wanted))

    def _add(self, now: float) -> None:
        self.begun[self.names] = now
        heapq.heappush(self.free, (now + self.ready, self.names))
        self.names += 1

    def _drop(self, now: float) -> None:
        """The youngest goes first; it ends the request it has, one that is still starting ends at once."""
        name = max(self.begun)
        since, free = self.begun.pop(name), next(at for at, one in self.free if one == name)
        self.free = [one for one in self.free if one[1] != name]
        heapq.heapify(self.free)
        starting = since > 0 and free == since + self.ready
        self.paid += (now if starting else max(now, free)) - since

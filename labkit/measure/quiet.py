"""Is the machine quiet enough to time anything? A busy machine cannot be told from a slow model afterwards.

Two witnesses: CPU time that others took (steal by the hypervisor, and every process but ours), and a fixed piece of
work repeated before, between and after the rounds, which also notices a throttled clock.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from labkit import host

OTHERS = 0.05  # share of the machine's CPU time that may go to others in a round
DRIFT = 0.25  # how much slower than its best the fixed work may get


class Clocks(NamedTuple):
    """CPU seconds since start, summed over CPUs: available, used by anyone, stolen, used by our processes."""

    total: float
    busy: float
    stolen: float
    own: float


def read_clocks(pids: Sequence[int] = ()) -> Clocks:
    """Read the counters; `pids` are our live children, whose time is ours too. Works on Linux, macOS and Windows."""
    import psutil

    cpu = psutil.cpu_times()._asdict()
    for inside in ("guest", "guest_nice"):  # already counted in user and nice
        cpu.pop(inside, None)
    idle = cpu["idle"] + cpu.get("iowait", 0.0)
    own = 0.0
    for pid in {os.getpid(), *pids}:
        try:
            times = psutil.Process(pid).cpu_times()
            own += times.user + times.system
        except psutil.NoSuchProcess:
            continue
    return Clocks(sum(cpu.values()), sum(cpu.values()) - idle, cpu.get("steal", 0.0), own)


def free_cpus(probes: int = 5, seconds: float = 0.2, sleep: Callable[[float], None] = time.sleep) -> int:
    """How many of the CPUs we may use nobody else is using now, at least 1: a thread too many waits for the others at every operation.

    Looks again, up to `probes` times, while somebody is in the way, so that a moment's work of another program does not count.
    """
    usable, everywhere, most = host.cpus(), os.cpu_count() or 1, 1
    for _ in range(probes):
        before = read_clocks()
        sleep(seconds)
        free = everywhere * (1 - shares(before, read_clocks())["others"])
        most = max(most, min(usable, round(free)))
        if most == usable:
            break
    return most


def shares(before: Clocks, after: Clocks) -> dict[str, float]:
    """Shares of the machine's CPU time between two readings: taken by others (steal included), and stolen."""
    total, busy, stolen, own = (b - a for a, b in zip(before, after, strict=True))
    if total <= 0:
        return {"others": 0.0, "steal": 0.0}
    return {"others": max(0.0, busy - own) / total, "steal": max(0.0, stolen) / total}


def calibrate(clock: Callable[[], float] = time.perf_counter, repeats: int = 5) -> float:
    """Seconds of a fixed piece of work (about two milliseconds), the best of a few."""
    best = float("inf")
    for _ in range(repeats):
        start = clock()
        sum(range(100_000))
        best = min(best, clock() - start)
    return best


def disturbed(others: float, steal: float, calibration: float, best: float) -> str | None:
    """Why a round cannot be trusted, or None. `best` is the fixed work's shortest time so far."""
    if steal > OTHERS:
        return f"the hypervisor took {steal:.0%} of the CPU time"
    if others > OTHERS:
        return f"other processes took {others:.0%} of the CPU time"
    if best > 0 and calibration / best - 1 > DRIFT:
        return f"a fixed piece of work ran {calibration / best - 1:.0%} slower than at its best"
    return None


def verdict(reasons: Sequence[str | None]) -> dict[str, Any]:
    """`quiet` and, where it is false, the reason in words, for the rounds that were kept."""
    bad = [reason for reason in reasons if reason]
    if not bad:
        return {"quiet": True, "reason": ""}
    return {"quiet": False, "reason": f"{len(bad)} of {len(reasons)} rounds disturbed: {bad[-1]}"}

"""Watch a process tree: peak memory, connections made, time; and end it whole."""

from __future__ import annotations

import contextlib
import ipaddress
import time
from dataclasses import dataclass, field

import psutil

PERIOD = 0.2  # seconds between two looks
METHOD = f"{'PSS' if psutil.LINUX else 'RSS'} summed over the kernel and its children, sampled every {PERIOD} s"


@dataclass
class Seen:
    """What the tree did so far."""

    peak_bytes: int = 0
    hosts: set[str] = field(default_factory=set)  # addresses outside this machine


def watch(process: psutil.Popen, deadline: float) -> tuple[Seen, bool]:
    """Look at the children of `process` until it ends; (what was seen, whether `deadline` passed and it was ended)."""
    seen = Seen()
    looks = 0
    while process.poll() is None:
        children = _children(process)
        seen.peak_bytes = max(seen.peak_bytes, sum(map(_memory, children)))
        if looks % 5 == 0:
            seen.hosts.update(*map(_remote, children))
        looks += 1
        if time.monotonic() > deadline:
            end(process)
            return seen, True
        with contextlib.suppress(psutil.TimeoutExpired):
            process.wait(PERIOD)
    return seen, False


def end(process: psutil.Process) -> None:
    """Kill a process and all below it."""
    tree = [*_children(process), process]
    for one in tree:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    psutil.wait_procs(tree, timeout=5)


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _memory(process: psutil.Process) -> int:
    """Proportional set size where the system tells it (shared pages counted once), else resident set size."""
    try:
        return process.memory_full_info().pss if psutil.LINUX else process.memory_info().rss
    except (psutil.Error, AttributeError):
        return 0


def _remote(process: psutil.Process) -> set[str]:
    """Addresses outside this machine that the process is connected to."""
    try:
        there = {c.raddr.ip for c in process.net_connections("inet") if c.raddr}
    except (psutil.Error, OSError):
        return set()
    return {ip for ip in there if not ipaddress.ip_address(ip.split("%")[0]).is_loopback}

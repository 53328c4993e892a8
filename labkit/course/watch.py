"""Watch a process tree: peak memory, connections made, time; and end it whole."""

from __future__ import annotations

import contextlib
import ipaddress
import math
import os
import stat
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil

PERIOD = 0.2  # seconds between two looks
METHOD = f"{'PSS' if psutil.LINUX else 'RSS'} summed over the kernel and its children, sampled every {PERIOD} s"


@dataclass
class Seen:
    """What the tree did so far."""

    peak_bytes: int = 0
    hosts: set[str] = field(default_factory=set)  # addresses outside this machine


def watch(
    process: psutil.Popen,
    deadline: float,
    *,
    itself: bool = False,
    memory_bytes: float = math.inf,
    processes: float = math.inf,
    folder: Path | None = None,
    folder_bytes: float = math.inf,
    stop: threading.Event | None = None,
) -> tuple[Seen, str | None]:
    """Look at the children of `process` (and `itself`) until it ends; what was seen, and why it was ended, else None.

    It is ended past the `deadline` (time.monotonic): "time"; when the tree holds more than `memory_bytes`: "memory"; when
    it has more than so many `processes`: "processes"; when `folder` holds more than `folder_bytes`: "disk"; when `stop` is set: "stopped".
    """
    seen = Seen()
    looks = 0
    while process.poll() is None:
        tree = _children(process) + ([process] if itself else [])
        now = sum(map(_memory, tree))
        seen.peak_bytes = max(seen.peak_bytes, now)
        if looks % 5 == 0:
            seen.hosts.update(*map(_remote, tree))
        over = {"time": time.monotonic() > deadline, "memory": now > memory_bytes, "processes": len(tree) > processes}
        over["disk"] = folder is not None and looks % 5 == 0 and tree_size(folder) > folder_bytes
        over["stopped"] = stop is not None and stop.is_set()
        looks += 1
        if reasons := [reason for reason, yes in over.items() if yes]:
            end(process)
            return seen, reasons[0]
        with contextlib.suppress(psutil.TimeoutExpired):
            process.wait(PERIOD)
    return seen, None


def tree_size(folder: Path) -> int:
    """Bytes of all files below; those that vanish meanwhile (another process may be building) count nothing."""
    total = 0
    for place, _, files in os.walk(folder):
        for name in files:
            with contextlib.suppress(OSError):
                found = os.lstat(os.path.join(place, name))
                total += found.st_size if stat.S_ISREG(found.st_mode) else 0
    return total


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
    for ask in ("memory_full_info", "memory_info"):
        with contextlib.suppress(psutil.Error, AttributeError):
            found = getattr(process, ask)()
            return found.pss if ask == "memory_full_info" and psutil.LINUX else found.rss
    return 0


def _remote(process: psutil.Process) -> set[str]:
    """Addresses outside this machine that the process is connected to."""
    try:
        there = {c.raddr.ip for c in process.net_connections("inet") if c.raddr}
    except (psutil.Error, OSError):
        return set()
    return {ip for ip in there if not ipaddress.ip_address(ip.split("%")[0]).is_loopback}

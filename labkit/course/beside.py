"""Labs side by side: as many as memory allows, and those that time anything alone."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from functools import cache
from pathlib import Path
from typing import Any

from labkit.course.labs import Lab

CLOCKS = re.compile(r"perf_counter|monotonic\(|process_time|\btimeit\b|%%?time|\bspeed\(|roofline|measure\.(compare|headline)")


def side_by_side(
    due: Sequence[Lab], work: Callable[[Lab, threading.Event], dict[str, Any]], workers: int
) -> Iterator[tuple[Lab, dict[str, Any], bool]]:
    """(lab, what `work` made of it, whether it ran alone all the time) as each is finished.

    Whatever ends this early (Ctrl-C, a signal, an error) also ends the labs that run.
    """
    from labkit import host

    room, stop, waiting = host.available_memory(), threading.Event(), list(due)
    running: dict[Future, Lab] = {}
    together: set[str] = set()
    with ThreadPoolExecutor(max_workers=workers) as pool:
        try:
            while waiting or running:
                while lab := next((one for one in waiting if _may_start(one, list(running.values()), workers, room)), None):
                    waiting.remove(lab)
                    running[pool.submit(work, lab, stop)] = lab
                if len(running) > 1:
                    together |= {lab.id for lab in running.values()}
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    lab = running.pop(future)
                    yield lab, future.result(), lab.id not in together
        finally:
            stop.set()


def _may_start(lab: Lab, running: Sequence[Lab], workers: int, room: int) -> bool:
    """Whether `lab` may start beside those that run: a place is free, nobody times anything, and memory suffices."""
    if not running:
        return True
    if len(running) >= workers or any(map(times_something, [lab, *running])):
        return False
    return sum(map(needed_memory, [lab, *running])) <= room


def needed_memory(lab: Lab) -> int:
    """Bytes to set aside for a lab: a quarter more than its recorded peak, or what every lab may take in profile ci."""
    from labkit.course import facts
    from labkit.course.session import NEEDED_MEMORY

    known = facts.read().get(lab.id)
    return int(1.25 * known["peak_bytes"]) if known else NEEDED_MEMORY


def times_something(lab: Lab) -> bool:
    """Whether a lab's code looks at a clock or at a speed."""
    return _times_something(lab.path)


@cache  # asked for every lab whenever one is finished
def _times_something(path: Path) -> bool:
    import nbformat

    cells = nbformat.read(path, as_version=4).cells
    return any(CLOCKS.search(cell.source) for cell in cells if cell.cell_type == "code")

"""What the operating system says of this process's memory, in bytes."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

PROC = Path("/proc/self")


def footprint(proc: Path = PROC) -> dict[str, Any]:
    """Resident memory now and at its peak, and on Linux its parts, private (anon) and file-backed: whole, and proportional (PSS).

    Linux: VmHWM and VmRSS, RssAnon, RssFile of /proc/self/status, smaps_rollup. macOS: ru_maxrss. Windows: the peak working set.
    A page that n processes map counts 1/n in PSS and wholly in RSS.
    Keys: peak, rss, rss_anon, rss_file, pss, pss_anon, pss_file (None where the system does not tell), method.
    """
    status = _fields(proc / "status")
    if "VmHWM" in status:
        parts = _fields(proc / "smaps_rollup")
        return {
            "peak": status["VmHWM"],
            "rss": status["VmRSS"],
            "rss_anon": status.get("RssAnon"),
            "rss_file": status.get("RssFile"),
            "pss": parts.get("Pss"),
            "pss_anon": parts.get("Pss_Anon", parts.get("Anonymous")),
            "pss_file": parts.get("Pss_File"),
            "method": "VmHWM and smaps_rollup",
        }
    return _elsewhere()


def _elsewhere() -> dict[str, Any]:
    import psutil

    info = psutil.Process().memory_info()
    nothing = {"rss_anon": None, "rss_file": None, "pss": None, "pss_anon": None, "pss_file": None}
    if hasattr(info, "peak_wset"):
        return {"peak": info.peak_wset, "rss": info.rss, **nothing, "method": "psutil peak working set"}
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak *= 1 if sys.platform == "darwin" else 1024  # macOS counts in bytes, the BSDs in kilobytes
    return {"peak": peak, "rss": info.rss, **nothing, "method": "getrusage ru_maxrss"}


def mapped_bytes(folder: Path) -> int:
    """Resident pages of the files under `folder` that this process has mapped, in bytes; 0 where the system does not tell.

    Read from each mapping (Linux: /proc/self/smaps), not from RssFile, which libraries' own pages raise as they are first used.
    """
    import psutil

    process = psutil.Process()
    if not hasattr(process, "memory_maps"):  # macOS
        return 0
    own = {str(file.resolve()) for file in Path(folder).rglob("*")}
    return sum(found.rss for found in process.memory_maps() if found.path in own)


def reset_peak(proc: Path = PROC) -> bool:
    """Start the peak afresh from what is resident now (Linux); False where that is not to be had."""
    try:
        handle = os.open(proc / "clear_refs", os.O_WRONLY)
    except OSError:
        return False
    try:
        os.write(handle, b"5")
    except OSError:
        return False
    finally:
        os.close(handle)
    return True


def _fields(path: Path) -> dict[str, int]:
    """`Name:   123 kB` lines as bytes."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return {}
    words = [line.split() for line in lines]
    return {w[0].rstrip(":"): int(w[1]) * 1024 for w in words if len(w) == 3 and w[2] == "kB"}

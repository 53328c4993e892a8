"""Which machine, which limits, which versions, how noisy. Inside a container the limits are the cgroup's."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from labkit.types import LabkitError

CGROUP = Path("/sys/fs/cgroup")
UNLIMITED = 1 << 60  # cgroup v1 writes a number near 2**63 for "no limit"
RECORDED = ("numpy", "tokenizers", "llama-cpp-python", "onnxruntime", "onnxruntime-genai", "openvino", "nncf", "mlx",
            "torch")  # fmt: skip
WAITING = {
    "passive": {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0"},
    "short": {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "1000"},
    "active": {"OMP_WAIT_POLICY": "active", "GOMP_SPINCOUNT": "infinity"},
}


def home() -> Path:
    """Where labkit keeps checkpoints, artifacts, the ledger and progress: $LABKIT_HOME, else the user's data folder."""
    chosen = os.environ.get("LABKIT_HOME")
    if chosen:
        return Path(chosen).expanduser().resolve()
    import platformdirs

    return Path(platformdirs.user_data_dir("labkit", appauthor=False))


def free_disk(folder: Path | None = None) -> int:
    """Bytes free for us where `folder` (default: home) is or will be made."""
    folder = Path(folder or home()).absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def cgroup_memory(root: Path = CGROUP, process: Path = Path("/proc/self/cgroup")) -> tuple[int | None, int | None]:
    """(limit, use now) in bytes of the tightest cgroup this process is in; (None, None) when there is no limit.

    Page cache that the kernel can drop at once is not counted as use.
    """
    tightest: tuple[int, int] | None = None
    for folder, limit_name, use_name, cache_key in _cgroup_folders(root, process, "memory"):
        limit = _number(folder / limit_name)
        use = _number(folder / use_name)
        if limit is None or use is None or limit >= UNLIMITED:
            continue
        use = max(0, use - _stat(folder / "memory.stat").get(cache_key, 0))
        if tightest is None or limit - use < tightest[0] - tightest[1]:
            tightest = (limit, use)
    return tightest or (None, None)


def cgroup_cpus(root: Path = CGROUP, process: Path = Path("/proc/self/cgroup")) -> float | None:
    """CPUs' worth of time the cgroup allows per period; None when it does not limit."""
    found = []
    for folder, *_ in _cgroup_folders(root, process, "cpu"):
        if (folder / "cpu.max").exists():
            quota, period = _read(folder / "cpu.max").split()
        else:
            quota, period = _read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")
        if quota.strip().isdigit() and period.strip().isdigit() and int(period):
            found.append(int(quota) / int(period))
    return min(found, default=None)


def _cgroup_folders(root: Path, process: Path, controller: str) -> list[tuple[Path, str, str, str]]:
    """Our folder and its parents for a controller, with the file names of its version (2, else 1)."""
    found = []
    for line in _read(process).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "" and (root / "cgroup.controllers").exists():
            base, names = root, ("memory.max", "memory.current", "inactive_file")
        elif controller in controllers.split(","):
            base, names = root / controller, ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        folder = base / path.lstrip("/")
        found += [(f, *names) for f in (folder, *folder.parents) if f == base or base in f.parents]
    return found


def available_memory() -> int:
    """Bytes we may still take: the least of what the cgroup and the machine have left."""
    import psutil

    limit, use = cgroup_memory()
    left = psutil.virtual_memory().available
    return left if limit is None else min(left, max(0, limit - use))


def memory_limit() -> int:
    """Bytes we may hold at most: the cgroup's limit, or the machine's memory when that is smaller."""
    import psutil

    limit, _ = cgroup_memory()
    total = psutil.virtual_memory().total
    return total if limit is None else min(total, limit)


def cpus() -> int:
    """CPUs usable by this process: affinity and cgroup quota, at least 1."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cgroup_cpus()
    return max(1, affinity if quota is None else min(affinity, int(quota + 0.5)))


@cache
def cpu_model() -> str:
    """The processor's name as the system gives it."""
    for line in _read(Path("/proc/cpuinfo")).splitlines():
        if line.startswith(("model name", "Model", "Hardware")):
            return line.split(":", 1)[1].strip()
    if sys.platform == "darwin":
        import subprocess

        ask = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(ask, capture_output=True, text=True).stdout.strip() or platform.processor()
    return platform.processor() or platform.machine()


@cache
def cpu_flags() -> tuple[str, ...]:
    """Instruction-set extensions that change the speed of quantized models, those present here."""
    wanted = ("avx2", "f16c", "fma", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "amx_bf16",
              "asimd", "asimddp", "i8mm", "bf16", "sve")  # fmt: skip
    for line in _read(Path("/proc/cpuinfo")).splitlines():
        if line.startswith(("flags", "Features")):
            present = set(line.split(":", 1)[1].split())
            return tuple(flag for flag in wanted if flag in present)
    return ()


def versions(names: tuple[str, ...] = RECORDED) -> dict[str, str]:
    """Distribution -> installed version, absent ones left out."""
    from importlib import metadata  # here, as it brings a dozen modules along

    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def busy_ticks() -> tuple[float, float, float, float]:
    """(all, busy, stolen, own) CPU seconds so far, summed over CPUs."""
    fields = _read(Path("/proc/stat")).splitlines()[:1]
    if not fields:
        return _ticks_elsewhere()
    per_second = os.sysconf("SC_CLK_TCK")
    ticks = [int(n) / per_second for n in fields[0].split()[1:9]]  # user nice system idle iowait irq softirq steal
    own = sum(os.times()[:4])
    return sum(ticks), sum(ticks) - ticks[3] - ticks[4], ticks[7], own


def _ticks_elsewhere() -> tuple[float, float, float, float]:
    """The same where there is no /proc/stat (macOS, Windows), which tells nothing of stolen time."""
    import psutil

    times = psutil.cpu_times()
    counted = sum(getattr(times, name, 0.0) for name in ("user", "nice", "system", "interrupt", "dpc"))
    return counted + times.idle, counted, 0.0, sum(os.times()[:4])


def others_share(before: tuple[float, ...], after: tuple[float, ...]) -> float | None:
    """CPU seconds a second of wall time that went to others (stolen ones included) between two `busy_ticks`.

    None when the readings are too close to tell.
    """
    total, busy, _, own = (b - a for a, b in zip(before, after, strict=True))
    machine = os.cpu_count() or 1
    return max(0.0, busy - own) / (total / machine) if total > 0 else None


def noise(seconds: float = 0.5) -> float:
    """Relative spread (90th percentile over minimum, minus 1) of a fixed piece of work repeated for `seconds`.

    About 0.02 on an idle machine; above 0.2 timings are not to be trusted.
    """
    times = sorted(_calibrate(seconds, time.perf_counter))
    return times[len(times) * 9 // 10] / times[0] - 1


def _calibrate(seconds: float, clock: Callable[[], float]) -> list[float]:
    """Times of the same numpy work (about a millisecond each), at least 10 of them."""
    import numpy as np

    data = np.arange(250_000, dtype=np.float32)
    times: list[float] = []
    end = clock() + seconds
    while clock() < end or len(times) < 10:
        start = clock()
        for _ in range(8):
            float(np.sqrt(data).sum())
        times.append(clock() - start)
    return times


@cache
def _static() -> dict[str, Any]:
    import psutil

    return {
        "system": platform.system(),
        "release": platform.release(),
        "machine": platform.machine(),
        "cpu": cpu_model(),
        "cpu_flags": list(cpu_flags()),
        "cpus": os.cpu_count() or 1,
        "cpus_usable": cpus(),
        "memory_bytes": psutil.virtual_memory().total,
        "memory_limit_bytes": cgroup_memory()[0],
        "python": platform.python_version(),
        "versions": versions(),
    }


def waiting(policy: str) -> dict[str, str]:
    """Environment variables for how idle OpenMP threads wait: "passive", "short" or "active". To be set before the library loads.

    Passive threads sleep at once, and waking them at every operation of a small model costs more than half its speed; active
    ones spin for milliseconds and starve whoever shares their core. "short" spins 1,000 times, some microseconds: enough to
    bridge Python's part of a token, so full speed on a quiet machine. On a busy one no policy saves a thread too many; take
    as many threads as there are free CPUs (`measure.quiet.free_cpus`). GOMP_SPINCOUNT is read by GNU's libgomp only.
    """
    if policy not in WAITING:
        raise LabkitError(f"There is no wait policy {policy!r}; expected one of {', '.join(WAITING)}.")
    return WAITING[policy]


def circumstances() -> dict[str, Any]:
    """What a measurement's reader must know of the machine: the fixed part, and the load of this moment."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {**_static(), "load_1min": load, "available_memory_bytes": available_memory()}


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _number(path: Path) -> int | None:
    text = _read(path).strip()
    return int(text) if text.isdigit() else None


def _stat(path: Path) -> dict[str, int]:
    pairs = (line.split() for line in _read(path).splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdigit()}

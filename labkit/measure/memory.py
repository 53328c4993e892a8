"""Memory: the peak of a process that does nothing but load the artifact, read a short prompt and answer it.

Three numbers that are often confused. The *peak* (VmHWM on Linux) is the most that was ever resident, and is kept by
the kernel, so nothing is missed between samples. *PSS anon* is memory that only this process holds and that must fit.
*PSS file* is the file mapped into memory (mmap): it counts as resident, yet the kernel may drop it and read it again,
and several processes share it. So a model that is mapped may show a peak below its file (pages never touched) or,
when its weights are also repacked into private memory, nearly twice the file.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from labkit import stats
from labkit.measure.prompts import fresh_prompt
from labkit.measure.record import record
from labkit.measure.worker import Child, Session
from labkit.types import Artifact, Measurement


def memory(
    artifact: Artifact,
    *,
    prompt_tokens: int = 64,
    new_tokens: int = 16,
    repeats: int = 1,
    threads: int | None = None,
    seed: int = 0,
    runner: Any = None,
) -> Measurement:
    """Peak bytes of a fresh child process, less what it held after importing the engine's library.

    Values: one a repeat. `details` hold the raw peak, the baseline, RSS and PSS after the answer, and the method
    (`footprint`). With `runner`, an already open one, this process is read instead and its peak is not the model's own.
    """
    rng = np.random.default_rng(seed)
    readings = []
    for _ in range(repeats):
        prompt = fresh_prompt(artifact.checkpoint, prompt_tokens, new_tokens, rng)
        readings.append(_once(artifact, prompt, new_tokens, threads, runner))
    values = [reading["peak"] - reading["baseline"] for reading in readings]
    settings, method = readings[0].pop("settings"), readings[0]["method"]
    names = ("peak", "baseline", "rss", "pss", "pss_anon", "pss_file")
    details: dict[str, Any] = {f"{name}_bytes": [reading[name] for reading in readings] for name in names}
    details |= {"method": method, "peak_reset": readings[0]["peak_reset"], "weight_bytes": artifact.weight_bytes}
    workload = {
        "prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "repeats": repeats, "threads": threads,
        "fresh_process": runner is None,
    }  # fmt: skip
    return record(artifact, "memory", "bytes", values, workload=workload, details=details, settings=settings)


def _once(artifact: Artifact, prompt: list[int], new: int, threads: int | None, runner: Any) -> dict[str, Any]:
    process = Child(artifact) if runner is None else Session(artifact, runner)
    try:
        before = process.ask("prepare")
        settings = process.ask("open", threads=threads)["settings"]
        process.ask("time", prompt=prompt, new=new)
        return {
            **process.ask("memory"),
            "baseline": before["rss"],
            "peak_reset": before["peak_reset"],
            "settings": settings,
        }
    finally:
        process.end()


def summary(measurement: Measurement) -> stats.Estimate:
    """Peak bytes of the model itself: median of the repeats, with its interval."""
    return stats.interval(measurement.values)

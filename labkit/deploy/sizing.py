"""What a served model needs, from measurements where there are any, and a refusal of limits that cannot hold it.

A limit below weights and key/value cache ends in a container that the kernel kills; so a limit is a result, not a wish. Each number
says where it comes from: given, measured (the ledger, with its date), or planned from the shape (never called measured).
"""

from __future__ import annotations

import json
import math
import re
import sys
import time
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from labkit import planner
from labkit.types import Artifact, LabkitError, Measurement

MIB, GIB = 2**20, 2**30
HEADROOM = 1.25  # limit over need: fragmentation, the interpreter's growth, a longer prompt than the measured one
BITS = {
    "f32": 32, "fp32": 32, "f16": 16, "fp16": 16, "bf16": 16, "fp8": 8, "q8_0": 8.5, "q6_k": 6.5625, "q5_k_m": 5.7, "q5_1": 6, "q4_k_m": 4.9,
    "q4_0": 4.5, "q3_k_m": 3.9, "q2_k": 3.0, "int8": 8.5, "int4": 4.5, "awq": 4.25, "gptq": 4.25,
}  # fmt: skip
UNITS = {"": 1, "B": 1, "K": 1000, "M": 1000**2, "G": 1000**3, "KI": 1024, "MI": MIB, "GI": GIB, "KB": 1000, "MB": 1000**2, "GB": 1000**3,
         "KIB": 1024, "MIB": MIB, "GIB": GIB}  # fmt: skip
COMPOSE_UNITS = {"": 1, "B": 1, "K": 1024, "KB": 1024, "M": MIB, "MB": MIB, "G": GIB, "GB": GIB}  # Docker counts in powers of two


@dataclass(frozen=True)
class Needs:
    """Bytes, cores and seconds of one server, each with its source. `planned`: weights and cache alone, from the shape (0: unknown)."""

    memory: float
    startup: float
    cpus: float
    limit: int
    planned: float
    sources: Mapping[str, str]
    cache: float = 0.0  # of `planned`: keys and values of every slot

    @property
    def request(self) -> int:
        """Bytes to ask the scheduler for: the need, rounded up to 32 MiB."""
        return _up(self.memory, 32 * MIB)

    @property
    def patience(self) -> int:
        """Seconds a start may take before it counts as failed: four times the measured one, at least 30."""
        return max(30, math.ceil(4 * self.startup))


def needs(
    model: str, engine: str, precision: str, *, context: int, slots: int = 1, memory: float | None = None, startup: float | None = None,
    cpus: float = 2, limit: float | None = None, measurements: Any = None, config: Mapping[str, Any] | None = None,
) -> Needs:  # fmt: skip
    """Needs of one server. `memory` (bytes) and `startup` (seconds) as given, else from the ledger; memory else from the shape.

    LabkitError when the start-up is unknown, nothing is known of the memory, or `limit` (bytes) is below what is needed.
    """
    if min(context, slots) < 1 or cpus <= 0 or any(x is not None and not (x > 0 and math.isfinite(x)) for x in (memory, startup, limit)):
        raise LabkitError("Context, slots, cores, memory, start-up and limit are numbers above 0; leave out what is not known.")
    planned = _planned(config, precision, context, slots)
    found = latest(measurements, model, engine, precision)
    sources: dict[str, str] = {"cpus": "given"}
    if memory is not None:
        sources["memory"] = "given"
    elif found is not None:
        memory, sources["memory"] = _peak(found), f"measured {found.when[:10]}, {_how(found)} (ledger)"
    elif planned:
        memory, sources["memory"] = planned, "planned from the shape, not measured"
    else:
        raise LabkitError(f"Nothing is known of the memory of {model} as {precision}; give --memory, or measure it: labkit deploy measure.")
    if startup is not None:
        sources["startup"] = "given"
    elif found is not None and found.details.get("startup_seconds"):
        startup, sources["startup"] = max(found.details["startup_seconds"]), f"measured {found.when[:10]} (ledger)"
    else:
        raise LabkitError(f"The start-up of {model} on {engine} was not measured, and probes need it; give --startup SECONDS, or run labkit deploy measure.")
    needed = max(memory, planned)
    if needed > memory:
        sources["memory"] += f"; raised to weights and cache of {slots} x {context} tokens, planned"
    chosen = int(limit) if limit is not None else _up(HEADROOM * needed, 64 * MIB)
    sources["limit"] = "given" if limit is not None else f"{HEADROOM:g} times the need"
    if chosen < needed:
        raise LabkitError(refusal(model, precision, chosen, needed, planned, slots, context, sources["memory"]))
    cache = planner.cache_per_token(config) * context * slots if planned and config else 0.0
    return Needs(needed, startup, cpus, chosen, planned, sources, cache)


def refusal(model: str, precision: str, limit: float, needed: float, planned: float, slots: int, context: int, source: str) -> str:
    """The sentence that refuses a limit."""
    about = f" (weights and the cache of {slots} x {context:,} tokens alone take {planned / GIB:.2f} GiB)" if planned else ""
    return (
        f"A limit of {limit / GIB:.2f} GiB was given, but {model} as {precision} needs {needed / GIB:.2f} GiB{about}, {source}; "
        "the kernel would kill it: raise the limit, or take fewer slots, a shorter context or fewer bits."
    )


def _planned(config: Mapping[str, Any] | None, precision: str, context: int, slots: int) -> float:
    """Bytes of weights and a float16 cache for every slot; 0 for a shape or precision the planner does not know."""
    if config is None or precision not in BITS:
        return 0.0
    try:
        stored = sum(planner.weights(config).values()) * BITS[precision] / 8
    except LabkitError:
        return 0.0
    return stored + planner.cache_per_token(config) * context * slots


def latest(measurements: Any, model: str, engine: str, precision: str) -> Measurement | None:
    """The memory measurement to go by: the newest of the server itself, else the newest of the model alone."""
    rows = measurements.where(metric="memory", checkpoint=model, engine=engine, precision=precision) if measurements is not None else []
    rows = [row for row in rows if row.values]
    served = [row for row in rows if row.workload.get("served")]
    return max(served or rows, key=lambda row: row.when, default=None)


def _peak(found: Measurement) -> float:
    """The whole process's peak: what a limit is compared with, libraries included."""
    return float(max(found.details.get("peak_bytes") or found.values))


def _how(found: Measurement) -> str:
    return "the server under requests" if found.workload.get("served") else "the model's process without the web server"


def measure_served(artifact: Artifact, *, requests: int = 3, new_tokens: int = 16, threads: int = 1, claims: tuple[str, ...] = ()) -> Measurement:
    """Start `labkit serve`, ask it, read its peak: one Measurement of `memory` whose details hold `startup_seconds`.

    The peak is VmHWM of the server's process (Linux), elsewhere its resident memory after the last answer.
    """
    from labkit.measure.record import record
    from labkit.serve.supervisor import supervise

    recipe = artifact.recipe
    model = "edgehome" if artifact.checkpoint.name == "edgehome" else str(artifact.checkpoint.path)
    asked = [sys.executable, "-m", "labkit", "serve", model, "--engine", recipe.engine, "--precision", recipe.precision]
    began = time.perf_counter()
    with supervise([*asked, "--name", "model", "--threads", str(threads), "--port", "{port}"]) as child:
        seconds = time.perf_counter() - began
        for _ in range(requests):
            _ask(child.url, new_tokens)
        peak = _process_peak(child.pid)
    details = {"startup_seconds": [seconds], "peak_bytes": [peak], "weight_bytes": artifact.weight_bytes}
    workload = {"served": True, "requests": requests, "new_tokens": new_tokens, "threads": threads}
    return replace(record(artifact, "memory", "bytes", [peak], workload=workload, details=details), claims=claims)


def _ask(url: str, new_tokens: int) -> None:
    body = json.dumps({"model": "model", "prompt": "Turn on the light in the kitchen", "max_tokens": new_tokens}).encode()
    request = urllib.request.Request(url + "/v1/completions", body, {"Content-Type": "application/json"})
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as reply:
        reply.read()


def _process_peak(leader: int) -> int:
    """The largest peak among a process and its descendants, in bytes: the server's, not its keeper's."""
    import psutil

    from labkit.measure.footprint import _fields

    found = []
    for process in [psutil.Process(leader), *psutil.Process(leader).children(recursive=True)]:
        try:
            fields = _fields(Path(f"/proc/{process.pid}/status"))
            found.append(fields.get("VmHWM") or process.memory_info().rss)
        except (psutil.Error, OSError):
            continue
    return max(found)


def size_in(text: str, units: Mapping[str, int] = UNITS) -> int:
    """Bytes of "8Gi", "512M", "8g"; Kubernetes' units, or Docker's with COMPOSE_UNITS. LabkitError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(text))
    if not match or match[2].upper() not in units:
        raise LabkitError(f"{text!r} is no size in bytes; expected a number with a unit such as 512Mi or 8Gi.")
    return int(float(match[1]) * units[match[2].upper()])


def _up(value: float, step: int) -> int:
    return math.ceil(value / step) * step

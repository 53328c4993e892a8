"""Speed: reading a prompt and writing an answer are two different machines, so they are timed apart.

Prefill reads all prompt tokens at once and is bound by arithmetic: tokens / time to the first token. Decode writes
one token after another and is bound by memory: (n - 1) / (t_n - t_1), from the moments the tokens arrived, so the
prompt is not in it and n tokens do not share n - 1 gaps. Things compared are run alternately, A B B A within a round,
so that a slow moment hits all of them; rounds in which the machine was busy are taken again.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np

from labkit import stats
from labkit.measure import quiet
from labkit.measure.prompts import fresh_prompt
from labkit.measure.record import record
from labkit.measure.worker import Child, Session
from labkit.types import Artifact, LabkitError, Measurement

UNSTABLE, EXTREME = 0.10, 0.50  # interquartile range and farthest value, as shares of the median


def speed(artifact: Artifact, *, runner: Any = None, **options: Any) -> Measurement:
    """Decode tokens/s, one value a round; options and `details` as in `compare`."""
    known = inspect.signature(compare).parameters
    for name in options:
        if name not in known or name in ("artifacts", "runners"):
            raise LabkitError(f"speed takes no {name}; it takes {', '.join(list(known)[1:])}.")
    return compare([artifact], runners=None if runner is None else [runner], **options)[0]


def compare(
    artifacts: Sequence[Artifact],
    *,
    prompt_tokens: int = 128,
    new_tokens: int = 64,
    rounds: int = 7,
    retries: int = 3,
    seconds: float = 0.5,
    threads: int | None = None,
    fresh: bool = True,
    wait: str = "short",
    seed: int = 0,
    runners: Sequence[Any] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Measurement]:
    """Time artifacts side by side; one Measurement each, whose values pair up round by round (see `stats.ratio`).

    `threads` (default): as many as there are CPUs nobody else uses now (`quiet.free_cpus`); the settings tell how many.
    Each artifact is loaded in a fresh process of its own (`fresh=False`: in this one), all before the first round.
    A round gives each two samples of at least `seconds` / 2, in random order and then reversed, every prompt new.
    Up to `retries` disturbed rounds are taken again. `wait` is that of `host.waiting`: active
    (one artifact only) collapses on a busy machine.
    `details`: prefill_tokens_per_second, ttft_seconds and tokens_per_cpu_second by round; import, load, second load
    and first call in seconds; what others took of the CPU by round; `quiet` and `reason`.
    """
    if rounds < 1 or retries < 0 or not artifacts:
        raise LabkitError(
            f"{rounds} rounds of {len(artifacts)} artifacts were asked for; expected at least one of each."
        )
    if wait == "active" and fresh and not runners and len(artifacts) > 1:
        raise LabkitError(
            "Idle threads of an active wait policy disturb what they are compared with; use wait='short'."
        )
    rng, asked = np.random.default_rng(seed), threads
    threads = threads or (None if runners else quiet.free_cpus())
    with ExitStack() as stack:
        arms = []
        for i, artifact in enumerate(artifacts):
            arm = Child(artifact, wait) if fresh and not runners else Session(artifact, runners and runners[i], clock)
            stack.callback(arm.end)
            arms.append(arm)
        drawn = [lambda a=a: fresh_prompt(a.checkpoint, prompt_tokens, new_tokens, rng) for a in artifacts]
        starts = [_start(arm, draw, new_tokens, threads) for arm, draw in zip(arms, drawn, strict=True)]
        samplers = [
            lambda arm=arm, draw=draw: _sample(arm, draw, new_tokens, seconds / 2)
            for arm, draw in zip(arms, drawn, strict=True)
        ]
        pids = [pid for arm in arms for pid in arm.pids]
        kept, discarded = _rounds(samplers, rounds, retries, rng, pids)
    workload = {
        "prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "rounds": rounds, "threads": asked,
        "fresh_process": fresh and not runners, "wait_policy": wait if fresh and not runners else None,
    }  # fmt: skip
    return [
        _measurement(artifact, i, starts[i], kept, discarded, workload, [other.name for other in artifacts])
        for i, artifact in enumerate(artifacts)
    ]


def _start(arm: Any, draw: Callable[[], list[int]], new: int, threads: int | None) -> dict[str, Any]:
    """Load, call once, load again; the last load stays open and has been warmed up by a full generation."""
    prepared = arm.ask("prepare")
    first = arm.ask("open", threads=threads)
    call = arm.ask("time", prompt=draw(), new=new)["stamps"][0]
    arm.ask("close")
    again = arm.ask("open", threads=threads)
    arm.ask("time", prompt=draw(), new=new)
    return {
        "import_seconds": prepared["import_seconds"],
        "load_seconds": first["load_seconds"],
        "load_again_seconds": again["load_seconds"],
        "first_call_seconds": call,
        "settings": again["settings"],
    }


def _sample(arm: Any, draw: Callable[[], list[int]], new: int, seconds: float) -> dict[str, float]:
    """Generations until `seconds` have gone by, added up."""
    total = dict.fromkeys(("ttft", "decoding", "cpu", "calls", "prompt", "decoded"), 0.0)
    while total["calls"] == 0 or total["ttft"] + total["decoding"] < seconds:
        prompt = draw()
        answer = arm.ask("time", prompt=prompt, new=new)
        first, last = answer["stamps"][0], answer["stamps"][-1]
        more = (first, last - first, answer["cpu_seconds"], 1, len(prompt), new - 1)
        total = {key: total[key] + value for key, value in zip(total, more, strict=True)}
    return total


def _rounds(
    samplers: list[Callable[[], dict[str, float]]], rounds: int, retries: int, rng: np.random.Generator, pids: list[int]
) -> tuple[list[dict[str, Any]], int]:
    """The `rounds` least disturbed of at most rounds + retries, in the order taken, and how many were left out."""
    taken: list[dict[str, Any]] = []
    before = best = quiet.calibrate()
    while sum(one["reason"] is None for one in taken) < rounds and len(taken) < rounds + retries:
        order = rng.permutation(len(samplers))
        clocks = quiet.read_clocks(pids)
        samples: list[list[dict[str, float]]] = [[] for _ in samplers]
        for i in [*order, *order[::-1]]:
            samples[i].append(samplers[i]())
        share = quiet.shares(clocks, quiet.read_clocks(pids))
        after = quiet.calibrate()
        best = min(best, after)
        slower = max(before, after)
        reason = quiet.disturbed(share["others"], share["steal"], slower, best)
        taken.append({"samples": samples, "reason": reason, "calibration": slower, **share})
        before = after
    ranked = sorted(range(len(taken)), key=lambda i: (taken[i]["reason"] is not None, taken[i]["others"]))[:rounds]
    return [taken[i] for i in sorted(ranked)], len(taken) - rounds


def _measurement(
    artifact: Artifact,
    arm: int,
    start: dict[str, Any],
    kept: list[dict[str, Any]],
    discarded: int,
    workload: dict[str, Any],
    together: list[str],
) -> Measurement:
    sums = [{key: sum(sample[key] for sample in one["samples"][arm]) for key in one["samples"][arm][0]} for one in kept]
    if any(total["decoding"] <= 0 or total["ttft"] <= 0 for total in sums):
        raise LabkitError("The clock did not advance between tokens; ask for more new tokens.")
    details = {
        "prefill_tokens_per_second": [total["prompt"] / total["ttft"] for total in sums],
        "ttft_seconds": [total["ttft"] / total["calls"] for total in sums],
        "tokens_per_cpu_second": [
            (total["decoded"] + total["prompt"]) / total["cpu"] if total["cpu"] else None for total in sums
        ],
        **{key: value for key, value in start.items() if key != "settings"},
        "others_share": [one["others"] for one in kept],
        "steal_share": [one["steal"] for one in kept],
        "calibration_seconds": [one["calibration"] for one in kept],
        "discarded_rounds": discarded,
        "measured_together": together,
        **quiet.verdict([one["reason"] for one in kept]),
    }
    values = [total["decoded"] / total["decoding"] for total in sums]
    return record(artifact, "speed", "tokens/s", values, workload=workload, details=details, settings=start["settings"])


def summary(measurement: Measurement) -> stats.Estimate:
    """Decode tokens/s: median of the rounds with its 95 % interval."""
    return stats.interval(measurement.values)


def prefill(measurement: Measurement) -> stats.Estimate:
    """Prefill tokens/s: median of the rounds with its 95 % interval."""
    return stats.interval(measurement.details["prefill_tokens_per_second"])


def warnings(measurement: Measurement) -> list[str]:
    """What a reader of this number should know: a busy machine, a wide spread, an outlier. Empty when all is well."""
    values, middle = np.asarray(measurement.values), stats.median(measurement.values)
    found = (
        [] if measurement.details.get("quiet", True) else [f"The machine was busy: {measurement.details['reason']}."]
    )
    spread = float(np.subtract(*np.quantile(values, [0.75, 0.25]))) / middle
    if spread >= UNSTABLE:
        found.append(f"The middle half of the rounds spreads over {spread:.0%} of the median; run more rounds.")
    farthest = float(np.abs(values / middle - 1).max())
    if farthest >= EXTREME:
        found.append(f"One round lies {farthest:.0%} away from the median; look for what else ran.")
    return found

"""Lab module03/03, containers and scale: admission, counters, gold answers, tool calls, queues, batching, affinity, scaling, rates."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from labkit.course.compare import NotYet, close, function, same, unfinished
from labkit.course.exercises import exercise
from labkit.i18n import tr


@exercise(
    "03.3.1",
    "How many sequences are admitted",
    hints=(
        "What is left beside the weights is shared among whole sequences.",
        "A sequence takes cache_per_token * length bytes.",
        "Never less than zero: max(0, ... // ...)",
    ),
)
def _(answer: Any) -> None:
    def reference(limit: float, weights: float, cache_per_token: float, length: int) -> int:
        return max(0, int((limit - weights) // (cache_per_token * length)))

    cases = [(8 * 2**30, 7_670_000_000, 131_072, 4096), (12 * 2**30, 7_670_000_000, 131_072, 4096), (6 * 2**30, 7_670_000_000, 131_072, 512)]
    function(answer, reference, [*cases, (2**30, 5_500_000, 6144, 512)], compare=_whole)


def _whole(got: Any, expected: int, *, what: str) -> None:
    close(got, expected, what=what)
    if got != int(got):
        raise NotYet(tr("{what}: expected a whole number, got {got}", what=what, got=got))


@exercise(
    "03.3.2",
    "How much a counter grew",
    hints=(
        "Look at neighbours: zip(values, values[1:]).",
        "Where the counter fell, the server was started again: all it counts now is new.",
        "Add b - a where b >= a, and b where it fell.",
    ),
)
def _(answer: Any) -> None:
    def reference(values: Sequence[float]) -> float:
        return sum(b - a if b >= a else b for a, b in pairwise(values))

    function(answer, reference, [([3, 5, 5, 9],), ([10, 14, 2, 6],), ([7, 0, 3, 1],), ([4],)])


_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


@exercise(
    "03.3.3",
    "The number a reply ends with",
    hints=(
        "re.findall gives all numbers of a text.",
        "A number: digits with commas between them, perhaps a point and more digits, perhaps a minus before.",
        r"re.findall(r'-?\d[\d,]*(?:\.\d+)?', text), then the last one without its commas",
    ),
)
def _(answer: Any) -> None:
    def reference(text: str) -> float | None:
        found = _NUMBER.findall(text)
        return float(found[-1].replace(",", "")) if found else None

    texts = ["It takes 2.4 hours.", "After 3 years: 5,955.08", "It grows by 44 %", "First 150, then 120, in all 270 miles", "-12.5 degrees", "I do not know"]
    function(answer, reference, [(text,) for text in texts], compare=_perhaps)


def _perhaps(got: Any, expected: float | None, *, what: str) -> None:
    if got is ... or got is NotImplemented:
        unfinished(got)
    if expected is None:
        if got is not None:
            raise NotYet(tr("{what}: expected None, got {got}", what=what, got=repr(got)))
        return
    if got is None:
        raise NotYet(tr("{what}: expected a number, got None", what=what))
    close(got, expected, what=what)


def _checked(reply: str, tools: Mapping[str, Mapping[str, str]]) -> dict[str, Any] | None:
    kinds = {"number": (int, float), "string": str}
    try:
        call = json.loads(reply)
        wanted, given = tools[call["name"]], call["arguments"]
        fits = set(wanted) == set(given) and all(isinstance(given[k], kinds[t]) and not isinstance(given[k], bool) for k, t in wanted.items())
    except (ValueError, LookupError, TypeError):
        return None
    return given if fits else None


@exercise(
    "03.3.4",
    "A tool call is checked before it is made",
    hints=(
        "json.loads raises ValueError for what is not JSON; a tool nobody knows is a KeyError.",
        "The arguments' names must be exactly those of the tool.",
        "In Python True is an int: a number must not be a bool.",
    ),
)
def _(answer: Any) -> None:
    tools = {"area": {"radius": "number"}, "convert": {"amount": "number", "unit": "string"}}
    replies = [
        '{"name": "area", "arguments": {"radius": 5}}', '{"name": "convert", "arguments": {"amount": 2.5, "unit": "km"}}', 'area(5)',
        '{"name": "volume", "arguments": {"radius": 5}}', '{"name": "area", "arguments": {}}', '{"name": "area", "arguments": {"radius": "5"}}',
        '{"name": "area", "arguments": {"radius": true}}', '{"name": "area", "arguments": {"radius": 5, "unit": "m"}}', "[1, 2]",
        '{"name": "convert", "arguments": {"amount": 1, "unit": 3}}',
    ]  # fmt: skip
    function(answer, _checked, [(reply, tools) for reply in replies], compare=_arguments)


def _arguments(got: Any, expected: dict[str, Any] | None, *, what: str) -> None:
    if got is ... or got is NotImplemented:
        unfinished(got)
    if expected is None:
        if got is not None:
            raise NotYet(tr("{what}: expected None, got {got}", what=what, got=repr(got)))
    elif got is None:
        raise NotYet(tr("{what}: expected the call's arguments, got None", what=what))
    else:
        same(got, expected, what)


def _latencies(arrivals: Sequence[float], work: Sequence[float]) -> list[float]:
    free, found = 0.0, []
    for at, seconds in zip(arrivals, work, strict=True):
        free = max(free, at) + seconds
        found.append(free - at)
    return found


@exercise(
    "03.3.5",
    "Latency in a queue",
    hints=(
        "Keep the moment when the server is free again.",
        "Work begins when the request is there and the server is free: max(free, at).",
        "The latency is the end minus the arrival, the waiting included.",
    ),
)
def _(answer: Any) -> None:
    rng = np.random.default_rng(3)
    long = np.round(np.cumsum(rng.exponential(0.1, 30)), 4).tolist()
    cases = [([0.0, 1.0, 2.0], [0.5, 0.5, 0.5]), ([0.0, 0.1, 0.2, 5.0], [1.0, 0.2, 0.2, 0.3]), (long, np.round(rng.uniform(0.02, 0.3, 30), 4).tolist())]
    function(answer, _latencies, cases, abs=1e-9)


def _steps(lengths: Sequence[int], slots: int) -> tuple[int, int]:
    static = sum(max(lengths[i : i + slots]) for i in range(0, len(lengths), slots))
    free = [0] * slots
    for length in lengths:
        free[free.index(min(free))] += length
    return static, max(free)


@exercise(
    "03.3.6",
    "Static and continuous batching",
    hints=(
        "A static batch lasts as long as its longest answer.",
        "Continuous: the next answer takes the slot that is free first.",
        "Keep for each slot the step at which it is free; the last of them is the end.",
    ),
)
def _(answer: Any) -> None:
    cases = [([8, 2, 2, 2, 8, 2], 2), ([5, 5, 5], 3), ([16, 1, 1, 1, 1, 1, 1, 16], 4), ([3, 9, 4, 1], 1)]
    function(answer, _steps, cases)


@exercise(
    "03.3.7",
    "Affinity by the highest hash",
    hints=(
        "Compare the servers by a key: max(servers, key=...).",
        "hashlib.sha256 takes bytes: f'{key} {server}'.encode().",
        "hexdigest gives text that can be compared.",
    ),
)
def _(answer: Any) -> None:
    def reference(key: str, servers: Sequence[str]) -> str:
        return max(servers, key=lambda server: hashlib.sha256(f"{key} {server}".encode()).hexdigest())

    cases = [(f"session {i}", servers) for i in range(12) for servers in (["a", "b", "c"], ["c", "a"], ["10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.0.4"])]
    function(answer, reference, cases, compare=_text)


def _text(got: Any, expected: str, *, what: str) -> None:
    same(got, expected, what)


@exercise(
    "03.3.8",
    "The autoscaler's ratio",
    hints=(
        "The ratio is the metric divided by its target.",
        "Within the tolerance on either side of 1 the number stays.",
        "Otherwise math.ceil(current * ratio).",
    ),
)
def _(answer: Any) -> None:
    def reference(current: int, metric: float, target: float, tolerance: float = 0.1) -> int:
        ratio = metric / target
        return current if abs(ratio - 1) <= tolerance else math.ceil(current * ratio)

    cases = [(2, 1.2, 0.6), (4, 0.63, 0.6), (3, 0.5, 0.6), (5, 0.1, 0.6), (1, 9, 2), (10, 0.57, 0.6), (4, 0.63, 0.6, 0.01), (7, 0, 2)]
    function(answer, reference, cases, compare=_whole)


def _allowed(moments: Sequence[float], rate: float, burst: int) -> list[bool]:
    left, then, found = float(burst), moments[0] if moments else 0, []
    for now in moments:
        left = min(burst, left + (now - then) * rate)
        then = now
        found.append(left >= 1)
        left -= found[-1]
    return found


@exercise(
    "03.3.9",
    "A token bucket",
    hints=(
        "Before each request add rate * (now - then), and never hold more than burst.",
        "A request passes when at least one token is there, and takes one.",
        "A refused request takes nothing.",
    ),
)
def _(answer: Any) -> None:
    cases = [([0.0] * 4, 1.0, 2), ([0.0, 0.25, 0.5, 1.5, 1.75, 4.0, 4.0, 4.0, 4.0], 1.0, 2), ([0.0, 0.0, 10.0, 10.0, 10.0, 10.0], 0.5, 3)]
    function(answer, _allowed, cases, compare=_verdicts)


def _verdicts(got: Any, expected: list[bool], *, what: str) -> None:
    unfinished(got)
    if not isinstance(got, list | tuple) or not all(isinstance(one, bool | np.bool_) for one in got):
        raise NotYet(tr("{what}: expected a list of True and False, got {got}", what=what, got=repr(got)[:80]))
    same([bool(one) for one in got], expected, what)


def _failure_threshold(seconds: float, period: float, factor: float) -> int:
    return max(1, math.ceil(factor * seconds / period))


@exercise(
    "03.3.10",
    "How often a start may fail to answer",
    hints=(
        "The start may take factor * seconds; each failure stands for one period.",
        "A period that is only half used still has to be allowed: round up.",
        "A threshold of 0 does not exist; the least is 1.",
    ),
)
def _(answer: Any) -> None:
    cases = [(3.7, 5, 4), (60.0, 10, 3), (12.5, 5, 2), (0.2, 10, 4), (31.0, 2, 1.5)]
    function(answer, _failure_threshold, cases, compare=_whole)


def _may_be_root(pod: dict) -> list[str]:
    found = []
    for container in pod["containers"]:
        holds = {**(pod.get("securityContext") or {}), **(container.get("securityContext") or {})}
        if holds.get("runAsNonRoot") is not True or holds.get("runAsUser") == 0:
            found.append(container["name"])
    return found


@exercise(
    "03.3.11",
    "Which containers may be root",
    hints=(
        "Begin with the pod's securityContext and lay the container's own over it; either may be missing.",
        "{**common, **own} keeps the later value of a key that is in both.",
        "Two ways to be root: runAsNonRoot is not true, or runAsUser is 0.",
    ),
)
def _(answer: Any) -> None:
    plain = {"name": "web"}
    pods = [
        {"securityContext": {"runAsNonRoot": True, "runAsUser": 10001}, "containers": [plain, {"name": "log", "securityContext": {"runAsNonRoot": False}}]},
        {"containers": [plain, {"name": "own", "securityContext": {"runAsNonRoot": True, "runAsUser": 7}}]},
        {"securityContext": {"runAsUser": 0}, "containers": [{"name": "a", "securityContext": {"runAsNonRoot": True, "runAsUser": 5}}, {"name": "b", "securityContext": {"runAsNonRoot": True}}]},
        {"securityContext": {"runAsNonRoot": True}, "containers": [{"name": "c", "securityContext": {"readOnlyRootFilesystem": True}}]},
    ]
    function(answer, _may_be_root, [(pod,) for pod in pods], compare=same)

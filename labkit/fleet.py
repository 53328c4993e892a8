"""One grid of recipes measured on many devices, through Dask distributed: what `labkit sweep` does.

A *device* is what a reader would tell apart: a worker's name and its circumstances (processor, usable cores, memory limit).
A *machine* is what disturbs itself: workers on one machine may build at the same time, and never while anything is measured
there; measurements on one machine follow one another, also those of different devices (containers, workers with limits).

Speed and memory belong to a device and are taken on every one; size and quality do not and are taken once, on any.
Only the client writes the ledger, one result a task, when it arrives: a worker that dies half-way has counted nothing, and one
that was given up and answers later is not heard. A task that finds its worker dead or silent moves to another worker of
the same device, or of any device where it is not bound to one; when there is none it is reported.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from labkit import _fleet_task
from labkit._fleet_task import Fleet, Worker
from labkit.ledger import HOST_BOUND, Ledger
from labkit.types import LabkitError, Measurement, Recipe

ATTEMPTS = 3  # workers that a task may lose before it is reported
GRACE = 15.0  # seconds that a device may be without a worker, and that a worker may be late beyond a task's own limit
PAUSE = 0.3  # seconds between two looks at the workers: the client may share a machine with what is measured


@dataclass(frozen=True)
class Task:
    """Something to build ("build") or to measure (a metric). `device` None: on any."""

    metric: str
    model: str
    fingerprint: str
    recipes: tuple[Recipe, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    reference: Recipe | None = None
    device: str | None = None

    def __hash__(self) -> int:
        return hash((self.job(), self.device))

    def job(self) -> str:
        """What the worker is told."""
        told = {"metric": self.metric, "model": self.model, "fingerprint": self.fingerprint, "settings": dict(self.settings)}
        told["recipes"] = [one.to_json() for one in self.recipes]
        return json.dumps(told | {"reference": self.reference and self.reference.to_json()}, sort_keys=True)

    def key(self, versions: Iterable[str]) -> str:
        """The same for the same work on the same device with the same engine: what a later sweep need not repeat."""
        return hashlib.sha256(json.dumps([self.job(), self.device, sorted(versions)]).encode()).hexdigest()[:16]

    def __str__(self) -> str:
        return f"{self.metric} of {self.model} {', '.join(map(str, self.recipes))}"


class Problem(NamedTuple):
    """A task that was not done, and why."""

    device: str
    task: str
    why: str


@dataclass
class Outcome:
    """A finished sweep."""

    measurements: list[Measurement] = field(default_factory=list)  # new ones, as appended to the ledger
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # workers left out, engines that differ in version
    devices: list[dict[str, Any]] = field(default_factory=list)
    kept: int = 0  # tasks that the ledger had


@dataclass
class _Flight:
    task: Task
    worker: Worker
    since: float


class _Sweep:
    """The state of a running sweep."""

    def __init__(self, fleet: Fleet, book: Ledger, seconds: float, say: Callable[[str], None], again: bool, grace: float):
        self.fleet, self.book, self.seconds, self.say, self.grace = fleet, book, seconds, say, grace
        self.known = {} if again else _counted(book)
        self.outcome = Outcome()
        self.waiting: list[Task] = []
        self.flying: dict[Any, _Flight] = {}
        self.lost: dict[Task, int] = {}
        self.refusals: dict[Task, dict[str, str]] = {}
        self.alone: dict[str, float] = {}  # device -> since when it has had no worker
        self.after: dict[str, list[Task]] = {}  # device -> what follows when its builds are done
        self.named: dict[str, str] = {}
        self.versions: dict[str, Mapping[str, Any]] = {}

    def run(self) -> Outcome:
        try:
            while self.waiting or self.flying or any(self.after.values()):
                self.fleet.look()
                self._release()
                self._start()
                self._give_up()
                time.sleep(PAUSE)
                self._collect()
        finally:
            self.fleet.client.cancel(list(self.flying))
        return self.outcome

    # what may start

    def _release(self) -> None:
        """Measurements of a device begin when its builds are done; those it could not build are left out."""
        busy = {task.device for task in [*self.waiting, *(f.task for f in self.flying.values())] if task.metric == "build"}
        for device in [one for one, later in self.after.items() if later and one not in busy]:
            for task in self.after.pop(device):
                unbuilt = {r for t in self.refusals for r in t.recipes if t.metric == "build" and t.device == device}
                recipes = tuple(r for r in task.recipes if r not in unbuilt)
                if recipes:
                    self.add(replace(task, recipes=recipes))

    def add(self, task: Task) -> None:
        """Put a task in the queue, unless the ledger has its results."""
        if task.metric != "build" and self.known.get(self._key(task), 0) >= len(task.recipes):
            self.outcome.kept += 1
        else:
            self.waiting.append(task)

    def _key(self, task: Task) -> str:
        of = [self.versions[task.device]] if task.device else self.versions.values()
        return task.key({f"{r.engine} {one.get(r.engine)}" for one in of for r in task.recipes})

    def _start(self) -> None:
        for task in sorted(self.waiting, key=lambda one: one.metric != "build"):  # builds first
            if worker := next((w for w in self.fleet.workers.values() if self._may(task, w)), None):
                self.waiting.remove(task)
                self.say(f"{worker.name or 'here'}: {task}")
                future = self.fleet.client.submit(
                    _fleet_task.perform, task.job(), self.seconds, workers=[worker.address], allow_other_workers=False,
                    pure=False, retries=0,
                )  # fmt: skip
                self.flying[future] = _Flight(task, worker, time.monotonic())

    def _may(self, task: Task, worker: Worker) -> bool:
        """Whether `worker` may do `task` now: it is free, of the right device, and nobody there would be disturbed."""
        if task.device not in (None, worker.device) or worker.device in self.refusals.get(task, {}):
            return False
        there = [one for one in self.flying.values() if one.worker.machine == worker.machine]
        if any(one.worker.address == worker.address or one.task.metric != "build" for one in there):
            return False
        return task.metric == "build" or not (there or self._builds_wait(worker.machine))

    def _builds_wait(self, machine: str) -> bool:
        on = {one.device for one in self.fleet.workers.values() if one.machine == machine}
        return any(task.metric == "build" and task.device in on for task in self.waiting)

    # what came back

    def _collect(self) -> None:
        for future in [one for one in self.flying if one.done()]:
            flight = self.flying.pop(future)
            if future.status == "finished":
                self._arrived(flight, json.loads(future.result()))
            else:
                self._lost(flight, "its worker died")

    def _arrived(self, flight: _Flight, answer: Mapping[str, Any]) -> None:
        task, worker = flight.task, flight.worker
        if "error" in answer:
            return self._refused(task, worker, answer["error"])
        found = [Measurement.from_json(one) for one in answer["measurements"]]
        named = [
            replace(one, host=one.host | ({"device": worker.name} if worker.name else {}), details=dict(one.details) | {"sweep": self._key(task)})
            for one in found
        ]  # fmt: skip
        if named:
            self.book.append(*named)
        self.outcome.measurements += named

    def _refused(self, task: Task, worker: Worker, why: str) -> None:
        """It cannot be done there. Arms timed together are tried one by one; a task of any device goes to the next."""
        if task.metric == "speed" and len(task.recipes) > 1:
            for recipe in task.recipes:
                self.add(replace(task, recipes=(recipe,)))
            return
        tried = self.refusals.setdefault(task, {})
        tried[worker.device] = why
        elsewhere = {one.device for one in self.fleet.workers.values()} - tried.keys()
        if task.device is None and elsewhere:
            self.waiting.append(task)
        else:
            self._report(task, why, worker.name)

    def _lost(self, flight: _Flight, how: str) -> None:
        task = flight.task
        self.lost[task] = self.lost.get(task, 0) + 1
        self.say(f"{flight.worker.name or 'here'}: {how} during {task}")
        if self.lost[task] >= ATTEMPTS:
            self._report(task, f"{how}, {ATTEMPTS} times; it is not tried again.", flight.worker.name)
        else:
            self.waiting.append(task)

    def _report(self, task: Task, why: str, name: str | None) -> None:
        self.outcome.problems.append(Problem(name or "here", str(task), why))
        if task.metric == "build":
            self.refusals.setdefault(task, {}).setdefault(str(task.device), why)

    # what does not come back

    def _give_up(self) -> None:
        now = time.monotonic()
        for future, flight in list(self.flying.items()):
            gone = flight.worker.address not in self.fleet.workers
            silent = now - flight.since > self.seconds + self.grace
            if not future.done() and (gone or silent):
                self.flying.pop(future)
                future.cancel()
                if silent:
                    self.fleet.workers.pop(flight.worker.address, None)
                    self.fleet.refused[flight.worker.address] = "it did not answer in time; no further task went there"
                self._lost(flight, "its worker died" if gone else "its worker did not answer")
        present = self.fleet.devices()
        for task in list(self.waiting):
            device = str(task.device)
            if (task.device in present) if task.device else any(d not in self.refusals.get(task, {}) for d in present):
                self.alone.pop(device, None)
            elif now - self.alone.setdefault(device, now) > self.grace:
                self.waiting.remove(task)
                self._report(task, "no worker of this device is left.", self.named.get(device, "any"))


def sweep(
    fleet: Fleet, tasks: Sequence[Task], book: Ledger, *, seconds: float = 1800, again: bool = False,
    say: Callable[[str], None] = lambda text: None, grace: float = GRACE,
) -> Outcome:  # fmt: skip
    """Do `tasks` (without devices: as `plan` makes them) on every device of the fleet, appending to `book` as results arrive.

    `seconds`: limit for one task. Results that the ledger has of an earlier sweep are not taken `again`.
    Raises LabkitError when there is no worker, or when the scheduler is gone.
    """
    fleet.look()
    if not fleet.workers:
        why = "; ".join(f"{address}: {reason}" for address, reason in fleet.refused.items())
        raise LabkitError(f"No worker can be given tasks ({why or 'none is connected'}); start one:  dask worker ADDRESS --nthreads 1")
    state = _Sweep(fleet, book, seconds, say, again, grace)
    for device, one in fleet.devices().items():
        state.named[device], state.versions[device] = one.name or "here", one.profile["engines"]
        mine = [replace(task, device=device) for task in tasks if task.metric in HOST_BOUND]
        recipes = {(task.model, task.fingerprint, recipe) for task in mine for recipe in task.recipes}
        state.after[device] = mine
        for model, fingerprint, recipe in sorted(recipes, key=str):
            state.add(Task("build", model, fingerprint, (recipe,), device=device))
    for task in tasks:
        if task.metric not in HOST_BOUND:
            state.add(task)
    state.outcome.devices = [_about(one, fleet) for one in fleet.devices().values()]
    outcome = state.run()
    outcome.notes = [*_unlike(state.versions, state.named), *(f"{a} was left out: {why}." for a, why in fleet.refused.items())]
    return outcome


def _about(one: Worker, fleet: Fleet) -> dict[str, Any]:
    from labkit._files import size

    seen = one.profile["host"]
    limit = seen.get("memory_limit_bytes") or seen.get("memory_bytes") or 0
    count = sum(other.device == one.device for other in fleet.workers.values())
    return {"device": one.name or "here", "cpu": seen["cpu"], "cores": seen["cpus_usable"], "memory": size(limit), "workers": count}


def _unlike(versions: Mapping[str, Mapping[str, Any]], named: Mapping[str, str]) -> list[str]:
    """Engines that devices have in different versions: a difference in speed may be the engine's."""
    said = []
    for engine in sorted({name for one in versions.values() for name in one}):
        seen = {named[device]: one.get(engine) for device, one in versions.items() if one.get(engine)}
        if len(set(seen.values())) > 1:
            told = ", ".join(f"{version} on {name}" for name, version in seen.items())
            said.append(f"{engine} differs in version ({told}): a difference in speed may be the engine's, not the device's.")
    return said


def _counted(book: Ledger) -> dict[str, int]:
    found: dict[str, int] = {}
    for one in book.where():
        if key := one.details.get("sweep"):
            found[key] = found.get(key, 0) + 1
    return found


def by_device(frame: Any) -> dict[str, Any]:
    """The ledger's frame by device ("here": measured without a fleet's name), so that devices can be compared and decided on.

    Each part holds the speeds and memory of that device and, for every device alike, what belongs to no machine: size and quality.
    """
    bound = frame["metric"].isin(HOST_BOUND)
    label = frame["host"].map(lambda one: one.get("device") or "here")
    return {str(name): frame[~bound | (label == name)] for name in sorted(set(label[bound]))}

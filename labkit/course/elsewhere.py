"""Labs on other machines: each lab is run once, by a worker of a Dask scheduler, and comes back as if it had been run here.

`labkit run --scheduler ADDRESS` is this module. One lab at a time on a machine, as labs time things. What comes back is the
record, the executed notebook and what the lab added to that machine's ledger, named by its device; files that a lab keeps
for later labs stay there, so labs that build on one another may build again. A lab whose worker dies or falls silent goes
to another one; when it has lost three, or nobody is left, it is recorded as failed.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from labkit.course.labs import Lab
from labkit.fleet import ATTEMPTS, GRACE, PAUSE
from labkit.types import LabkitError, Measurement


@dataclass
class _Flight:
    lab: Lab
    worker: Any
    since: float


def spread(
    due: Sequence[Lab], parameters: Mapping[str, Mapping[str, Any]], fleet: Any, folder: Path, *, seconds: float,
    solutions: bool = False, say: Any = lambda text: None, grace: float = GRACE,
) -> Iterator[tuple[Lab, dict[str, Any], bool]]:  # fmt: skip
    """(lab, its record, True) as each comes back; its executed notebook is then in `folder`. Ends as side_by_side does."""
    waiting, flying, lost = list(due), {}, dict.fromkeys((lab.id for lab in due), 0)
    alone = time.monotonic()  # since when nobody could take a lab
    try:
        while waiting or flying:
            fleet.look()
            for worker in _free(fleet, flying):
                if waiting:
                    lab = waiting.pop(0)
                    say(f"{lab.id:<14} {lab.title} on {worker.name or 'this machine'} ...")
                    flying[_submit(fleet, worker, lab, parameters[lab.id], seconds, solutions)] = _Flight(lab, worker, time.monotonic())
            time.sleep(PAUSE)
            for future in list(flying):
                if (answer := _answer(fleet, future, flying[future], seconds + grace)) is None:
                    continue
                flight = flying.pop(future)
                if "record" in answer:
                    yield flight.lab, _arrived(answer, flight, folder), True
                    continue
                lost[flight.lab.id] += 1
                say(f"{flight.lab.id:<14} {flight.worker.name}: {answer['error']}")
                if lost[flight.lab.id] < ATTEMPTS and answer["again"]:
                    waiting.insert(0, flight.lab)
                else:
                    yield flight.lab, _failed(flight.lab, folder, answer["error"]), True
            alone = time.monotonic() if flying or fleet.workers else alone
            if waiting and time.monotonic() - alone > grace:
                reasons = "; ".join(f"{address}: {why}" for address, why in fleet.refused.items())
                for lab in waiting:
                    yield lab, _failed(lab, folder, f"No worker is left that could run it ({reasons or 'none is connected'})."), True
                return
    finally:
        fleet.client.cancel(list(flying))


def _free(fleet: Any, flying: Mapping[Any, _Flight]) -> list[Any]:
    """One idle worker of every machine on which no lab runs."""
    busy = {flight.worker.machine for flight in flying.values()}
    return list({one.machine: one for one in fleet.workers.values() if one.machine not in busy}.values())


def _submit(fleet: Any, worker: Any, lab: Lab, parameters: Mapping[str, Any], seconds: float, solutions: bool) -> Any:
    job = {"lab": lab.id, "notebook": _digest(lab), "parameters": dict(parameters), "seconds": seconds, "solutions": solutions}
    how = {"workers": [worker.address], "allow_other_workers": False, "pure": False, "retries": 0}
    return fleet.client.submit(perform, json.dumps(job), **how)


def _answer(fleet: Any, future: Any, flight: _Flight, limit: float) -> dict[str, Any] | None:
    """What a worker said, or what its death or silence means; None: it is still at work."""
    if future.done():
        if future.status == "finished":
            return json.loads(future.result())
        return {"error": "its worker died.", "again": True}
    if flight.worker.address not in fleet.workers:
        future.cancel()
        return {"error": "its worker died.", "again": True}
    if time.monotonic() - flight.since > limit:
        future.cancel()
        fleet.refused[flight.worker.address] = "it did not answer in time"
        fleet.workers.pop(flight.worker.address, None)
        return {"error": "its worker did not answer in time.", "again": True}
    return None


def _arrived(answer: Mapping[str, Any], flight: _Flight, folder: Path) -> dict[str, Any]:
    from labkit._files import write_text
    from labkit.ledger import ledger

    record, device = dict(answer["record"]), flight.worker.name
    if answer["executed"]:
        write_text(folder / record["executed"], answer["executed"])
    found = [Measurement.from_json(one) for one in answer["measurements"]]
    if found:
        ledger().append(*(replace(one, host=one.host | ({"device": device} if device else {})) for one in found))
    return record | ({"device": device} if device else {})


def _failed(lab: Lab, folder: Path, why: str) -> dict[str, Any]:
    """The record of a lab that nobody ran."""
    from labkit.course.run import now

    (folder / f"{lab.key}.ipynb").unlink(missing_ok=True)
    return {
        "lab": lab.id, "title": lab.title, "notebook": lab.relative.as_posix(), "seconds": 0.0, "when": now(), "peak_bytes": 0,
        "disk_bytes": 0, "network": [], "executed": f"{lab.key}.ipynb", "html": f"{lab.key}.html", "status": "failed", "cells": 0,
        "failed": [{"cell": None, "index": None, "signature": "fleet", "message": why}], "exercises": {},
    }  # fmt: skip


def _digest(lab: Lab) -> str:
    return hashlib.sha256(lab.path.read_bytes()).hexdigest()


# --- on the worker ---------------------------------------------------------------------------------------------------


def perform(job: str) -> str:
    """Run one lab; the answer as JSON: record, executed notebook and new measurements, or `error`. Never raises."""
    try:
        return json.dumps(_perform(json.loads(job)))
    except LabkitError as error:
        return json.dumps({"error": str(error), "again": False})
    except Exception as error:
        return json.dumps({"error": f"{type(error).__name__}: {error}", "again": False})


def _perform(job: Mapping[str, Any]) -> dict[str, Any]:
    from labkit import host
    from labkit._files import locked
    from labkit.course import labs as course
    from labkit.course.run import run_lab
    from labkit.ledger import ledger

    lab = course.find(job["lab"], course.folder(job["solutions"]))
    if _digest(lab) != job["notebook"]:
        raise LabkitError(f"{lab.id} is another notebook there; copy the same course to all machines.")
    with tempfile.TemporaryDirectory(prefix="labkit-lab-") as place, locked(host.home() / ".measuring.lock"):
        before = len(ledger().where())
        record = run_lab(lab, job["parameters"], Path(place), job["seconds"], job["solutions"], threading.Event())
        executed = Path(place) / record["executed"]
        text = executed.read_text(encoding="utf-8") if executed.exists() else ""
        added = [one.to_json() for one in ledger().where()[before:]]
    return {"record": record, "executed": text, "measurements": added}

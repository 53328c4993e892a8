"""Run labs headless, each in a fresh kernel, and write a report.

`results.json` is described, field by field, by `labkit/data/results.schema.json`. It is written after every lab, so a
run that is killed loses nothing finished: labs that passed are not run again until something about them changes.

Labs may run side by side (`workers`) as long as the memory they are known to need fits into what is free. A lab that
times anything always runs alone, because two labs on the same cores cannot tell their own speed from the other's load.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from labkit._files import size, write_json
from labkit.course import labs as course
from labkit.course import parameters as given_to
from labkit.course.beside import side_by_side
from labkit.course.labs import Lab
from labkit.i18n import language
from labkit.types import LabkitError

SCHEMA = 2  # 2: `alone` in each lab's record; 1: the first
LIMITS = {"ci": 600, "class": 3600, "full": 6 * 3600}  # seconds a lab may take, by profile
CORES = 4  # cores for each lab when labs run side by side
PACKAGE = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Outcome:
    """A finished run."""

    results: Mapping[str, Any]  # what results.json holds
    folder: Path

    @property
    def report(self) -> Path:
        return self.folder / "index.html"

    @property
    def passed(self) -> bool:
        return all(lab["status"] == "passed" for lab in self.results["labs"])


def run(
    names: Sequence[str] = (),
    *,
    profile: str = "ci",
    parameters: Mapping[str, Any] | None = None,
    out: str | Path | None = None,
    solutions: bool = False,
    force: bool = False,
    timeout: float | None = None,
    headline: bool = True,
    workers: int | None = None,
    scheduler: str | None = None,
) -> Outcome:
    """Run the named labs (all when none is named) and write `index.html` and `results.json` into `out`.

    A lab that passed before with the same notebook, parameters and package is not run again unless `force`.
    `solutions` runs the hand-written notebooks, in which every exercise must pass. `timeout`: seconds a lab.
    `workers`: labs at once at most; left out, one for every four cores. `scheduler`: address of a Dask scheduler whose
    workers run the labs instead of this machine, one on each machine at a time (see labkit.course.elsewhere).
    """
    from labkit import host
    from labkit._fleet_command import fleet
    from labkit.course import elsewhere, report

    _refuse_nothing(workers, timeout)
    root = course.folder(solutions)
    chosen = list({lab.id: lab for lab in (course.find(name, root) for name in names)}.values()) or course.labs(root)
    wanted = given_to.for_labs(chosen, profile, parameters or {})
    folder = Path(out or Path("reports") / (profile + ("-solutions" if solutions else ""))).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    pages = {lab.relative.as_posix(): f"{lab.key}.html" for lab in chosen}
    results = _header(profile, solutions, dict(parameters or {}))
    keep = _Keeper(folder, results, [lab.id for lab in chosen], _earlier(folder))
    marks = {lab.id: fingerprint(lab, wanted[lab.id]) for lab in chosen}
    due = [lab for lab in chosen if force or not keep.again(lab.id, marks[lab.id])]

    def one_lab(lab: Lab, stop: threading.Event) -> dict[str, Any]:
        _say(f"{lab.id:<14} {lab.title} ...")
        return run_lab(lab, wanted[lab.id], folder, timeout or LIMITS[profile], solutions, stop)

    with contextlib.ExitStack() as ends:
        if scheduler:
            workers_there, seconds = ends.enter_context(fleet(scheduler)), timeout or LIMITS[profile]
            finished = elsewhere.spread(due, wanted, workers_there, folder, seconds=seconds, solutions=solutions, say=_say)
        else:
            finished = side_by_side(due, one_lab, workers or max(1, host.cpus() // CORES))
        for lab, record, alone in ends.enter_context(contextlib.closing(finished)):
            record |= {"fingerprint": marks[lab.id], "alone": alone}
            report.write_lab(folder, record, pages)
            _say(f"{lab.id:<14} {record['status']}: {record['seconds']:.0f} s, peak {size(record['peak_bytes'])}")
            keep.record(record)
    if headline:
        results["headline"] = _headline(profile)
    results["finished"] = now()
    write_json(folder / "results.json", results)
    report.write_index(folder, results)
    return Outcome(results, folder)


def _refuse_nothing(workers: int | None, timeout: float | None) -> None:
    if workers is not None and workers < 1:
        raise LabkitError(f"--workers {workers} runs nothing; expected 1 or more.")
    if timeout is not None and timeout <= 0:
        raise LabkitError(f"--timeout {timeout:g} leaves no time; expected seconds above 0.")


@dataclass
class _Keeper:
    """Writes results.json after every lab, so that an interrupted run loses nothing finished."""

    folder: Path
    results: dict[str, Any]
    order: Sequence[str]  # ids of the labs asked for
    earlier: dict[str, Any]  # id -> its record of an earlier run, until there is a new one

    def again(self, lab: str, mark: str) -> bool:
        """Whether the earlier record of a lab is as good as a new one; then it is kept."""
        record = self.earlier.get(lab)
        if record is None or not _still_good(record, mark, self.folder):
            return False
        _say(f"{lab:<14} unchanged since {record['when']}, not run again")
        self.record(record)
        return True

    def record(self, record: dict[str, Any]) -> None:
        self.earlier.pop(record["lab"], None)
        labs = [*self.results["labs"], record]
        self.results["labs"] = sorted(labs, key=lambda one: self.order.index(one["lab"]))
        self.results["kept"] = list(self.earlier.values())
        write_json(self.folder / "results.json", self.results)


def run_lab(
    lab: Lab,
    parameters: Mapping[str, Any],
    folder: Path,
    timeout: float,
    solutions: bool = False,
    stop: threading.Event | None = None,
) -> dict[str, Any]:
    """Run one lab in a kernel of its own, until `stop` is set; never raises for what the lab does."""
    from psutil import Popen

    from labkit import host
    from labkit.course.watch import end, tree_size, watch

    work = folder / "work" / lab.key
    shutil.rmtree(work, ignore_errors=True)
    (work / "here").mkdir(parents=True)
    executed = folder / f"{lab.key}.ipynb"
    executed.unlink(missing_ok=True)
    job = {"notebook": str(lab.path), "executed": str(executed), "parameters": dict(parameters)}
    job |= {"folder": str(work / "here"), "outcome": str(work / "outcome.json")}
    write_json(work / "job.json", job)
    used, start = tree_size(host.home()), time.monotonic()
    command = [sys.executable, "-m", "labkit.course.worker", str(work / "job.json")]
    with open(work / "log.txt", "wb") as log:
        process = Popen(
            command,
            env=environment(lab, work),
            cwd=work,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            seen, late = watch(process, start + timeout, stop=stop)
        finally:
            end(process)
    seconds = time.monotonic() - start
    disk = max(0, tree_size(host.home()) - used) + tree_size(work / "here")
    record = {
        "lab": lab.id, "title": lab.title, "notebook": lab.relative.as_posix(), "seconds": seconds, "when": now(),
        "peak_bytes": seen.peak_bytes, "disk_bytes": disk, "network": sorted(seen.hosts),
        "executed": executed.name, "html": f"{lab.key}.html",
    }  # fmt: skip
    return record | _verdict(executed, work, seen.peak_bytes, timeout if late else None, solutions)


def environment(lab: Lab, work: Path) -> dict[str, str]:
    """What a lab's kernel sees: our interpreter and package, its own progress file, threads that do not spin for long."""
    from labkit import host

    spec = {
        "argv": [
            sys.executable,
            "-m",
            "ipykernel_launcher",
            "-f",
            "{connection_file}",
            "--HistoryManager.enabled=False",
        ]
    }
    write_json(work / "jupyter/kernels/python3/kernel.json", spec | {"display_name": "Python 3", "language": "python"})
    ours = [str(PACKAGE.parent)] if (PACKAGE.parent / "pyproject.toml").exists() else []
    return os.environ | {
        "JUPYTER_PATH": os.pathsep.join([str(work / "jupyter"), *filter(None, [os.environ.get("JUPYTER_PATH")])]),
        "PYTHONPATH": os.pathsep.join([*ours, *filter(None, [os.environ.get("PYTHONPATH")])]),
        "LABKIT_NOTEBOOK": str(lab.path),
        "LABKIT_PROGRESS": str(work / "progress.json"),
        **host.waiting("short"),
        "PYTHONHASHSEED": "0",
        "TOKENIZERS_PARALLELISM": "false",
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",
        "IPYTHONDIR": str(work / "ipython"),
    }


def fingerprint(lab: Lab, parameters: Mapping[str, Any]) -> str:
    """Changes when the notebook, its parameters, the package, the Python version or the language change."""
    parts = [
        lab.path.read_bytes(),
        json.dumps(parameters, sort_keys=True).encode(),
        _package().encode(),
        sys.version.encode(),
        language().encode(),
    ]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


@cache
def _package() -> str:
    """Hash of labkit's code and data."""
    digest = hashlib.sha256()
    for file in sorted(p for p in PACKAGE.rglob("*") if p.is_file() and "__pycache__" not in p.parts):
        if file.name != "facts.json":  # the recorded times of runs do not change a run
            digest.update(str(file.relative_to(PACKAGE)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def _verdict(executed: Path, work: Path, peak: int, late: float | None, solutions: bool) -> dict[str, Any]:
    """Status, failed cells and exercise states, read from what the lab left behind."""
    from labkit.course.failures import failed_cells, last_cell

    outcome = _json(work / "outcome.json") or {
        "dead": False,
        "error": None if late else "the worker ended without a word",
    }
    states = {name: one["state"] for name, one in (_json(work / "progress.json") or {}).get("exercises", {}).items()}
    notebook = _json(executed) or {"cells": []}
    failed = failed_cells(notebook)
    status = "failed" if failed else "passed"
    if late or outcome["dead"] or outcome["error"]:
        at = last_cell(notebook)
        status, message = _ending(outcome, peak, late)
        failed.append({"cell": at.get("id"), "index": at.get("index"), "signature": status, "message": message})
    if solutions and (wrong := [f"{name} {state}" for name, state in states.items() if state != "passed"]):
        status = "failed"
        failed.append({"cell": None, "index": None, "signature": "exercises", "message": f"Not passed: {', '.join(wrong)}."})
    cells = sum(cell["cell_type"] == "code" for cell in notebook["cells"])
    return {"status": status, "failed": failed, "exercises": states, "cells": cells}


def _ending(outcome: Mapping[str, Any], peak: int, late: float | None) -> tuple[str, str]:
    from labkit import host

    if late:
        return "timed out", f"Stopped after {late:.0f} s."
    if outcome["dead"]:
        limit = size(host.memory_limit())
        return "died", f"The kernel died, probably out of memory: limit {limit}, peak {size(peak)} when last seen."
    return "failed", str(outcome["error"])


def _headline(profile: str) -> list[dict[str, Any]]:
    from labkit.course import sweep

    _say("headline table: one model through every engine ...")
    return sweep.headline(profile, _say)


def _header(profile: str, solutions: bool, parameters: dict[str, Any]) -> dict[str, Any]:
    from labkit import __version__, host
    from labkit.course.watch import METHOD

    about = {
        "schema": SCHEMA,
        "labkit": __version__,
        "profile": profile,
        "solutions": solutions,
        "parameters": parameters,
    }
    machine = host.circumstances() | {"cpus": host.cpus(), "memory_limit_bytes": host.memory_limit()}
    return about | {
        "started": now(),
        "finished": None,
        "host": machine,
        "memory_method": METHOD,
        "labs": [],
        "kept": [],
        "headline": [],
    }


def _still_good(record: Mapping[str, Any], mark: str, folder: Path) -> bool:
    there = all((folder / record[kind]).exists() for kind in ("html", "executed"))
    return record["status"] == "passed" and record["fingerprint"] == mark and there


def _earlier(folder: Path) -> dict[str, Any]:
    found = _json(folder / "results.json") or {}
    if found.get("schema") != SCHEMA:
        return {}
    return {lab["lab"]: lab for lab in [*found.get("kept", []), *found.get("labs", [])]}


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)

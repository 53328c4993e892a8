"""Grade a folder of submissions: every notebook in a process of its own, points, `grades.csv` and pages.

`results.json` is described by `labkit/data/grades.schema.json`. An exercise is one point. Its verdict is made by the
grader with the course's own check (`grade_judge`), from values that the learner's process hands over (`grade_wire`);
that process is shut in as far as the system allows (`grade_sandbox`), and each record says how far that was.

What this does not stop: code that reads labkit's own functions and calls them instead of writing them (a page shows the
code, the instructor judges), and, where a wall is missing, what the record then says.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from multiprocessing import connection
from pathlib import Path
from typing import Any

from labkit._files import write_json
from labkit.course import grade_inbox, grade_judge, grade_sandbox, variants
from labkit.course import labs as course
from labkit.course import parameters as given_to
from labkit.course.grade_inbox import Learner, Notebook
from labkit.course.grade_sandbox import Limits
from labkit.course.labs import Lab
from labkit.types import LabkitError

SCHEMA = 1
SLACK = 120.0  # seconds beyond a notebook's own limit until its judge is given up
FORK = multiprocessing.get_context("fork" if sys.platform.startswith("linux") else "spawn")


@dataclass(frozen=True)
class Outcome:
    """A finished grading."""

    results: Mapping[str, Any]  # what results.json holds
    folder: Path

    @property
    def complete(self) -> bool:
        """Whether every learner could be judged; a bad notebook is judged, a failure of the grader is not."""
        return not any(one["status"] == "not graded" for learner in self.results["learners"] for one in learner["labs"])


@dataclass(frozen=True)
class _Job:
    """One notebook on its way: what is known before it runs."""

    learner: Learner
    lab: Lab
    notebook: Notebook | None
    wanted: Mapping[str, str]
    parameters: Mapping[str, Any]
    notes: Sequence[str]


def grade(
    submissions: str | Path,
    out: str | Path,
    *,
    labs: Sequence[str] = (),
    profile: str = "ci",
    parameters: Mapping[str, Any] | None = None,
    limits: Limits | None = None,
    workers: int | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Outcome:
    """Grade `submissions` into `out`: `grades.csv`, `results.json`, `index.html` and one page a learner.

    `labs`: which labs count; left out, those that anybody worked in. `workers`: how many run at once at most (left
    out, one a core), always so few that their memory limits together fit into what is free.
    """
    from labkit.course import grade_report

    source, folder, limits = Path(submissions).resolve(), Path(out).resolve(), limits or Limits()
    if folder == source or folder in source.parents:
        raise LabkitError(f"--out {folder} is or holds the submissions; give a folder of its own.")
    _refuse_another(folder)
    learners = grade_inbox.learners(source, leave_out=folder)
    read = {one.id: [grade_inbox.read(path) for path in one.notebooks] for one in learners}
    chosen = _labs(labs, read)
    jobs = _jobs(learners, read, chosen, profile, parameters or {})
    at_once = _workers(workers, limits)
    base = Path(tempfile.mkdtemp(prefix="labkit-grade-")).resolve()
    base.chmod(0o711)  # a submission's own user must be able to reach its own folder, and to list nothing
    try:
        hidden = _hidden(source, folder, base)
        walls = grade_sandbox.walls(base, limits, hidden)
        say(f"{len(jobs)} notebooks of {len(learners)} learners, {at_once} at once; walls: {', '.join(walls) or 'none'}")
        records = _run(jobs, base, limits, walls, hidden, at_once, say)
    finally:
        _remove(base)
    results = _results(learners, records, chosen, limits, walls, profile, at_once)
    folder.mkdir(parents=True, exist_ok=True)
    grade_report.write(folder, results)
    write_json(folder / "results.json", results)
    return Outcome(results, folder)


def _refuse_another(folder: Path) -> None:
    """Results are written over earlier results, but into no other folder."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())) and not (folder / "results.json").exists():
        raise LabkitError(f"--out {folder} holds something else than grades; give a new or empty folder.")


def _labs(names: Sequence[str], read: Mapping[str, Sequence[Notebook]]) -> list[Lab]:
    """The labs asked for, else those that anybody worked in, else those that anybody handed in."""
    known, every = course.labs(), [one for mine in read.values() for one in mine]
    wanted = {course.find(name).id for name in names}
    wanted = wanted or {one.lab for one in every for lab in known if one.lab == lab.id and grade_inbox.changed(one, lab)}
    wanted = wanted or {one.lab for one in every}
    chosen = [lab for lab in known if lab.id in wanted]
    if not chosen:
        ids = ", ".join(lab.id for lab in known)
        raise LabkitError(f"None of the submissions says which lab it is; name it with --lab (the labs are {ids}).")
    return chosen


def _jobs(
    learners: Sequence[Learner], read: Mapping[str, Sequence[Notebook]], labs: Sequence[Lab], profile: str, given: Mapping
) -> list[_Job]:
    """A job for each learner and lab. With a single lab, a notebook that does not say which lab it is counts as it."""
    wanted = {lab.id: grade_inbox.wanted(lab) for lab in labs}
    parameters = given_to.for_labs(labs, profile, given)
    takes_seed = {lab.id: "seed" in given_to.declared(lab) for lab in labs}
    jobs = []
    for learner in learners:
        notebooks = read[learner.id]
        if len(labs) == 1:
            notebooks = [replace(one, lab=one.lab or labs[0].id) for one in notebooks]
        for lab in labs:
            notebook, notes = grade_inbox.chosen(notebooks, lab)
            own = {"seed": variants.seed_for(learner.id)} if takes_seed[lab.id] else {}
            jobs.append(_Job(learner, lab, notebook, wanted[lab.id], own | parameters[lab.id], notes))
    return jobs


def _workers(asked: int | None, limits: Limits) -> int:
    from labkit import host

    if asked is not None and asked < 1:
        raise LabkitError(f"--workers {asked} does nothing; expected 1 or more.")
    fit = int(host.available_memory() // limits.memory_bytes)
    return max(1, min(asked or host.cpus(), fit))


def _hidden(source: Path, folder: Path, base: Path) -> list[Path]:
    """What no submission may see: the others', the results, the solutions, the checks, and the grader's own files."""
    from labkit import host

    found = [source, folder, base, host.home(), Path.home(), Path(tempfile.gettempdir())]
    found += [grade_sandbox.PACKAGE / "course/checks", grade_sandbox.PACKAGE.parent / "tests"]
    return [path for path in found if path.exists()]


# --- running ---------------------------------------------------------------------------------------------------------


def _run(
    jobs: Sequence[_Job], base: Path, limits: Limits, walls: Sequence[str], hidden: Sequence[Path], at_once: int,
    say: Callable[[str], None],
) -> list[dict[str, Any]]:  # fmt: skip
    """Every job in a judge process of its own, `at_once` at a time; a record for each, in order."""
    from labkit.course import exercises

    exercises.exercises()  # imported once, before the judges are forked
    records: dict[int, dict[str, Any]] = {}
    waiting, running = list(enumerate(jobs)), {}
    while waiting or running:
        while waiting and len(running) < at_once:
            number, job = waiting.pop(0)
            if job.notebook is None or job.notebook.problem or not grade_inbox.changed(job.notebook, job.lab):
                records[number] = _not_run(job)
                continue
            process = FORK.Process(target=_judge, args=(number, job, base, limits, tuple(walls), tuple(hidden)), daemon=True)
            process.start()
            running[number] = (process, time.monotonic() + limits.seconds + SLACK)
        connection.wait([process.sentinel for process, _ in running.values()], timeout=1.0)
        for number, (process, until) in list(running.items()):
            if process.is_alive() and time.monotonic() < until:
                continue
            process.kill()
            process.join()
            del running[number]
            records[number] = _read_record(base / f"{number}.json", jobs[number])
            one = records[number]
            say(f"{len(records)} of {len(jobs)}: {one['learner']} {one['lab']}: {one['points']} of {one['of']}, {one['status']}")
    return [records[number] for number in range(len(jobs))]


def _judge(number: int, job: _Job, base: Path, limits: Limits, walls: tuple[str, ...], hidden: tuple[Path, ...]) -> None:
    """A judge process: grade one notebook and write its record."""
    grade_sandbox.adopt_orphans()
    os.environ["LABKIT_SEED"] = str(variants.seed_for(job.learner.id))
    folder = base / f"s{number}"

    def fresh() -> None:
        _remove(folder)
        folder.mkdir(mode=0o700)
        (folder / "work").mkdir()
        grade_inbox.copy_beside(job.learner, folder / "work")
        shutil.copyfile(job.notebook.path, folder / "notebook.ipynb")

    try:
        task = grade_judge.Task(
            job.notebook.cells, job.wanted, folder, fresh, number, limits, walls, hidden,
            variants.seed_for(job.learner.id), job.parameters, job.notebook.parameters_at,
        )  # fmt: skip
        found = grade_judge.grade(task)
        cells = [{"source": grade_judge.plain(job.notebook.cells[i]), **one} for i, one in sorted(found.cells.items())]
        record = _head(job) | {
            "status": "cut short" if found.left_out or found.barred or len(cells) < len(task.cells) else "graded",
            "exercises": found.exercises, "cells": cells, "notes": [*job.notes, *found.notes],
            "seconds": found.seconds, "peak_bytes": found.seen.peak_bytes, "network": sorted(found.seen.hosts),
        }  # fmt: skip
        write_json(base / f"{number}.json", record)
    finally:
        _remove(folder)


def _head(job: _Job) -> dict[str, Any]:
    path = job.notebook.path if job.notebook else None
    inside = path.relative_to(job.learner.place.parent).as_posix() if path else None
    return {
        "learner": job.learner.id, "lab": job.lab.id, "title": job.lab.title, "notebook": inside,
        "seed": variants.seed_for(job.learner.id), "points": 0, "of": len(job.wanted), "cells": [],
        "exercises": {name: {"state": "not started", "message": ""} for name in job.wanted},
        "seconds": 0.0, "peak_bytes": 0, "network": [], "notes": list(job.notes),
    }  # fmt: skip


def _not_run(job: _Job) -> dict[str, Any]:
    """The record of a notebook there is no point in running."""
    status, said = "untouched", "This is the course's notebook as it was handed out."
    if job.notebook is None:
        status, said = "missing", "There is no notebook of this lab."
    elif job.notebook.problem:
        status, said = "unreadable", job.notebook.problem
    return _head(job) | {"status": status, "notes": [said, *job.notes]}


def _read_record(path: Path, job: _Job) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        said = "The grader's own process ended; grade this one again by itself."
        return _head(job) | {"status": "not graded", "notes": [said, *job.notes]}
    return record | {"points": sum(one["state"] == "passed" for one in record["exercises"].values())}


def _remove(folder: Path) -> None:
    """Remove a folder, also when what is in it was made unreadable."""

    def open_up(action: Callable[[str], Any], path: str, _: Any) -> None:
        try:
            os.chmod(os.path.dirname(path), 0o700)
            if os.path.isdir(path) and not os.path.islink(path):
                os.chmod(path, 0o700)
                shutil.rmtree(path, ignore_errors=True)
            else:
                action(path)
        except OSError:
            pass

    if folder.exists():
        shutil.rmtree(folder, onerror=open_up)


def _results(
    learners: Sequence[Learner], records: Sequence[Mapping[str, Any]], labs: Sequence[Lab], limits: Limits,
    walls: Sequence[str], profile: str, at_once: int,
) -> dict[str, Any]:  # fmt: skip
    from labkit import __version__
    from labkit.course.run import now

    mine = {one.id: [r for r in records if r["learner"] == one.id] for one in learners}
    people = [
        {"learner": name, "points": sum(r["points"] for r in found), "of": sum(r["of"] for r in found), "labs": found}
        for name, found in mine.items()
    ]
    return {
        "schema": SCHEMA, "labkit": __version__, "profile": profile, "when": now(), "limits": asdict(limits),
        "workers": at_once, "walls": {wall: wall in walls for wall in grade_sandbox.WALLS},
        "warnings": grade_sandbox.told(walls), "labs": [{"lab": lab.id, "title": lab.title} for lab in labs],
        "cohort": _cohort(people, records), "learners": people,
    }  # fmt: skip


def _cohort(people: Sequence[Mapping[str, Any]], records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The class as a whole: points, and for each exercise how many are where."""
    points = [one["points"] for one in people]
    states: dict[str, dict[str, int]] = {}
    for record in records:
        for name, one in record["exercises"].items():
            states.setdefault(name, {"passed": 0, "not yet": 0, "not started": 0})[one["state"]] += 1
    middle = {"mean": statistics.fmean(points), "median": statistics.median(points)}
    return {"learners": len(people), "of": max(one["of"] for one in people), **middle, "exercises": states}

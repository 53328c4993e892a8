"""Grade one notebook: run its cells in a shut-in process, judge the answers here, and go on after a cell that kills it.

An exercise is passed when any answer handed to `labkit.check` under its name is right, or when the expression of the
course's own check cell is right at the end; so a check cell that was copied, moved or deleted costs nothing. A cell that
failed because a name was not there yet is tried once more at the end. A cell that ends its process (or hangs in it) is
left out and everything else is run again, at most `RESTARTS` times and within the notebook's whole time.
"""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from labkit.course import exercises, grade_sandbox
from labkit.course.grade_sandbox import Limits
from labkit.course.grade_wire import Broken, Peer
from labkit.course.watch import Seen, end, watch

RESTARTS = 4
ATTEMPTS = 8  # answers judged for one exercise in one run; more would let code feel its way by the verdicts
BROKE = "broke the line to the grader"
GRACE = 5.0  # seconds beyond a cell's limit until its process is ended


@dataclass(frozen=True)
class Task:
    """One notebook to grade."""

    cells: Sequence[str]  # sources of its code cells, in order
    wanted: Mapping[str, str]  # exercise -> the expression the course's own check cell hands in
    folder: Path  # for the process
    fresh: Callable[[], None]  # makes the folder anew, so that no run finds what an earlier one left
    number: int  # which submission it is; decides its user id
    limits: Limits
    walls: Sequence[str]
    hidden: Sequence[Path]  # what the process must not see
    seed: int
    parameters: Mapping[str, Any] = field(default_factory=dict)
    parameters_at: int = -1  # index of the parameters cell, -1 for none


@dataclass
class Result:
    """What came of it; grows while the notebook runs, so that nothing reached is lost."""

    exercises: dict[str, dict[str, str]]  # name -> {"state", "message"}
    cells: dict[int, dict[str, Any]] = field(default_factory=dict)  # index -> {"error", "message", "said"}
    notes: list[str] = field(default_factory=list)
    left_out: set[int] = field(default_factory=set)  # cells that ended their process
    barred: set[str] = field(default_factory=set)  # exercises whose answers did
    seen: Seen = field(default_factory=Seen)
    seconds: float = 0.0


class Ended(Exception):
    """The learner's process ended, or had to be ended, in the middle of something."""


def grade(task: Task) -> Result:
    """Run and judge; never raises for what the learner's code does."""
    start = time.monotonic()
    result = Result({name: {"state": "not started", "message": ""} for name in task.wanted})
    for _ in range(RESTARTS + 1):
        run = _Run(task, result, start + task.limits.seconds)
        try:
            run.all()
            break
        except Ended as ended:
            if not _leave_out(run, result, str(ended)) or time.monotonic() > run.until:
                break
        finally:
            run.close()
    result.seconds = time.monotonic() - start
    return result


def _leave_out(run: _Run, result: Result, why: str) -> bool:
    """Note what ended the process, so that the next run does without it; False when it was nothing of the notebook."""
    if run.exercise is not None:
        result.notes.append(f"The answer to {run.exercise} {why}.")
        result.exercises[run.exercise] = {"state": "not yet", "message": f"The answer {why}."}
        result.barred.add(run.exercise)
    elif run.cell >= 0:
        result.notes.append(f"Code cell {run.cell + 1} {why}.")
        result.cells[run.cell] = {"error": "Ended", "message": f"This cell {why}.", "said": ""}
        # a cell after it was blamed when this one was still there, perhaps wrongly: it gets another chance
        result.left_out = {cell for cell in result.left_out if cell < run.cell} | {run.cell}
    else:
        result.notes.append(f"The process {why} before the first cell.")
    return run.exercise is not None or run.cell >= 0


class _Run:
    """One process with the notebook's cells."""

    def __init__(self, task: Task, result: Result, until: float) -> None:
        self.task, self.result, self.until = task, result, until
        self.cell = -1
        self.exercise: str | None = None  # what is being judged
        self.judged: dict[str, int] = {}
        self.reason: str | None = None
        self.others = psutil.Process().children(recursive=True)
        task.fresh()
        grade_sandbox.prepare(task.folder, task.number, task.walls)
        command = grade_sandbox.command(task.folder, task.number, task.limits, task.walls, task.hidden)
        self.process = psutil.Popen(
            command, env=grade_sandbox.environment(task.folder, task.seed), cwd=task.folder,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        self.watcher = threading.Thread(target=self._watch, daemon=True)
        self.watcher.start()
        self.peer = Peer(self.process.stdout, self.process.stdin)

    def all(self) -> None:
        """Cells in order, then once more those that missed a name, then the course's own expressions."""
        self.ask("ready", seconds=60)
        missed = [i for i in range(len(self.task.cells)) if i not in self.result.left_out and self.run_cell(i) == "NameError"]
        for index in missed:
            self.run_cell(index)
        for name, expression in self.task.wanted.items():
            if self.open(name):
                self.exercise = name
                found = self.ask("answer", expression, seconds=20)
                if isinstance(found, list) and len(found) == 3:  # else the name is not there
                    self.judge(name, *found[1:])

    def run_cell(self, index: int) -> str | None:
        """Run one cell, judge what it hands in, and return the kind of its error."""
        self.cell, self.exercise = index, None
        seconds = min(self.task.limits.cell_seconds, max(1.0, self.until - time.monotonic()))
        done, handed = self._run(self.task.cells[index], seconds)
        self.result.cells[index] = done
        for name, answer, state in handed:
            if self.open(name):
                self.exercise = name
                self.judge(name, answer, state)
        if index == self.task.parameters_at and self.task.parameters:
            self._run("\n".join(f"{name} = {value!r}" for name, value in self.task.parameters.items()), 10)
        return done["error"]

    def _run(self, source: str, seconds: float) -> tuple[dict[str, str], list[list[Any]]]:
        """What a cell left ({"error", "message", "said"}, all text) and the answers it handed in."""
        done = self.ask("run", source, seconds, seconds=seconds + GRACE)
        try:
            handed = [one for one in done["handed"] if len(one) == 3]
            return {key: plain(done[key] or "") for key in ("error", "message", "said")}, handed
        except Exception:  # it did not come from our own code over there
            raise Ended(BROKE) from None

    def open(self, name: Any) -> bool:
        """Whether an answer to `name` still matters."""
        known = isinstance(name, str) and name in self.task.wanted and name not in self.result.barred
        return known and self.result.exercises[name]["state"] != "passed" and self.judged.get(name, 0) < ATTEMPTS

    def judge(self, name: str, answer: Any, state: Any) -> None:
        """Judge an answer here, with the course's own check; a function among it is called over there."""
        self.judged[name] = self.judged.get(name, 0) + 1
        before = self.result.exercises[name]
        if not (isinstance(state, str) and state == "not started"):
            verdict = exercises.judge(name, answer)
            if verdict.state != "not started" or before["state"] == "not started":
                self.result.exercises[name] = {"state": verdict.state, "message": plain(verdict.message)}
        self.ask("ready", seconds=GRACE)  # a function that does not return must not hold up the next cell
        self.exercise = None

    def ask(self, what: str, *values: Any, seconds: float) -> Any:
        try:
            return self.peer.ask(what, *values, seconds=seconds)
        except Broken as broken:
            raise Ended(self._why(str(broken))) from None
        except Exception:  # our own code over there answers without errors
            raise Ended(BROKE) from None

    def _why(self, said: str) -> str:
        self.watcher.join(1.0)
        if self.reason:
            return self.reason
        return "did not come to an end and was stopped" if said == "no reply in time" else "ended its process"

    def _watch(self) -> None:
        limits = self.task.limits
        seen, reason = watch(
            self.process, self.until, itself=True, memory_bytes=limits.memory_bytes, processes=limits.processes,
            folder=self.task.folder, folder_bytes=limits.disk_bytes,
        )  # fmt: skip
        words = {
            "time": f"was running when the time of the whole notebook ({limits.seconds:.0f} s) was over",
            "memory": "took more memory than allowed", "processes": "started more processes than allowed",
            "disk": "wrote more to the disk than allowed",
        }  # fmt: skip
        self.reason = words.get(reason or "")
        mine = self.result.seen
        mine.peak_bytes = max(mine.peak_bytes, seen.peak_bytes)
        mine.hosts |= seen.hosts

    def close(self) -> None:
        """End the process and whatever it left behind; orphans are ours (`adopt_orphans`)."""
        end(self.process)
        self.watcher.join()
        for one in psutil.Process().children(recursive=True):
            if one not in self.others:
                end(one)


def plain(value: Any) -> str:
    """Text from a learner's process that can be written to any file: halves of characters replaced, and not too long."""
    return str(value)[:30_000].encode("utf-8", "replace").decode()

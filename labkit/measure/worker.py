"""A loaded artifact to be timed: in this process, or in a fresh one of its own.

A fresh process is the default. Its memory holds nothing of ours, no other library's threads spin beside it, and
OpenMP reads OMP_WAIT_POLICY when its library is loaded, so the setting must be there before Python starts.

The child (`serve`) reads one JSON command a line from standard input and answers each with one JSON line.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import labkit
from labkit import host
from labkit.build import read
from labkit.measure.footprint import footprint, reset_peak
from labkit.types import Artifact, LabkitError


class Session:
    """An artifact in this process. `ask` names one of the methods below it."""

    pids: tuple[int, ...] = ()

    def __init__(self, artifact: Artifact, runner: Any = None, clock: Callable[[], float] = time.perf_counter):
        self.artifact, self.runner, self.clock, self.given = artifact, runner, clock, runner is not None

    def ask(self, what: str, **given: Any) -> dict[str, Any]:
        return getattr(self, what)(**given)

    def prepare(self) -> dict[str, Any]:
        """Import the engine's library and start the memory peak afresh: what is used now is the baseline."""
        names = [] if self.given else _modules(self.artifact.recipe.engine)
        begin = self.clock()
        for name in names:
            import_module(name)
        seconds = self.clock() - begin
        gc.collect()
        return {"import_seconds": seconds, "peak_reset": reset_peak(), **footprint()}

    def open(self, threads: int | None = None) -> dict[str, Any]:
        """Load the artifact, with the engine's best honest settings."""
        begin = self.clock()
        if not self.given:
            self.runner = labkit.load(self.artifact, threads=threads)
        return {"load_seconds": self.clock() - begin, "settings": dict(self.runner.settings)}

    def time(self, prompt: Sequence[int], new: int) -> dict[str, Any]:
        """Seconds from the call to each of `new` tokens, and the CPU seconds that all of it took."""
        cpu, begin = time.process_time(), self.clock()
        stamps = [self.clock() - begin for _ in self.runner.generate(prompt, new)]
        if len(stamps) != new:
            raise LabkitError(f"{self.artifact.name} generated {len(stamps)} tokens where {new} were asked for.")
        return {"stamps": stamps, "cpu_seconds": time.process_time() - cpu}

    def memory(self) -> dict[str, Any]:
        """Memory of this process now, and its peak."""
        return footprint()

    def close(self) -> dict[str, Any]:
        """Free the model, unless the runner was handed in."""
        if self.runner is not None and not self.given:
            self.runner.close()
            self.runner = None
        return {}

    def end(self) -> None:
        self.close()


class Child:
    """The same in a fresh process. `wait`: how its idle threads wait, see `host.waiting`."""

    def __init__(self, artifact: Artifact, wait: str = "short"):
        self.artifact = artifact
        self.log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 - closed by `end`
        package = str(Path(labkit.__file__).parents[1])
        path = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
        self.process = subprocess.Popen(
            [sys.executable, "-c", "from labkit.measure import worker; worker.serve()", str(artifact.path)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True, encoding="utf-8",
            env={**os.environ, **host.waiting(wait), "PYTHONPATH": path, "PYTHONIOENCODING": "utf-8"},
        )  # fmt: skip
        self.pids = (self.process.pid,)

    def ask(self, what: str, **given: Any) -> dict[str, Any]:
        try:
            self.process.stdin.write(json.dumps({"what": what, "given": given}) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise LabkitError(self._death(what))
        answer = json.loads(line)
        if "error" in answer:
            raise LabkitError(answer["error"])
        return answer

    def _death(self, what: str) -> str:
        status = self.process.wait()
        self.log.seek(0)
        tail = " | ".join(self.log.read().strip().splitlines()[-3:]) or "it wrote nothing"
        killed = " (probably out of memory)" if status == -9 else ""
        return f"The process measuring {self.artifact.name} ended with status {status}{killed} at {what!r}: {tail}"

    def end(self) -> None:
        """End the process; safe to call twice."""
        if self.process.poll() is None:
            self.process.stdin.close()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self.process.stdout.close()
        self.log.close()


def _modules(engine: str) -> list[str]:
    """What loading will import, by the engine's word or its distribution's files; imported first, it counts apart."""
    from labkit.engines import require

    module = require(engine)
    if hasattr(module, "MODULES"):
        return list(module.MODULES)
    files = metadata.distribution(module.PACKAGE).files or []
    names = {path.parts[0] for path in files if len(path.parts) == 2 and path.name == "__init__.py"}
    return sorted(name for name in names if name.isidentifier() and not name.startswith("_"))


def serve() -> None:
    """Answer commands for the artifact in the folder sys.argv[1] until standard input ends.

    What libraries print goes to standard error.
    """
    folder = Path(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    session = None
    for line in sys.stdin:
        command = json.loads(line)
        try:
            session = session or Session(read(folder))
            answer = session.ask(command["what"], **command["given"])
        except LabkitError as error:
            answer = {"error": str(error)}
        print(json.dumps(answer, default=str), file=answers, flush=True)
    if session:
        session.end()

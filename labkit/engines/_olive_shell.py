"""Olive's command line in one child process: torch and Olive are imported once, then each command takes its own time.

    with olive.Shell(folder) as shell:
        shell.run("optimize", "-m", model, "-o", "made", "--dry_run")

The child reads one JSON list of arguments a line and answers with one JSON object. Nothing is fetched or reported: the
hub is offline, its caches lie in the folder, and Olive's telemetry is off (see SILENT).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from labkit.types import LabkitError

LOG = "olive.log"
# Olive 0.13 sends one message before it reads --disable_telemetry or OLIVE_DISABLE_TELEMETRY, and waits for the answer,
# ten seconds without a network. Only on a build server it sends none, which it knows by this variable.
SILENT = {"CI": "1", "OLIVE_DISABLE_TELEMETRY": "1"}


@dataclass(frozen=True)
class Ran:
    """One command, and what became of it."""

    command: str
    seconds: float  # without the start of the process
    output: str  # all it printed

    def __repr__(self) -> str:
        return f"$ {self.command}\n" + (f"({self.seconds:.1f} s)" if self.seconds else self.output)


class Shell:
    """`olive …` in `folder`. What the commands print is in olive.log there; close it, or use it in a with statement.

    Without Olive nothing is started: `absent` holds the sentence that says what to install, and every command answers with it.
    """

    def __init__(self, folder: str | Path):
        from labkit import engines
        from labkit.engines import _genai

        self.folder, self.absent = Path(folder), ""
        self._child: subprocess.Popen[str] | None = None
        try:
            engines.require("olive")
        except LabkitError as missing:
            self.absent = str(missing)
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        caches = {name: str(self.folder / "hub") for name in ("HF_HUB_CACHE", "HF_DATASETS_CACHE")}
        settings = {**os.environ, **_genai.OFFLINE, **SILENT, **caches}
        command = [sys.executable, "-P", __file__, LOG]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._child = subprocess.Popen(command, cwd=self.folder, env=settings, **pipes)

    def run(self, *arguments: str | Path | int) -> Ran:
        """One command. A command that fails is an error with the last line it printed."""
        if self.absent:
            return Ran(" ".join(["olive", *map(str, arguments)]), 0.0, self.absent)
        if self._child is None or self._child.poll() is not None:
            raise LabkitError("This shell is closed or its process has ended; open a new one.")
        words = [str(one) for one in arguments]
        log = self.folder / LOG
        before = log.stat().st_size if log.exists() else 0
        self._child.stdin.write(json.dumps([*words, "--disable_telemetry"]) + "\n")
        self._child.stdin.flush()
        answer = self._child.stdout.readline()
        with open(log, encoding="utf-8", errors="replace") as file:
            file.seek(before)
            output = file.read()
        if not answer or json.loads(answer)["error"]:
            last = json.loads(answer)["error"] if answer else "the process ended; it may have run out of memory"
            raise LabkitError(f"olive {words[0] if words else ''} failed: {last}; see {log}.")
        return Ran(" ".join(["olive", *words]), json.loads(answer)["seconds"], output)

    def close(self) -> None:
        """End the child process. Safe to call twice."""
        if self._child is not None:
            self._child.stdin.close()  # the end of its input ends it
            self._child.wait()
            self._child.stdout.close()
            self._child = None

    def __enter__(self) -> Shell:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _one(parser: Any, words: Sequence[str]) -> dict[str, Any]:
    """Run one command, as Olive's main does but without its wait for telemetry."""
    began, error = time.perf_counter(), ""
    try:
        arguments, unknown = parser.parse_known_args(words)
        arguments.func(parser, arguments, unknown).run()
    except SystemExit as stopped:
        error = f"it stopped with {stopped.code}" if stopped.code else ""
    except Exception as raised:
        traceback.print_exc()
        error = f"{type(raised).__name__}: {raised}".splitlines()[0]
    return {"seconds": time.perf_counter() - began, "error": error}


def _serve(log: str) -> None:
    answers = os.fdopen(os.dup(1), "w")
    file = open(log, "a", buffering=1, encoding="utf-8")  # noqa: SIM115  (open as long as the process)
    for stream in (1, 2):
        os.dup2(file.fileno(), stream)
    from labkit.engines import _genai_child

    _genai_child.adapt_builder()
    from olive.cli.launcher import get_cli_parser

    for line in sys.stdin:
        said = _one(get_cli_parser(), json.loads(line))
        sys.stdout.flush()
        sys.stderr.flush()
        print(json.dumps(said), file=answers, flush=True)
    os._exit(0)  # telemetry would wait at the end


if __name__ == "__main__":
    _serve(sys.argv[1])

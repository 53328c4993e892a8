"""The learner's side of grading: runs cells one by one in a process that the grader has shut in, and hands answers over.

Nothing here is trusted: the learner's code runs in the same process and may change all of it. It gains nothing by that,
because verdicts are made elsewhere (`grade_judge`); this side can only return values.
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

from labkit.course import exercises
from labkit.course.grade_wire import Peer

MOST_TEXT = 20_000  # characters kept of what a cell prints
MOST_ANSWERS = 20  # answers of one cell that are judged


class Late(BaseException):
    """The cell's time is over. Not an Exception, so that an ordinary `except Exception` does not swallow it."""


class Said(io.TextIOBase):
    """Keeps the beginning of what is printed and counts the rest."""

    def __init__(self) -> None:
        self.parts: list[str] = []
        self.left, self.lost = MOST_TEXT, 0

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        kept = text[: self.left]
        if kept:
            self.parts.append(kept)
        self.left -= len(kept)
        self.lost += len(text) - len(kept)
        return len(text)

    def text(self) -> str:
        return "".join(self.parts) + (f"\n... and {self.lost:,} more characters" if self.lost else "")


class Cells:
    """A notebook's namespace and what has been handed in by the cell that runs."""

    def __init__(self) -> None:
        from IPython.core.interactiveshell import InteractiveShell
        from traitlets.config import Config

        quiet = Config({"HistoryManager": {"enabled": False}, "InteractiveShell": {"colors": "nocolor"}})
        self.shell = InteractiveShell.instance(config=quiet)
        self.handed: list[list[Any]] = []
        exercises.check, exercises.hint = self.check, lambda name: f"Hints for {name} are not shown while grading."

    def check(self, name: str, answer: Any) -> exercises.Verdict:
        """Takes the place of labkit.check: the answer is kept for the grader, who judges it after the cell."""
        if len(self.handed) < MOST_ANSWERS:
            self.handed.append(_handed(name, answer))
        return exercises.Verdict(str(name), "handed in", "")

    def run(self, source: str, seconds: float) -> dict[str, Any]:
        """Run one cell: {"error": None or the error's kind, "message", "said": its text, "handed": [name, answer, state]}."""
        self.handed = []
        said, process = Said(), os.getpid()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), _time_limit(seconds):
            result = self.shell.run_cell(source)
        if os.getpid() != process:  # the cell forked, and this is the copy
            os._exit(0)
        error = result.error_before_exec or result.error_in_exec
        if isinstance(error, SystemExit) and error.code in (None, 0):
            error = None
        about = {"error": type(error).__name__ if error else None, "message": str(error)[:2000] if error else ""}
        return about | {"said": said.text(), "handed": self.handed}

    def answer(self, expression: str) -> list[Any] | None:
        """What an expression of the course's own check cell is now, as it would be handed in; None when it fails."""
        try:
            return _handed("", eval(expression, self.shell.user_ns))
        except Exception:
            return None


def _handed(name: str, answer: Any) -> list[Any]:
    stub = exercises._is_stub(answer) or exercises._has_dots(answer)
    return [str(name), answer, "not started" if stub else ""]


@contextlib.contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise Late in the main thread after `seconds` and again every second, where the platform has timers."""
    if not hasattr(signal, "setitimer"):
        yield
        return

    def late(*_: object) -> None:
        raise Late(f"stopped after {seconds:g} s")

    signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def main() -> None:
    source, sink = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(nothing, number)
    sys.path.insert(0, os.getcwd())
    cells = Cells()
    if hasattr(os, "register_at_fork"):  # a forked copy must not speak on the line
        os.register_at_fork(after_in_child=lambda: (os.close(source.fileno()), os.close(sink.fileno())))
    handlers = {"ready": lambda: os.getpid(), "run": cells.run, "answer": cells.answer}
    Peer(source, sink, handlers).serve()
    threading.Timer(2, os._exit, (0,)).start()  # threads of the learner must not keep the process


if __name__ == "__main__":
    main()

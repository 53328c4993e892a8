"""Exercises that check themselves: `check(name, answer)` and `hint(name)`.

A check is written once, in `labkit/course/checks/`:

    @exercise("04.1.2", "Bits per weight of Q4_0", hints=("A block has 32 weights.", "18 bytes a block."))
    def _(answer):
        close(answer, 18 * 8 / 32)

It returns nothing when the answer is right, and raises `NotYet` (the helpers in `compare` do) when it is not.
Title and hints are English and are found by `python -m labkit.messages`; a message of a `NotYet` goes through `tr`.
"""

from __future__ import annotations

import contextlib
import dis
import html
import importlib
import pkgutil
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from types import CodeType
from typing import Any

from labkit.course import progress
from labkit.course.compare import NotStarted, NotYet, unfinished
from labkit.i18n import html_language, noop, tr
from labkit.types import LabkitError

HINTS = 3  # at most this many an exercise
_REGISTER: dict[str, Exercise] = {}


@dataclass(frozen=True)
class Exercise:
    """A named question and the function that judges an answer. `title` and `hints` are English, translated when shown."""

    name: str
    title: str
    judge: Callable[[Any], None]
    hints: tuple[str, ...] = ()
    seconds: float = 20.0  # the judge's time limit, the learner's function included


@dataclass(frozen=True)
class Verdict:
    """What `check` says. True when passed; shown as one line in a notebook."""

    name: str
    state: str  # "not started", "passed" or "not yet"
    message: str

    def __bool__(self) -> bool:
        return self.state == "passed"

    def __repr__(self) -> str:
        return f"{self.name}: {tr(self.state)}" + (f". {self.message}" if self.message else "")

    def _repr_html_(self) -> str:
        line = f"<strong>{html.escape(self.name)}: {html.escape(tr(self.state))}</strong>"
        return f"<p role='status' class='labkit-check' lang='{html_language()}'>{line} {html.escape(self.message)}</p>"


@dataclass(frozen=True)
class Hints:
    """The hints unlocked so far, and what opens the next one."""

    name: str
    lines: tuple[str, ...]
    more: str

    def __repr__(self) -> str:
        lines = [tr("Hint {number}: {text}", number=i, text=line) for i, line in enumerate(self.lines, 1)]
        return "\n".join([*lines, self.more]).strip()

    def _repr_html_(self) -> str:
        items = "".join(f"<li>{html.escape(line)}</li>" for line in self.lines)
        label = html.escape(tr("Hints for {name}", name=self.name), quote=True)
        opened = f"<ol class='labkit-hints' aria-label='{label}'>{items}</ol>"
        return f"<div lang='{html_language()}'>{opened}<p>{html.escape(self.more)}</p></div>"


def exercise(name: str, title: str, *, hints: tuple[str, ...] = (), seconds: float = 20.0) -> Callable:
    """Register the decorated function as the judge of exercise `name`."""
    if len(hints) > HINTS or isinstance(hints, str):
        raise ValueError(f"exercise {name}: give a tuple of at most {HINTS} hints")

    def keep(judge: Callable[[Any], None]) -> Callable[[Any], None]:
        if name in _REGISTER:
            raise ValueError(f"exercise {name} is registered twice")
        _REGISTER[name] = Exercise(name, title, judge, tuple(hints), seconds)
        return judge

    return keep


@cache
def exercises() -> dict[str, Exercise]:
    """Every exercise of the course by name."""
    package = importlib.import_module("labkit.course.checks")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
    return dict(sorted(_REGISTER.items()))


def judge(name: str, answer: Any) -> Verdict:
    """The verdict on an answer, without touching the learner's record."""
    task = _find(name)
    try:
        unfinished(answer)
        if _is_stub(answer):
            raise NotStarted
        with _time_limit(task.seconds):
            task.judge(answer)
    except (NotStarted, NotImplementedError):
        return _not_started(name)
    except NotYet as error:
        return _not_started(name) if _has_dots(answer) else _not_yet(name, str(error))
    except TimeoutError:
        late = tr("Stopped after {seconds:g} s; this exercise needs far less. Is there an endless loop?", seconds=task.seconds)
        return _not_yet(name, late)
    except Exception as error:  # an answer of a kind the judge did not foresee is a wrong answer, not a crash
        kind = type(error).__name__
        return _not_yet(name, tr("The answer could not be judged: {kind}: {error}", kind=kind, error=error))
    return Verdict(name, noop("passed"), "")


def _not_started(name: str) -> Verdict:
    return Verdict(name, noop("not started"), tr("Replace the ... above and run the cell again."))


def _not_yet(name: str, message: str) -> Verdict:
    return Verdict(name, noop("not yet"), message[:1000])


def check(name: str, answer: Any) -> Verdict:
    """Judge an answer and remember the result: not started, passed, or not yet with the first difference."""
    verdict = judge(name, answer)
    before = progress.read()["exercises"].get(name, {})
    attempts = before.get("attempts", 0) + (verdict.state == "not yet")
    state = "passed" if before.get("state") == "passed" else verdict.state
    progress.note("exercises", name, state=state, attempts=attempts)
    if verdict.state == "not yet" and attempts <= len(_find(name).hints):
        more = tr('{message}. A new hint is open: labkit.hint("{name}")', message=verdict.message, name=name)
        return Verdict(name, verdict.state, more)
    return verdict


def hint(name: str) -> Hints:
    """Show the hints open so far: one for each attempt that was not yet right."""
    task = _find(name)
    seen = progress.read()["exercises"].get(name, {})
    opened = len(task.hints) if seen.get("state") == "passed" else min(seen.get("attempts", 0), len(task.hints))
    if opened == len(task.hints):
        more = "" if task.hints else tr("This exercise has no hints.")
    else:
        closed, total = len(task.hints) - opened, len(task.hints)
        more = tr("{closed} of {total} hints closed; each attempt that is not yet right opens one.", closed=closed, total=total)
    return Hints(name, tuple(map(tr, task.hints[:opened])), more)


def _find(name: str) -> Exercise:
    known = exercises()
    if name not in known:
        near = [n for n in known if n.rsplit(".", 1)[0] == str(name).rsplit(".", 1)[0]] or list(known)
        raise LabkitError(tr("There is no exercise {name!r}; this lab has {known}.", name=name, known=", ".join(near)))
    return known[name]


def _is_stub(answer: Any) -> bool:
    """A function whose body is only `...`, `pass` or `raise NotImplementedError`."""
    code = getattr(answer, "__code__", None)
    if not isinstance(code, CodeType):
        return False
    if code.co_names == ("NotImplementedError",):
        return True
    quiet = {"RESUME", "LOAD_CONST", "RETURN_VALUE", "RETURN_CONST", "NOP", "POP_TOP", "CACHE"}
    only = {c for c in code.co_consts if c is not None and c is not ...} <= {getattr(answer, "__doc__", None)}
    return only and {step.opname for step in dis.get_instructions(code)} <= quiet


def _has_dots(answer: Any) -> bool:
    """A function in which a `...` of the stub is still assigned or returned; an index such as a[..., 0] is not that."""
    code = getattr(answer, "__code__", None)
    if not isinstance(code, CodeType):
        return False
    steps = list(dis.get_instructions(code))
    after = ("STORE", "RETURN")
    return any(
        step.argval is ... and (step.opname == "RETURN_CONST" or following.opname.startswith(after))
        for step, following in zip(steps, [*steps[1:], steps[-1]], strict=True)
    )


@contextlib.contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError after `seconds`, where the platform has timers (not Windows) and we are in the main thread."""
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def late(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)

"""One runner, one thread, one queue of bounded length: whoever comes too late is told so at once.

A runner holds one sequence, so answers are made one after the other. The thread opens the runner, runs it and closes it
(some engines bind their memory to a thread); everything it makes goes to the job's `put`, which must not block: a reader
that is slow fills its own mailbox, never the engine's time.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from labkit.checkpoint import Checkpoint
from labkit.serve.sampling import Sampling, continuation
from labkit.serve.text import TextStream
from labkit.types import LabkitError, Runner


class Busy(LabkitError):
    """The queue is full; come back later."""


@dataclass(frozen=True)
class Event:
    """A piece of text, or the end: `reason` is stop, length, cancelled, timeout or error (then `problem` says which)."""

    text: str = ""
    reason: str | None = None
    problem: str = ""


@dataclass(eq=False)
class Job:
    """One answer to be made: token ids in, events out. Times are seconds of `time.monotonic()`."""

    prompt: Sequence[int]
    max_new: int
    checkpoint: Checkpoint
    put: Callable[[Event], None]
    how: Sampling = field(default_factory=Sampling)
    stop: Sequence[str] = ()
    seconds: float = 60.0  # from joining the queue to the last token
    adapter: str | None = None  # of those the runner has loaded; None: the base alone
    made: int = 0
    queued: float = field(default_factory=time.monotonic)
    started: float | None = None
    first: float | None = None
    ended: float | None = None
    reason: str | None = None
    cancelled: bool = False

    @property
    def late(self) -> bool:
        return time.monotonic() > self.queued + self.seconds

    def run(self, runner: Runner) -> None:
        """Make the answer on this thread; always ends with one event that has a reason."""
        self.started = time.monotonic()
        out = TextStream(self.checkpoint, self.stop)
        try:
            if use := getattr(runner, "use", None):  # a runner with adapters; the job before may have chosen another
                use(self.adapter)
            reason = self._refused() or self._generate(runner, out)
            self.finish(reason, out.finish() if reason in ("stop", "length") else "")
        except Exception as error:  # an engine's failure ends this answer, not the server
            self.finish("error", problem=str(error) or type(error).__name__)

    def _refused(self) -> str | None:
        return "cancelled" if self.cancelled else "timeout" if self.late else None

    def _generate(self, runner: Runner, out: TextStream) -> str:
        ids = continuation(runner, self.prompt, self.max_new, self.how)
        try:
            for token in ids:
                if ended := self._refused():
                    return ended
                self.made += 1
                self.first = self.first or time.monotonic()
                if token in self.checkpoint.eos_ids:
                    return "stop"
                if piece := out.feed(token):
                    self.put(Event(piece))
                if out.stopped:
                    return "stop"
            return "length"
        finally:
            if close := getattr(ids, "close", None):
                close()  # the engine stops now, not when the garbage is collected

    def finish(self, reason: str, text: str = "", problem: str = "") -> None:
        self.reason, self.ended = reason, time.monotonic()
        self.put(Event(text, reason, problem))


class Worker:
    """The thread. `limit` jobs may wait beside the one that runs; `done` is told of every job that ended."""

    def __init__(self, open_runner: Callable[[], Runner], limit: int, done: Callable[[Job], None] = lambda job: None):
        self.limit, self._open, self._done = limit, open_runner, done
        self._waiting: deque[Job] = deque()
        self._running: Job | None = None
        self._change = threading.Condition()
        self._closing = False
        self._problem: BaseException | None = None
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._work, name="labkit-runner", daemon=True)
        self._thread.start()
        self._ready.wait()
        if self._problem is not None:
            raise self._problem

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        return int(self._running is not None)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self._closing

    def submit(self, job: Job) -> None:
        """Queue a job. Busy when the queue is full; LabkitError when the server is stopping."""
        with self._change:
            if self._closing:
                raise LabkitError("The server is stopping; send the request again when it is back.")
            if len(self._waiting) >= self.limit + (self._running is None):
                raise Busy(f"{len(self._waiting)} requests are waiting already; try again in a moment.")
            self._waiting.append(job)
            self._change.notify()

    def cancel(self, job: Job) -> None:
        """A waiting job leaves the queue now; a running one stops before its next token. Safe to call at any time."""
        with self._change:
            job.cancelled = True
            try:
                self._waiting.remove(job)
            except ValueError:
                return
        job.finish("cancelled")
        self._done(job)

    def close(self, wait: float = 10.0) -> None:
        """Cancel everything and end the thread. Safe to call twice."""
        with self._change:
            self._closing = True
            for job in [*self._waiting, *([self._running] if self._running else [])]:
                job.cancelled = True
            self._change.notify()
        self._thread.join(wait)

    def _work(self) -> None:
        try:
            runner = self._open()
        except BaseException as error:  # handed to the thread that waits for it
            self._problem = error
            return
        finally:
            self._ready.set()
        with runner:
            while (job := self._next()) is not None:
                job.run(runner)
                with self._change:
                    self._running = None
                self._done(job)

    def _next(self) -> Job | None:
        with self._change:
            while not self._waiting and not self._closing:
                self._change.wait()
            self._running = self._waiting.popleft() if self._waiting else None
            return self._running

"""The model behind a gateway: from a request's words to a queued job, and from a job's events to an answer.

Only token ids go to the engine; the tokenizer and the chat template are the checkpoint's.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

from starlette.requests import Request
from starlette.responses import StreamingResponse

from labkit._chat import template
from labkit._files import read_json
from labkit.checkpoint import Checkpoint
from labkit.serve.guard import Limits
from labkit.serve.metrics import Meters
from labkit.serve.sampling import Sampling
from labkit.serve.worker import Busy, Event, Job, Worker
from labkit.types import LabkitError, Runner


class Refused(LabkitError):
    """A request that cannot be met: the HTTP status, a sentence, and for OpenAI's clients a code."""

    def __init__(self, status: int, sentence: str, code: str | None = None):
        super().__init__(sentence)
        self.status, self.code = status, code


class Served:
    """One checkpoint, one worker. Opening it loads the model; `close` frees it."""

    def __init__(
        self, name: str, checkpoint: Checkpoint, open_runner: Callable[[], Runner], limits: Limits, meters: Meters,
        about: Mapping[str, Any], adapters: Sequence[str] = (),
    ):  # fmt: skip
        self.name, self.checkpoint, self.limits, self.meters, self.about = name, checkpoint, limits, meters, about
        self.adapters, self.created = tuple(adapters), int(time.time())
        self.worker = Worker(open_runner, limits.queue, meters.generation)
        meters.watch(self.worker)

    def close(self) -> None:
        self.worker.close()

    @property
    def names(self) -> list[str]:
        """What clients may ask for: the model, and the model with each adapter, NAME:ADAPTER."""
        return [self.name, *(f"{self.name}:{adapter}" for adapter in self.adapters)]

    @cached_property
    def defaults(self) -> Sampling:
        """How the model wants to be sampled when a request does not say: its generation_config.json, else greedy."""
        file = self.checkpoint.path / "generation_config.json"
        told = read_json(file, "Generation settings") if file.exists() else {}
        if not told.get("do_sample"):
            return Sampling()
        known = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
        return Sampling(**{key: other if told.get(key) is None else told[key] for key, other in known.items()})

    @property
    def template(self) -> str:
        """Source of the chat template, in Jinja; "" when there is none."""
        return template(self.checkpoint.path) or ""

    @cached_property
    def _control(self) -> list[str]:
        added = self.checkpoint.tokenizer.get_added_tokens_decoder().values()
        return [token.content for token in added if token.special]

    def chat_ids(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """A conversation in the model's template. Control tokens typed into a message are refused: they would forge turns."""
        for place, message in enumerate(messages):
            if typed := next((word for word in self._control if word in message["content"]), None):
                raise Refused(400, f"messages[{place}] contains {typed!r}, a control token of this model; leave it out.")
        try:
            return self.checkpoint.encode(self.checkpoint.chat(messages))
        except LabkitError as error:
            raise Refused(400, str(error).replace(str(self.checkpoint.path), self.name)) from None

    def text_ids(self, text: str) -> list[int]:
        """Plain text, after the begin-of-text id where the tokenizer has one."""
        begin = [] if self.checkpoint.bos_id is None else [self.checkpoint.bos_id]
        return begin + self.checkpoint.encode(text)

    def start(
        self, request: Request, prompt: Sequence[int], max_new: int | None, how: Sampling, stop: Sequence[str],
        context: int | None = None, up_to: bool = False, model: str | None = None,
    ) -> Answer:  # fmt: skip
        """Queue an answer; `up_to`: one that meets the end of the context before `max_new` is welcome. Refused: an empty or too long prompt (400), a full queue (429), a stopping server (503)."""
        context = min(context or self.checkpoint.context, self.checkpoint.context)
        room = context - len(prompt)
        if not prompt:
            raise Refused(400, "The prompt is empty; send at least one token.")
        if room < 1 or ((max_new or 0) > room and not up_to):
            wanted = f"{len(prompt)} prompt tokens" + (f" and {max_new} new ones" if max_new else " and room for an answer")
            raise Refused(400, f"{wanted} were asked for; the context is {context} tokens.", "context_length_exceeded")
        answer = Answer(self.worker, asyncio.get_running_loop(), self.limits.seconds)
        adapter = (model or self.name)[len(self.name) + 1 :] or None
        answer.job = Job(prompt, min(max_new or room, room), self.checkpoint, answer.put, how, stop, self.limits.seconds, adapter)
        if visit := getattr(request.state, "visit", None):
            visit.notes.update(model=model or self.name, prompt_tokens=len(prompt))
        try:
            self.worker.submit(answer.job)
        except Busy as error:
            raise Refused(429, str(error), "queue_full") from None
        except LabkitError as error:
            raise Refused(503, str(error)) from None
        return answer


class Answer:
    """The events of one job, carried from the worker's thread to the event loop."""

    job: Job

    def __init__(self, worker: Worker, loop: asyncio.AbstractEventLoop, seconds: float):
        self._worker, self._loop, self._seconds = worker, loop, seconds
        self._mail: asyncio.Queue[Event] = asyncio.Queue()

    def put(self, event: Event) -> None:
        try:
            self._loop.call_soon_threadsafe(self._mail.put_nowait, event)
        except RuntimeError:  # the loop is closed: nobody listens any more
            self.job.cancelled = True

    def cancel(self) -> None:
        """Free the slot. Safe to call at any time, also after the end."""
        if self.job.reason is None:
            self._worker.cancel(self.job)

    async def events(self) -> AsyncIterator[Event]:
        """Every event, the last with its reason. A model that says nothing until the time is up gives `timeout`."""
        try:
            while True:
                left = self.job.queued + self._seconds + 1 - time.monotonic()  # the worker's own limit comes first
                try:
                    event = await asyncio.wait_for(self._mail.get(), max(left, 0.01))
                except TimeoutError:
                    event = Event(reason="timeout")
                yield event
                if event.reason:
                    return
        finally:
            self.cancel()

    async def whole(self, request: Request) -> tuple[str, str]:
        """Text and reason (stop or length). The job is cancelled when the client goes; Refused for other ends."""
        gone = asyncio.ensure_future(_gone(request))
        reading = asyncio.ensure_future(self._read())
        try:
            await asyncio.wait({gone, reading}, return_when=asyncio.FIRST_COMPLETED)
            if not reading.done():
                raise Refused(499, "The client went away.")
            text, last = reading.result()
        finally:
            gone.cancel()
            reading.cancel()
            self.cancel()
        if refused := ended_badly(last, self._seconds):
            raise refused
        return text, last.reason or ""

    async def _read(self) -> tuple[str, Event]:
        pieces, last = [], Event()
        async for last in self.events():
            pieces.append(last.text)
        return "".join(pieces), last


def ended_badly(last: Event, seconds: float) -> Refused | None:
    """The refusal for an answer that did not end by itself, None for one that did."""
    if last.reason == "timeout":
        return Refused(504, f"The answer was not done within {seconds:g} seconds; ask for fewer tokens or try later.")
    if last.reason == "cancelled":
        return Refused(503, "The server is stopping; send the request again when it is back.")
    if last.reason == "error":
        return Refused(500, f"The engine failed: {last.problem}")
    return None


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class Stream(StreamingResponse):
    """A streamed answer. However it ends (client gone, reader too slow, error), its job is cancelled."""

    def __init__(self, answer: Answer, content: AsyncIterator[bytes], media_type: str, seconds: float):
        super().__init__(content, media_type=media_type, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._answer, self._most = answer, 2 * seconds + 5  # a reader may take as long again as the answer took

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            async with asyncio.timeout(self._most):
                await super().__call__(scope, receive, send)
        except TimeoutError:  # it does not read: the connection is given up
            pass
        finally:
            self._answer.cancel()

"""OpenAI's routes: /v1/models, /v1/completions and /v1/chat/completions, whole or as server-sent events.

A field is honoured or refused with a sentence. What no runner of labkit gives (log probabilities, tools, several choices,
JSON mode) is refused by the schema itself, so /openapi.json says so too. Source of the fields: OpenAI's API reference.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from labkit.serve.sampling import Sampling
from labkit.serve.served import Answer, Refused, Served, Stream, ended_badly


def whole(number: Any) -> Any:
    """JSON has one kind of number: 10.0 is a whole one."""
    return int(number) if isinstance(number, float) and number.is_integer() else number


# JSON readers that count in float64 round 2**63 - 1 up: the limit is the largest whole number every reader keeps
Seed = Annotated[int, Field(ge=-(2**53) + 1, le=2**53 - 1), BeforeValidator(whole)]
Positive = Annotated[int, Field(ge=1), BeforeValidator(whole)]
Natural = Annotated[int, Field(ge=0), BeforeValidator(whole)]
def _characters(text: str) -> str:
    """JSON can spell half of a surrogate pair, which is no character and which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("expected characters; half of a surrogate pair is none") from None
    return text


Text = Annotated[str, AfterValidator(_characters)]
Word = Annotated[Text, Field(min_length=1, max_length=200)]


class Strict(BaseModel):
    """Types are not converted, unknown fields are refused: a misspelt option must not be ignored in silence."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(Strict):
    include_usage: bool | None = None


class Part(Strict):
    type: Literal["text"]
    text: Text


class Message(Strict):
    role: Literal["system", "user", "assistant"]
    content: Text | list[Part]

    def plain(self) -> dict[str, str]:
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": content}


class TextFormat(Strict):
    type: Literal["text"]


class Common(Strict):
    """What both kinds of completion take. top_k, min_p and repeat_penalty are extensions, named as llama.cpp does."""

    model: Word
    max_tokens: Positive | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = Field(None, description="left out: as the model's files say")
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Natural | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repeat_penalty: Annotated[float, Field(ge=0.1, le=10)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    seed: Seed | None = None
    stop: Word | Annotated[list[Word], Field(max_length=4)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Literal[1] | None = None
    user: Annotated[Text, Field(max_length=200)] | None = Field(None, description="accepted for clients that send it; not used")

    def sampling(self, defaults: Sampling) -> Sampling:
        names = ("temperature", "top_p", "top_k", "min_p", "repeat_penalty", "presence_penalty", "frequency_penalty", "seed")
        return replace(defaults, **{name: value for name in names if (value := getattr(self, name)) is not None})

    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class CompletionRequest(Common):
    prompt: Annotated[Text, Field(min_length=1)]
    best_of: Literal[1] | None = None
    echo: Literal[False] | None = None
    logprobs: None = None


class ChatRequest(Common):
    messages: Annotated[list[Message], Field(min_length=1, max_length=1000)]
    max_completion_tokens: Positive | None = None
    logprobs: Literal[False] | None = None
    top_logprobs: None = None
    response_format: TextFormat | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(BaseModel):
    error: ErrorDetail


ERRORS = {
    400: "The request cannot be met as it is", 401: "No valid API key", 403: "A page of another site asked", 404: "No such model", 408: "The body came too slowly",
    409: "The name is taken or protected", 413: "The body is too large", 429: "The queue is full, or too many requests", 500: "The engine failed",
    503: "The server is stopping", 504: "The answer took too long",
}  # fmt: skip


def errors(form: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """The documented refusals, for a router's `responses`."""
    return {status: {"model": form, "description": words} for status, words in ERRORS.items()}


def streamed(media_type: str) -> dict[int | str, dict[str, Any]]:
    """For the schema: a 200 is one JSON object, or a stream of them."""
    words = "One JSON object, or a stream of them"
    return {200: {"description": words, "content": {"application/json": {"schema": {}}, media_type: {"schema": {}}}}}


def routes(served: Served) -> APIRouter:
    """The /v1 routes in front of one model."""
    router = APIRouter(prefix="/v1", tags=["OpenAI"], responses=errors(ErrorReply))

    @router.get("/models")
    async def models() -> dict[str, Any]:
        """The one model that is served, and the same with each of its adapters."""
        return {"object": "list", "data": [_card(served, name) for name in served.names]}

    @router.get("/models/{model:path}")
    async def model(model: str) -> dict[str, Any]:
        """One model by its name."""
        _known(served, model)
        return _card(served, model)

    @router.post("/completions", response_model=None, responses=streamed("text/event-stream"))
    async def completions(asked: CompletionRequest, request: Request) -> Response:
        """Continue a text."""
        _known(served, asked.model)
        answer = _start(served, request, asked, served.text_ids(asked.prompt), asked.max_tokens)
        return await _reply(served, request, asked, answer, "cmpl", "text_completion", _text_choice)

    @router.post("/chat/completions", response_model=None, responses=streamed("text/event-stream"))
    async def chat(asked: ChatRequest, request: Request) -> Response:
        """Answer a conversation."""
        _known(served, asked.model)
        if asked.max_tokens and asked.max_completion_tokens and asked.max_tokens != asked.max_completion_tokens:
            raise Refused(400, "max_tokens and max_completion_tokens differ; send one of them.")
        ids = served.chat_ids([message.plain() for message in asked.messages])
        answer = _start(served, request, asked, ids, asked.max_completion_tokens or asked.max_tokens)
        return await _reply(served, request, asked, answer, "chatcmpl", "chat.completion", _chat_choice)

    return router


def _card(served: Served, name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": served.created, "owned_by": "labkit"}


def _known(served: Served, model: str) -> None:
    if model not in served.names:
        known = ", ".join(map(repr, served.names))
        raise Refused(404, f"There is no model {model!r} here; this server has {known}.", "model_not_found")


def _start(served: Served, request: Request, asked: Common, ids: list[int], max_new: int | None) -> Answer:
    if asked.stream_options is not None and not asked.stream:
        raise Refused(400, "stream_options were given without stream=true; leave them out or stream.")
    return served.start(request, ids, max_new, asked.sampling(served.defaults), asked.stops(), model=asked.model)


def _text_choice(text: str, reason: str | None, streamed: bool) -> dict[str, Any]:
    return {"index": 0, "text": text, "logprobs": None, "finish_reason": reason}


def _chat_choice(text: str, reason: str | None, streamed: bool) -> dict[str, Any]:
    said: dict[str, Any] = {"role": "assistant", "content": text}
    if streamed:
        return {"index": 0, "delta": {"content": text} if text else {}, "logprobs": None, "finish_reason": reason}
    return {"index": 0, "message": {**said, "refusal": None}, "logprobs": None, "finish_reason": reason}


def _usage(answer: Answer) -> dict[str, int]:
    read, made = len(answer.job.prompt), answer.job.made
    return {"prompt_tokens": read, "completion_tokens": made, "total_tokens": read + made}


async def _reply(
    served: Served, request: Request, asked: Common, answer: Answer, prefix: str, kind: str, choice: Callable[..., dict[str, Any]]
) -> Response:
    head = {"id": f"{prefix}-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": asked.model}
    if asked.stream:
        if prefix == "chatcmpl":
            head["object"] = "chat.completion.chunk"
        with_usage = bool(asked.stream_options and asked.stream_options.include_usage)
        return Stream(answer, _sse(served, answer, head, choice, with_usage), "text/event-stream", served.limits.seconds)
    text, reason = await answer.whole(request)
    return JSONResponse({**head, "choices": [choice(text, reason, False)], "usage": _usage(answer)})


async def _sse(
    served: Served, answer: Answer, head: dict[str, Any], choice: Callable[..., dict[str, Any]], with_usage: bool
) -> AsyncIterator[bytes]:
    """Chunks as server-sent events; with `include_usage` one more, without choices, carries the counts."""
    empty = {"usage": None} if with_usage else {}
    if head["object"] == "chat.completion.chunk":
        first = {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
        yield _event({**head, "choices": [first], **empty})
    async for event in answer.events():
        if refused := ended_badly(event, served.limits.seconds) if event.reason else None:
            yield _event({"error": {"message": str(refused), "type": "server_error", "param": None, "code": event.reason}})
            return
        if event.text:
            yield _event({**head, "choices": [choice(event.text, None, True)], **empty})
        if event.reason:
            yield _event({**head, "choices": [choice("", event.reason, True)], **empty})
    if with_usage:
        yield _event({**head, "choices": [], "usage": _usage(answer)})
    yield b"data: [DONE]\n\n"


def _event(data: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(data).encode() + b"\n\n"

"""Ollama's routes over the same model: /api/generate, chat, embed, tags, ps, show, create, copy, delete, version.

Ollama's official client and its NDJSON streams work unchanged. A model made with /api/create is a name for the served model
with a system message, first messages and parameters of its own; it lives in memory. What Ollama would ignore in silence is
refused with a sentence here. Source of the fields: docs/api.md of ollama/ollama.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from labkit.serve import embedding, modelfile
from labkit.serve.ollama_forms import (
    Asked,
    ChatRequest,
    CopyRequest,
    CreateRequest,
    DeleteRequest,
    EmbedRequest,
    GenerateRequest,
    NameRequest,
    OllamaError,
)
from labkit.serve.openai_api import errors, streamed
from labkit.serve.sampling import Sampling
from labkit.serve.served import Answer, Refused, Served, Stream, ended_badly
from labkit.serve.shelf import Shelf, Variant, tagged

VERSION = "0.12.0"  # the API's version these routes follow; clients only show it


def routes(served: Served) -> APIRouter:
    """The /api routes in front of one model."""
    router = APIRouter(prefix="/api", tags=["Ollama"], responses=errors(OllamaError))
    shelf = Shelf(served)
    _answering(router, served, shelf)
    _listing(router, served, shelf)
    _making(router, shelf)
    return router


def _answering(router: APIRouter, served: Served, shelf: Shelf) -> None:
    @router.post("/generate", response_model=None, responses=streamed("application/x-ndjson"))
    async def generate(asked: GenerateRequest, request: Request) -> Response:
        """Answer one prompt, in the model's chat template unless `raw`."""
        variant = shelf.find(asked.model)
        if not asked.prompt:
            return _loaded(asked, {"response": ""})
        if asked.raw and asked.system:
            raise Refused(400, "raw=true takes the prompt as it is; put the system text into it yourself.")
        if asked.raw:
            ids = served.text_ids(asked.prompt)
        else:
            ids = served.chat_ids([*_opening(variant, asked.system), {"role": "user", "content": asked.prompt}])
        return await _reply(served, request, asked, variant, ids, lambda text: {"response": text})

    @router.post("/chat", response_model=None, responses=streamed("application/x-ndjson"))
    async def chat(asked: ChatRequest, request: Request) -> Response:
        """Answer a conversation."""
        variant = shelf.find(asked.model)
        if not asked.messages:
            return _loaded(asked, {"message": {"role": "assistant", "content": ""}})
        said = [message.plain() for message in asked.messages]
        own = next((message["content"] for message in said if message["role"] == "system"), None)
        opening = _opening(variant, own)[1 if own is not None else 0 :]  # the conversation brings its own system message
        ids = served.chat_ids(opening + said)
        return await _reply(served, request, asked, variant, ids, lambda text: {"message": {"role": "assistant", "content": text}})

    @router.post("/embed")
    async def embed(asked: EmbedRequest) -> dict[str, Any]:
        """The mean of the tokens' rows of the embedding matrix, of length 1: words without their order (see embedding.py)."""
        shelf.find(asked.model)
        began = time.perf_counter_ns()
        texts = [asked.input] if isinstance(asked.input, str) else asked.input
        ids = [served.text_ids(text) for text in texts]
        context = served.checkpoint.context
        if long := next((one for one in ids if len(one) > context and asked.truncate is False), None):
            raise Refused(400, f"An input has {len(long)} tokens; the context is {context} and truncate is false.")
        ids = [one[:context] for one in ids]
        vectors = embedding.mean_rows(served.checkpoint, ids)
        taken = time.perf_counter_ns() - began
        return {
            "model": asked.model, "embeddings": [[float(value) for value in row] for row in vectors],
            "total_duration": taken, "load_duration": 0, "prompt_eval_count": sum(map(len, ids)),
        }  # fmt: skip


def _opening(variant: Variant, system: str | None) -> list[dict[str, str]]:
    """What comes before the user's words: the request's system text, else the variant's, and its messages."""
    text = variant.system if system is None else system
    first = [{"role": "system", "content": text}] if text or system is not None else []
    return first + [dict(message) for message in variant.messages]


def _loaded(asked: Asked, empty: dict[str, Any]) -> JSONResponse:
    return JSONResponse({"model": asked.model, "created_at": _now(), **empty, "done": True, "done_reason": "load"})


async def _reply(
    served: Served, request: Request, asked: Asked, variant: Variant, ids: list[int], content: Any
) -> Response:
    options = {**variant.parameters, **(asked.options.given() if asked.options else {})}
    stop = options.pop("stop", [])
    new = options.pop("num_predict", -1)
    answer = served.start(
        request, ids, new if new > 0 else None, sampling(served.defaults, options),
        [stop] if isinstance(stop, str) else stop, options.get("num_ctx"), up_to=True,
    )  # fmt: skip
    head = {"model": asked.model}
    if asked.stream is not False:
        return Stream(answer, _ndjson(served, answer, head, content), "application/x-ndjson", served.limits.seconds)
    text, reason = await answer.whole(request)
    return JSONResponse({**head, "created_at": _now(), **content(text), **_done(answer, reason)})


def sampling(defaults: Sampling, options: Mapping[str, Any]) -> Sampling:
    """`defaults` with what `options` say; a seed alone changes nothing for a greedy model."""
    return replace(defaults, **{name: value for name, value in options.items() if name != "num_ctx"})


async def _ndjson(served: Served, answer: Answer, head: dict[str, Any], content: Any) -> AsyncIterator[bytes]:
    async for event in answer.events():
        if refused := ended_badly(event, served.limits.seconds) if event.reason else None:
            yield _line({"error": str(refused)})
            return
        if event.text:
            yield _line({**head, "created_at": _now(), **content(event.text), "done": False})
        if event.reason:
            yield _line({**head, "created_at": _now(), **content(""), **_done(answer, event.reason)})


def _done(answer: Answer, reason: str) -> dict[str, Any]:
    """The end of an answer: its reason, counts and durations in nanoseconds."""
    job = answer.job
    began, ended = job.started or job.queued, job.ended or job.queued
    first = job.first or ended
    return {
        "done": True, "done_reason": reason, "total_duration": _ns(ended - job.queued), "load_duration": 0,
        "prompt_eval_count": len(job.prompt), "prompt_eval_duration": _ns(first - began),
        "eval_count": job.made, "eval_duration": _ns(ended - first),
    }  # fmt: skip


def _ns(seconds: float) -> int:
    return max(1, int(seconds * 1e9))


def _now() -> str:
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")


def _line(data: dict[str, Any]) -> bytes:
    return json.dumps(data).encode() + b"\n"


def _listing(router: APIRouter, served: Served, shelf: Shelf) -> None:
    about = served.about
    details = {
        "parent_model": "", "format": about["engine"], "family": served.checkpoint.family or "unknown",
        "families": [served.checkpoint.family or "unknown"], "parameter_size": f"{about['weights'] / 1e6:.1f}M",
        "quantization_level": about["precision"].upper(),
    }  # fmt: skip

    def entry(variant: Variant) -> dict[str, Any]:
        told = json.dumps([variant.name, variant.system, list(variant.messages), dict(variant.parameters)], sort_keys=True)
        digest = hashlib.sha256((served.checkpoint.fingerprint + told).encode()).hexdigest()
        return {"name": variant.name, "model": variant.name, "size": about["weight_bytes"], "digest": digest, "details": details}

    @router.get("/tags")
    async def tags() -> dict[str, Any]:
        """The models of this server."""
        return {"models": [{**entry(one), "modified_at": one.made.isoformat()} for one in shelf.all.values()]}

    @router.get("/ps")
    async def running() -> dict[str, Any]:
        """The models that are loaded: the one there is."""
        never = {"expires_at": "2318-01-01T00:00:00Z", "size_vram": 0, "context_length": served.checkpoint.context}
        return {"models": [{**entry(shelf.base), **never}]}

    @router.get("/version")
    async def version() -> dict[str, str]:
        """The version of the API that these routes follow."""
        return {"version": VERSION}

    @router.post("/show")
    async def show(asked: NameRequest) -> dict[str, Any]:
        """What a model is made of."""
        found = shelf.find(asked.model)
        family, config = served.checkpoint.family or "unknown", served.checkpoint.config
        facts = {
            "general.architecture": family, "general.parameter_count": about["weights"],
            f"{family}.context_length": served.checkpoint.context, f"{family}.block_count": config.get("num_hidden_layers"),
            f"{family}.embedding_length": config.get("hidden_size"), "labkit.bits_per_weight": about["bits_per_weight"],
            "labkit.notes": about["notes"], "labkit.embedding": "mean of token embedding rows, normalized",
        }  # fmt: skip
        parameters = dict(found.parameters)
        base = "" if found is shelf.base else shelf.base.name
        return {
            "modelfile": found.modelfile(shelf.base.name),
            "parameters": "\n".join(modelfile.parameter_lines(parameters)), "template": served.template, "system": found.system,
            "license": "\n".join(found.license), "details": {**details, "parent_model": base}, "model_info": facts,
            "capabilities": ["completion", "embedding"], "modified_at": found.made.isoformat(),
        }  # fmt: skip


def _making(router: APIRouter, shelf: Shelf) -> None:
    @router.post("/create", response_model=None, responses=streamed("application/x-ndjson"))
    async def create(asked: CreateRequest) -> Response:
        """Give the model a name with a system message, first messages and parameters of its own."""
        base = shelf.find(asked.from_)
        given = asked.parameters.given() if asked.parameters else {}
        licences = base.license if asked.license is None else (asked.license if isinstance(asked.license, list) else [asked.license])
        said = base.messages if asked.messages is None else tuple(message.plain() for message in asked.messages)
        shelf.keep(Variant(
            tagged(asked.model), datetime.now(UTC), base.system if asked.system is None else asked.system, said,
            {**base.parameters, **given}, tuple(licences),
        ))  # fmt: skip
        if asked.stream is False:
            return JSONResponse({"status": "success"})
        steps = b"".join(_line({"status": status}) for status in ("using existing layer", "writing manifest", "success"))
        return Response(steps, media_type="application/x-ndjson")

    @router.post("/copy", response_model=None)
    async def copy(asked: CopyRequest) -> Response:
        """The same under another name."""
        shelf.keep(replace(shelf.find(asked.source), name=tagged(asked.destination), made=datetime.now(UTC)))
        return JSONResponse({})

    @router.delete("/delete", response_model=None)
    async def delete(asked: DeleteRequest) -> Response:
        """Forget a made model."""
        shelf.drop(asked.model)
        return JSONResponse({})

"""An OpenAI- and Ollama-compatible server over the runner of any engine.

    app = gateway(artifact)                  # an ASGI application: uvicorn.run(app, port=8000)

A request passes the guard (key, rate, size), is checked against the schema, becomes token ids, and waits in the queue of
the one worker. `labkit serve` is this module on the command line.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from labkit.serve.audit import AuditLog
from labkit.serve.guard import Guard, Keys, Limits, refusal
from labkit.types import Artifact, NotInstalled, Runner

if TYPE_CHECKING:
    from fastapi import FastAPI, Request



def gateway(
    artifact: Artifact,
    *,
    name: str | None = None,
    limits: Limits = Limits(),  # noqa: B008 (frozen)
    keys: Mapping[str, str] | None = None,
    audit: Path | str | None = None,
    threads: int | None = None,
    open_runner: Callable[[], Runner] | None = None,
    adapters: Mapping[str, Path | str] | None = None,
) -> FastAPI:
    """The application for one artifact; the model is loaded now and freed when the server stops.

    `keys` maps a caller's name to its secret (none: no key is asked for); `audit` is the file of the audit log;
    `name` is what clients call the model (default: the checkpoint's). `adapters` (name -> PEFT folder) are loaded beside it:
    a request for the model `name:adapter` is answered with that one. Errors: LabkitError when FastAPI is absent.
    """
    require()
    from fastapi import FastAPI

    from labkit.serve import ollama_api, openai_api, operations
    from labkit.serve.metrics import Meters
    from labkit.serve.served import Served

    meters, log = Meters(), AuditLog(audit) if audit else None
    opener = open_runner or (lambda: _opened(artifact, adapters, threads))
    name = name or artifact.checkpoint.name
    about = {
        "engine": artifact.recipe.engine, "precision": artifact.recipe.precision, "weight_bytes": artifact.weight_bytes,
        "weights": artifact.weights, "bits_per_weight": artifact.bits_per_weight, "notes": list(artifact.notes),
    }  # fmt: skip
    served = Served(name, artifact.checkpoint, opener, limits, meters, about, tuple(adapters or ()))

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        try:
            yield
        finally:
            served.close()
            if log:
                log.close()

    app = FastAPI(title="labkit gateway", version="1", description=__doc__ or "", lifespan=life, docs_url=None, redoc_url=None)
    app.state.served = served
    _errors(app)
    app.include_router(openai_api.routes(served))
    app.include_router(ollama_api.routes(served))
    app.include_router(operations.routes(served))
    routes = frozenset(getattr(route, "path", "") for route in app.routes) | frozenset(app.openapi()["paths"])
    app.add_middleware(Guard, limits=limits, keys=Keys(keys), meters=meters, audit=log, routes=routes)
    return app


def _opened(artifact: Artifact, adapters: Mapping[str, Path | str] | None, threads: int | None) -> Runner:
    if adapters:
        from labkit.adapters import load as load_adapted

        return load_adapted(artifact, adapters, threads=threads)
    from labkit.build import load

    return load(artifact, threads=threads)


def require() -> None:
    """NotInstalled with the command to run when a package of the `serve` extra is absent."""
    from importlib.util import find_spec

    if absent := [name for name in ("fastapi", "uvicorn", "prometheus_client") if find_spec(name) is None]:
        raise NotInstalled(f'The gateway needs {", ".join(absent)}. Try:  pip install "labkit[serve]"')


def _errors(app: FastAPI) -> None:
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse
    from starlette.exceptions import HTTPException

    from labkit.serve.served import Refused

    def reply(request: Request, status: int, sentence: str, code: str | None = None, headers: Any = None) -> JSONResponse:
        after = {"Retry-After": "1"} if status in (429, 503) else {}
        return JSONResponse(refusal(request.url.path, status, _clean(sentence), code), status, {**after, **(headers or {})})

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> JSONResponse:
        return reply(request, error.status, str(error), error.code)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return reply(request, 400, "; ".join(_said(one) for one in error.errors()[:3]) + ".")

    @app.exception_handler(HTTPException)
    async def other(request: Request, error: HTTPException) -> JSONResponse:
        return reply(request, error.status_code, _PLAIN.get(error.status_code, str(error.detail)), headers=error.headers)

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> JSONResponse:
        return reply(request, 500, f"The server met an error it did not expect ({type(error).__name__}); its log says more.")


_PLAIN = {
    404: "There is nothing at this address; /openapi.json lists what there is.",
    405: "This address does not take that method; /openapi.json lists what there is.",
    400: "The body cannot be read as JSON; send a JSON object.",
}


def _said(error: Mapping[str, Any]) -> str:
    """One validation error in a few words: where, what was given, what was expected."""
    if error["type"] == "json_invalid":
        return "The body is not JSON; send a JSON object"
    place = ".".join(str(part)[:60] for part in error["loc"][1:] if "(" not in str(part) and "[" not in str(part)) or "the body"
    if error["type"] == "extra_forbidden":
        return f"{place} is not supported by this server; leave it out"
    if error["type"] == "missing":
        return f"{place} is missing"
    wrong = error["msg"].removeprefix("Value error, ")
    return f"{place} was given as {str(error.get('input'))[:60]!r}: {wrong[:1].lower()}{wrong[1:200]}"


def _clean(text: str) -> str:
    return text.encode("utf-8", "replace").decode()

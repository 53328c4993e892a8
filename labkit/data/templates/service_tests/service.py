"""A service in front of a local model: a sentence in, a checked command out.

    POST /command {"text": "Turn on the lamp"}  ->  200 {"command": {...}}
    400 the request is wrong, 413 it is too long, 502 the model's answer is no command, 503 the runtime is away

Settings: RUNTIME_URL (anything that speaks OpenAI's chat language), RUNTIME_MODEL, RUNTIME_KEY.
"""

import json
import os
import urllib.error
import urllib.request
from functools import cache
from pathlib import Path

MOST_BYTES, MOST_CHARACTERS, SECONDS, NEW_TOKENS = 10_000, 500, 30, 128
SCHEMA = json.loads(Path(__file__).with_name("commands.schema.json").read_text(encoding="utf-8"))


class Refused(Exception):
    """The request cannot be met: an HTTP status and a sentence for the caller."""

    def __init__(self, status, sentence):
        super().__init__(sentence)
        self.status = status


def read_request(body):
    """The sentence in a request's body (bytes)."""
    if len(body) > MOST_BYTES:
        raise Refused(413, f"The body has {len(body)} bytes; send at most {MOST_BYTES}.")
    try:
        text = json.loads(body)["text"]
        text.encode()  # half of a surrogate pair is no character
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise Refused(400, 'Send JSON with a text: {"text": "Turn on the lamp"}.') from None
    if not isinstance(text, str) or not text.strip() or "<|" in text:  # control tokens would forge a turn
        raise Refused(400, "The text is empty, or holds a control token of the model; send a plain sentence.")
    if len(text) > MOST_CHARACTERS:
        raise Refused(400, f"The text has {len(text)} characters; send at most {MOST_CHARACTERS}.")
    return text


def read_answer(text):
    """The command in a model's answer. What the schema does not allow never leaves this service."""
    try:
        command = json.loads(text)
        if _form().is_valid(command):
            return command
    except (ValueError, RecursionError):
        pass
    raise Refused(502, "The model did not answer with a command; say it in other words.")


@cache
def _form():
    from jsonschema import Draft202012Validator

    return Draft202012Validator(SCHEMA)


def ask(text):
    """What the runtime answers to one sentence. Greedy, so that the same sentence has the same answer."""
    body = {
        "model": os.environ.get("RUNTIME_MODEL", "edgehome"),
        "messages": [{"role": "user", "content": text}],
        "temperature": 0,
        "max_tokens": NEW_TOKENS,
    }
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("RUNTIME_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    url = os.environ["RUNTIME_URL"] + "/v1/chat/completions"
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(urllib.request.Request(url, json.dumps(body).encode(), headers), timeout=SECONDS) as reply:
            return json.load(reply)["choices"][0]["message"]["content"]
    except urllib.error.HTTPError as error:
        if error.code == 400:  # the runtime's words may hold what callers must not see
            raise Refused(400, "The model cannot take this text; make it shorter.") from None
        raise Refused(503, "The model is busy or away; try again in a moment.") from None
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        raise Refused(503, "The model is busy or away; try again in a moment.") from None


def answer(body, ask=ask):
    """Status and JSON object for a request's body: everything but HTTP itself."""
    try:
        return 200, {"command": read_answer(ask(read_request(body)))}
    except Refused as refused:
        return refused.status, {"error": str(refused)}


def make_app():
    from fastapi import FastAPI, Request
    from fastapi.responses import JSONResponse
    from starlette.concurrency import run_in_threadpool

    app = FastAPI(title="commands", docs_url=None, redoc_url=None, openapi_url=None)

    @app.get("/health")
    async def health():
        return {"status": "ok"}

    @app.post("/command")
    async def command(request: Request):
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > MOST_BYTES:
                break  # what comes after it is not read into memory
        status, reply = await run_in_threadpool(answer, bytes(body))
        return JSONResponse(reply, status, {"Retry-After": "1"} if status == 503 else None)

    return app


def __getattr__(name):  # `uvicorn service:app`; the pure functions above need no FastAPI
    if name == "app":
        globals()["app"] = make_app()
        return globals()["app"]
    raise AttributeError(name)

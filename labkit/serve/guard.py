"""The door of the gateway: API keys, rate limit, size and time limits of a body, metrics and the audit log.

One ASGI layer around everything, so that no route can forget it, and nothing of a refused request is ever parsed.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import json
import time
from collections import OrderedDict
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

from labkit.serve.audit import AuditLog
from labkit.serve.metrics import Meters

OPEN = ("/health",)  # needs no key: whoever restarts a server must be able to ask it
OTHER = "other"  # the label of every address that is no route: a stranger must not invent labels


@dataclass(frozen=True)
class Limits:
    """What a gateway grants. A request over a limit gets a 4xx or 5xx with a sentence, never silence."""

    queue: int = 64  # requests that may wait for the model
    seconds: float = 60.0  # from joining the queue to the last token
    body_bytes: int = 1_000_000
    body_seconds: float = 10.0  # for the whole body to arrive
    per_minute: float | None = None  # requests a key (or an address, without keys) may make
    burst: int = 10  # of these, how many at once


def refusal(path: str, status: int, sentence: str, code: str | None = None) -> dict[str, Any]:
    """The body of an error: Ollama's form under /api, OpenAI's everywhere else."""
    if path.startswith("/api"):
        return {"error": sentence}
    kind = "server_error" if status >= 500 else "rate_limit_error" if status == 429 else "invalid_request_error"
    return {"error": {"message": sentence, "type": kind, "param": None, "code": code}}


class Keys:
    """Names and their secrets. Only digests are kept, and every digest is compared on every request."""

    def __init__(self, secrets: Mapping[str, str] | None = None):
        self._digests = {name: _digest(secret) for name, secret in (secrets or {}).items()}

    def __bool__(self) -> bool:
        return bool(self._digests)

    def owner(self, header: bytes) -> str | None:
        """The name behind an `Authorization: Bearer …` header; None when it is no known key."""
        scheme, _, secret = header.decode("latin-1").partition(" ")
        given, owner = _digest(secret.strip()), None
        for name, digest in self._digests.items():  # no early end: the time taken tells nothing
            if hmac.compare_digest(digest, given):
                owner = name
        return owner if scheme.lower() == "bearer" else None


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).digest()


class Buckets:
    """Token buckets: `burst` requests at once, refilled at `per_minute`; the 10,000 callers seen last are remembered."""

    def __init__(self, per_minute: float, burst: int, keep: int = 10_000):
        self._rate, self._burst, self._keep = per_minute / 60, burst, keep
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def wait(self, who: str, now: float | None = None) -> float:
        """0 and one request is taken, or the seconds until there is one."""
        now = time.monotonic() if now is None else now
        left, then = self._left.pop(who, (float(self._burst), now))
        left = min(self._burst, left + (now - then) * self._rate)
        self._left[who] = (left - 1, now) if left >= 1 else (left, now)
        if len(self._left) > self._keep:
            self._left.popitem(last=False)
        return 0.0 if left >= 1 else (1 - left) / self._rate


class Guard:
    """ASGI middleware: `app` sees only requests that may pass."""

    def __init__(self, app: Any, limits: Limits, keys: Keys, meters: Meters, audit: AuditLog | None, routes: frozenset[str]):
        self.app, self.limits, self.keys, self.meters, self.audit, self.routes = app, limits, keys, meters, audit, routes
        self.buckets = Buckets(limits.per_minute, limits.burst) if limits.per_minute else None

    async def __call__(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        visit = _Visit(scope, send)
        try:
            if refused := self._refused(visit):
                await visit.answer(*refused)
            else:
                await self._pass(visit, receive)
        finally:
            self._count(visit)

    def _refused(self, visit: _Visit) -> tuple[int, str, dict[str, str]] | None:
        if self.keys and visit.path not in OPEN:
            visit.who = self.keys.owner(visit.header(b"authorization"))
            if visit.who is None:
                asked = {"WWW-Authenticate": "Bearer"}
                return 401, "This server wants an API key: send it as 'Authorization: Bearer KEY'.", asked
        if self.buckets and visit.path not in OPEN:
            wait = self.buckets.wait(visit.who or visit.address)
            if wait:
                after = {"Retry-After": str(int(wait) + 1)}
                return 429, f"Too many requests; the next one is welcome in {wait:.1f} seconds.", after
        if not self.keys and (name := visit.strange_host()):
            return 403, f"This server asks for no key, so it answers under its own address only, not as {name!r}.", {}
        if foreign := visit.foreign():
            return 403, f"A page of {foreign} may not use this server; call it from a program or through your own site.", {}
        length = visit.header(b"content-length")
        if length and visit.header(b"transfer-encoding"):  # two lengths: what one of them leaves over would count as the next request
            return 400, "A request has one length; send Content-Length or Transfer-Encoding, not both.", {"Connection": "close"}
        if length.isdigit() and int(length[:20]) > self.limits.body_bytes:
            return 413, _too_large(self.limits), {"Connection": "close"}
        return None

    async def _pass(self, visit: _Visit, receive: Any) -> None:
        if visit.path.startswith("/api/"):
            visit.take_as_json()
        visit.scope.setdefault("state", {})["visit"] = visit
        await self.app(visit.scope, _limited(receive, self.limits), visit.send)

    def _count(self, visit: _Visit) -> None:
        route = visit.path if visit.path in self.routes else OTHER
        seconds = time.monotonic() - visit.began
        self.meters.requests.labels(route, str(visit.status)).inc()
        self.meters.seconds.labels(route).observe(seconds)
        if self.audit:
            self.audit.write(
                who=visit.who or "", address=visit.address, method=visit.scope["method"], path=visit.path[:200],
                status=visit.status, seconds=round(seconds, 4), bytes_in=visit.header(b"content-length").decode("latin-1")[:20],
                bytes_out=visit.sent, **visit.notes,
            )  # fmt: skip


class _Visit:
    """One request on its way through: who came, what was answered."""

    def __init__(self, scope: MutableMapping[str, Any], send: Any):
        self.scope, self._send = scope, send
        self.path: str = scope["path"]
        self.address = (scope.get("client") or ("unknown",))[0]
        self.who: str | None = None
        self.status, self.sent, self.began = 0, 0, time.monotonic()
        self.notes: dict[str, Any] = {}

    def header(self, name: bytes) -> bytes:
        return next((value for key, value in self.scope["headers"] if key == name), b"")

    def foreign(self) -> str:
        """The site of a browser page that is not this server's own; "" for programs."""
        origin = self.header(b"origin").decode("latin-1")
        own = self.header(b"host").decode("latin-1")
        return "" if not origin or origin.partition("://")[2] == own else origin[:100]

    def strange_host(self) -> str:
        """A name in Host that a stranger could point at this machine (DNS rebinding); "" for addresses and names without a dot."""
        host = self.header(b"host").decode("latin-1")
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
        if "." not in name or name.lower().endswith(".localhost"):  # nobody can register a name without a dot
            return ""
        try:
            ipaddress.ip_address(name.strip("[]"))
        except ValueError:
            return name[:100]
        return ""

    def take_as_json(self) -> None:
        """`curl -d` calls its body a form; Ollama reads JSON whatever it is called, and its documentation relies on that."""
        form = (b"content-type", b"application/x-www-form-urlencoded")
        self.scope["headers"] = [(form[0], b"application/json") if pair == form else pair for pair in self.scope["headers"]]

    async def send(self, message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        self.sent += len(message.get("body", b""))
        await self._send(message)

    async def answer(self, status: int, sentence: str, headers: Mapping[str, str]) -> None:
        if self.status:  # an answer has begun: only ending the connection is left
            return
        body = json.dumps(refusal(self.path, status, sentence)).encode()
        plain = {"content-type": "application/json", "content-length": str(len(body)), **headers}
        pairs = [(key.lower().encode(), value.encode()) for key, value in plain.items()]
        await self.send({"type": "http.response.start", "status": status, "headers": pairs})
        await self.send({"type": "http.response.body", "body": b"" if self.scope["method"] == "HEAD" else body})


def _too_large(limits: Limits) -> str:
    return f"The body is larger than {limits.body_bytes} bytes; send less at once."


def _limited(receive: Any, limits: Limits) -> Any:
    """`receive` that refuses a body that is too large or too slow; after the body it waits as long as it takes."""
    from fastapi import HTTPException

    got, more, until = 0, True, time.monotonic() + limits.body_seconds

    async def limited() -> MutableMapping[str, Any]:
        nonlocal got, more
        if not more:
            return await receive()
        try:
            message = await asyncio.wait_for(receive(), max(0.001, until - time.monotonic()))
        except TimeoutError:
            raise HTTPException(408, f"The body did not arrive within {limits.body_seconds:g} seconds.", {"Connection": "close"}) from None
        got += len(message.get("body", b""))
        more = message.get("more_body", False)
        if got > limits.body_bytes:
            raise HTTPException(413, _too_large(limits), {"Connection": "close"})
        return message

    return limited

"""Every attempt against a gateway must fail: a table of what was tried, what happened, and whether it held.

    attack(Target("http://127.0.0.1:8000", key="…"))

Use it on servers of your own. It talks to loopback addresses only, destroys nothing, and needs no package. `careless.py` is the
negative control: a server, and ways to open files, against which the same attempts succeed.
"""

from __future__ import annotations

import http.client
import json
import socket
import statistics
import time
import urllib.parse
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from labkit.deploy import attack_files, attack_parts
from labkit.types import LabkitError

GRACE = 3.0  # seconds beyond its patience in which a server must have given up on a slow client
SILENCE = 0.6  # seconds without a byte after which nothing more is expected
Outcome = tuple[str, bool]  # what happened, whether it held


@dataclass(frozen=True)
class Attempt:
    """One attempt. `held`: the server (or the library) refused, or took the attack for plain words, and went on serving."""

    group: str
    name: str
    happened: str
    held: bool

    def row(self) -> dict[str, Any]:
        """Flat, for a table."""
        return {"group": self.group, "attempt": self.name, "what happened": self.happened, "held": self.held}


@dataclass(frozen=True)
class Reply:
    """An answer of the server; `status` 0 when it closed the connection without one that could be read, -1 when it said nothing in time."""

    status: int
    text: str

    @property
    def refused(self) -> bool:
        """A 4xx, or a closed connection: whoever still sends when a server hangs up may not get to read its 413."""
        return 400 <= self.status < 500 or self.status == 0

    def said(self) -> str:
        """Status and the first words."""
        if self.status < 1:
            return "said nothing in time" if self.status else "closed the connection"
        try:
            found = json.loads(self.text)["error"]
            words = found if isinstance(found, str) else found["message"]
        except (ValueError, KeyError, TypeError):
            words = " ".join(self.text.split())
        return f"{self.status} {words[:90]}".strip()


@dataclass(frozen=True)
class Target:
    """A gateway on this machine. `patience`: seconds it was told to wait for a slow head or body; `key` "" when it asks for none."""

    url: str
    key: str = ""
    model: str = "edgehome"
    patience: float = 10.0
    body_bytes: int = 1_000_000
    seen: list[str] = field(default_factory=list, repr=False, compare=False)  # every answer's text

    def __post_init__(self) -> None:
        if self.address[0] not in ("127.0.0.1", "localhost", "::1"):
            raise LabkitError(f"{self.url} is not on this machine; attack a server of your own on a loopback address.")

    @property
    def address(self) -> tuple[str, int]:
        parts = urllib.parse.urlsplit(self.url)
        return parts.hostname or "", parts.port or 80

    @property
    def own(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"} if self.key else {}

    def ask(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None, *, keyed: bool = True, wait: float = 20.0) -> Reply:
        """One request; `body` bytes as they are, anything else as JSON."""
        sent = body if isinstance(body, (bytes, type(None))) else json.dumps(body).encode()
        given = {"Content-Type": "application/json"} | (self.own if keyed else {}) | (headers or {})
        connection = http.client.HTTPConnection(*self.address, timeout=wait)
        try:
            connection.request(method, path, sent, given)
            answer = connection.getresponse()
            reply = Reply(answer.status, answer.read(200_000).decode("utf-8", "replace"))
        except TimeoutError:
            reply = Reply(-1, "")
        except (OSError, http.client.HTTPException):
            reply = Reply(0, "")
        finally:
            connection.close()
        self.seen.append(reply.text)
        return reply

    def chat(self, wait: float = 20.0, **fields: Any) -> Reply:
        """A chat completion of a few tokens, with `fields` replaced."""
        body = {"model": self.model, "messages": [{"role": "user", "content": "Turn on the light"}], "max_tokens": 4, "temperature": 0}
        return self.ask("POST", "/v1/chat/completions", body | fields, wait=wait)

    def raw(self, data: bytes, first: float = 5.0) -> tuple[list[int], str]:
        """Bytes as they are: (the statuses that came back, all text) until the server closes or falls silent; `first`: seconds it has to begin."""
        got = b""
        with socket.create_connection(self.address, timeout=first) as line:
            try:
                line.sendall(data)
                while part := line.recv(65_536):
                    got += part
                    line.settimeout(SILENCE)
            except OSError:
                pass
        text = got.decode("latin-1")
        self.seen.append(text)
        return [int(part[:3]) for part in text.split("HTTP/1.1 ")[1:] if part[:3].isdigit()], text

    def alive(self) -> bool:
        """Whether it still answers others."""
        return self.ask("GET", "/health", keyed=False, wait=5).status == 200


def attack(target: Target, *, opener: Any = None, verifier: Any = None, rounds: int = 40) -> list[Attempt]:
    """All attempts, in order. `opener(folder)` and `verifier(folder, public_key)` are what files are tried on (default: labkit's own)."""
    if not target.alive():
        raise LabkitError(f"{target.url} does not answer /health; start the gateway first.")
    done = [_timed(target, rounds)] if target.key else []
    with ThreadPoolExecutor(2) as pool:
        slow = [pool.submit(_try, target, *one) for one in SLOW]
        for group, name, attempt in (*(ATTEMPTS if target.key else [one for one in ATTEMPTS if one[0] != "key"]), *attack_parts.ATTEMPTS):
            done.append(_try(target, group, name, attempt))
        done += [one.result() for one in slow]
    done.append(_never_said(target))
    done += [Attempt("files", name, *outcome) for name, outcome in attack_files.run(opener, verifier)]
    return done


def _try(target: Target, group: str, name: str, attempt: Callable[[Target], Outcome]) -> Attempt:
    happened, held = attempt(target)
    if not target.alive():
        return Attempt(group, name, f"{happened}; afterwards the server answers nobody", False)
    return Attempt(group, name, happened, held)


def _never_said(target: Target) -> Attempt:
    """Over all answers: the key in none of them, no line of this machine's files either."""
    leaked = [text for text in target.seen if (target.key and target.key in text) or "root:x:0:0" in text]
    return Attempt("secrets", "the key or a file in any answer", f"{len(leaked)} of {len(target.seen)} answers hold one", not leaked)


# --- the key ---------------------------------------------------------------------------------------------------------


def _without(headers: dict[str, str], path: str = "/v1/models") -> Callable[[Target], Outcome]:
    def attempt(target: Target) -> Outcome:
        reply = target.ask("GET", path.replace("KEY", target.key), headers={name: value.replace("KEY", target.key) for name, value in headers.items()}, keyed=False)
        return reply.said(), reply.status == 401

    return attempt


def _timed(target: Target, rounds: int) -> Attempt:
    """Does a key that is right but for its last character take longer to refuse than one wrong from the first?"""
    near, far = target.key[:-1] + ("x" if target.key[-1] != "x" else "y"), "\x7f" * len(target.key)
    differences, answered = [], set()
    for turn in range(rounds):
        taken = {}
        for wrong in (near, far) if turn % 2 else (far, near):  # either comes first equally often
            began = time.perf_counter()
            answered.add(target.ask("GET", "/v1/models", headers={"Authorization": f"Bearer {wrong}"}, keyed=False).status)
            taken[wrong] = time.perf_counter() - began
        differences.append(taken[near] - taken[far])
    middle = statistics.median(differences)
    low, high = statistics.quantiles(differences, n=4)[::2]
    told = middle > 0.5e-3 and low > 0  # half a millisecond, and in three rounds of four
    said = f"median difference {1e3 * middle:+.2f} ms, middle half {1e3 * low:+.2f} to {1e3 * high:+.2f}"
    return Attempt("key", "time a nearly right key takes to refuse", said, not told and answered == {401})


# --- the door --------------------------------------------------------------------------------------------------------


def _rebound(target: Target) -> Outcome:
    """A page whose own name was made to point at this machine: Origin and Host agree, and are not ours."""
    page = f"rebound.example:{target.address[1]}"
    reply = target.ask("POST", "/v1/chat/completions", {"model": target.model, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2},
                       {"Host": page, "Origin": f"http://{page}"}, keyed=False)  # fmt: skip
    return reply.said(), reply.status in (401, 403, 421)


def _foreign(target: Target) -> Outcome:
    reply = target.ask("GET", "/v1/models", headers={"Origin": "https://evil.example"})
    return reply.said(), reply.status == 403


def _head(target: Target, method: str, path: str, more: Sequence[str]) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", f"Host: {target.address[0]}:{target.address[1]}", *(f"{k}: {v}" for k, v in target.own.items()), *more]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


def _smuggled(*more: str) -> Callable[[Target], Outcome]:
    """Two lengths for one body, and a second request hidden in what one of them leaves over."""

    def attempt(target: Target) -> Outcome:
        hidden = f"GET /health?smuggled HTTP/1.1\r\nHost: {target.address[0]}\r\n\r\n".encode()
        found, _ = target.raw(_head(target, "POST", "/v1/completions", ["Content-Type: application/json", *more]) + b"0\r\n\r\n" + hidden)
        return f"answered {', '.join(map(str, found)) or 'nothing'}", 200 not in found

    return attempt


def _header(*more: str, method: str = "GET", path: str = "/v1/models") -> Callable[[Target], Outcome]:
    def attempt(target: Target) -> Outcome:
        found, text = target.raw(_head(target, method, path, more))
        return Reply(found[0] if found else 0, text.partition("\r\n\r\n")[2]).said(), not found or 400 <= found[0] < 500

    return attempt


# --- slowness --------------------------------------------------------------------------------------------------------


def _slow_heads(target: Target, count: int = 20) -> Outcome:
    """Connections whose request never ends its first lines; a patient server runs out of them."""
    lines = [socket.create_connection(target.address, timeout=5) for _ in range(count)]
    try:
        for line in lines:
            line.sendall(b"GET /health HTTP/1.1\r\nX-Slow: ")
        until, closed = time.monotonic() + target.patience + GRACE, 0
        while lines and time.monotonic() < until:
            time.sleep(0.2)
            for line in list(lines):
                if _gone(line, b"a"):
                    lines.remove(line)
                    closed += 1
        return f"{closed} of {count} closed", closed == count
    finally:
        for line in lines:
            line.close()


def _slow_body(target: Target) -> Outcome:
    """A head that promises a body which comes a byte at a time."""
    with socket.create_connection(target.address, timeout=5) as line:
        line.sendall(_head(target, "POST", "/v1/chat/completions", ["Content-Type: application/json", "Content-Length: 5000"]))
        until = time.monotonic() + target.patience + GRACE
        while time.monotonic() < until:
            time.sleep(0.2)
            if _gone(line, b" "):
                return f"ended it within {target.patience + GRACE:g} s", True
    return f"still waits after {target.patience + GRACE:g} s", False


def _gone(line: socket.socket, more: bytes) -> bool:
    """Send a little more; whether the server has answered or closed."""
    line.settimeout(0.001)
    try:
        line.recv(4096)
        return True
    except TimeoutError:
        pass
    except OSError:
        return True
    try:
        line.sendall(more)
        return False
    except OSError:
        return True


SLOW = (("body", "20 heads that never end", _slow_heads), ("body", "a body of a byte now and then", _slow_body))
ATTEMPTS: tuple[tuple[str, str, Callable[[Target], Outcome]], ...] = (
    ("key", "no key", _without({})), ("key", "a wrong key", _without({"Authorization": "Bearer not-the-key-0000"})),
    ("key", "an empty key", _without({"Authorization": "Bearer "})), ("key", "the key under another scheme", _without({"Authorization": "Basic KEY"})),
    ("key", "the key in the address", _without({}, "/v1/models?key=KEY")), ("key", "/metrics without a key", _without({}, "/metrics")),
    ("key", "the list of routes without a key", _without({}, "/openapi.json")), ("key", "two slashes around the door", _without({}, "//v1/models")),
    ("key", "a method nobody expects", lambda target: (lambda r: (r.said(), r.status in (401, 405, 501)))(target.ask("TRACE", "/v1/models", keyed=False))),
    ("door", "a page of another site", _foreign), ("door", "a page whose name points here (rebinding)", _rebound),
    ("door", "a length and chunks together", _smuggled("Content-Length: 5", "Transfer-Encoding: chunked")),
    ("door", "two different lengths", _smuggled("Content-Length: 5", "Content-Length: 60")),
    ("door", "chunked in a costume", _smuggled("Transfer-Encoding: xchunked", "Content-Length: 5")),
    ("door", "a second Host", _header("Host: evil.example")), ("door", "NUL in a header", _header("X-Test: a\x00b")),
    ("door", "a head of 200,000 bytes", _header(*(f"X-{n}: {'a' * 2500}" for n in range(80)))),
    ("door", "a line break in the address", _header(path="/v1/%0d%0aSet-Cookie:%20a=b")),
)  # fmt: skip

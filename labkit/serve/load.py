"""Open-loop load: every request leaves when it is due, whether or not earlier ones were answered.

    due = arrivals(rate=20, seconds=5, seed=0)                  # Poisson arrivals, (n,) seconds
    replies = run(url, bodies, due)                             # one `Reply` a request, in the order of `due`
    [reply.latency for reply in replies]                        # from the moment it was due

Users do not wait for each other. A generator that waits for an answer before it sends the next request stops asking just
when the server is slow, and the slow moments go unrecorded ("coordinated omission", G. Tene). So a latency here begins when
the request was due, not when it left.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from labkit import stats
from labkit.types import LabkitError, NotInstalled

CHAT = "/v1/chat/completions"


class Reply(NamedTuple):
    """One request. Times in seconds since the start of the load; `first` is the first piece of text, None if there was none."""

    due: float
    sent: float
    first: float | None
    ended: float
    status: int  # 0: no answer at all
    pieces: int  # of text, as they were streamed
    whole: bool  # a final reason was given: the answer was not cut off
    server: str  # what the header X-Server said
    problem: str = ""
    cached: bool = False  # the header X-Cached said 1

    @property
    def latency(self) -> float:
        """What a user waits: from due to the last byte."""
        return self.ended - self.due

    @property
    def good(self) -> bool:
        return self.status == 200 and self.whole


class Told(NamedTuple):
    """The load at one rate: `latency` holds the q-quantile with its interval, in seconds, of good answers only."""

    rate: float  # asked, requests a second
    answered: float  # good answers a second
    latency: stats.Estimate
    first: stats.Estimate
    failed: int
    requests: int


def arrivals(rate: float, seconds: float | None = None, seed: int = 0, *, count: int | None = None) -> np.ndarray:
    """Moments of a Poisson process of `rate` a second, rising, (n,): those within `seconds`, or the first `count`."""
    if rate <= 0 or (seconds is None) == (count is None) or min(seconds or 1, count or 1) <= 0:
        raise LabkitError(f"rate={rate}, seconds={seconds}, count={count} were given; expected a rate above 0 and one of the others.")
    expected = rate * seconds if seconds is not None else 0
    drawn = count or int(expected + 10 * expected**0.5 + 10)
    moments = np.cumsum(np.random.default_rng(seed).exponential(1 / rate, size=drawn))  # gaps are exponential
    return moments if seconds is None else moments[moments < seconds]


def chat(model: str, text: str, tokens: int = 32, **more: Any) -> dict[str, Any]:
    """The body of a streamed chat request in OpenAI's form."""
    return {"model": model, "messages": [{"role": "user", "content": text}], "max_tokens": tokens, "temperature": 0, "stream": True, **more}


def run(
    url: str, bodies: Sequence[Mapping[str, Any]], due: Sequence[float], *, route: str = CHAT, seconds: float = 60.0,
    headers: Sequence[Mapping[str, str]] | Mapping[str, str] = (), trust: Any = True,
) -> list[Reply]:  # fmt: skip
    """Send request i (bodies and headers are taken in turn) at `due[i]` seconds from now; returns when all have ended.

    `seconds` is the longest a request may be silent; `trust` is httpx's `verify`. Works inside a notebook's event loop.
    """
    if not len(bodies) or not len(due):
        raise LabkitError(f"{len(bodies)} bodies and {len(due)} moments were given; expected at least one of each.")
    with ThreadPoolExecutor(1) as pool:  # a notebook's own loop is busy
        return pool.submit(asyncio.run, _all(url + route, bodies, np.asarray(due), seconds, headers, trust)).result()


async def _all(url: str, bodies: Any, due: np.ndarray, seconds: float, headers: Any, trust: Any) -> list[Reply]:
    import httpx

    each = [dict(headers)] if isinstance(headers, Mapping) else [dict(one) for one in headers] or [{}]
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=32)
    async with httpx.AsyncClient(timeout=seconds, limits=limits, trust_env=False, verify=trust) as client:
        began = time.perf_counter() + 0.05
        asked = [_one(client, url, bodies[i % len(bodies)], each[i % len(each)], began, at) for i, at in enumerate(due)]
        return list(await asyncio.gather(*asked))


async def _one(client: Any, url: str, body: Mapping[str, Any], headers: Mapping[str, str], began: float, due: float) -> Reply:
    import httpx

    await asyncio.sleep(max(0.0, began + due - time.perf_counter()))
    sent, first, pieces, whole, status, server, problem, hit = time.perf_counter() - began, None, 0, False, 0, "", "", ""
    try:
        async with client.stream("POST", url, json=body, headers=headers) as reply:
            status, server, hit = reply.status_code, reply.headers.get("x-server", ""), reply.headers.get("x-cached")
            async for line in reply.aiter_lines():
                text, ended = piece(line)
                whole = whole or ended
                if text:
                    pieces += 1
                    first = time.perf_counter() - began if first is None else first
    except httpx.HTTPError as error:
        problem = type(error).__name__
    return Reply(float(due), sent, first, time.perf_counter() - began, status, pieces, whole, server, problem, hit == "1")


def one_by_one(url: str, bodies: Sequence[Mapping[str, Any]], *, route: str = CHAT, seconds: float = 60.0) -> list[Reply]:
    """Each request after the answer to the one before, as a single patient client: the time of service without a queue."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, _patient(url + route, bodies, seconds)).result()


async def _patient(url: str, bodies: Sequence[Mapping[str, Any]], seconds: float) -> list[Reply]:
    import httpx

    async with httpx.AsyncClient(timeout=seconds, trust_env=False) as client:
        began = time.perf_counter()
        return [await _one(client, url, body, {}, began, time.perf_counter() - began) for body in bodies]


def capacity(url: str, bodies: Sequence[Mapping[str, Any]], **how: Any) -> float:
    """Answers a second when all `bodies` are sent at one moment: the most the server does, however it shares its time."""
    replies = run(url, bodies, np.zeros(len(bodies)), **how)
    return sum(reply.good for reply in replies) / max(reply.ended for reply in replies)


def piece(line: str) -> tuple[str, bool]:
    """(new text, whether the answer says why it ended) of one line of an answer, streamed or whole."""
    try:
        found = json.loads(line.removeprefix("data: "))["choices"][0]
    except (ValueError, LookupError, TypeError):
        return "", False
    said = found.get("delta") or found.get("message") or {}
    return said.get("content") or found.get("text") or "", found.get("finish_reason") is not None


def told(rate: float, replies: Sequence[Reply], q: float = 0.95) -> Told:
    """Quantiles of the latency and of the time to the first piece, answered rate and failures of one load."""
    from labkit.monitor import quantile

    good = [reply for reply in replies if reply.good]
    lasted = max(reply.ended for reply in replies) - min(reply.due for reply in replies)
    nothing = stats.Estimate(float("nan"), float("nan"), float("nan"))
    times = quantile([one.latency for one in good], q) if good else nothing
    firsts = [one.first - one.due for one in good if one.first is not None]
    return Told(rate, len(good) / lasted, times, quantile(firsts, q) if firsts else nothing, len(replies) - len(good), len(replies))


def knee(rates: Sequence[float], latencies: Sequence[float]) -> int:
    """Index of the point farthest below the chord from the first to the last: where more load begins to cost much more time.

    Both axes scaled to 0..1 ("kneedle", V. Satopää and others, 2011). Error: fewer than three points.
    """
    x, y = np.asarray(rates, dtype=float), np.asarray(latencies, dtype=float)
    if x.shape != y.shape or x.size < 3 or (np.diff(x) <= 0).any():
        raise LabkitError(f"{x.size} rates and {y.size} latencies were given; expected three or more of both, rates rising.")
    flat = y[-1] - y[0]
    below = (x - x[0]) / (x[-1] - x[0]) - ((y - y[0]) / flat if flat else 0)
    return int(np.argmax(below))


def verdict(found: stats.Estimate, limit: float) -> str:
    """ "within" or "over" when the whole interval is; "unsure" when it holds the limit or nothing bounds it."""
    if not np.isfinite(found.value):
        return "unsure"
    return "within" if found.high <= limit else "over" if found.low > limit else "unsure"


# --- the same schedule by Locust ---------------------------------------------------------------------------------


def locust_program() -> list[str]:
    """The command that runs Locust: $LABKIT_LOCUST, or the one installed beside this Python. NotInstalled otherwise."""
    from importlib.util import find_spec

    if chosen := os.environ.get("LABKIT_LOCUST"):
        return [chosen]
    if find_spec("locust"):
        return [sys.executable, "-m", "locust"]
    if found := shutil.which("locust"):
        return [found]
    raise NotInstalled("Locust is not installed. Try:  pip install locust")


def locust(
    url: str, bodies: Sequence[Mapping[str, Any]], due: Sequence[float], *, route: str = CHAT, seconds: float = 120.0
) -> list[Reply]:
    """The load of `run`, sent by Locust in a process of its own (gevent changes Python's sockets for a whole process)."""
    with tempfile.TemporaryDirectory(prefix="labkit-locust-") as folder:
        plan, out = Path(folder) / "plan.json", Path(folder) / "replies.json"
        plan.write_text(json.dumps({"route": route, "bodies": list(bodies), "due": [float(at) for at in due]}))
        file = Path(__file__).with_name("_locustfile.py")
        given = ["-f", str(file), "--headless", "-u", "1", "-r", "1", "--host", url, "--loglevel", "ERROR", "--only-summary"]
        told = {"LABKIT_PLAN": str(plan), "LABKIT_REPLIES": str(out)}
        done = subprocess.run(
            [*locust_program(), *given], capture_output=True, text=True, timeout=seconds, cwd=folder, env={**os.environ, **told}
        )
        if not out.exists():
            said = (done.stderr.strip().splitlines() or ["it wrote nothing"])[-1]
            raise LabkitError(f"Locust ended with status {done.returncode} and no replies: {said}")
        return [Reply(*row) for row in json.loads(out.read_text())]

"""Read by Locust, never imported: sends the plan of `labkit.serve.load.locust` when each request is due, then stops.

Locust's users normally wait for their answer before they ask again (a closed loop). Here one user starts every request at
its own moment, and Locust's statistics are told the time since the request was due. Nothing of labkit is needed in
Locust's environment.
"""

import json
import os
import time

import gevent
from locust import FastHttpUser, task

with open(os.environ["LABKIT_PLAN"], encoding="utf-8") as _file:
    PLAN = json.load(_file)


class OpenLoop(FastHttpUser):
    concurrency = 1000  # connections at once
    network_timeout = connection_timeout = 60.0

    @task
    def everything(self) -> None:
        began, bodies = time.perf_counter() + 0.05, PLAN["bodies"]
        jobs = []
        for i, due in enumerate(PLAN["due"]):
            gevent.sleep(max(0.0, began + due - time.perf_counter()))
            jobs.append(gevent.spawn(self.one, bodies[i % len(bodies)], began, due))
        gevent.joinall(jobs)
        with open(os.environ["LABKIT_REPLIES"], "w", encoding="utf-8") as file:
            json.dump([job.value for job in jobs], file)
        self.environment.runner.quit()

    def one(self, body: dict, began: float, due: float) -> list:
        sent, first, pieces, whole = time.perf_counter() - began, None, 0, False
        with self.client.post(PLAN["route"], json=body, stream=True, catch_response=True, name="due") as reply:
            for line in _lines(reply):
                text, last = _piece(line)
                whole = whole or last
                if text:
                    pieces += 1
                    first = time.perf_counter() - began if first is None else first
            ended = time.perf_counter() - began
            reply.request_meta["response_time"] = 1000 * (ended - due)
            if reply.status_code == 200 and whole:
                reply.success()
            else:
                reply.failure("no whole answer")
            server = (reply.headers or {}).get("x-server", "") if reply.status_code else ""
            return [due, sent, first, ended, reply.status_code or 0, pieces, whole, server, ""]


def _lines(reply):
    """Lines as they arrive; the last may end without a mark."""
    if reply.status_code:
        while line := reply.stream.readline(b"\n"):
            yield line
        yield reply.stream.read()


def _piece(line: bytes) -> tuple:
    try:
        found = json.loads(line.decode().removeprefix("data: "))["choices"][0]
    except (ValueError, LookupError, TypeError):
        return "", False
    said = found.get("delta") or found.get("message") or {}
    return said.get("content") or found.get("text") or "", found.get("finish_reason") is not None

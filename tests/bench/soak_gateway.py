"""A gateway under many clients for a while: does it stay up, does its memory stay flat, are its slots free afterwards?

    python tests/bench/soak_gateway.py --seconds 600 --clients 64

Each client does, at random: a whole answer, a streamed one, a stream left in the middle, a stream read slowly, a hostile body.
One JSON object at the end; exit status 0 when everything below held:
nothing but the expected statuses, resident memory after the first fifth flat within 5 %, no waiting job and no open slot left.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import json
import random
import sys
import time

import httpx
import psutil

from labkit.serve.supervisor import supervise, taken

HOSTILE = (b"", b"{", b"[" * 50_000, b'{"model":"edgehome","messages":[{"role":"user","content":"\\ud800"}]}', b"\xff\xfe\x00",
           b'{"model":"edgehome"}x', b'{"model":"edgehome","prompt":"x","temperature":NaN}')  # fmt: skip
JSON = {"Content-Type": "application/json"}


async def client(http: httpx.AsyncClient, until: float, counts: collections.Counter, rng: random.Random) -> None:
    while time.monotonic() < until:
        kind = rng.choices(("whole", "stream", "left", "slow", "hostile"), (4, 4, 3, 1, 2))[0]
        try:
            status = await asyncio.wait_for(one(http, kind, rng), 60)
        except (httpx.HTTPError, TimeoutError) as error:
            status = type(error).__name__
        counts[f"{kind} {status}"] += 1


async def one(http: httpx.AsyncClient, kind: str, rng: random.Random) -> int:
    if kind == "hostile":
        route = rng.choice(("/v1/chat/completions", "/v1/completions", "/api/chat"))
        return (await http.post(route, content=rng.choice(HOSTILE), headers=JSON)).status_code
    room = rng.choice(("kitchen", "garage", "bedroom", "office"))
    messages = [{"role": "user", "content": f"Turn on the light in the {room} at {rng.randrange(24)}:{rng.randrange(60):02}"}]
    ollama = rng.random() < 0.3
    route = "/api/chat" if ollama else "/v1/chat/completions"
    body = {"model": "edgehome", "messages": messages, "stream": kind != "whole"}
    if kind == "whole":
        return (await http.post(route, json=body)).status_code
    async with http.stream("POST", route, json=body) as reply:
        async for _ in reply.aiter_lines():
            if kind == "left":
                break
            if kind == "slow":
                await asyncio.sleep(0.2)
        return reply.status_code


async def watch(server, until: float, memory: list[tuple[float, int]]) -> None:
    began = time.monotonic()
    while time.monotonic() < until:
        held = sum(one.memory_info().rss for one in psutil.Process(server.pid).children(recursive=True))
        memory.append((round(time.monotonic() - began, 1), held))
        await asyncio.sleep(2)


async def load(server, seconds: float, clients: int, seed: int) -> dict:
    counts: collections.Counter = collections.Counter()
    memory: list[tuple[float, int]] = []
    until = time.monotonic() + seconds
    limits = httpx.Limits(max_connections=clients * 2)
    async with httpx.AsyncClient(base_url=server.url, timeout=60, limits=limits, trust_env=False) as http:
        tasks = [client(http, until, counts, random.Random(seed + n)) for n in range(clients)]
        await asyncio.gather(*tasks, watch(server, until, memory))
        await asyncio.sleep(1)
        health = (await http.get("/health")).json()
        metrics = {}
        for line in (await http.get("/metrics")).text.splitlines():
            if line.startswith(("labkit_running", "labkit_queue_length", "labkit_generations_total", "process_open_fds")):
                name, value = line.rsplit(" ", 1)
                metrics[name] = float(value)
    return {"counts": dict(counts), "memory": memory, "health": health, "metrics": metrics}


def flatness(memory: list[tuple[float, int]]) -> float:
    """Largest distance from the median of resident memory after the first fifth of the time, as a share of the median."""
    values = sorted(held for at, held in memory if at > memory[-1][0] / 5)
    middle = values[len(values) // 2]
    return max(values[-1] - middle, middle - values[0]) / middle


def main() -> int:
    take = argparse.ArgumentParser(description=__doc__)
    take.add_argument("--seconds", type=float, default=600)
    take.add_argument("--clients", type=int, default=64)
    take.add_argument("--engine", default="llamacpp")
    take.add_argument("--precision", default="q8_0")
    take.add_argument("--seed", type=int, default=0)
    chosen = take.parse_args()
    command = [sys.executable, "-m", "labkit", "serve", "edgehome", "--engine", chosen.engine, "--precision", chosen.precision,
               "--threads", "1", "--port", "{port}"]  # fmt: skip
    with supervise(command, environment={"OMP_WAIT_POLICY": "passive"}) as server:
        found = asyncio.run(load(server, chosen.seconds, chosen.clients, chosen.seed))
        found["log"], port = server.said(3), server.port
    ok = {"whole 200", "stream 200", "left 200", "slow 200", "hostile 400", "whole 429", "stream 429", "left 429", "slow 429"}
    left = [psutil.Process(one.pid).name() for one in psutil.Process().children(recursive=True)]
    found |= {"flat_within": round(flatness(found["memory"]), 4), "port_taken": taken(port), "children": left}
    found["memory"] = [(at, round(held / 1e6, 2)) for at, held in found["memory"]][:: max(1, len(found["memory"]) // 12)]
    found["unexpected"] = {name: n for name, n in found["counts"].items() if name not in ok}
    free = found["metrics"]["labkit_running"] == found["metrics"]["labkit_queue_length"] == 0
    found["held"] = bool(free and found["flat_within"] <= 0.05 and not (found["unexpected"] or left or found["port_taken"]))
    print(json.dumps(found, indent=1))
    return 0 if found["held"] else 1


if __name__ == "__main__":
    sys.exit(main())

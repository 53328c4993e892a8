"""A light stand-in for a model server: it answers in OpenAI's form after sleeping the time a real one was measured to take.

    python -I -S _light.py PORT NAME '{"prefill": 0.02, "decode": 0.05, "memory": 4, "prefix": 80}'

One request at a time, the others wait in order, as with one sequence of a real engine. `prefill` is slept only when the
first `prefix` characters of the prompt are not among the `memory` prefixes seen last: a prompt cache. It loads no
model and nothing of labkit, so that many fit where one model does. Standard library only.
"""

import asyncio
import json
import signal
import sys
from collections import OrderedDict


class Light:
    def __init__(self, name, prefill=0.0, decode=0.05, memory=0, prefix=80):
        self.name, self.prefill, self.decode, self.memory, self.prefix = name, prefill, decode, memory, prefix
        self.seen, self.turn, self.waiting, self.answered, self.hits = OrderedDict(), asyncio.Lock(), 0, 0, 0

    async def answer(self, text):
        """Sleep what the request costs; whether its prefix was remembered."""
        self.waiting += 1
        try:
            async with self.turn:
                head = text[: self.prefix]
                hit = self.seen.pop(head, False)
                self.seen[head] = True
                while len(self.seen) > self.memory:
                    self.seen.popitem(last=False)
                await asyncio.sleep(self.decode + (0 if hit else self.prefill))
        finally:
            self.waiting -= 1
        self.answered, self.hits = self.answered + 1, self.hits + hit
        return hit

    async def serve(self, reader, writer):
        """One connection, as many requests as it brings."""
        try:
            while line := await reader.readline():
                method, route, _ = line.decode("latin-1").split(" ", 2)
                headers = {}
                while (line := await reader.readline()).strip():
                    name, _, value = line.decode("latin-1").partition(":")
                    headers[name.strip().lower()] = value.strip()
                body = await reader.readexactly(int(headers.get("content-length") or 0))
                await self.reply(writer, method, route, body)
        except (asyncio.IncompleteReadError, ConnectionError, ValueError):
            pass
        finally:
            writer.close()

    async def reply(self, writer, method, route, body):
        kind, more = "application/json", ""
        if method == "POST":
            messages = json.loads(body)["messages"]
            hit = await self.answer("".join(one["content"] for one in messages))
            choice = {"index": 0, "message": {"role": "assistant", "content": "slept"}, "finish_reason": "stop"}
            text, more = json.dumps({"choices": [choice]}), f"X-Server: {self.name}\r\nX-Cached: {int(hit)}\r\n"
        elif route == "/metrics":
            kind, text = "text/plain; version=0.0.4", self.metrics()
        else:
            text = json.dumps({"status": "ok", "waiting": self.waiting})
        data = text.encode()
        writer.write(f"HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\nContent-Length: {len(data)}\r\n{more}\r\n".encode() + data)
        await writer.drain()

    def metrics(self):
        rows = {"light_requests_total": self.answered, "light_prefix_hits_total": self.hits, "light_queue_length": self.waiting}
        return "".join(f"{name} {value}\n" for name, value in rows.items())


async def main(port, name, settings):
    end = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, end.set)
    server = await asyncio.start_server(Light(name, **settings).serve, "127.0.0.1", port)
    await end.wait()
    server.close()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])))

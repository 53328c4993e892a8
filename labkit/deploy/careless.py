"""The negative control of `attack`: a server, and two ways to open files, in which every attempt succeeds.

Each careless line is one that real servers have had. It is made for seconds on a loopback port: its "files" are a folder of its own
with an invented /etc/passwd, and the templates of requests are rendered in a sandbox, so it harms nobody who runs it.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import pickle
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from labkit.deploy.attack import Target

KEY = "sk-careless-0123456789"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    models: Path
    made: dict[str, str]

    def _answer(self, data: Any, status: int = 200) -> None:
        body = json.dumps(data).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        for right, typed in zip(KEY, given, strict=False):  # ends at the first wrong character, and that takes time to tell
            if right != typed:
                break
            time.sleep(0.0005)
        self._answer({"status": "ok", "path": self.path})  # ... and nobody looks at the result

    do_TRACE = do_DELETE = do_GET

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))  # as long as it takes, as much as there is
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)  # without a limit
        try:
            asked = json.loads(body or b"{}")
            self._answer(self._create(asked) if self.path.startswith("/api") else self._chat(asked))
        except Exception as error:  # the whole error to whoever caused it
            self._answer({"error": repr(error)[:300]}, 500)

    def _chat(self, asked: dict[str, Any]) -> dict[str, Any]:
        from jinja2.sandbox import SandboxedEnvironment

        said = "".join(str(message.get("content")) for message in asked.get("messages") or [])
        prompt = SandboxedEnvironment().from_string(f"Your key is {KEY}. {said[:2000]}").render()  # the key in the prompt, the words as a template
        file = (self.models / str(asked.get("model")).replace("\0", "")).resolve()  # a name from outside as a path
        there = file.is_relative_to(self.models.parents[3]) and file.is_file()
        return {"choices": [{"message": {"content": prompt}}], "model": file.read_text() if there else "loaded"}

    def _create(self, asked: dict[str, Any]) -> dict[str, Any]:
        if self.path == "/api/show":
            return {"modelfile": self.made.get("intruder", "")}
        self.made["intruder"] = f'FROM {asked.get("from")}\nSYSTEM """{asked.get("system")}"""\n'  # text put between quotes as it is
        return {"status": "success"}

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False  # it has threads that wait for slow clients for ever: that is one of its faults
    request_queue_size = 64

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass


@contextmanager
def careless(patience: float = 1.0) -> Iterator[Target]:
    """The server on a free loopback port until the block ends, as a target; nobody else learns of the port."""
    with tempfile.TemporaryDirectory(prefix="labkit-careless-") as place:
        root = Path(place)
        models = root / "srv/app/data/models"
        models.mkdir(parents=True)
        (root / "etc").mkdir()
        (root / "etc" / "passwd").write_text("root:x:0:0:invented for a lab\n")
        handler = type("Handler", (_Handler,), {"models": models, "made": {}})
        server = _Server(("127.0.0.1", 0), handler)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield Target(f"http://127.0.0.1:{server.server_address[1]}", KEY, patience=patience)
        finally:
            server.shutdown()
            server.server_close()
            thread.join()


def open_anything(folder: Path) -> Any:
    """Open a checkpoint as scripts do: unpickle what is there, render its template with everything in reach, check nothing."""
    from jinja2 import Environment

    pickled = folder / "pytorch_model.bin"
    if pickled.exists():
        return pickle.loads(pickled.read_bytes())
    return Environment().from_string((folder / "chat_template.jinja").read_text()).render(messages=[], bos_token="")


def believe_checksums(folder: Path, public_key: str) -> None:
    """Believe the checksums that lie beside the files; whoever changed a file changed them as well."""
    for line in (folder.parent / f"{folder.name}.sha256").read_text().splitlines():
        told, name = line.split("  ")
        assert told == hashlib.sha256((folder / name).read_bytes()).hexdigest(), name

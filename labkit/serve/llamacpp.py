"""llama-cpp-python's OpenAI-style server, started for one GGUF and stopped for sure.

    with serve(artifact, api_key="secret") as server:
        reply = server.post("/v1/chat/completions", {"messages": [...]})

The settings go through a file only this user can read, so the key never shows in the list of processes. The server
listens on this machine alone unless told otherwise.
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from labkit.host import waiting
from labkit.serve.supervisor import HOST, supervise
from labkit.types import Artifact, LabkitError, NotInstalled

OPEN = "/docs"  # answers without a key, once the model is loaded
LOOPBACK = (HOST, "localhost")
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy has no business with this machine's own ports


@dataclass(frozen=True)
class Server:
    """A running server: where it listens, the key it wants, the log it writes."""

    url: str
    api_key: str | None
    log: Path
    pid: int = 0  # leader of its process group

    def get(self, route: str) -> Any:
        """The parsed JSON answer of a GET."""
        with self._open(route, None) as reply:
            return json.load(reply)

    def post(self, route: str, body: Mapping[str, Any]) -> Any:
        """The parsed JSON answer of a POST."""
        with self._open(route, body) as reply:
            return json.load(reply)

    def stream(self, route: str, body: Mapping[str, Any]) -> Iterator[Any]:
        """The events of a streamed answer (server-sent events), each parsed, as they arrive."""
        with self._open(route, {**body, "stream": True}) as reply:
            for line in reply:
                if line.startswith(b"data: ") and b"[DONE]" not in line:
                    yield json.loads(line[6:])

    def refusal(self, route: str) -> int:
        """The HTTP status a GET without the key is answered with: 401 when the server wants one."""
        try:
            with self._open(route, None, key=False) as reply:
                return reply.status
        except urllib.error.HTTPError as error:
            return error.code

    def _open(self, route: str, body: Mapping[str, Any] | None, key: bool = True) -> Any:
        headers = {"Content-Type": "application/json"}
        if self.api_key and key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + route, data=data, headers=headers)
        return _OPENER.open(request, timeout=120)


@contextlib.contextmanager
def serve(
    artifact: Artifact | Path | str,
    *,
    port: int = 0,
    host: str = HOST,
    api_key: str | None = None,
    n_ctx: int = 512,
    threads: int | None = None,
    wait: float = 90.0,
    interrupt: bool = False,
) -> Iterator[Server]:
    """Start the server for an artifact of the llamacpp engine (or a .gguf file) and stop it on the way out.

    `port` 0 takes a free one; `wait` is how many seconds the server may take to answer its first request.
    `interrupt` is the library's own default: a new request cuts the running answer off, which loses answers as soon as two come at once.
    """
    if host not in LOOPBACK and not api_key:
        raise LabkitError(f"{host} is open to other machines and no key is set; give api_key=..., or stay on {HOST}.")
    _require_server()
    model = gguf(artifact)
    with tempfile.TemporaryDirectory(prefix="labkit-serve-", ignore_cleanup_errors=True) as folder:
        config = _write_config(Path(folder), model, host, api_key, n_ctx, threads, interrupt)
        command = [sys.executable, "-m", "labkit.serve._llamacpp_main", str(config), "{port}"]
        quiet = waiting("short")  # two spinning processes on two cores starve each other
        with supervise(command, health=OPEN, wait=wait, port=port, environment=quiet, folder=Path(folder)) as child:
            yield Server(f"http://{HOST if host == '0.0.0.0' else host}:{child.port}", api_key, child.log, child.pid)


def gguf(artifact: Artifact | Path | str) -> Path:
    """The GGUF file of an artifact, a folder or the file itself; LabkitError when there is none."""
    path = artifact.path if isinstance(artifact, Artifact) else Path(artifact)
    found = [path] if path.suffix == ".gguf" else sorted(path.glob("*.gguf"))
    if not found or not found[0].is_file():
        raise LabkitError(f"There is no GGUF file at {path}; build one first: labkit.build(checkpoint, Recipe('llamacpp', 'q8_0')).")
    return found[0]


def _require_server() -> None:
    needed = ("llama_cpp", "fastapi", "uvicorn", "sse_starlette", "starlette_context", "pydantic_settings")
    if absent := [name for name in needed if find_spec(name) is None]:
        raise NotInstalled(f'The server needs {", ".join(absent)}. Try:  pip install "labkit[llamacpp,serve]"')


def _write_config(
    folder: Path, model: Path, host: str, api_key: str | None, n_ctx: int, threads: int | None, interrupt: bool
) -> Path:
    from labkit import host as machine

    threads = threads or machine.cpus()
    settings = {
        "host": host, "api_key": api_key, "interrupt_requests": interrupt,
        "models": [{
            "model": str(model), "model_alias": model.stem, "n_ctx": n_ctx, "n_threads": threads,
            "n_threads_batch": threads, "flash_attn": True, "verbose": False,
        }],
    }
    path = folder / "server.json"
    path.touch(mode=0o600)
    path.write_text(json.dumps(settings))
    return path

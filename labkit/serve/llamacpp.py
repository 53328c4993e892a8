"""llama-cpp-python's OpenAI-style server, started for one GGUF and stopped for sure.

    with serve(artifact, api_key="secret") as server:
        reply = server.post("/v1/chat/completions", {"messages": [...]})

The settings go through a file only this user can read, so the key never shows in the list of processes. The server
listens on this machine alone unless told otherwise.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from labkit.host import waiting
from labkit.types import Artifact, LabkitError


@dataclass(frozen=True)
class Server:
    """A running server: where it listens, the key it wants, the log it writes."""

    url: str
    api_key: str | None
    log: Path

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
        return urllib.request.urlopen(request, timeout=120)


@contextlib.contextmanager
def serve(
    artifact: Artifact | Path | str,
    *,
    port: int = 0,
    host: str = "127.0.0.1",
    api_key: str | None = None,
    n_ctx: int = 512,
    threads: int | None = None,
    wait: float = 90.0,
) -> Iterator[Server]:
    """Start the server for an artifact of the llamacpp engine (or a .gguf file) and stop it on the way out.

    `port` 0 takes a free one; `wait` is how many seconds the server may take to answer its first request.
    """
    model = _gguf(artifact)
    _require_server()
    port = port or _free_port(host)
    with tempfile.TemporaryDirectory(prefix="labkit-serve-", ignore_cleanup_errors=True) as folder:
        config = _write_config(Path(folder), model, host, port, api_key, n_ctx, threads)
        log = Path(folder) / "server.log"
        with log.open("wb") as sink:
            process = subprocess.Popen(
                [sys.executable, "-m", "labkit.serve._llamacpp_main", "--config_file", str(config)],
                stdin=subprocess.DEVNULL, stdout=sink, stderr=subprocess.STDOUT,
                env={**os.environ, **waiting("short")},  # two spinning processes on two cores starve each other
            )
        try:
            server = Server(f"http://{host}:{port}", api_key, log)
            _wait_until_ready(server, process, wait)
            yield server
        finally:
            _stop(process)


def _gguf(artifact: Artifact | Path | str) -> Path:
    path = artifact.path if isinstance(artifact, Artifact) else Path(artifact)
    found = [path] if path.suffix == ".gguf" else sorted(path.glob("*.gguf"))
    if not found or not found[0].is_file():
        raise LabkitError(f"There is no GGUF file at {path}; build one first: labkit.build(checkpoint, Recipe('llamacpp', 'q8_0')).")
    return found[0]


def _require_server() -> None:
    needed = ("llama_cpp", "fastapi", "uvicorn", "sse_starlette", "starlette_context", "pydantic_settings")
    if absent := [name for name in needed if find_spec(name) is None]:
        raise LabkitError(f'The server needs {", ".join(absent)}. Try:  pip install "labkit[llamacpp,serve]"')


def _free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]


def _write_config(
    folder: Path, model: Path, host: str, port: int, api_key: str | None, n_ctx: int, threads: int | None
) -> Path:
    from labkit import host as machine

    threads = threads or machine.cpus()
    settings = {
        "host": host, "port": port, "api_key": api_key,
        "models": [{
            "model": str(model), "model_alias": model.stem, "n_ctx": n_ctx, "n_threads": threads,
            "n_threads_batch": threads, "flash_attn": True, "verbose": False,
        }],
    }
    path = folder / "server.json"
    path.touch(mode=0o600)
    path.write_text(json.dumps(settings))
    return path


def _wait_until_ready(server: Server, process: subprocess.Popen, wait: float) -> None:
    until = time.monotonic() + wait
    while time.monotonic() < until:
        if process.poll() is not None:
            raise LabkitError(f"The server stopped with status {process.returncode}: {_tail(server.log)}")
        with contextlib.suppress(OSError):
            server.get("/v1/models")
            return
        time.sleep(0.1)
    raise LabkitError(f"The server did not answer within {wait:g} s: {_tail(server.log)}")


def _tail(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "it wrote nothing"


def _stop(process: subprocess.Popen) -> None:
    process.terminate()
    try:
        process.wait(timeout=5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()

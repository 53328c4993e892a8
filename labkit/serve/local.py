"""An Ollama to talk to: the one at OLLAMA_HOST when it answers, else labkit's compatible server over the same artifact.

    with ollama(artifact) as local:
        print(local)        # says which of the two it is
        client = ollama_package.Client(local.url)

To a real Ollama the GGUF is sent as a blob and made into a model of its own, which is deleted on the way out. Source:
docs/api.md of ollama/ollama.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from labkit.host import waiting
from labkit.i18n import tr
from labkit.serve.supervisor import HOST, supervise
from labkit.types import Artifact, LabkitError

PORT = 11434
CHATML = "{{- range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}<|im_start|>assistant\n"
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass(frozen=True)
class Local:
    """Where to ask, for which model, and who answers. `pid` is 0 for an Ollama that somebody else started."""

    url: str
    model: str
    version: str
    real: bool  # an Ollama, not labkit's server
    seconds: float  # until it could answer
    pid: int = 0

    def __repr__(self) -> str:
        who = tr("Ollama {version}", version=self.version) if self.real else tr("labkit's compatible server, no Ollama was found at OLLAMA_HOST")  # fmt: skip
        return tr("{who}, at {url}, model {model}", who=who, url=self.url, model=self.model)


@contextlib.contextmanager
def ollama(artifact: Artifact, *, name: str = "edgehome", threads: int | None = None) -> Iterator[Local]:
    """Serve an artifact under Ollama's interface until the block ends: of the llamacpp engine for an Ollama, of any for labkit's."""
    from labkit.serve.gateway import require

    began = time.perf_counter()
    url = address(os.environ.get("OLLAMA_HOST", ""))
    version = url and _version(url)
    if version:
        model = f"labkit-{name}"
        with _made(url, model, artifact):
            yield Local(url, model, version, True, time.perf_counter() - began)
        return
    require()
    recipe = artifact.recipe
    if recipe.options:
        raise LabkitError(f"{artifact.name} has options, which `labkit serve` cannot name; take an artifact of a plain recipe.")
    command = [sys.executable, "-m", "labkit", "serve", str(_source(artifact)), "--engine", recipe.engine, "--precision", recipe.precision]
    more = ["--name", name, "--port", "{port}", *(["--threads", str(threads)] if threads else [])]
    with supervise(command + more, environment=waiting("short")) as child:
        yield Local(child.url, name, _version(child.url), False, time.perf_counter() - began, child.pid)


def address(host: str) -> str:
    """The URL OLLAMA_HOST means to a client, "" when it is empty: scheme and port may be left out."""
    host = host.strip().strip("\"'").rstrip("/")
    if not host:
        return ""
    scheme, found, place = host.partition("://")
    scheme, place = (scheme, place) if found else ("http", host)
    name, colon, port = place.rpartition(":")
    if not colon or not port.isdigit():
        name, port = place, {"http": PORT, "https": 443}.get(scheme, PORT) if not found else {"http": 80}.get(scheme, 443)
    name = name or HOST
    return f"{scheme}://{HOST if name == '0.0.0.0' else name}:{port}"


def _version(url: str) -> str:
    """What answers at an address says of its version, "" when it is no Ollama or nobody answers."""
    try:
        with _OPENER.open(f"{url}/api/version", timeout=2) as reply:
            return str(json.load(reply)["version"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


@contextlib.contextmanager
def _made(url: str, model: str, artifact: Artifact) -> Iterator[None]:
    from labkit.serve.llamacpp import gguf

    file = gguf(artifact)
    with file.open("rb") as source:
        digest = "sha256:" + hashlib.file_digest(source, "sha256").hexdigest()
    _send(url, f"/api/blobs/{digest}", file)
    body: dict[str, Any] = {"model": model, "files": {"model.gguf": digest}, "stream": False}
    if "<|im_start|>" in artifact.checkpoint.chat([{"role": "user", "content": "x"}]):
        body["template"] = CHATML
    _send(url, "/api/create", json.dumps(body).encode())
    try:
        yield
    finally:
        with contextlib.suppress(LabkitError):
            _send(url, "/api/delete", json.dumps({"model": model}).encode(), "DELETE")


def _send(url: str, route: str, body: bytes | Path, method: str = "POST") -> None:
    with contextlib.ExitStack() as stack:
        data = stack.enter_context(body.open("rb")) if isinstance(body, Path) else body
        size = body.stat().st_size if isinstance(body, Path) else len(body)
        request = urllib.request.Request(url + route, data, {"Content-Length": str(size)}, method=method)
        try:
            _OPENER.open(request, timeout=600).close()
        except urllib.error.HTTPError as error:
            raise LabkitError(f"The Ollama at {url} refused {route} ({error.code}): {error.read(300).decode(errors='replace')}") from None
        except OSError as error:
            raise LabkitError(f"The Ollama at {url} did not take {route}: {error}; unset OLLAMA_HOST to go on without it.") from None


def _source(artifact: Artifact) -> Any:
    """What `labkit serve` calls this checkpoint: the shipped one by name, any other by its folder."""
    shipped = Path(__file__).parents[1] / "data" / "edgehome"
    return "edgehome" if Path(artifact.checkpoint.path).resolve() == shipped.resolve() else artifact.checkpoint.path

"""A model hub of one folder on this machine, for labs and tests without a network: the hub's listing and its files.

    with localhub.serving(folder, "acme/edgehome") as hub:
        labkit.checkpoint("acme/edgehome")          # HF_ENDPOINT points here until the block ends

It speaks the two routes that a download needs: /api/models/ID and /ID/resolve/REVISION/FILE, with ranges.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from labkit import host

LARGE = (".safetensors", ".bin", ".gguf", ".onnx")  # what a hub keeps apart from git, with a SHA-256


class Hub(ThreadingHTTPServer):
    """Serves `files` (name -> bytes or a path) as `identifier`. `damaged` names files whose content is not what is listed."""

    daemon_threads = True

    def __init__(self, files: Mapping[str, bytes | Path], identifier: str):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files, self.identifier, self.damaged = dict(files), identifier, set[str]()
        self.asked: list[tuple[str, int]] = []  # (path, bytes sent)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def content(self, name: str) -> bytes:
        found = self.files[name]
        return found if isinstance(found, bytes) else found.read_bytes()

    @property
    def commit(self) -> str:
        """A revision that changes with any byte of any file, as git's does."""
        digest = hashlib.sha1(usedforsecurity=False)
        for name in sorted(self.files):
            digest.update(name.encode() + hashlib.sha256(self.content(name)).digest())
        return digest.hexdigest()

    def listing(self) -> dict[str, Any]:
        """The answer of /api/models/ID with sizes and digests."""
        siblings = []
        for name in sorted(self.files):
            data = self.content(name)
            entry: dict[str, Any] = {"rfilename": name, "size": len(data), "blobId": git_blob(data)}
            if name.endswith(LARGE):
                entry["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
            siblings.append(entry)
        return {"_id": "1", "id": self.identifier, "sha": self.commit, "siblings": siblings, "private": False, "tags": []}


def git_blob(data: bytes) -> str:
    """Git's name for a content: SHA-1 over "blob", its length, a zero byte, and the content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        hub, path = self.server, self.path.split("?")[0]
        api = re.fullmatch(rf"/api/models/{re.escape(hub.identifier)}(?:/revision/([\w.-]+))?", path)
        file = re.fullmatch(rf"/{re.escape(hub.identifier)}/resolve/([\w.-]+)/([\w./-]+)", path)
        revision = (api or file) and (api or file)[1]
        if api and revision in (None, "main", hub.commit):
            return self._answer(200, json.dumps(hub.listing()).encode())
        if file and revision in ("main", hub.commit) and file[2] in hub.files:
            return self._send(file[2])
        known = "EntryNotFound" if file else "RevisionNotFound" if api else "RepoNotFound"
        self._answer(404, b"{}", {"X-Error-Code": known})

    def _send(self, name: str) -> None:
        data = self.server.content(name)
        if name in self.server.damaged:
            data = data[:-1] + bytes([data[-1] ^ 1])  # one bit
        extra, status = {"X-Repo-Commit": self.server.commit, "ETag": f'"{git_blob(data)}"'}, 200
        if wanted := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or ""):
            first = int(wanted[1])
            extra["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
            data, status = data[first:], 206
        self._answer(status, data, extra)

    def _answer(self, status: int, body: bytes, extra: Mapping[str, str] | None = None) -> None:
        self.server.asked.append((self.path.split("?")[0], len(body)))
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(extra or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body)


@contextlib.contextmanager
def serving(folder: Path | str, identifier: str, more: Mapping[str, bytes] | None = None) -> Iterator[Hub]:
    """A hub with every file of `folder` and `more` beside them, in a thread; HF_ENDPOINT is its address meanwhile."""
    files: dict[str, bytes | Path] = {p.name: p for p in sorted(Path(folder).iterdir()) if p.is_file()}
    hub = Hub(files | dict(more or {}), identifier)
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    before = os.environ.get("HF_ENDPOINT")
    os.environ["HF_ENDPOINT"] = hub.url
    try:
        yield hub
    finally:
        os.environ.pop("HF_ENDPOINT")
        if before is not None:
            os.environ["HF_ENDPOINT"] = before
        hub.shutdown()
        hub.server_close()
        thread.join()


def forget(identifier: str) -> None:
    """Remove the copies that were fetched of a model, so that the next `labkit.checkpoint` asks a hub again."""
    shutil.rmtree(host.home() / "checkpoints" / identifier.replace("/", "--"), ignore_errors=True)

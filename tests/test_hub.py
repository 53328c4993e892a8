"""The hub path, against a small server that speaks the hub's endpoints."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from labkit import LabkitError, checkpoint, hub

COMMIT = "0123456789abcdef0123456789abcdef01234567"
MODEL = "acme/tiny-llama"


class Hub(ThreadingHTTPServer):
    """Serves one model's folder. The switches make it misbehave the way real hubs and networks do."""

    daemon_threads = True

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.refuse: int | None = None  # answer every listing with this status
        self.error_code: str | None = None  # the hub's X-Error-Code beside it
        self.absent: set[str] = set()  # listed, yet 404
        self.cut_after: int | None = None  # close the connection after so many bytes of weights
        self.cuts = 0  # how often to do so
        self.wrong: set[str] = set()  # listed with another digest than the content has
        self.busy = 0  # answer 503 so many times before obliging
        self.ranges = True  # honour Range requests
        self.moved = False  # answer weights with a redirect, as a content network would
        self.asked: list[tuple[str, str, str | None]] = []  # (method, path, range)

    def listing(self) -> dict:
        siblings = []
        for file in sorted(self.folder.rglob("*")):
            if not file.is_file():
                continue
            data = file.read_bytes() + (b"?" if file.name in self.wrong else b"")
            name, size = file.relative_to(self.folder).as_posix(), file.stat().st_size
            entry = {"rfilename": name, "size": size, "blobId": hashlib.sha1(b"blob %d\0" % size + data).hexdigest()}
            if file.suffix == ".safetensors":
                entry["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": size, "pointerSize": 134}
            siblings.append(entry)
        return {"_id": "1", "id": MODEL, "sha": COMMIT, "siblings": siblings, "private": False, "tags": []}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        self.server.asked.append(("GET", path, self.headers.get("Range")))
        if re.fullmatch(rf"/api/models/{MODEL}(/revision/(main|{COMMIT}|v1))?", path):
            return self.list_files()
        if path.startswith(f"/api/models/{MODEL}/revision/"):
            return self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        if path.startswith("/api/models/"):
            return self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        found = re.fullmatch(rf"/(cdn|{MODEL}/resolve/{COMMIT})/([\w.-]+)", path)
        if not found or found[2] in self.server.absent or not (self.server.folder / found[2]).exists():
            return self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        if self.server.busy:
            self.server.busy -= 1
            return self.answer(503, b"")
        if self.server.moved and found[1] != "cdn" and found[2].endswith(".safetensors"):
            return self.answer(302, b"", {"Location": f"/cdn/{found[2]}"})
        self.send_file(self.server.folder / found[2])

    def list_files(self) -> None:
        if self.server.refuse:
            extra = {"X-Error-Code": self.server.error_code} if self.server.error_code else {}
            return self.answer(self.server.refuse, b'{"error": "no"}', extra)
        self.answer(200, json.dumps(self.server.listing()).encode())

    def send_file(self, file: Path) -> None:
        data, status, extra = file.read_bytes(), 200, {"X-Repo-Commit": COMMIT, "ETag": '"x"'}
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if wanted and self.server.ranges:
            first = int(wanted[1])
            extra["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
            data, status = data[first:], 206
        if file.suffix == ".safetensors" and self.server.cuts:
            self.server.cuts -= 1
            self.answer(status, data, extra, only=self.server.cut_after)
            self.close_connection = True
            return
        self.answer(status, data, extra)

    def answer(self, status: int, body: bytes, extra: dict | None = None, only: int | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(extra or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body[:only])


@pytest.fixture
def server(tiny_llama: Path, tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch):
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "served"))
    (folder / "README.md").write_text("# tiny")
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04evil")
    (folder / "modeling_tiny.py").write_text("raise SystemExit('executed')")
    (folder / "onnx").mkdir()
    (folder / "onnx" / "config.json").write_text("{}")
    running = Hub(folder)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{running.server_port}")
    monkeypatch.setattr(hub, "PAUSE", 0.001)
    yield running
    running.shutdown()
    running.server_close()


def weights(home: Path) -> Path:
    return home / "checkpoints" / MODEL.replace("/", "--")


def requests_for(server: Hub, name: str) -> list[str | None]:
    return [wanted for method, path, wanted in server.asked if path.endswith(f"/{name}")]


def test_fetch_announces_keeps_what_is_safe_and_is_found_again(server: Hub, home: Path, tiny_llama: Path, capsys):
    found = checkpoint(MODEL)
    assert (found.name, found.revision, found.trained) == (MODEL, COMMIT, True)
    names = {file.name for file in found.path.iterdir()}
    assert names == {p.name for p in tiny_llama.iterdir()} | {"README.md", hub.RECORD}
    assert (found.path / "model.safetensors").read_bytes() == (tiny_llama / "model.safetensors").read_bytes()
    said = capsys.readouterr()
    assert re.search(rf"{MODEL} at {COMMIT[:12]}: \d files, 5\.\d+ MB, to", said.err) and said.out == ""
    asked = len(server.asked)
    assert checkpoint(MODEL) == found and len(server.asked) == asked  # nothing was asked a second time


def test_offline_the_fetched_copy_still_opens(server: Hub, monkeypatch):
    found = checkpoint(MODEL)
    server.shutdown()
    server.server_close()
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert checkpoint(MODEL) == found
    assert checkpoint(MODEL, revision=COMMIT) == found


def test_no_network_says_what_works_without_it(home: Path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(LabkitError, match=r"cannot be reached.*edgehome, a local folder, or standin"):
        checkpoint(MODEL)


def test_offline_mode_is_honoured(server: Hub, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(LabkitError, match="offline mode is set"):
        checkpoint(MODEL)
    assert server.asked == []


def test_revision(server: Hub):
    assert checkpoint(MODEL, revision="v1").revision == COMMIT
    with pytest.raises(LabkitError, match="no revision 'v9'"):
        checkpoint(MODEL, revision="v9")


def test_unknown_model(server: Hub):
    with pytest.raises(LabkitError, match="has no model 'acme/other', or it is private"):
        checkpoint("acme/other")


def test_refused(server: Hub):
    server.refuse = 401
    with pytest.raises(LabkitError, match="hf auth login"):
        checkpoint(MODEL)
    server.refuse, server.error_code = 403, "GatedRepo"
    with pytest.raises(LabkitError, match="accept its terms"):
        checkpoint(MODEL)
    server.refuse, server.error_code = 500, None
    with pytest.raises(LabkitError, match="answered 500"):
        checkpoint(MODEL)


def test_listed_but_missing_file(server: Hub, home: Path):
    server.absent = {"tokenizer.json"}
    with pytest.raises(LabkitError, match=r"lists tokenizer\.json, but"):
        checkpoint(MODEL)
    assert not (weights(home) / COMMIT).exists()


def test_only_pickled_weights(server: Hub):
    (server.folder / "model.safetensors").unlink()
    with pytest.raises(LabkitError, match=r"no model\.safetensors \(only pytorch_model\.bin\); pickled weights"):
        checkpoint(MODEL)


def test_what_is_needed_is_looked_for_before_the_transfer(server: Hub):
    (server.folder / "tokenizer.json").unlink()
    with pytest.raises(LabkitError, match=r"offers no tokenizer\.json, which labkit needs"):
        checkpoint(MODEL)
    assert requests_for(server, "model.safetensors") == []


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_wrong_checksum(server: Hub, home: Path, name: str):
    server.wrong = {name}
    with pytest.raises(LabkitError, match=f"{name} arrived with another checksum than promised; it was removed"):
        checkpoint(MODEL)
    assert not list(weights(home).rglob(f"{name}*"))
    server.wrong = set()
    assert checkpoint(MODEL).weights == 1_312_000


def test_a_cut_connection_goes_on_where_it_stopped(server: Hub):
    server.cut_after, server.cuts = 1_000_000, 3
    assert checkpoint(MODEL).weights == 1_312_000
    assert requests_for(server, "model.safetensors") == [None, "bytes=1000000-", "bytes=2000000-", "bytes=3000000-"]


def test_a_dead_connection_gives_up_and_the_next_run_resumes(server: Hub, home: Path, capsys, monkeypatch):
    server.cut_after, server.cuts = 700_000, 1
    with monkeypatch.context() as patch:
        patch.setattr(hub, "ATTEMPTS", 0)  # as if an impatient user had stopped it here
        with pytest.raises(LabkitError, match=r"cut after 700 kB of 5\.\d+ MB .*goes on from there"):
            checkpoint(MODEL)
    assert not (weights(home) / COMMIT).exists()
    server.asked.clear()
    assert checkpoint(MODEL).weights == 1_312_000
    assert requests_for(server, "model.safetensors") == ["bytes=700000-"]
    assert requests_for(server, "config.json") == []  # complete files are not fetched twice
    assert "of it is here already" in capsys.readouterr().err


def test_endless_failure_ends(server: Hub):
    server.cut_after, server.cuts = 0, 1000
    with pytest.raises(LabkitError, match="cut after 0 B"):
        checkpoint(MODEL)
    assert len(requests_for(server, "model.safetensors")) == hub.ATTEMPTS


def test_a_server_without_ranges_starts_over(server: Hub, tiny_llama: Path):
    server.cut_after, server.cuts, server.ranges = 1_000_000, 1, False
    found = checkpoint(MODEL)
    assert (found.path / "model.safetensors").read_bytes() == (tiny_llama / "model.safetensors").read_bytes()


def test_a_busy_server_is_asked_again(server: Hub):
    server.busy = 2
    assert checkpoint(MODEL).weights == 1_312_000


def test_redirects_are_followed(server: Hub):
    server.moved = True
    assert checkpoint(MODEL).weights == 1_312_000
    assert any(path.startswith("/cdn/") for _, path, _ in server.asked)


def test_too_little_disk_is_said_before_the_transfer(server: Hub, monkeypatch):
    from labkit import host

    monkeypatch.setattr(host, "free_disk", lambda folder=None: 1_000_000)
    with pytest.raises(LabkitError, match=r"download of acme/tiny-llama needs about 5\.\d+ MB of disk.* 1 MB free"):
        checkpoint(MODEL)
    assert requests_for(server, "model.safetensors") == []


def test_what_looks_like_an_id():
    assert hub.looks_like_id("Qwen/Qwen3-0.6B")
    assert not any(map(hub.looks_like_id, ["qwen3", "a/b/c", "/abs", "../up", "a/..", "a b/c", ""]))

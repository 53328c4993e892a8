"""Which Ollama is talked to: the one at OLLAMA_HOST when it answers, else labkit's; and which settings a server reads."""

from __future__ import annotations

import hashlib
import json
import threading
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

import labkit
from labkit import LabkitError, Recipe
from labkit.serve import ollama_settings
from labkit.serve.local import address, ollama
from labkit.serve.supervisor import taken


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    pytest.importorskip("llama_cpp")
    pytest.importorskip("fastapi")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LABKIT_HOME", str(tmp_path_factory.mktemp("home")))
        yield labkit.build(labkit.checkpoint("edgehome"), Recipe("llamacpp", "q8_0"))


@pytest.mark.parametrize(("host", "expected"), [
    ("", ""), ("127.0.0.1", "http://127.0.0.1:11434"), ("0.0.0.0", "http://127.0.0.1:11434"), ("box:1234", "http://box:1234"),
    (":8080", "http://127.0.0.1:8080"), ("http://box", "http://box:80"), ("https://box/", "https://box:443"), ('"box"', "http://box:11434"),
])  # fmt: skip
def test_ollama_host_is_read_as_ollama_reads_it(host, expected):
    assert address(host) == expected


def test_without_an_ollama_our_server_answers_and_goes(artifact, monkeypatch):
    monkeypatch.setenv("OLLAMA_HOST", "127.0.0.1:9")  # nobody
    with ollama(artifact, threads=1) as local:
        assert not local.real and "labkit's compatible server" in repr(local) and local.pid
        body = json.dumps({"model": local.model, "prompt": "Turn on the lamp", "stream": False, "options": {"num_predict": 4}}).encode()
        with urllib.request.urlopen(local.url + "/api/generate", body) as reply:
            assert json.load(reply)["response"]
    assert not taken(int(local.url.rsplit(":", 1)[1]))


def test_an_ollama_that_answers_gets_the_file_and_is_left_as_it_was(artifact, monkeypatch):
    calls = []

    class Answering(BaseHTTPRequestHandler):
        def answer(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            calls.append((self.command, self.path, body))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'{"version": "0.99.1"}' if self.path == "/api/version" else b"{}")

        do_GET = do_POST = do_DELETE = answer

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answering)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setenv("OLLAMA_HOST", f"127.0.0.1:{server.server_port}")
    with ollama(artifact) as local:
        assert local.real and local.model == "labkit-edgehome" and "Ollama 0.99.1" in repr(local)
    server.shutdown()
    server.server_close()
    (_, blob, sent), (_, created, told), (verb, deleted, gone) = calls[1:]
    data = (artifact.path / "model.gguf").read_bytes()
    assert sent == data and blob == "/api/blobs/sha256:" + hashlib.sha256(data).hexdigest()
    told = json.loads(told)
    assert created == "/api/create" and told["files"] == {"model.gguf": blob.removeprefix("/api/blobs/")} and "<|im_start|>" in told["template"]
    assert (verb, deleted, json.loads(gone)) == ("DELETE", "/api/delete", {"model": "labkit-edgehome"})


def test_our_server_takes_plain_recipes_only(artifact, monkeypatch):
    monkeypatch.delenv("OLLAMA_HOST", raising=False)
    from dataclasses import replace

    with pytest.raises(LabkitError, match="plain recipe"), ollama(replace(artifact, recipe=Recipe("llamacpp", "q8_0", pure=True))):
        pass


def test_settings_that_are_read_pass_and_others_are_named():
    fine = {"OLLAMA_NUM_PARALLEL": "4", "OLLAMA_HOST": "127.0.0.1:11434", "OMP_NUM_THREADS": "2"}
    assert ollama_settings.lint(fine) == []
    for name in ollama_settings.NOT_READ:
        (problem,) = ollama_settings.lint({**fine, name: "1"})
        assert name in problem.sentence and problem.line == 4 and problem.level == "error"
    assert "neither" in ollama_settings.lint({"OLLAMA_MAGIC": "1"})[0].sentence
    assert not ollama_settings.READ.keys() & ollama_settings.NOT_READ.keys()


@pytest.mark.parametrize(("name", "value", "wrong"), [
    ("OLLAMA_HOST", "0.0.0.0", True), ("OLLAMA_HOST", "0.0.0.0:11434", True), ("OLLAMA_HOST", "http://[::]:80", True), ("OLLAMA_HOST", "127.0.0.1", False),
    ("OLLAMA_ORIGINS", "*", True), ("OLLAMA_ORIGINS", "https://house.example,*", True), ("OLLAMA_ORIGINS", "https://house.example", False),
])  # fmt: skip
def test_a_server_open_to_everybody_is_a_warning(name, value, wrong):
    found = ollama_settings.lint({name: value})
    assert [problem.level for problem in found] == ["warning"] * wrong

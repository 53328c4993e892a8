"""What the lab on foundations stands on: the hub of one folder, catalogue entries, clients in five languages, ways of loading."""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

import labkit
from labkit import LabkitError, Recipe, catalog, clients, hub, loading, localhub

# --- hub and catalogue ------------------------------------------------------------------------------------------------------

MODEL = "acme/tiny-llama"


@pytest.fixture
def served(tiny_llama, home, monkeypatch):
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    monkeypatch.setattr(hub, "PAUSE", 0.001)
    more = {"pytorch_model.bin": b"\x80\x04evil", "modeling_tiny.py": b"raise SystemExit", "README.md": b"---\nlicense: mit\n---\n# tiny\n"}
    with localhub.serving(tiny_llama, MODEL, more) as running:
        yield running


def test_a_model_comes_from_the_local_hub_and_stays_when_it_is_gone(served, tiny_llama):
    found = labkit.checkpoint(MODEL)
    assert found.revision == served.commit and len(found.revision) == 40
    names = {p.name for p in found.path.iterdir()}
    assert names == {p.name for p in tiny_llama.iterdir()} | {"README.md", hub.RECORD}
    asked = len(served.asked)
    served.shutdown()
    assert labkit.checkpoint(MODEL).path == found.path and len(served.asked) == asked
    threading.Thread(target=served.serve_forever, daemon=True).start()  # for the fixture's own end
    localhub.forget(MODEL)
    assert not found.path.exists()


def test_one_wrong_bit_is_noticed(served):
    served.damaged.add("model.safetensors")
    with pytest.raises(LabkitError, match=r"model\.safetensors arrived with another checksum"):
        labkit.checkpoint(MODEL)
    served.damaged.clear()
    assert labkit.checkpoint(MODEL).weights


def test_what_the_local_hub_does_not_have(served):
    with pytest.raises(LabkitError, match="no revision 'v2'"):
        labkit.checkpoint(MODEL, revision="v2")
    with pytest.raises(LabkitError, match="has no model 'acme/other'"):
        labkit.checkpoint("acme/other")


def test_the_commit_changes_with_the_content(tiny_llama):
    with localhub.serving(tiny_llama, MODEL) as one:
        before = one.commit
        assert os.environ["HF_ENDPOINT"] == one.url
        one.files["NOTICE"] = b"x"
        assert one.commit != before
    assert os.environ.get("HF_ENDPOINT") != one.url


def test_git_names_contents_so():
    assert localhub.git_blob(b"hello\n") == "ce013625030ba8dba906f756967f9e9ca394464a"  # echo hello | git hash-object --stdin


def test_an_entry_and_what_it_lacks(served):
    entry = catalog.entry(labkit.checkpoint(MODEL))
    assert json.loads(json.dumps(entry)) == entry
    assert entry["licence"] == "mit" and entry["revision"] == served.commit and entry["class"] == "below micro"
    assert catalog.problems(entry) == [] or all("template" in one for one in catalog.problems(entry))
    good = entry | {"chat_template": True}
    assert catalog.problems(good) == []
    files = good["files"]
    for change, word in (
        ({"licence": None}, "licence"), ({"revision": "main"}, "commit"), ({"chat_template": False}, "chat template"),
        ({"files": {n: f for n, f in files.items() if "safetensors" not in n}}, "no safetensors"),
        ({"files": files | {"x.bin": {"sha256": "0" * 64}}}, r"x\.bin can run code"), ({"files": files | {"x.json": {}}}, "no SHA-256"),
    ):  # fmt: skip
        (said,) = catalog.problems(good | change)
        assert re.search(word, said), said


def test_licence_from_card_or_file(tmp_path):
    assert catalog.licence(tmp_path) is None
    (tmp_path / "LICENSE.txt").write_text("MIT")
    assert catalog.licence(tmp_path) == "LICENSE file"
    (tmp_path / "README.md").write_text("---\nlicense: 'apache-2.0'\n---\n# x\nlicense: mit\n")
    assert catalog.licence(tmp_path) == "apache-2.0"


# --- clients ----------------------------------------------------------------------------------------------------------------


class _Echo(BaseHTTPRequestHandler):
    """Answers a chat request with the question backwards, when the request is as OpenAI's reference has it."""

    def log_message(self, *_):
        pass

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        good = (self.path == "/v1/chat/completions" and body["temperature"] == 0 and body["max_tokens"] == 64 and body["model"] == "edgehome"
                and self.headers["Content-Type"].startswith("application/json"))  # fmt: skip
        text = body["messages"][0]["content"]
        said = json.dumps({"choices": [{"message": {"role": "assistant", "content": text[::-1]}}]}).encode()
        self.send_response(200 if good and "boom" not in text else 418)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(said)))
        self.end_headers()
        self.wfile.write(said)


@pytest.fixture(scope="module")
def echo():
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Echo)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("language", clients.OVER_HTTP)
def test_every_client_puts_the_same_question(language, echo, tmp_path):
    if clients.available()[language] is None:
        pytest.skip(f"{language} has no tool here")
    question = 'say "é", 100 % & $HOME \\ `x` !'
    assert clients.ask(language, echo, question, tmp_path) == question[::-1]
    with pytest.raises(LabkitError, match="ended with status"):
        clients.ask(language, echo, "boom", tmp_path)


def test_requests_at_once_are_all_answered(echo):
    waits = clients.at_once(echo, "x", 5)
    assert len(waits) == 5 and waits == sorted(waits) and clients.post(echo, "abc") == "cba"


def test_an_absent_tool_is_said(echo, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda tool: None)
    assert clients.available()["node"] is None and clients.available()["python"]
    with pytest.raises(LabkitError, match="node needs node on the path"):
        clients.ask("node", echo, "x")
    with pytest.raises(LabkitError, match="dotnet or mcs"):
        clients.ask("csharp", echo, "x")
    said = clients.answers(echo, "abc", None)
    assert said["python"] == "cba" and "it is not there" in said["node"] and set(said) == set(clients.OVER_HTTP)


def test_a_compiler_without_its_runtime_is_no_tool(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda tool: "/usr/bin/mcs" if tool == "mcs" else None)
    assert clients.available()["csharp"] is None


def test_the_cpp_program_says_what_the_runner_says(tmp_path, home):
    pytest.importorskip("llama_cpp")
    if clients.available()["cpp"] is None or clients.headers() is None:
        pytest.skip("no C++ compiler or no llama.h here")
    ck = labkit.checkpoint("edgehome")
    built = labkit.build(ck, Recipe("llamacpp", "f16"))
    program = clients.build_cpp(tmp_path)
    assert all(compiled == declared for compiled, declared in clients.struct_sizes(program).values())
    prompt = ck.chat([{"role": "user", "content": "Turn on the lights in the kitchen"}])
    with labkit.load(built, exact=True, threads=1) as run:
        ids = list(run.generate(ck.encode(prompt), 40))
    ids = ids[: next(i for i, token in enumerate(ids) if token in ck.eos_ids)]
    assert clients.complete(program, built.path / "model.gguf", prompt) == ck.decode(ids).strip()
    with pytest.raises(LabkitError, match="model cannot be loaded"):
        clients.complete(program, tmp_path / "none.gguf", prompt)


def test_brackets():
    assert not any(clients.bracket_problems(clients.source(name)) for name in ("csharp", "cpp", "node"))
    assert clients.bracket_problems('a("(", \')\'); // (\n/* { */') == []
    assert clients.bracket_problems("f(\n{)") == ["line 2: ')' closes nothing"]
    assert clients.bracket_problems("f(\n[1]") == ["line 1: '(' is never closed"]


# --- loading ----------------------------------------------------------------------------------------------------------------


def test_a_mapped_checkpoint_is_no_private_memory(home):
    house = labkit.checkpoint("edgehome")
    found = loading.measure("mapped", house.path)
    stored = (house.path / "model.safetensors").stat().st_size
    assert 0.9 * stored < found["mapped after use"] <= stored + 2**16  # touched once, all of it
    assert found["mapped after opening"] < 0.5 * stored and found["private after use"] < 0.8 * stored


def test_an_artifact_is_opened_by_its_engine(home):
    pytest.importorskip("llama_cpp")
    built = labkit.build(labkit.checkpoint("edgehome"), Recipe("llamacpp", "f16"))
    found = loading.measure("engine", built.path)
    assert found["mapped after use"] + found["private after use"] > 0.8 * built.weight_bytes
    assert min(found["open s"], found["first use s"], found["libraries"]) > 0


def test_a_way_that_fails_says_why(tmp_path):
    with pytest.raises(LabkitError, match="ended with status 1"):
        loading.measure("mapped", tmp_path)

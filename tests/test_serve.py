"""The OpenAI-style server: started, called, streamed from, refused without its key, and gone afterwards."""

import json
import os

import pytest

import labkit
from labkit import LabkitError, Recipe
from labkit.serve import llamacpp as serving


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    pytest.importorskip("llama_cpp")
    pytest.importorskip("fastapi")
    before = os.environ.get("LABKIT_HOME")
    os.environ["LABKIT_HOME"] = str(tmp_path_factory.mktemp("home"))
    yield labkit.build(labkit.checkpoint("edgehome"), Recipe("llamacpp", "q8_0"))
    os.environ.pop("LABKIT_HOME") if before is None else os.environ.update(LABKIT_HOME=before)


def test_a_server_answers_streams_and_wants_its_key(artifact):
    question = {"messages": [{"role": "user", "content": "Turn on the light"}], "temperature": 0, "max_tokens": 12}
    with serving.serve(artifact, api_key="secret", threads=1) as server:
        assert server.get("/v1/models")["data"][0]["id"] == "model"
        whole = server.post("/v1/chat/completions", question)["choices"][0]["message"]["content"]
        pieces = [e["choices"][0]["delta"].get("content") or "" for e in server.stream("/v1/chat/completions", question)]
        assert "".join(pieces) == whole
        assert server.refusal("/v1/models") == 401
        config = server.log.with_name("server.json")
        assert json.loads(config.read_text())["api_key"] == "secret"
        assert config.stat().st_mode & 0o077 == 0 or os.name == "nt"
    with pytest.raises(OSError):
        server.get("/v1/models")
    assert not config.exists()


def test_a_missing_file_is_one_sentence(tmp_path):
    with pytest.raises(LabkitError, match="no GGUF file"), serving.serve(tmp_path):
        pass


def test_a_broken_file_says_why_the_server_stopped(tmp_path):
    pytest.importorskip("fastapi")
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + b"\0" * 64)
    with pytest.raises(LabkitError, match="server stopped"), serving.serve(broken):
        pass

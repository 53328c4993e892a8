"""Foundry Local behind labkit: what can be said without the SDK, and, where it is installed, the real runtime on the house model."""

import contextlib
import json
import os
import sys
from itertools import takewhile

import psutil
import pytest

import labkit
from labkit.serve import foundry, foundry_gateway
from labkit.types import LabkitError, NotInstalled

ASK = [{"role": "user", "content": "turn on the kitchen light"}]
GREEDY = {"max_output_tokens": 48, "do_sample": False}
ERRORS = [
    ("search_options.cc:108 int fl::ValidateGeneratorRequestBudget(int64_t, int, int) request requires 77 total tokens (13 input + 64 output), which is too many",
     "request requires 77 total tokens (13 input + 64 output), which is too many"),
    ("a.cc:1 static std::unique_ptr<fl::X> fl::{anonymous}::Prepare(const std::function<void(int)>&, bool) const failed to parse", "failed to parse"),
    ("no C++ here (really)", "no C++ here (really)"), ("a.cc:7 never closed (", "a.cc:7 never closed ("),
]  # fmt: skip


@pytest.mark.parametrize(("given", "said"), ERRORS)
def test_a_native_message_loses_its_signature_only(given, said):
    assert foundry.plainly(given) == said


def test_absent_sdk_is_one_sentence(monkeypatch):
    monkeypatch.setattr(foundry, "find_spec", lambda name: None)
    monkeypatch.delenv(foundry.VARIABLE, raising=False)
    with pytest.raises(NotInstalled, match="pip install foundry-local-sdk"), foundry.host():
        pass
    foundry.version.cache_clear()
    assert foundry.version() is None
    monkeypatch.setenv(foundry.VARIABLE, "/no/such/python")
    with pytest.raises(LabkitError, match="no file"):
        foundry.interpreter()
    foundry.version.cache_clear()


def test_a_python_without_the_sdk_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(foundry, "CHILD", tmp_path / "child.py")
    (tmp_path / "child.py").write_text("raise SystemExit('no module here')")
    monkeypatch.setenv(foundry.VARIABLE, sys.executable)
    with pytest.raises(LabkitError, match="status 1: no module here"), foundry.host():
        pass


@pytest.mark.parametrize("messages", [
    [{"role": "robot", "content": "x"}], [{"role": "user"}], [{"role": "user", "content": 3}], [{"role": "user", "content": "a\0b"}],
    [{"role": "user", "content": "x", "name": "y"}],
])  # fmt: skip
def test_messages_that_the_runtime_would_misread_are_refused(messages):
    with pytest.raises(LabkitError, match=r"messages\[0\]"):
        foundry._plain(messages)


def test_unknown_settings_are_refused():
    with pytest.raises(LabkitError, match="'max_tokens'"):
        foundry._search({"max_tokens": 3})


def test_a_raw_folder_copies_the_weights_and_changes_the_template(tmp_path):
    old = tmp_path / "old"
    old.mkdir()
    (old / "model.onnx.data").write_bytes(b"1234")
    (old / "chat_template.jinja").write_text("x")
    (old / "tokenizer_config.json").write_text('{"chat_template": "x", "eos_token": "</s>"}')
    new = foundry_gateway.raw_folder(old, tmp_path / "new")
    assert (new / "model.onnx.data").read_bytes() == b"1234" and not (new / "chat_template.jinja").exists()
    assert (old / "model.onnx.data").stat().st_nlink == 1, "with a second name the onnx package refuses to read it"
    assert json.loads((new / "tokenizer_config.json").read_text()) == {"chat_template": "{{ messages[0]['content'] }}", "eos_token": "</s>"}
    assert json.loads((old / "tokenizer_config.json").read_text())["chat_template"] == "x"


# --- the real runtime --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    if foundry.version() is None:
        pytest.skip("foundry-local-sdk is not installed")
    pytest.importorskip("onnxruntime_genai")
    pytest.importorskip("onnx")
    kept = os.environ.get("LABKIT_HOME")
    os.environ["LABKIT_HOME"] = str(tmp_path_factory.mktemp("home"))
    try:
        yield labkit.build(labkit.checkpoint("edgehome"), labkit.Recipe("onnxruntime", "int4"))
    finally:
        os.environ.pop("LABKIT_HOME") if kept is None else os.environ.update(LABKIT_HOME=kept)


@pytest.fixture(scope="module")
def local(artifact):
    with foundry.host(threads=1) as opened:
        model = opened.register(artifact.path, "edgehome")
        opened.load(model)
        yield opened, model


def test_the_runtime_renders_as_the_checkpoint_does(local):
    opened, model = local
    house = labkit.checkpoint("edgehome")
    for messages in (ASK, [{"role": "system", "content": "kitchen light: off"}, *ASK], [*ASK, {"role": "assistant", "content": "{}"}, *ASK]):
        assert opened.budget(model, messages, **GREEDY).prompt_tokens == len(house.encode(house.chat(messages)))


def test_its_answer_is_the_engines_own(local, artifact):
    opened, model = local
    house = artifact.checkpoint
    with labkit.load(artifact) as run:
        ids = takewhile(lambda token: token not in house.eos_ids, run.generate(house.encode(house.chat(ASK)), 48))
        expected = house.decode(list(ids))
    reply = opened.chat(model, ASK, **GREEDY)
    assert reply.text == expected and reply.reason == "stop" and reply.prompt_tokens == len(house.encode(house.chat(ASK)))
    stream = opened.stream(model, ASK, **GREEDY)
    pieces = []
    with contextlib.suppress(StopIteration):
        while True:
            pieces.append(next(stream))
    assert len(pieces) > 3 and "".join(pieces) == expected


def test_a_stream_left_early_frees_the_model(local):
    opened, model = local
    for _ in range(3):
        stream = opened.stream(model, ASK, **GREEDY)
        next(stream)
        stream.close()
        assert opened.chat(model, ASK, **GREEDY).reason == "stop"
    assert list(opened.stream(model, ASK, max_output_tokens=2, do_sample=False))


def test_the_default_budget_is_refused_by_a_small_model_and_a_limit_cures_it(local):
    opened, model = local
    told = opened.budget(model, ASK)
    assert told.reserved == foundry.OUTPUT_TOKENS and not told.fits and told.context == 512
    with pytest.raises(LabkitError, match=r"^Foundry Local refused: request requires 2061 total tokens"):
        opened.chat(model, ASK)
    assert opened.chat(model, ASK, max_output_tokens=3, do_sample=False).reason == "length"


def test_refusals_are_sentences_and_leave_it_working(local, artifact, tmp_path):
    opened, model = local
    for said, act in {
        "already registered": lambda: opened.register(artifact.path, "edgehome"),
        "existing directory": lambda: opened.register(tmp_path / "none", "none"),
        "unsupported task": lambda: opened.register(artifact.path, "other", task="chat"),
        "no model x:1": lambda: opened.chat("x:1", ASK),
        "nothing to generate": lambda: opened.chat(model, [], **GREEDY),
        "temperature": lambda: opened.chat(model, ASK, temperature=9.0),
        "2061": lambda: list(opened.stream(model, ASK)),
    }.items():
        with pytest.raises(LabkitError, match=said):
            act()
    assert opened.chat(model, ASK, **GREEDY).reason == "stop"


def test_unloading_and_unregistering(local, artifact):
    opened, _ = local
    second = opened.register(artifact.path, "second", version=2, display_name="Second")
    assert second == "second:2" and opened.models()[second] is False
    with pytest.raises(LabkitError, match="must be loaded"):
        opened.chat(second, ASK, **GREEDY)
    assert opened.load(second) > 0 and opened.models()[second] is True
    opened.unload(second)
    opened.unregister(second)
    assert second not in opened.models() and (artifact.path / "genai_config.json").exists()


def test_the_process_ends_with_its_block(artifact):
    with contextlib.suppress(RuntimeError), foundry.host(threads=1) as opened:
        pid = opened.pid
        assert opened.memory() > 1e7 and opened.cpu_seconds() > 0
        raise RuntimeError
    assert not psutil.pid_exists(pid)


def test_the_gateway_serves_it_with_the_engines_ids(artifact):
    house = artifact.checkpoint
    ids = house.encode(house.chat(ASK))
    with foundry_gateway.FoundryRunner(artifact.path, house, threads=1) as run, labkit.load(artifact) as own:
        made = list(run.generate(ids, 48))
        assert made[-1] in house.eos_ids and made == list(own.generate(ids, len(made)))
        assert len(list(run.generate(ids, 5))) == 5
        with pytest.raises(LabkitError, match="no logits"):
            run.logits(ids)


@pytest.mark.parametrize("by_foundry", [True, False])
def test_rest_in_front_of_it(artifact, by_foundry):
    httpx = pytest.importorskip("httpx")
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    from labkit.serve.supervisor import supervise

    key = "a-secret-of-more-than-16"
    command = foundry_gateway.gateway_command(artifact, foundry=by_foundry)
    with supervise(command, environment={"LABKIT_API_KEYS": f"me={key}"}) as server:
        with httpx.Client(base_url=server.url, timeout=30) as http:
            body = {"model": "edgehome", "messages": ASK, "max_tokens": 48}
            assert http.post("/v1/chat/completions", json=body).status_code == 401
            http.headers["Authorization"] = f"Bearer {key}"
            whole = http.post("/v1/chat/completions", json=body).json()
            assert json.loads(whole["choices"][0]["message"]["content"])["intent"] == "light" and whole["choices"][0]["finish_reason"] == "stop"
            stream = http.post("/v1/chat/completions", json={**body, "stream": True}).text
            pieces = [json.loads(line[6:])["choices"][0]["delta"].get("content", "") for line in stream.splitlines() if line.startswith("data: {")]
            assert "".join(pieces) == whole["choices"][0]["message"]["content"]
            assert http.post("/v1/chat/completions", json={**body, "max_tokens": 600}).status_code == 400
            assert http.post("/v1/chat/completions", json={**body, "temperature": 1.0}).status_code == (500 if by_foundry else 200)
        pids = [one.pid for one in psutil.Process(server.pid).children(recursive=True)]
    assert not any(psutil.pid_exists(pid) for pid in pids)

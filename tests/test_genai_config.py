"""The validator of genai_config.json: against folders labkit writes, against every kind of fault, and against the runtime itself."""

import json
import os
import subprocess
import sys

import pytest

import labkit
from labkit import genai_config
from labkit.types import LabkitError

GOOD = {"do_sample": False, "max_length": 512, "min_length": 0, "temperature": 1.0, "top_k": 50, "top_p": 1.0, "num_beams": 1}


@pytest.fixture
def folder(tmp_path):
    """A folder as the house model would have it; the graph is empty, nobody opens it here."""
    model = {"context_length": 512, "vocab_size": 2048, "eos_token_id": [2, 0], "decoder": {"filename": "model.onnx"}}
    for name in ("model.onnx", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "genai_config.json").write_text(json.dumps({"model": model, "search": GOOD}))
    return tmp_path


def changed(folder, part, **values):
    document = genai_config.read(folder)
    document[part].update(values)
    (folder / "genai_config.json").write_text(json.dumps(document))
    return genai_config.faults(folder, labkit.checkpoint("edgehome"))


def test_a_good_one_has_no_faults(folder):
    assert genai_config.faults(folder, labkit.checkpoint("edgehome")) == []


WRONG = [
    ({"temprature": 0.7}, "temprature is unknown"), ({"max_new_tokens": 9}, "max_length, which counts the prompt too"), ({"temperature": 3.0, "do_sample": True}, "float from 0 to 2"),
    ({"top_p": 7, "do_sample": True}, "top_p is 7"), ({"num_beams": 0}, "num_beams is 0"), ({"do_sample": 1}, "true or false"), ({"top_k": 2.5, "do_sample": True}, "int from"),
    ({"top_k": True, "do_sample": True}, "top_k is True"), ({"max_length": 2048}, "context 512"), ({"min_length": 513}, "above max_length"), ({"temperature": 0.7}, "does nothing"),
    ({"repetition_penalty": "1.1"}, "'1.1'"),
]  # fmt: skip


@pytest.mark.parametrize(("search", "said"), WRONG)
def test_a_search_block_that_is_wrong_in_one_thing(folder, search, said):
    assert [said in line for line in changed(folder, "search", **search)] == [True]


@pytest.mark.parametrize(("model", "said"), [
    ({"eos_token_id": 7}, "answers would run on"), ({"eos_token_id": None}, "no answer would end"), ({"eos_token_id": 2048}, "no id of a vocabulary"),
    ({"context_length": 256}, "the checkpoint's context 512"), ({"vocab_size": 4096}, "vocab_size"), ({"decoder": {"filename": "other.onnx"}}, "other.onnx is not"),
])  # fmt: skip
def test_what_disagrees_with_the_checkpoint(folder, model, said):
    assert any(said in line for line in changed(folder, "model", **model))


def test_defaults_are_written_or_refused_as_a_whole(folder):
    before = (folder / "genai_config.json").read_text()
    with pytest.raises(LabkitError, match=r"max_length is 2048.*"):
        genai_config.with_search(folder, do_sample=True, temperature=0.7, top_p=0.9, repetition_penalty=1.1, max_length=2048)
    assert (folder / "genai_config.json").read_text() == before
    told = genai_config.with_search(folder, do_sample=True, temperature=0.7, top_p=0.9, repetition_penalty=1.1)
    assert told["search"]["temperature"] == 0.7 and genai_config.read(folder) == told and genai_config.faults(folder) == []


@pytest.mark.parametrize(("text", "said"), [(None, "has no genai_config"), ("{", "is not JSON"), ("[]", "holds a list")])
def test_files_that_are_none(tmp_path, text, said):
    if text:
        (tmp_path / "genai_config.json").write_text(text)
    with pytest.raises(LabkitError, match=said):
        genai_config.read(tmp_path)


OPEN = "import sys, onnxruntime_genai as og; og.Model(sys.argv[1]); print('opened')"


@pytest.mark.parametrize(("search", "opens"), [({"random_seed": 3, "batch_size": 1, "chunk_size": 64}, True), ({"max_new_tokens": 4}, False), ({"seed": 3}, False)])
def test_known_keys_are_those_of_the_runtime(tmp_path, monkeypatch, search, opens):
    pytest.importorskip("onnxruntime_genai")
    pytest.importorskip("onnx")
    monkeypatch.setenv("LABKIT_HOME", str(tmp_path / "home"))
    made = labkit.build(labkit.checkpoint("edgehome"), labkit.Recipe("onnxruntime", "int4"))
    assert genai_config.faults(made.path, made.checkpoint) == []
    document = genai_config.read(made.path)
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in made.path.iterdir():
        os.link(file, copy / file.name)
    (copy / "genai_config.json").unlink()
    (copy / "genai_config.json").write_text(json.dumps({**document, "search": {**document["search"], **search}}))
    done = subprocess.run([sys.executable, "-c", OPEN, str(copy)], capture_output=True, text=True)
    assert ("opened" in done.stdout) is opens and any("unknown" in line for line in genai_config.faults(copy)) is not opens

"""Releases: one digest over all that decides an answer, a registry that goes back, deltas, and bytes that are really served."""

from __future__ import annotations

import threading

import pytest

import labkit
from labkit import lineage, release
from labkit.serve.supervisor import free_port, taken
from labkit.types import LabkitError, Recipe


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    pytest.importorskip("llama_cpp")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LABKIT_HOME", str(tmp_path_factory.mktemp("home")))
        yield labkit.build(labkit.checkpoint("edgehome"), Recipe("llamacpp", "q4_0"))


@pytest.fixture
def folder(artifact, tmp_path):
    place = tmp_path / "one"
    place.mkdir()
    release.write(place, artifact, {"data": "d" * 64})
    return place


def changed(folder, place):
    """Another release: the same with one more blank in its template, as its author would release it."""
    import shutil

    shutil.copytree(folder, place)
    (place / "chat_template.jinja").write_text((place / "chat_template.jinja").read_text() + "\n")
    told = release.read_json(place / "release.json", "Release")
    (place / "release.json").unlink()
    release.write_json(place / "release.json", told | {"files": lineage.hashes(place)})
    return place


def test_a_release_holds_weights_template_tokenizer_and_settings(folder, artifact):
    names = {file.name for file in folder.iterdir()}
    assert {"model.gguf", "chat_template.jinja", "tokenizer.json", "generation_config.json", "config.json", "release.json"} <= names
    assert not names & set(release.LEFT_OUT)
    found = release.read(folder)
    assert found.recipe == artifact.recipe and found.weight_bytes == artifact.weight_bytes
    assert found.settings["digest"] == lineage.digest(lineage.hashes(folder)) and found.checkpoint.revision == found.settings["digest"][:12]
    assert found.checkpoint.eos_ids == artifact.checkpoint.eos_ids


def test_the_template_belongs_to_the_digest(folder, tmp_path):
    other = changed(folder, tmp_path / "two")
    assert (other / "model.gguf").read_bytes() == (folder / "model.gguf").read_bytes()
    assert release.read(other).settings["digest"] != release.read(folder).settings["digest"]


@pytest.mark.parametrize("name", ["model.gguf", "chat_template.jinja", "generation_config.json"])
def test_a_changed_file_is_named(folder, name):
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(LabkitError, match=f"{name} in .* is not as released"):
        release.read(folder)


def test_a_missing_and_an_added_file_are_named(folder):
    (folder / "extra.txt").write_text("x")
    with pytest.raises(LabkitError, match=r"extra\.txt"):
        release.read(folder)
    (folder / "extra.txt").unlink()
    (folder / "tokenizer.json").unlink()
    with pytest.raises(LabkitError, match=r"tokenizer\.json"):
        release.read(folder)


def test_delta_counts_blocks_that_are_new():
    old = bytes(range(64))
    assert release.delta(old, old, 16) == 0
    assert release.delta(old, old[16:] + old[:16], 16) == 0, "blocks may move"
    assert release.delta(old, old[:20] + b"!" + old[21:], 16) == 16
    assert release.delta(old, b"x" * 40, 16) == 16 + 8, "equal new blocks once, the short last one too"


def test_aliases_move_and_go_back(folder, tmp_path):
    book = release.Book(tmp_path / "book.json")
    assert book.add(folder) == book.add(folder) == "1"
    assert book.add(changed(folder, tmp_path / "two")) == "2" and book.add(changed(tmp_path / "two", tmp_path / "three")) == "3"
    for version in "123":
        book.point("champion", version, "a try")
    assert book.where("champion") == tmp_path / "three"
    assert book.back("champion", "worse") == "2" and book.back("champion", "worse still") == "1"
    assert book.where("champion") == folder
    with pytest.raises(LabkitError, match="named nothing before"):
        book.back("champion", "once more")
    assert [move["to"] for move in book.state["moves"]] == ["1", "2", "3", "2", "1"]
    with pytest.raises(LabkitError, match="no version '9'"):
        book.point("champion", "9", "none")
    with pytest.raises(LabkitError, match="No version has the alias 'canary'"):
        book.where("canary")


def test_the_server_tells_the_digest_of_what_it_serves(folder, tmp_path):
    pytest.importorskip("uvicorn")
    other, port = changed(folder, tmp_path / "two"), free_port()
    question = [{"role": "user", "content": "Turn on the lights in the kitchen"}]
    said = []
    for place in (folder, other):
        with release.serving(place, port=port, threads=1) as server:
            said.append((server.served(), server.ask(question)))
        assert not taken(port), "the port is free afterwards"
    assert said[0][0] == release.read(folder).settings["digest"][:12] != said[1][0]
    assert '"light"' in said[0][1]


def test_a_release_that_was_changed_is_not_served(folder):
    pytest.importorskip("uvicorn")
    (folder / "chat_template.jinja").write_text("{{ 'other' }}")
    with pytest.raises(LabkitError, match="is not as released"), release.serving(folder):
        pass


def test_a_taken_port_gets_a_sentence(folder):
    pytest.importorskip("uvicorn")
    before = set(threading.enumerate())
    with release.serving(folder, threads=1) as server:
        port = int(server.url.rpartition(":")[2])
        with pytest.raises(LabkitError, match=f"Port {port} is taken"), release.serving(folder, port=port):
            pass
        assert server.served()
        runners = [thread for thread in set(threading.enumerate()) - before if thread.name == "labkit-runner"]
    assert len(runners) == 1 and not runners[0].is_alive(), "what was refused had opened no model, and what was served is closed"

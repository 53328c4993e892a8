"""A signed manifest notices every change; a bill of materials names the model, its files and what serves it."""

import json
import os
from dataclasses import replace

import pytest
from live_gateway import artifact

from labkit import LabkitError
from labkit.serve import manifest


@pytest.fixture
def signed(tmp_path):
    pytest.importorskip("cryptography")
    public = manifest.new_key(tmp_path / "key.pem")
    folder = tmp_path / "model"
    (folder / "deep").mkdir(parents=True)
    (folder / "model.gguf").write_bytes(b"GGUF" * 1000)
    (folder / "deep" / "config.json").write_text("{}")
    manifest.sign(folder, tmp_path / "key.pem")
    return folder, public, tmp_path / "key.pem"


def test_what_was_signed_verifies(signed):
    folder, public, key = signed
    assert set(manifest.verify(folder, public)["files"]) == {"model.gguf", "deep/config.json"}
    assert key.stat().st_mode & 0o077 == 0 or os.name == "nt"
    with pytest.raises(LabkitError, match="there already"):
        manifest.new_key(key)


def _flip(folder):
    data = bytearray((folder / "model.gguf").read_bytes())
    data[99] ^= 1
    (folder / "model.gguf").write_bytes(data)


def _rewrite(folder):  # a thief who corrects the checksum too
    _flip(folder)
    told = json.loads((folder / "manifest.json").read_text())
    told["files"] = manifest.digests(folder)
    (folder / "manifest.json").write_text(json.dumps(told))


@pytest.mark.parametrize(("change", "says"), [
    (_flip, "model.gguf .* was changed"), (_rewrite, "not signed with this key"),
    (lambda folder: (folder / "deep/config.json").unlink(), "is missing"),
    (lambda folder: (folder / "extra.py").write_text(""), "not in the signed manifest"),
    (lambda folder: (folder / "manifest.sig").unlink(), "no signed manifest"),
    (lambda folder: (folder / "link").symlink_to("/etc/hostname"), "is a link"),
])  # fmt: skip
def test_every_change_is_noticed(signed, change, says):
    folder, public, _ = signed
    change(folder)
    with pytest.raises(LabkitError, match=says):
        manifest.verify(folder, public)


def test_another_key_does_not_open_it(signed, tmp_path):
    other = manifest.new_key(tmp_path / "other.pem")
    with pytest.raises(LabkitError, match="not signed with this key"):
        manifest.verify(signed[0], other)
    with pytest.raises(LabkitError, match="no public key"):
        manifest.verify(signed[0], "abc")
    with pytest.raises(LabkitError, match="no private key"):
        manifest.sign(signed[0], signed[0] / "model.gguf")


def test_the_bill_names_model_files_and_libraries(tmp_path):
    (tmp_path / "weights.bin").write_bytes(b"x")
    told = manifest.bill(replace(artifact(), path=tmp_path))
    assert told["bomFormat"] == "CycloneDX" and told["specVersion"] == "1.6"
    model = told["metadata"]["component"]
    assert model["type"] == "machine-learning-model" and model["components"][0]["name"] == "weights.bin"
    assert model["components"][0]["hashes"][0]["content"] == manifest.digests(tmp_path)["weights.bin"]["sha256"]
    json.dumps(told)


def test_libraries_are_found_through_other_libraries():
    names = {found.metadata["Name"].lower() for found in manifest._needed("jupyterlab", ())}
    assert {"jupyterlab", "jinja2", "markupsafe"} <= names

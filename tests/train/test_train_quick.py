"""A tuned checkpoint for labs about something else: made, found again, or left out with a sentence."""

from dataclasses import replace

import numpy as np
import pytest

import labkit
from labkit.train import quick


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("LABKIT_HOME", str(tmp_path / "home"))


def test_it_is_trained_once_and_moves_the_adapted_matrices_only(tmp_path):
    pytest.importorskip("torch")
    house = labkit.checkpoint("edgehome")
    made, said = quick.tuned(house, tmp_path, steps=2, examples=12)
    assert "2 steps of 1 rows" in said and made.trained
    stored, before = made.tensors(), house.tensors()
    moved = {name for name in stored if not np.array_equal(stored[name].float32(), before[name].float32())}
    assert moved == {name for name in stored if "_proj." in name}
    stamp = (made.path / "model.safetensors").stat().st_mtime_ns
    again, _ = quick.tuned(house, tmp_path, steps=2, examples=12)
    assert again.path == made.path and (again.path / "model.safetensors").stat().st_mtime_ns == stamp


def test_other_models_and_machines_without_torch(tmp_path, monkeypatch):
    other = replace(labkit.checkpoint("edgehome"), name="my own")
    found, said = quick.tuned(other, tmp_path)
    assert found is other and said.startswith("my own is taken as it is")
    monkeypatch.setattr(quick, "find_spec", lambda name: None)
    found, said = quick.tuned(labkit.checkpoint("edgehome"), tmp_path)
    assert found.name == "edgehome" and "PyTorch is not installed" in said

"""Shared fixtures: a seeded tiny checkpoint written on the spot, and a home of its own for every test."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tiny_checkpoint import write_llama

# Before any engine loads OpenMP: spinning threads on a busy machine make the suite many times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.pop("LABKIT_LANG", None)


@pytest.fixture(autouse=True)
def english(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests read English, whatever the owner of this machine has chosen; in the browser, the test chooses."""
    if "browser" not in request.path.parts:
        monkeypatch.setenv("LABKIT_LANG", "en")


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the tiny Llama (float32, tied). Read only: copy it before changing anything."""
    return write_llama(tmp_path_factory.mktemp("checkpoints") / "tiny-llama")


@pytest.fixture
def make_llama(tmp_path: Path):
    """`make_llama(name="x", dtype="BF16", seed=1, hidden_size=128, ...) -> Path`: a tiny Llama of your own."""

    def make(name: str = "made", **overrides: object) -> Path:
        return write_llama(tmp_path / name, **overrides)

    return make


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty LABKIT_HOME for one test."""
    monkeypatch.setenv("LABKIT_HOME", str(tmp_path / "home"))
    return tmp_path / "home"

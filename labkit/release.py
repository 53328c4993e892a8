"""A release: weights, quantization, template and settings in one folder, known by one digest; and the book that says which is live.

    write(folder, artifact, {"dataset": …})     # copies what an answer depends on, and says where it came from
    artifact = read(folder)                     # every byte checked against release.json, then served as any artifact

Weights alone are no release: another template or another end-of-answer id changes every answer with the same weights.
"""

from __future__ import annotations

import json
import shutil
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from labkit._files import locked, read_json, write_json
from labkit.checkpoint import SMALL_FILES, Checkpoint
from labkit.lineage import digest, hashes
from labkit.types import Artifact, LabkitError, Recipe

RECORD = "release.json"
LEFT_OUT = ("artifact.json", "build.log")  # they hold times and places, no answer depends on them


def write(folder: Path, artifact: Artifact, origin: Mapping[str, Any]) -> dict[str, Any]:
    """Fill the existing folder with the release of an artifact; gives what release.json says. `origin`: digests it came from."""
    folder = Path(folder)
    for file in sorted(artifact.path.iterdir()):
        if file.is_file() and file.name not in LEFT_OUT:
            shutil.copyfile(file, folder / file.name)
    for file in {found for pattern in SMALL_FILES for found in artifact.checkpoint.path.glob(pattern)}:
        shutil.copyfile(file, folder / file.name)
    told = {
        "model": artifact.checkpoint.name, "recipe": artifact.recipe.to_json(), "engine_version": artifact.engine_version,
        "weight_bytes": artifact.weight_bytes, "weights": artifact.weights, "bits_per_weight": artifact.bits_per_weight,
        "notes": list(artifact.notes), "origin": dict(origin), "files": hashes(folder),
    }  # fmt: skip
    write_json(folder / RECORD, told)
    return told


def read(folder: Path) -> Artifact:
    """The release as an artifact whose checkpoint is the folder itself; LabkitError at the first file that is not as released.

    The checkpoint's revision is the first twelve digits of the release's digest. It has tokenizer, template and settings but no
    tensors in safetensors: it can be served and measured, not converted again.
    """
    folder = Path(folder)
    told, now = read_json(folder / RECORD, "Release"), hashes(folder)
    of_release = now.pop(RECORD)
    for name in sorted(told["files"].keys() | now.keys()):
        if told["files"].get(name) != now.get(name):
            raise LabkitError(f"{name} in {folder} is not as released; get the release again.")
    config = read_json(folder / "config.json", "Checkpoint config")
    whole = digest(now | {RECORD: of_release})
    source = Checkpoint(folder, told["model"], whole[:12], config)
    return Artifact(
        path=folder, recipe=Recipe.from_json(told["recipe"]), checkpoint=source, weight_bytes=told["weight_bytes"],
        weights=told["weights"], bits_per_weight=told["bits_per_weight"], seconds=0.0, engine_version=told["engine_version"],
        settings={"digest": whole}, notes=tuple(told["notes"]),
    )  # fmt: skip


def delta(old: bytes, new: bytes, block: int = 4096) -> int:
    """Bytes a device that has `old` must fetch to make `new`: the blocks of `new` that stand nowhere in `old` as a block."""
    have = {old[at : at + block] for at in range(0, len(old), block)}
    parts = {new[at : at + block] for at in range(0, len(new), block)}
    return sum(len(part) for part in parts - have)


class Book:
    """Versions, aliases that point at them, and every move with its reason: a model registry in one JSON file."""

    def __init__(self, file: Path | str):
        self.file = Path(file)

    @property
    def state(self) -> dict[str, Any]:
        """{"versions": {"1": digest}, "folders": {"1": path}, "aliases": {name: "1"}, "moves": [...]}"""
        empty: dict[str, Any] = {"versions": {}, "folders": {}, "aliases": {}, "moves": []}
        return read_json(self.file, "Registry") if self.file.exists() else empty

    def add(self, folder: Path | str) -> str:
        """The version of a release, a new one unless the very same bytes are there already."""
        whole = read(Path(folder)).settings["digest"]
        with self._change() as state:
            for version, known in state["versions"].items():
                if known == whole:
                    return version
            version = str(len(state["versions"]) + 1)
            state["versions"][version], state["folders"][version] = whole, str(folder)
        return version

    def point(self, alias: str, version: str, because: str) -> None:
        """Let an alias name a version from now on."""
        with self._change() as state:
            if version not in state["versions"]:
                raise LabkitError(f"There is no version {version!r}; the registry has {', '.join(state['versions']) or 'none'}.")
            state["moves"].append({"alias": alias, "to": version, "because": because, "back": False})
            state["aliases"][alias] = version

    def back(self, alias: str, because: str) -> str:
        """Point an alias at what it named before its present version; gives that version. Twice back is two versions back."""
        with self._change() as state:
            past: list[str] = []
            for move in state["moves"]:
                if move["alias"] == alias:
                    past.pop() if move["back"] else past.append(move["to"])
            if len(past) < 2:
                raise LabkitError(f"The alias {alias!r} named nothing before; there is nothing to go back to.")
            state["moves"].append({"alias": alias, "to": past[-2], "because": because, "back": True})
            state["aliases"][alias] = past[-2]
        return past[-2]

    def where(self, alias: str) -> Path:
        """The folder an alias points at."""
        state = self.state
        if alias not in state["aliases"]:
            raise LabkitError(f"No version has the alias {alias!r}; point it at one of {', '.join(state['versions']) or 'none'}.")
        return Path(state["folders"][state["aliases"][alias]])

    @contextmanager
    def _change(self) -> Iterator[dict[str, Any]]:
        with locked(self.file.with_name(f".lock-{self.file.name}")):
            state = self.state
            yield state
            write_json(self.file, state)


# --- serving -----------------------------------------------------------------------------------------------------


class Live:
    """A release that answers on this machine: `url`, and the digest the server itself tells."""

    def __init__(self, url: str):
        self.url = url
        self._open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open

    def served(self) -> str:
        """First digits of the digest of the bytes that are served, as /v1/models tells it."""
        return self._name().partition("@")[2]

    def _name(self) -> str:
        with self._open(self.url + "/v1/models", timeout=30) as reply:
            return json.load(reply)["data"][0]["id"]

    def ask(self, messages: Sequence[Mapping[str, str]], most: int = 128) -> str:
        """The greedy answer to a conversation."""
        body = {"model": self._name(), "messages": list(messages), "temperature": 0, "max_tokens": most}
        request = urllib.request.Request(self.url + "/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
        with self._open(request, timeout=60) as reply:
            return json.load(reply)["choices"][0]["message"]["content"]


@contextmanager
def serving(folder: Path, *, port: int = 0, threads: int | None = None) -> Iterator[Live]:
    """Serve a release through labkit's gateway on a loopback port of this process until the block ends; 0 takes a free one.

    The bytes are checked before the model is loaded, and the model's name ends in @ and their digest.
    """
    from labkit.serve.gateway import gateway, require
    from labkit.serve.supervisor import HOST, free_port, taken

    require()
    import uvicorn

    artifact = read(folder)
    port = port or free_port()
    if taken(port):
        raise LabkitError(f"Port {port} is taken, so the release in {folder} cannot be served there; give another, or 0 for a free one.")
    app = gateway(artifact, name=f"{artifact.checkpoint.name}@{artifact.checkpoint.revision}", threads=threads)
    server = uvicorn.Server(uvicorn.Config(app, host=HOST, port=port, log_level="error", timeout_graceful_shutdown=2))
    thread = threading.Thread(target=server.run, name="labkit-release", daemon=True)
    thread.start()
    try:
        until = time.monotonic() + 60
        while not server.started:
            if not thread.is_alive() or time.monotonic() > until:
                raise LabkitError(f"The release in {folder} could not be served at port {port}; the messages above say why.")
            time.sleep(0.01)
        yield Live(f"http://{HOST}:{port}")
    finally:
        server.should_exit = True
        thread.join(15)
        app.state.served.close()

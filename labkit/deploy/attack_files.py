"""Attempts with files: pickled weights, a chat template that runs code, a header that lies, a model exchanged after it was signed."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from labkit.types import LabkitError

Outcome = tuple[str, bool]
MARK = "was-run"


class _Payload:
    """Unpickling it makes an empty file: proof that code ran, and nothing else."""

    def __init__(self, file: Path):
        self.file = str(file)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.file,)


def run(opener: Callable[[Path], Any] | None = None, verifier: Callable[[Path, str], Any] | None = None) -> Iterator[tuple[str, Outcome]]:
    """(attempt, outcome) of every file, tried in a folder that is removed afterwards."""
    opener, verifier = opener or _open, verifier or _verify
    with tempfile.TemporaryDirectory(prefix="labkit-attack-") as place:
        work = Path(place)
        for name, make in OPENED.items():
            folder = _copy(work / name.replace(" ", "-"))
            make(folder, work / MARK)
            yield name, _judge(lambda folder=folder: opener(folder), work / MARK)
        signed, public, key = _signed(work)
        for name, change in SIGNED.items():
            folder = work / f"signed-{name.replace(' ', '-')}"
            shutil.copytree(signed, folder)
            change(folder, key)
            yield name, _judge(lambda folder=folder: verifier(folder, public), work / MARK)


def _open(folder: Path) -> Any:
    """Open a checkpoint, and use its chat template as a server does."""
    import labkit

    return labkit.checkpoint(folder).chat([{"role": "user", "content": "hi"}])


def _verify(folder: Path, public_key: str) -> Any:
    from labkit.serve.manifest import verify

    return verify(folder, public_key)


def _judge(act: Callable[[], Any], mark: Path) -> Outcome:
    try:
        act()
        happened, refused = "accepted", False
    except LabkitError as error:
        happened, refused = str(error)[:110], True
    except Exception as error:  # a crash is no answer either
        happened, refused = f"{type(error).__name__}: {str(error)[:80]}", False
    if mark.exists():
        mark.rmdir()
        return "its code ran", False
    return happened.replace(str(mark.parent), "…"), refused


def _copy(folder: Path) -> Path:
    """The small files of the house model, and weights of a few bytes."""
    from labkit.checkpoint import house_folder

    shutil.copytree(house_folder(), folder)
    return folder


def _pickled(folder: Path, mark: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(_Payload(mark)))


def _template(folder: Path, mark: Path) -> None:
    source = f"{{{{ ''.__class__.__mro__[1].__subclasses__() }}}}{{{{ cycler.__init__.__globals__.os.mkdir('{mark.as_posix()}') }}}}"
    (folder / "chat_template.jinja").write_text(source)


def _long_header(folder: Path, mark: Path) -> None:
    (folder / "model.safetensors").write_bytes((2**40).to_bytes(8, "little") + b"{}")


def _outside(folder: Path, mark: Path) -> None:
    head = json.dumps({"model.embed_tokens.weight": {"dtype": "F32", "shape": [2048, 256], "data_offsets": [0, 2**33]}}).encode()
    (folder / "model.safetensors").write_bytes(len(head).to_bytes(8, "little") + head + b"\0" * 64)


def _index(folder: Path, mark: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.embed_tokens.weight": "../../../../etc/passwd"}}))


OPENED: dict[str, Callable[[Path, Path], None]] = {
    "weights as a pickle": _pickled, "a chat template that runs code": _template, "a header of a terabyte": _long_header,
    "a tensor beyond the file": _outside, "an index that leaves the folder": _index,
}  # fmt: skip


def _signed(work: Path) -> tuple[Path, str, Path]:
    """A signed folder, its public key, and a second private key that is somebody else's."""
    from labkit.serve.manifest import new_key, sign

    folder = work / "signed"
    folder.mkdir()
    (folder / "model.gguf").write_bytes(bytes(range(256)) * 16)
    (folder / "config.json").write_text("{}")
    public = new_key(work / "own.pem")
    sign(folder, work / "own.pem")
    new_key(work / "other.pem")
    _sums(folder)
    return folder, public, work / "other.pem"


def _sums(folder: Path) -> None:
    """What careless people rely on: checksums beside the files, signed by nobody. Outside the manifest, so kept in its parent."""
    import hashlib

    lines = [f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n" for file in sorted(folder.iterdir()) if file.is_file()]
    (folder.parent / f"{folder.name}.sha256").write_text("".join(lines))


def _changed(folder: Path, key: Path) -> None:
    data = bytearray((folder / "model.gguf").read_bytes())
    data[1000] ^= 1
    (folder / "model.gguf").write_bytes(data)
    _sums(folder)


def _signed_again(folder: Path, key: Path) -> None:
    from labkit.serve.manifest import sign

    _changed(folder, key)
    sign(folder, key)
    _sums(folder)


def _added(folder: Path, key: Path) -> None:
    (folder / "sitecustomize.py").write_text("")
    _sums(folder)


def _listed(folder: Path, key: Path) -> None:
    """The manifest is edited to fit the changed file, the signature left."""
    _changed(folder, key)
    from labkit.serve.manifest import MANIFEST, digests

    told = json.loads((folder / MANIFEST).read_text())
    told["files"] = digests(folder)
    (folder / MANIFEST).write_text(json.dumps(told, indent=1, sort_keys=True) + "\n")
    _sums(folder)


SIGNED: dict[str, Callable[[Path, Path], None]] = {
    "one bit of the weights flipped": _changed, "weights and manifest changed together": _listed,
    "signed again with another key": _signed_again, "a file nobody signed": _added,
}  # fmt: skip

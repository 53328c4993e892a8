"""A pipeline whose every product is known by its bytes: what made it, from what, with which settings and seed.

    line  = Line(folder)
    data  = line.stage("data", write, seed=3)              # write(folder, seed=3) puts files into the empty folder
    model = line.stage("train", fit, data, seed=0, steps=12)  # fit(folder, data_folder, seed=0, steps=12)
    line.trace(model.digest)                               # back to data and seed, every file hashed again on the way

A stage whose inputs, settings and code are the same as before is not done again. The digest of a product is that of its files
alone, so two runs that differ in time and place and not in bytes have the same.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from labkit._files import locked, read_json, write_json, written_beside
from labkit.serve.manifest import digests
from labkit.types import LabkitError

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Step:
    """One product: `digest` of its `files` (name -> SHA-256), `inputs` (name of the stage -> digest), how long it took."""

    stage: str
    digest: str
    inputs: Mapping[str, str]
    settings: Mapping[str, Any]
    files: Mapping[str, str]
    code: str  # SHA-256 of the source of the function that made it
    version: str  # of labkit
    seconds: float
    folder: Path

    @property
    def short(self) -> str:
        """The first twelve digits of the digest: what people say to each other."""
        return self.digest[:12]


def digest(files: Mapping[str, str]) -> str:
    """One SHA-256 for many files, from name -> SHA-256: of the lines "name sha256", sorted by name."""
    return hashlib.sha256("".join(f"{name} {files[name]}\n" for name in sorted(files)).encode()).hexdigest()


def hashes(folder: Path) -> dict[str, str]:
    """Name -> SHA-256 of every file below a folder, a manifest and its signature apart (they hold the time)."""
    return {name: one["sha256"] for name, one in digests(folder).items()}


class Line:
    """All products of a pipeline, in one folder: `STAGE-KEY/` the files, `STAGE-KEY.json` what is known of them."""

    def __init__(self, root: Path | str):
        self.root = Path(root)

    def stage(self, name: str, make: Callable[..., Any], /, *inputs: Step, **settings: Any) -> Step:
        """The product of `make(folder, *input_folders, **settings)`, made now or found as it was made before.

        LabkitError when two inputs come from stages of the same name, or when `make` wrote nothing.
        """
        from labkit import __version__

        given = {one.stage: one.digest for one in inputs}
        if len(given) != len(inputs):
            raise LabkitError(f"The inputs of {name!r} come from stages of the same name; give each stage a name of its own.")
        asked = {"inputs": given, "settings": _plain(settings), "code": _source(make), "version": __version__}
        key = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:10]
        target = self.root / f"{name}-{key}"
        with locked(self.root / f".lock-{name}-{key}"):
            if found := self._found(target):
                return found
            began = time.perf_counter()
            with written_beside(target) as new:
                make(new, *(one.folder for one in inputs), **settings)
                files = hashes(new)
            if not files:
                raise LabkitError(f"The stage {name!r} wrote no file; its function gets a folder to write into.")
            made = Step(name, digest(files), files=files, seconds=time.perf_counter() - began, folder=target, **asked)
            write_json(self._record(target), {**asdict(made), "folder": target.name})
        return made

    def steps(self) -> list[Step]:
        """Every product there is, by stage and key."""
        return [self._read(file) for file in sorted(self.root.glob("*-*.json"))]

    def trace(self, of: str) -> list[Step]:
        """The product with this digest and all it came from, nearest first; every file is hashed again.

        LabkitError when no product has the digest, or at the first whose files are not those that were recorded.
        """
        known = {one.digest: one for one in self.steps()}
        found, waiting = {}, [of]
        while waiting:
            wanted = waiting.pop(0)
            if wanted not in known:
                raise LabkitError(f"No stage in {self.root} made {wanted[:12]}; what is served does not come from this pipeline.")
            if wanted not in found:
                found[wanted] = _checked(known[wanted])
                waiting += known[wanted].inputs.values()
        return list(found.values())

    def _record(self, target: Path) -> Path:
        return target.with_name(target.name + ".json")

    def _found(self, target: Path) -> Step | None:
        """A product whose files are still there and unchanged."""
        if not (self._record(target).exists() and target.is_dir()):
            return None
        kept = self._read(self._record(target))
        return kept if hashes(target) == kept.files else None

    def _read(self, file: Path) -> Step:
        kept = read_json(file, "Lineage record")
        try:
            return Step(**{**kept, "folder": self.root / kept["folder"]})
        except (TypeError, KeyError) as error:
            raise LabkitError(f"{file} is no lineage record ({error}); delete it, and the stage is done again.") from None


def _checked(step: Step) -> Step:
    now = hashes(step.folder) if step.folder.is_dir() else {}
    wrong = sorted(name for name in step.files.keys() | now.keys() if step.files.get(name) != now.get(name))
    if wrong:
        raise LabkitError(f"{wrong[0]} of stage {step.stage!r} is not what was recorded; its product {step.short} cannot be traced.")
    return step


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return json.loads(json.dumps(settings))
    except TypeError as error:
        raise LabkitError(f"A setting cannot be written down ({error}); give numbers, words, lists and dicts.") from None


def _source(make: Callable[..., Any]) -> str:
    """A digest of the function's source; of its bytecode where there is no source to read."""
    try:
        text = inspect.getsource(make).encode()
    except (OSError, TypeError):
        text = getattr(getattr(make, "__code__", None), "co_code", b"")
    return hashlib.sha256(text).hexdigest()


def frame(steps: Iterable[Step]) -> pd.DataFrame:
    """A trace as a table: stage, digest, what it came from, settings."""
    import pandas as pd

    rows = [
        {
            "stage": one.stage,
            "digest": one.short,
            "from": ", ".join(f"{name} {value[:12]}" for name, value in one.inputs.items()),
            "settings": ", ".join(f"{key}={value}" for key, value in one.settings.items()),
            "bytes": sum(file.stat().st_size for file in one.folder.rglob("*") if file.is_file()),
        }
        for one in steps
    ]
    return pd.DataFrame(rows)

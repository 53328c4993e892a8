"""All rules over a folder of deployment files: each file by its kind, each overlay as Kustomize builds it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from labkit.deploy import compose, dashboards, dockerfile, kubernetes, pipeline
from labkit.deploy.finding import Finding, read_yaml
from labkit.types import LabkitError, NotInstalled


def recorded(folder: Path) -> dict[str, Any]:
    """What `render` wrote into values.json; {} for files from elsewhere."""
    file = folder / "values.json"
    try:
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    except ValueError as error:
        raise LabkitError(f"{file} is damaged ({error}); render the folder again.") from None


def check(folder: Path | str, *, config: Mapping[str, Any] | None = None) -> list[Finding]:
    """Every finding in a folder, errors first. LabkitError when there is nothing to check."""
    folder = Path(folder)
    if not folder.is_dir():
        raise LabkitError(f"There is no folder {folder}; give one with a Dockerfile, compose.yaml, kubernetes or workflows.")
    needs = recorded(folder).get("needs") or {}
    need, startup = needs.get("memory"), needs.get("startup")
    said: list[Finding] = []
    seen = 0
    for file in sorted(path for path in folder.rglob("*") if path.is_file() and ".git/" not in path.as_posix()):
        place, found = file.relative_to(folder).as_posix(), None
        if file.name == "Dockerfile" or file.name.startswith("Dockerfile."):
            found = dockerfile.lint(_text(file), startup=startup)
        elif file.name in ("compose.yaml", "compose.yml", "docker-compose.yml", "docker-compose.yaml"):
            found = compose.lint(_text(file), need=need, startup=startup, config=config)
        elif "/.github/workflows/" in f"/{place}" and file.suffix in (".yml", ".yaml"):
            found = pipeline.lint(_text(file))
        elif "dashboards" in file.parts and file.suffix == ".json":
            found = _dashboard(file)
        elif file.name == "kustomization.yaml" and "overlays" in file.parts:
            found = _overlay(file.parent, need, startup, config)
        elif file.name.startswith("prometheus") and file.suffix in (".yml", ".yaml"):
            found = compose.scrape_findings(_text(file))
        elif file.name in ("alerts.yml", "recording.yml"):
            found = _rules(file)
        elif file.name == "Modelfile":
            found = _modelfile(file)
        if found is not None:
            seen += 1
            said += [one.at(place) for one in found]
    if not seen:
        raise LabkitError(f"{folder} holds nothing these rules know: no Dockerfile, compose.yaml, overlay, workflow or dashboard.")
    order = ("error", "warning", "accepted")
    return sorted(said, key=lambda one: order.index(one.level))


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace")


def _overlay(folder: Path, need: float | None, startup: float | None, config: Mapping[str, Any] | None) -> list[Finding]:
    try:
        return kubernetes.lint(kubernetes.build(folder), need=need, startup=startup, config=config)
    except NotInstalled as error:
        return [Finding("not-built", folder.name, str(error), "warning")]
    except LabkitError as error:
        return [Finding("kustomize", folder.name, str(error))]


def _dashboard(file: Path) -> list[Finding]:
    try:
        return [Finding("dashboard", file.stem, sentence) for sentence in dashboards.check(json.loads(_text(file)))]
    except ValueError as error:
        return [Finding("syntax", file.stem, f"This is no JSON: {error}.")]


def _rules(file: Path) -> list[Finding]:
    """Expressions of Prometheus' rules: metrics of the gateway or its canary, or names another rule of the folder records."""
    said, rules = [], []
    for place in sorted(file.parent.glob("*.yml")):
        try:
            rules += [(place, rule) for document in read_yaml(_text(place)) for group in document.get("groups") or [] for rule in group.get("rules") or []]
        except LabkitError as error:
            said += [Finding("syntax", place.stem, str(error))] * (place == file)
    known = dashboards.exposed() | {rule.get("record") for _, rule in rules} | {"up"}
    for place, rule in rules:
        if place == file:
            lost = [name for name in dashboards.unknown_metrics(str(rule.get("expr")), known) if not name.startswith("canary_")]
            said += [Finding("alert-metric", str(rule.get("alert") or rule.get("record")), f"It asks for {name}, which nobody counts or records; it can never fire.") for name in lost]
    return said


def _modelfile(file: Path) -> list[Finding]:
    from labkit.serve import modelfile

    return [Finding("modelfile", f"line {one.line}", one.sentence, one.level) for one in modelfile.lint(_text(file))]


def programs(folder: Path | str) -> list[tuple[str, str, str]]:
    """(program, file, what it said) of the linters others wrote: hadolint and `docker compose config`; one that is absent says so."""
    folder, said = Path(folder), []
    jobs = [("hadolint", [_installed("hadolint"), str(file)], file) for file in sorted(folder.rglob("Dockerfile"))]
    jobs += [("docker compose config", [*_compose(), "-f", str(file), "config", "--quiet"], file) for file in sorted(folder.rglob("compose.yaml"))]
    for name, command, file in jobs:
        place = file.relative_to(folder).as_posix()
        if not command[0]:
            said.append((name, place, "not installed here; the rules of this page were run all the same"))
            continue
        asked = dict.fromkeys(re.findall(r"\$\{(\w+):\?", _text(file)), "for-this-check-only")  # Compose wants every variable set
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, env={**os.environ, **asked})
        said.append((name, place, (done.stdout + done.stderr).strip()[:300] or "nothing found"))
    return said


def _installed(name: str) -> str:
    """Where the program is: on PATH, or beside this Python, where pip puts it though nobody activated the environment; "" if absent."""
    return shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent)) or ""


def _compose() -> list[str]:
    """The command of Compose as a plugin of docker, or as a program; [""] when there is neither."""
    docker = shutil.which("docker")
    if docker and subprocess.run([docker, "compose", "version"], capture_output=True, timeout=20).returncode == 0:
        return [docker, "compose"]
    return [shutil.which("docker-compose") or ""]

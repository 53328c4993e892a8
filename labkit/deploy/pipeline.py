"""Rules for a GitHub Actions workflow that builds and deploys, and the published schema where check-jsonschema is installed."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from labkit.deploy.finding import Finding, looks_secret, published, read_yaml
from labkit.types import LabkitError

CURRENT = {  # the oldest major version that still runs on a supported Node
    "actions/checkout": 4, "actions/setup-python": 5, "actions/upload-artifact": 4, "actions/download-artifact": 4, "actions/cache": 4,
    "docker/build-push-action": 6, "docker/login-action": 3, "docker/setup-buildx-action": 3,
}  # fmt: skip
STRANGERS = r"\$\{\{[^}]*github\.(?:event\.(?:issue|pull_request|comment|review|head_commit|discussion)[\w.]*\.(?:title|body|message|ref|label|name|email)|head_ref)[^}]*\}\}"


def lint(text: str) -> list[Finding]:
    """Every broken rule of a workflow."""
    try:
        documents = read_yaml(text)
    except LabkitError as error:
        return [Finding("syntax", "workflow", str(error))]
    if len(documents) != 1 or not isinstance(documents[0].get("jobs"), dict):
        return [Finding("syntax", "workflow", "A workflow is one document with jobs.")]
    whole = dict(documents[0])
    whole["on"] = whole.pop(True, whole.get("on"))  # YAML 1.1 reads the word on as true
    said = [Finding("schema", place, sentence) for place, sentence in schema_errors(whole)]
    events = whole["on"] if isinstance(whole["on"], (dict, list)) else [whole["on"]]
    if "permissions" not in whole:
        said.append(Finding("permissions", "workflow", "The token may do whatever the repository's default allows; begin with permissions: {contents: read}."))
    if "pull_request_target" in events:
        said.append(Finding("untrusted-code", "workflow", "pull_request_target runs with secrets in reach of a stranger's branch; take pull_request."))
    for name, job in whole["jobs"].items():
        said += _job(name, job, whole["jobs"])
    return said


def schema_errors(whole: Mapping[Any, Any]) -> list[tuple[str, str]]:
    """(place, sentence) of what the published workflow schema refuses; [] where the schema is not installed."""
    judge = published("github-workflows.json")
    errors = judge.iter_errors(json.loads(json.dumps(whole, default=str))) if judge else ()
    return [("/".join(map(str, error.absolute_path)) or "workflow", error.message[:200] + ".") for error in errors]


def _job(name: str, job: Mapping[str, Any], jobs: Mapping[str, Any]) -> list[Finding]:
    said = []
    steps = job.get("steps") or []
    runs = "\n".join(str(step.get("run") or "") for step in steps)
    if "timeout-minutes" not in job and steps:
        said.append(Finding("timeout", name, "A job that hangs runs for six hours; set timeout-minutes."))
    for step in steps:
        said += _step(name, step)
    if re.search(r"\bollama\s+(pull|run|create|list)\b", runs) and not re.search(r"ollama serve|ollama\.com/install|setup-ollama", runs + str(steps) + str(job.get("services") or "")):
        said.append(Finding("no-server", name, "ollama is called and nothing on this runner installs or starts it; start it first, or test against the gateway."))
    if re.search(r"kubectl\s[^\n]*\bapply\b|rollout|helm\s+upgrade", runs):
        if not job.get("environment"):
            said.append(Finding("approval", name, "It deploys without an environment, so nobody is asked and its credentials are everybody's; set environment."))
        if not job.get("needs"):
            said.append(Finding("untested", name, "It deploys without waiting for a test; set needs."))
        if not re.search(r"rollout status", runs):
            said.append(Finding("unwatched", name, "It applies and does not look whether the new version starts; add kubectl rollout status.", "warning"))
    return said


def _step(name: str, step: Mapping[str, Any]) -> list[Finding]:
    said, uses, run = [], str(step.get("uses") or ""), str(step.get("run") or "")
    action, _, version = uses.partition("@")
    major = re.fullmatch(r"v(\d+)(?:\.\d+)*", version)
    if uses and not uses.startswith("./"):
        if not version or version in ("main", "master", "latest"):
            said.append(Finding("pinned", name, f"{uses} is other code tomorrow; name a version or a commit."))
        elif major and int(major[1]) < CURRENT.get(action, 0):
            said.append(Finding("old-action", name, f"{uses} runs on a Node that is no longer supported; take v{CURRENT[action]} or newer."))
        elif major and action.split("/")[0] not in ("actions", "docker", "github"):
            said.append(Finding("pinned", name, f"{uses} is by a third party and its tag can be moved; name the commit.", "warning"))
    if re.search(STRANGERS, run):
        said.append(Finding("injection", name, "A text that strangers write is put into a shell script before the shell reads it; hand it over as an environment variable."))
    for key, value in {**(step.get("env") or {}), **(step.get("with") or {})}.items():
        if looks_secret(str(key), value) and "${{" not in str(value) and not isinstance(value, bool):
            said.append(Finding("secret", name, f"The value of {key} stands in the workflow; take it from secrets."))
    return said

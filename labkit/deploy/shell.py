"""Rules for the commands of tutorials: `docker run`, `docker exec`, `ollama`, `foundry`, as one types them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from typing import Any

from labkit.deploy import arguments
from labkit.deploy.dockerfile import variable_findings
from labkit.deploy.finding import Finding, looks_secret, pinned
from labkit.deploy.sizing import COMPOSE_UNITS, size_in
from labkit.deploy.stacks import which
from labkit.types import LabkitError

VALUED = ("-e", "--env", "-p", "--publish", "-v", "--volume", "--memory", "-m", "--cpus", "--name", "--gpus", "--runtime", "--network", "--user", "-u",
          "--shm-size", "--restart", "--mount", "--tmpfs", "--security-opt", "--cap-drop", "--cap-add", "--entrypoint", "--env-file", "-w", "--pids-limit")  # fmt: skip


def lint(text: str, config: Mapping[str, Any] | None = None) -> list[Finding]:
    """Every broken rule in lines of shell; `config` is that of the model they are about."""
    said: list[Finding] = []
    for line in filter(None, (one.strip() for one in text.replace("\\\n", " ").splitlines())):
        try:
            words = shlex.split(line, comments=True)
        except ValueError as error:
            said.append(Finding("syntax", line[:40], f"The shell cannot read this line: {error}."))
            continue
        if words[:2] == ["docker", "run"]:
            said += _run(words[2:], config)
        elif words[:2] == ["docker", "exec"]:
            said += _exec(words)
        elif words[:1] == ["vllm"]:
            said += arguments.lint(words[2:], config)
        elif words and words[0] == "foundry-local":
            said.append(Finding("no-such-command", words[0], "There is no program foundry-local; it is foundry, with the groups model, service and cache."))
        said += [Finding("model-tag", "ollama", "There is no model phi4:mini; it is called phi4-mini.")] * ("phi4:mini" in line)
        for address, right in (("/api/health", "/api/tags"), ("/metrics", "no address of Ollama")):
            if re.search(rf"11434{address}\b", line):
                said.append(Finding("endpoint", "ollama", f"{address} is no address of Ollama; it is {right}."))
    return said


def _run(words: list[str], config: Mapping[str, Any] | None) -> list[Finding]:
    options: dict[str, list[str]] = {}
    at = 0
    while at < len(words) and words[at].startswith("-"):
        name, sign, value = words[at].partition("=")
        if not sign and name in VALUED and at + 1 < len(words):
            at, value = at + 1, words[at + 1]
        options.setdefault(name, []).append(value)
        at += 1
    image = words[at] if at < len(words) else ""
    known, said = which(image if ":" in image.rsplit("/", 1)[-1] else image + ":"), pinned(image, image)
    gpu = bool({"--gpus"} & options.keys()) or "nvidia" in options.get("--runtime", [])
    for value in options.get("-e", []) + options.get("--env", []):
        name, _, given = value.partition("=")
        said += variable_findings(name, image)
        if looks_secret(name, given):
            said.append(Finding("secret", image, f"{name} stays in the shell's history and in docker inspect; give --env-file, or only the name."))
    for port in options.get("-p", []) + options.get("--publish", []):
        if not port.startswith(("127.0.0.1:", "[::1]:")):
            said.append(Finding("open-port", image, f"-p {port} is open to every network of the host; write 127.0.0.1:{port}."))
    limit = (options.get("--memory") or options.get("-m") or [""])[0]
    if not limit:
        said.append(Finding("memory-limit", image, "Without --memory the kernel chooses whom it kills; set it from a measurement."))
    if known and known.name == "vllm":
        if not gpu and "cpu" not in image:
            said.append(Finding("cuda-image", image, "This image is built for CUDA and gets no GPU; take the CPU image, or give --gpus."))
        try:
            memory = size_in(limit, COMPOSE_UNITS) if limit and not gpu else None
        except LabkitError as error:
            return [*said, Finding("memory-limit", image, str(error))]
        said += arguments.lint(words[at + 1 :], config, memory=memory, place=image)
    return said


def _exec(words: list[str]) -> list[Finding]:
    if "create" in words and "-f" in words and words[words.index("-f") + 1 :]:
        file = words[words.index("-f") + 1]
        if not file.startswith("/"):
            return [Finding("host-file", "ollama", f"-f {file} is looked for inside the container, and it lies on the host; mount it, or send it to /api/create.")]
    return []

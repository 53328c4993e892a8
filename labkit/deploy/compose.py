"""Rules for a Compose file, and the published schema where check-jsonschema is installed.

An exception is written into the service, with its reason: `x-allow: {rule: reason}`. It is then shown as accepted, not passed over.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from labkit.deploy import arguments
from labkit.deploy.dockerfile import health_findings, health_program, patience_findings, seconds_of, variable_findings
from labkit.deploy.finding import Finding, looks_secret, pinned, published, read_yaml
from labkit.deploy.sizing import COMPOSE_UNITS, GIB, size_in
from labkit.deploy.stacks import ENDPOINTS, OLLAMA_VARIABLES, Stack, which
from labkit.types import LabkitError


def lint(text: str, *, need: float | None = None, startup: float | None = None, config: Mapping[str, Any] | None = None) -> list[Finding]:
    """Every broken rule of a Compose file; `need`: bytes the model server takes, `startup`: its seconds to the first answer."""
    try:
        documents = read_yaml(text)
    except LabkitError as error:
        return [Finding("syntax", "compose", str(error))]
    if len(documents) != 1 or not isinstance(documents[0].get("services"), dict):
        return [Finding("syntax", "compose", "A Compose file is one document with services.")]
    whole = documents[0]
    said = [Finding("version-key", "version", "The key version has had no effect for years, and Compose warns of it; delete it.", "warning")] if "version" in whole else []
    said += [Finding("schema", place, sentence) for place, sentence in schema_errors(whole)]
    for name, service in whole["services"].items():
        if not isinstance(service, dict):
            said.append(Finding("syntax", name, "A service is keys with values."))
            continue
        said += _allowed(service, _service(name, service, need, startup, config))
    return said


def _allowed(service: Mapping[str, Any], found: list[Finding]) -> list[Finding]:
    reasons = service.get("x-allow") or {}
    return [replace(one, level="accepted", sentence=f"{one.sentence} Accepted: {reasons[one.rule]}.") if str(reasons.get(one.rule) or "").strip() else one for one in found]


def schema_errors(whole: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(place, sentence) of what the published Compose schema refuses; [] where the schema is not installed."""
    judge = published("compose-spec.json")
    errors = judge.iter_errors(json.loads(json.dumps(whole, default=str))) if judge else ()
    return [("/".join(map(str, error.absolute_path)) or "compose", error.message[:200] + ".") for error in errors]


def environment(service: Mapping[str, Any]) -> dict[str, Any]:
    """Variables of a service, from either form; None for one taken from the shell."""
    given = service.get("environment") or {}
    if isinstance(given, Mapping):
        return dict(given)
    pairs = [str(line).partition("=") for line in given]
    return {name: value if sign else None for name, sign, value in pairs}


def _service(name: str, service: Mapping[str, Any], need: float | None, startup: float | None, config: Mapping[str, Any] | None) -> list[Finding]:
    image = str(service.get("image") or "")
    known, tool = which(image), bool(service.get("profiles"))
    said = pinned(image, name) if image else []
    said += _hardening(name, service) + _variables(name, service, known)
    said += _limits(name, service, need if known and not tool else None)
    if not tool:
        said += _health(name, service, known, startup) + _ports(name, service, known)
        if service.get("restart") in (None, "no"):
            said.append(Finding("restart", name, "Nothing starts this service again when it ends; set restart: unless-stopped."))
    command = service.get("command") or []
    if known and known.name == "vllm" and command:
        said += arguments.lint(command, config, memory=None if _has_gpu(service) else _memory(service), place=name)
    text = command if isinstance(command, str) else " ".join(map(str, command))
    if known and known.name == "ollama" and "phi4:mini" in text + str(environment(service)):
        said.append(Finding("model-tag", name, "There is no model phi4:mini; it is called phi4-mini."))
    if known and known.name == "vllm" and "cpu" not in image and not _has_gpu(service):
        said.append(Finding("cuda-image", name, f"{image} is built for CUDA and no GPU is given to it; take the CPU image, or give a GPU."))
    return said


def _has_gpu(service: Mapping[str, Any]) -> bool:
    devices = (((service.get("deploy") or {}).get("resources") or {}).get("reservations") or {}).get("devices")
    return bool(devices or service.get("gpus") or service.get("runtime") == "nvidia")


def _memory(service: Mapping[str, Any]) -> int | None:
    """The memory limit in bytes; None when there is none that can be read."""
    given = (((service.get("deploy") or {}).get("resources") or {}).get("limits") or {}).get("memory") or service.get("mem_limit")
    try:
        return size_in(given, COMPOSE_UNITS) if given else None
    except LabkitError:
        return None


def _hardening(name: str, service: Mapping[str, Any]) -> list[Finding]:
    said = []

    def unless(right: Any, rule: str, sentence: str) -> None:
        if not right:
            said.append(Finding(rule, name, sentence))

    user = str(service.get("user") or "")
    unless(user and user.split(":")[0] not in ("0", "root"), "user", 'The service is root in its container; set user: "10001:10001".')
    unless(service.get("read_only") is True, "read-only", "Its root file system can be written; set read_only: true, and tmpfs for /tmp.")
    unless("ALL" in (service.get("cap_drop") or []), "capabilities", "It keeps capabilities it does not need; set cap_drop: [ALL].")
    options = [str(one).replace("=", ":") for one in service.get("security_opt") or []]
    unless(any(one in ("no-new-privileges", "no-new-privileges:true") for one in options), "no-new-privileges", "A program with setuid may become root; set security_opt: [no-new-privileges:true].")
    unless(not any("unconfined" in one for one in options), "seccomp", "seccomp is switched off; leave its default profile on.")
    unless(service.get("privileged") is not True, "privileged", "privileged gives it the whole machine; leave it out.")
    unless(not any(service.get(key) == "host" for key in ("network_mode", "pid", "ipc")), "host-namespace", "It shares a namespace with the host; leave that out (shm_size gives shared memory).")
    unless(not any("docker.sock" in str(one) for one in service.get("volumes") or []), "docker-socket", "Whoever has Docker's socket is root on the host; leave it out.")
    return said


def _variables(name: str, service: Mapping[str, Any], known: Stack | None) -> list[Finding]:
    said = []
    for key, value in environment(service).items():
        if looks_secret(key, value):
            said.append(Finding("secret", name, f"The value of {key} stands in the file; write ${{{key}:?}} and keep it in the shell or an untracked .env."))
        found = variable_findings(key, name)
        if not found and known and known.name == "ollama" and key.startswith("OLLAMA_") and key not in OLLAMA_VARIABLES:
            found = [Finding("ollama-variable", name, f"{key} is no variable of Ollama that this check knows; see `ollama serve --help`.", "warning")]
        said += found
    return said


def _limits(name: str, service: Mapping[str, Any], need: float | None) -> list[Finding]:
    limits = ((service.get("deploy") or {}).get("resources") or {}).get("limits") or {}
    memory, cpus = limits.get("memory") or service.get("mem_limit"), limits.get("cpus") or service.get("cpus")
    said = [] if cpus else [Finding("cpu-limit", name, "It may take every core of the machine; set deploy.resources.limits.cpus.")]
    if not memory:
        return [*said, Finding("memory-limit", name, "Without a memory limit the kernel chooses whom it kills; set deploy.resources.limits.memory from a measurement.")]
    try:
        given = size_in(memory, COMPOSE_UNITS)
    except LabkitError as error:
        return [*said, Finding("memory-limit", name, str(error))]
    if need is not None and given < need:
        said.append(Finding("memory-fits", name, f"The limit of {given / GIB:.2f} GiB is below the {need / GIB:.2f} GiB this model needs; the kernel would kill it."))
    return said


def _health(name: str, service: Mapping[str, Any], known: Stack | None, startup: float | None) -> list[Finding]:
    check = service.get("healthcheck") or {}
    if not check.get("test") or check.get("disable"):
        return [Finding("health", name, "There is no health check; nobody notices a server that runs and does not answer.")]
    program, command = health_program(json.dumps(check["test"]) if isinstance(check["test"], list) else str(check["test"]))
    said = health_findings(command, program, str(service.get("image") or ""), known, name)
    return said + (patience_findings(seconds_of(check.get("start_period") or "0s"), startup, name) if known else [])


def _ports(name: str, service: Mapping[str, Any], known: Stack | None) -> list[Finding]:
    said = []
    for port in service.get("ports") or []:
        address = str(port.get("host_ip") or "") if isinstance(port, Mapping) else str(port).rpartition(":")[0].rpartition(":")[0]
        if address.strip("[]") not in ("127.0.0.1", "::1"):
            why = "and Ollama asks nobody for a key" if known and known.name == "ollama" else "past the host's firewall rules"
            said.append(Finding("open-port", name, f"{port} is open to every network of the host, {why}; bind it to 127.0.0.1 and put a proxy with TLS and keys before it."))
    return said


def scrape_findings(text: str) -> list[Finding]:
    """Rules of a Prometheus scrape configuration: nobody counts at an address that does not exist."""
    said = []
    for document in read_yaml(text):
        for job in document.get("scrape_configs") or []:
            targets = " ".join(str(target) for group in job.get("static_configs") or [] for target in group.get("targets") or [])
            path, name = str(job.get("metrics_path") or "/metrics"), str(job.get("job_name") or "scrape")
            if "11434" in targets or "ollama" in (targets + name).lower():
                said.append(Finding("endpoint", name, f"{path} is no address of Ollama, which counts nothing; scrape the gateway before it."))
            elif path in ENDPOINTS["foundry"]:
                said.append(Finding("endpoint", name, f"{path} is no address of any server here; the gateway, vLLM and llama.cpp count at /metrics."))
    return said

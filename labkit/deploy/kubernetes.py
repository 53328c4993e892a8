"""Kubernetes manifests: built with `kubectl kustomize`, judged by the cluster's own schemas, then by rules no schema knows.

The schemas in `labkit/data/templates/kubernetes/schemas.json` are the part of Kubernetes 1.34's OpenAPI description that these kinds
need, with unknown fields refused, as `kubectl --validate=strict` does.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from labkit.deploy import arguments
from labkit.deploy.finding import Finding, looks_secret, pinned, read_yaml
from labkit.deploy.sizing import GIB, size_in
from labkit.deploy.stacks import ENDPOINTS, which
from labkit.types import LabkitError, NotInstalled

SCHEMAS = Path(__file__).parent.parent / "data" / "templates" / "kubernetes" / "schemas.json"
Objects = Sequence[Mapping[str, Any]]


def build(overlay: Path | str) -> str:
    """The manifests of a Kustomize folder as YAML. NotInstalled without kubectl or kustomize; LabkitError with what it said."""
    program = shutil.which("kubectl") or shutil.which("kustomize")
    if program is None:
        raise NotInstalled("kubectl is not installed, and overlays are built with it. Get it from kubernetes.io/docs/tasks/tools")
    command = [program, "kustomize"] if program.endswith("kubectl") else [program, "build"]
    done = subprocess.run([*command, str(overlay)], capture_output=True, text=True, timeout=60)
    if done.returncode:
        raise LabkitError(f"{overlay} does not build: {(done.stderr.strip().splitlines() or ['no reason given'])[-1][:300]}")
    return done.stdout


def lint(text: str, *, need: float | None = None, startup: float | None = None, config: Mapping[str, Any] | None = None) -> list[Finding]:
    """Schema errors and broken rules of built manifests; `need` and `startup` as measured (else from the annotations)."""
    try:
        objects = read_yaml(text)
    except LabkitError as error:
        return [Finding("syntax", "manifests", str(error))]
    said = [Finding("schema", _name(one), sentence) for one in objects for sentence in schema_errors(one)]
    if said:
        return said
    for one in objects:
        if one["kind"] == "Deployment":
            notes = one["metadata"].get("annotations") or {}
            bytes_needed = need if need is not None else float(notes.get("labkit/needed-memory-bytes") or 0)
            seconds = startup if startup is not None else float(notes.get("labkit/startup-seconds") or 0)
            for rule in RULES:
                said += rule(one, objects, bytes_needed, seconds)
            for container in one["spec"]["template"]["spec"]["containers"]:
                said += _vllm(container, config)
        elif one["kind"] == "Secret" and (one.get("data") or one.get("stringData")):
            said.append(Finding("secret", _name(one), "The values of a Secret stand in a file; base64 hides nothing: make it with kubectl create secret, or seal it."))
    return said


@cache
def _schemas() -> dict[str, Any]:
    return json.loads(SCHEMAS.read_text(encoding="utf-8"))


def schema_errors(one: Mapping[str, Any]) -> list[str]:
    """What the cluster's schema refuses in one object; a kind that is not among ours is an error too."""
    kept = _schemas()
    kind = f"{one.get('apiVersion')}/{one.get('kind')}"
    if kind not in kept["kinds"]:
        return [f"{kind} is no kind these schemas know; expected one of {', '.join(kept['kinds'])}."]
    errors = _judge(kept["kinds"][kind]).iter_errors(json.loads(json.dumps(one, default=str)))
    return [f"{'.'.join(map(str, error.absolute_path)) or kind}: {error.message[:200]}." for error in errors]


@cache
def _judge(definition: str) -> Any:
    from jsonschema import Draft202012Validator

    return Draft202012Validator({"$ref": f"#/definitions/{definition}", "definitions": _schemas()["definitions"]})


def _name(one: Mapping[str, Any]) -> str:
    return f"{one.get('kind')}/{(one.get('metadata') or {}).get('name')}"


def _pod(one: Mapping[str, Any]) -> Mapping[str, Any]:
    return one["spec"]["template"]["spec"]


def _of(kind: str, objects: Objects, one: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Objects of a kind in the namespace of `one`."""
    return [other for other in objects if other["kind"] == kind and other["metadata"].get("namespace") == one["metadata"].get("namespace")]


def _selects(labels: Mapping[str, str] | None, one: Mapping[str, Any]) -> bool:
    own = one["spec"]["template"].get("metadata", {}).get("labels") or {}
    return labels is not None and all(own.get(key) == value for key, value in labels.items())


def _pod_security(one: Mapping[str, Any], objects: Objects, need: float, startup: float) -> list[Finding]:
    said, pod = [], _pod(one)
    common = pod.get("securityContext") or {}
    for container in [*pod["containers"], *(pod.get("initContainers") or [])]:
        own, place = container.get("securityContext") or {}, f"{_name(one)}/{container['name']}"
        if not own.get("runAsNonRoot", common.get("runAsNonRoot")) or own.get("runAsUser", common.get("runAsUser")) == 0:
            said.append(Finding("user", place, "It may run as root; set runAsNonRoot: true and a runAsUser above 0."))
        if own.get("readOnlyRootFilesystem") is not True:
            said.append(Finding("read-only", place, "Its root file system can be written; set readOnlyRootFilesystem: true, and an emptyDir for /tmp."))
        if own.get("allowPrivilegeEscalation") is not False:
            said.append(Finding("no-new-privileges", place, "A program with setuid may become root; set allowPrivilegeEscalation: false."))
        if "ALL" not in ((own.get("capabilities") or {}).get("drop") or []):
            said.append(Finding("capabilities", place, "It keeps capabilities it does not need; set capabilities.drop: [ALL]."))
        if (own.get("seccompProfile") or common.get("seccompProfile") or {}).get("type") not in ("RuntimeDefault", "Localhost"):
            said.append(Finding("seccomp", place, "No seccomp profile is set; set seccompProfile.type: RuntimeDefault."))
        if own.get("privileged"):
            said.append(Finding("privileged", place, "privileged gives it the whole node; leave it out."))
    if any(pod.get(key) for key in ("hostNetwork", "hostPID", "hostIPC")) or any("hostPath" in volume for volume in pod.get("volumes") or []):
        said.append(Finding("host-namespace", _name(one), "It shares the node's network, processes or files; leave that out."))
    account = next((other for other in _of("ServiceAccount", objects, one) if other["metadata"]["name"] == pod.get("serviceAccountName")), {})
    if pod.get("automountServiceAccountToken", account.get("automountServiceAccountToken", True)):
        said.append(Finding("token", _name(one), "A token of the cluster is put into the pod, which never needs it; set automountServiceAccountToken: false."))
    return said


def _images_and_secrets(one: Mapping[str, Any], objects: Objects, need: float, startup: float) -> list[Finding]:
    said = []
    for container in [*_pod(one)["containers"], *(_pod(one).get("initContainers") or [])]:
        place = f"{_name(one)}/{container['name']}"
        said += pinned(container.get("image") or "", place)
        for variable in container.get("env") or []:
            if looks_secret(variable["name"], variable.get("value")):
                said.append(Finding("secret", place, f"The value of {variable['name']} stands in the manifest; take it from a secretKeyRef."))
    return said


def _resources(one: Mapping[str, Any], objects: Objects, need: float, startup: float) -> list[Finding]:
    said = []
    for container in _pod(one)["containers"]:
        place, given = f"{_name(one)}/{container['name']}", container.get("resources") or {}
        requests, limits = given.get("requests") or {}, given.get("limits") or {}
        for name in ("cpu", "memory"):
            if name not in requests:
                said.append(Finding("requests", place, f"No {name} is requested, so the pod lands on a node that has none left; request what was measured."))
        if "memory" not in limits:
            said.append(Finding("memory-limit", place, "Without a memory limit the node's kernel chooses whom it kills; set one from a measurement."))
        for where, table in (("request", requests), ("limit", limits)):
            text = str(table.get("memory", "1Gi"))
            if text.endswith("m"):
                said.append(Finding("memory-unit", place, f"The {where} {text} is thousandths of a byte; mega is M, mebi is Mi."))
            elif need and size_in(text) < need and where in ("limit", "request") and "memory" in table:
                said.append(Finding("memory-fits", place, f"The {where} of {size_in(text) / GIB:.2f} GiB is below the {need / GIB:.2f} GiB this model needs."))
    return said


def _budget(probe: Mapping[str, Any]) -> float:
    return (probe.get("initialDelaySeconds") or 0) + (probe.get("periodSeconds") or 10) * (probe.get("failureThreshold") or 3)


def _probes(one: Mapping[str, Any], objects: Objects, need: float, startup: float) -> list[Finding]:
    said = []
    for container in _pod(one)["containers"]:
        place = f"{_name(one)}/{container['name']}"
        for kind, why in (("readinessProbe", "traffic comes before the model is loaded"), ("livenessProbe", "a server that hangs is never restarted")):
            if kind not in container:
                said.append(Finding("probes", place, f"There is no {kind}: {why}."))
        starts = container.get("startupProbe") or container.get("livenessProbe")
        if starts and startup and _budget(starts) < startup:
            said.append(Finding("start-period", place, f"The probes give up after {_budget(starts):g} s and the model took {startup:.1f} s to load; it would be restarted for ever."))
        if "startupProbe" not in container and "livenessProbe" in container:
            said.append(Finding("startup-probe", place, "Without a startupProbe the livenessProbe judges a model that still loads; add one.", "warning"))
        known = which(container.get("image") or "")
        for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
            path = ((container.get(kind) or {}).get("httpGet") or {}).get("path")
            if known and path in ENDPOINTS.get(known.name, {}):
                said.append(Finding("endpoint", place, f"{path} is no address of {known.title}; it is {ENDPOINTS[known.name][path]}."))
    return said


def _replicas(one: Mapping[str, Any], objects: Objects) -> int:
    scalers = [other for other in _of("HorizontalPodAutoscaler", objects, one) if other["spec"]["scaleTargetRef"]["name"] == one["metadata"]["name"]]
    return scalers[0]["spec"].get("minReplicas", 1) if scalers else one["spec"].get("replicas") or 1


def _many(one: Mapping[str, Any], objects: Objects, need: float, startup: float) -> list[Finding]:
    """Rules of what runs more than once: budget, spread, volumes that several nodes can mount."""
    said, place, count = [], _name(one), _replicas(one, objects)
    budgets = [other for other in _of("PodDisruptionBudget", objects, one) if _selects((other["spec"].get("selector") or {}).get("matchLabels"), one)]
    for budget in budgets:
        least = budget["spec"].get("minAvailable")
        if least == "100%" or (isinstance(least, int) and least >= count) or budget["spec"].get("maxUnavailable") in (0, "0%"):
            said.append(Finding("disruption-blocks", _name(budget), f"It never lets one of {count} replicas go, so no node can be drained; set maxUnavailable: 1."))
    if count < 2:
        return said
    if not budgets:
        said.append(Finding("disruption", place, "No PodDisruptionBudget selects it; draining nodes may take every replica at once."))
    if not _pod(one).get("topologySpreadConstraints"):
        said.append(Finding("spread", place, "All replicas may land on one node; add topologySpreadConstraints."))
    claims = {(volume.get("persistentVolumeClaim") or {}).get("claimName") for volume in _pod(one).get("volumes") or []}
    for other in _of("PersistentVolumeClaim", objects, one):
        if other["metadata"]["name"] in claims and not {"ReadWriteMany", "ReadOnlyMany"} & set(other["spec"]["accessModes"]):
            said.append(Finding("volume-mode", _name(other), f"{other['spec']['accessModes'][0]} is mounted by one node only, and {count} replicas are spread; take ReadWriteMany or ReadOnlyMany."))
    return said


def _scaling(one: Mapping[str, Any], objects: Objects, need: float, startup: float) -> list[Finding]:
    said = []
    known = which(_pod(one)["containers"][0].get("image") or "")
    for other in _of("HorizontalPodAutoscaler", objects, one):
        if other["spec"]["scaleTargetRef"]["name"] != one["metadata"]["name"]:
            continue
        place = _name(other)
        if one["spec"].get("replicas") is not None:
            said.append(Finding("replicas-twice", place, "The Deployment fixes replicas as well, so every apply undoes the autoscaler; leave replicas out."))
        if other["spec"].get("minReplicas", 1) >= other["spec"]["maxReplicas"]:
            said.append(Finding("scale-range", place, "minReplicas is not below maxReplicas; there is nothing to scale."))
        for metric in other["spec"].get("metrics") or []:
            name = ((metric.get("pods") or {}).get("metric") or {}).get("name")
            if name and known and (known.waiting or "").replace(":", "_") != name:
                have = known.waiting or "no metric of its own"
                said.append(Finding("scale-metric", place, f"{name} is not counted by {known.title}, which has {have}; the autoscaler would stand still."))
            if (metric.get("resource") or {}).get("name") == "memory":
                said.append(Finding("scale-metric", place, "A model's memory does not grow with its load; scale by the requests that wait."))
    targets = {other["spec"]["scaleTargetRef"]["name"] for other in _of("HorizontalPodAutoscaler", objects, one)}
    for lost in targets - {other["metadata"]["name"] for other in _of("Deployment", objects, one)}:
        said.append(Finding("scale-target", _name(one), f"An autoscaler scales {lost}, which is not there; name this Deployment."))
    return said


def _network(one: Mapping[str, Any], objects: Objects, need: float, startup: float) -> list[Finding]:
    said, place = [], _name(one)
    mine = [other for other in _of("NetworkPolicy", objects, one) if _selects((other["spec"].get("podSelector") or {}).get("matchLabels") or {}, one)]
    if not mine:
        said.append(Finding("network", place, "No NetworkPolicy selects it: every pod of the cluster may call the model, and it may call anything."))
    for policy in mine:
        if "Egress" not in (policy["spec"].get("policyTypes") or []):
            said.append(Finding("egress", _name(policy), "What leaves the pod is not limited; add Egress to policyTypes."))
        if any(not rule or not rule.get("from") for rule in policy["spec"].get("ingress") or []):
            said.append(Finding("ingress", _name(policy), "An ingress rule without `from` lets everybody in; name who may."))
    services = [other for other in _of("Service", objects, one) if _selects(other["spec"].get("selector"), one)]
    if not services:
        said.append(Finding("service", place, "No Service selects its pods; nobody finds them."))
    names = {port.get("name") for container in _pod(one)["containers"] for port in container.get("ports") or []}
    ports = {port.get("containerPort") for container in _pod(one)["containers"] for port in container.get("ports") or []}
    known = which(_pod(one)["containers"][0].get("image") or "")
    for other in services:
        for port in other["spec"]["ports"]:
            if port.get("targetPort", port["port"]) not in names | ports:
                said.append(Finding("target-port", _name(other), f"It sends to {port.get('targetPort', port['port'])}, which no container opens."))
        if other["spec"].get("type") in ("NodePort", "LoadBalancer"):
            said.append(Finding("open-port", _name(other), f"{other['spec']['type']} opens the model to the outside without TLS; take ClusterIP behind an ingress that has it."))
        if (other["metadata"].get("annotations") or {}).get("prometheus.io/scrape") == "true" and known and known.metrics is None:
            said.append(Finding("endpoint", _name(other), f"{known.title} has no /metrics; scrape the gateway before it."))
    return said


def _vllm(container: Mapping[str, Any], config: Mapping[str, Any] | None) -> list[Finding]:
    known = which(container.get("image") or "")
    return arguments.lint(container.get("args") or [], config, place=container["name"]) if known and known.name == "vllm" else []


RULES: tuple[Callable[[Mapping[str, Any], Objects, float, float], list[Finding]], ...] = (
    _pod_security, _images_and_secrets, _resources, _probes, _many, _scaling, _network,
)  # fmt: skip

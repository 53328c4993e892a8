"""A checklist that runs: each item looks at rendered files, at a live gateway, or at a model's folder, and says what it saw.

An item is a function of a `Subject`; it passes, fails, or is not applicable because what it looks at was not given. Nothing is
ticked by hand.
"""

from __future__ import annotations

import json
import re
import ssl
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from labkit.deploy.check import check, recorded
from labkit.deploy.finding import Finding
from labkit.deploy.stacks import stack
from labkit.types import LabkitError

PASS, FAIL, NOT_APPLICABLE = "pass", "fail", "not applicable"
Result = tuple[str, str]


@dataclass(frozen=True)
class Item:
    """One line of the checklist."""

    group: str
    name: str
    result: str
    reason: str

    def row(self) -> dict[str, str]:
        """Flat, for a table."""
        return {"group": self.group, "item": self.name, "result": self.result, "why": self.reason}


@dataclass(frozen=True)
class Subject:
    """What is looked at: a rendered folder, the address of a live gateway and its key, a model's folder and who signs it."""

    folder: Path | None = None
    url: str = ""
    key: str = ""
    model: Path | None = None
    public_key: str = ""
    authority: Path | None = None  # certificate to trust, for a gateway with one of its own
    config: dict[str, Any] | None = field(default=None, repr=False)

    @cached_property
    def findings(self) -> list[Finding]:
        return check(self.folder, config=self.config) if self.folder else []

    @cached_property
    def values(self) -> dict[str, Any]:
        return recorded(self.folder) if self.folder else {}

    @cached_property
    def _opener(self) -> urllib.request.OpenerDirector:
        own: list[Any] = [urllib.request.ProxyHandler({})]  # a proxy would answer in the gateway's place
        if self.url.startswith("https"):
            own.append(urllib.request.HTTPSHandler(context=ssl.create_default_context(cafile=str(self.authority) if self.authority else None)))
        return urllib.request.build_opener(*own)

    def ask(self, path: str, body: bytes | None = None, *, keyed: bool = True) -> tuple[int, str, dict[str, str]]:
        """(status, text, headers); status 0 and the reason when nobody answers."""
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if keyed and self.key else {})
        try:
            with self._opener.open(urllib.request.Request(self.url.rstrip("/") + path, body, headers), timeout=20) as reply:
                return reply.status, reply.read().decode("utf-8", "replace"), dict(reply.headers)
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode("utf-8", "replace"), dict(error.headers)
        except (OSError, ValueError) as error:
            return 0, str(error), {}


def readiness(subject: Subject) -> list[Item]:
    """The whole checklist. LabkitError when nothing was given to look at."""
    if not (subject.folder or subject.url or subject.model):
        raise LabkitError("There is nothing to look at; give a rendered folder, the address of a gateway, or a model's folder.")
    lines = []
    for group, name, needs, look in ITEMS:
        if not getattr(subject, needs):
            result: Result = (NOT_APPLICABLE, _ABSENT[needs])
        else:
            result = look(subject)
        lines.append(Item(group, name, *result))
    return lines


_ABSENT = {"folder": "no rendered folder was given", "url": "no address of a gateway was given", "model": "no folder of a model was given"}


def _rules(*names: str, target: str = "") -> Callable[[Subject], Result]:
    """Files break none of these rules; only where the folder has files of that kind."""

    def look(subject: Subject) -> Result:
        if target and not any(subject.folder.rglob(target)):  # type: ignore[union-attr]
            return NOT_APPLICABLE, f"the folder holds no {target}"
        broken = [one for one in subject.findings if one.rule in names and one.level != "accepted"]
        accepted = [one for one in subject.findings if one.rule in names and one.level == "accepted"]
        if broken:
            more = f" (and {len(broken) - 1} more)" if len(broken) > 1 else ""
            return FAIL, f"{broken[0].file}, {broken[0].place}: {broken[0].sentence}{more}"
        return PASS, f"{len(accepted)} exceptions with a reason" if accepted else "no rule is broken: " + ", ".join(names)

    return look


def _measured(subject: Subject) -> Result:
    sources = (subject.values.get("needs") or {}).get("sources") or {}
    if not sources:
        return FAIL, "there is no values.json, so nobody knows where the numbers come from; render the folder with labkit deploy render"
    planned = [name for name in ("memory", "startup") if "measured" not in sources.get(name, "") or "not measured" in sources[name]]
    told = "; ".join(f"{name}: {sources.get(name)}" for name in ("memory", "startup"))
    return (FAIL if planned else PASS), told


def _alerts(subject: Subject) -> Result:
    engine = subject.values.get("engine")
    files = list(subject.folder.rglob("alerts.yml"))  # type: ignore[union-attr]
    if not files and engine and stack(engine).metrics is None:
        return FAIL, f"{stack(engine).title} counts nothing, so nobody can be told; put the gateway before it"
    if not files:
        return FAIL, "there are no alert rules; labkit's own are in its templates, under monitoring"
    return _rules("alert-metric")(subject)


def _network(subject: Subject) -> Result:
    return _rules("network", "ingress", "egress", "open-port")(subject)


def _keys_in_files(subject: Subject) -> Result:
    engine = subject.values.get("engine")
    if not engine:
        return NOT_APPLICABLE, "the folder was not rendered by labkit"
    known = stack(engine)
    if known.key is None:
        return FAIL, f"{known.title} asks nobody for a key; put the gateway or a proxy with keys before it"
    files = [file for file in subject.folder.rglob("*.yaml") if known.key in file.read_text(encoding="utf-8")]  # type: ignore[union-attr]
    return (PASS, f"{known.key} comes from outside the files") if files else (FAIL, f"{known.key} is set nowhere, so no key is asked for")


def _health(subject: Subject) -> Result:
    status, text, _ = subject.ask("/health", keyed=False)
    return (PASS if status == 200 else FAIL), f"/health answered {status} {text[:80]}".strip()


def _metrics(subject: Subject) -> Result:
    status, text, _ = subject.ask("/metrics")
    from labkit.deploy.dashboards import PANELS, metrics_in

    names = set(re.findall(r"^([A-Za-z_:][\w:]*)", text, re.MULTILINE)) | set(re.findall(r"^# TYPE (\S+)", text, re.MULTILINE))
    base = {re.sub(r"_(total|bucket|sum|count)$", "", name) for name in names}
    missing = sorted({metric for panel in PANELS for metric in metrics_in(panel[3]) if metric not in names and re.sub(r"_(total|bucket)$", "", metric) not in base})
    if status != 200:
        return FAIL, f"/metrics answered {status}"
    return (FAIL, f"the dashboard asks for {missing[0]}, which is not there") if missing else (PASS, f"{len(names)} names, all that the dashboard asks for")


def _auth(subject: Subject) -> Result:
    status, _, headers = subject.ask("/v1/models", keyed=False)
    if status != 401:
        return FAIL, f"/v1/models without a key answered {status}"
    with_key = subject.ask("/v1/models")[0] if subject.key else None
    if with_key not in (None, 200):
        return FAIL, f"without a key 401, but with the key given {with_key}"
    return PASS, "401 without a key" + (", 200 with one" if with_key else "") + (", and says how to ask" if headers.get("www-authenticate") else "")


def _answers(subject: Subject) -> Result:
    status, text, _ = subject.ask("/v1/models")
    try:
        name = json.loads(text)["data"][0]["id"]
    except (ValueError, KeyError, IndexError, TypeError):
        return FAIL, f"/v1/models answered {status}, no list of models"
    body = json.dumps({"model": name, "messages": [{"role": "user", "content": "Turn on the light in the kitchen"}], "max_tokens": 8}).encode()
    status, text, _ = subject.ask("/v1/chat/completions", body)
    return (PASS if status == 200 and '"choices"' in text else FAIL), f"a chat with {name} answered {status}"


def _size_limit(subject: Subject) -> Result:
    status, _, _ = subject.ask("/v1/chat/completions", b'{"model": "' + b"a" * 8_000_000 + b'"}')
    return (PASS if status in (413, 0) else FAIL), "eight megabytes were " + ("refused" if status in (413, 0) else f"read, and answered {status}")


def _rate_limit(subject: Subject) -> Result:
    found = [subject.ask("/v1/models")[0] for _ in range(40)]
    return (PASS, f"the {found.index(429) + 1}th of 40 quick requests got 429") if 429 in found else (FAIL, "40 quick requests were all answered; start it with --per-minute")


def _tls(subject: Subject) -> Result:
    if subject.url.startswith("https://"):
        status, reason, _ = subject.ask("/health", keyed=False)
        return (PASS, "https with a certificate that is trusted") if status else (FAIL, reason[:120])
    host = re.sub(r"^https?://|[:/].*$", "", subject.url)
    if host in ("127.0.0.1", "localhost"):
        return NOT_APPLICABLE, "it listens on loopback; TLS ends at the proxy before it"
    return FAIL, f"{subject.url} sends keys and prompts in the clear"


def _signed(subject: Subject) -> Result:
    from labkit.serve.manifest import verify

    if not subject.public_key:
        return FAIL, "no public key was given, so the signature was not checked"
    try:
        told = verify(subject.model, subject.public_key)  # type: ignore[arg-type]
    except LabkitError as error:
        return FAIL, str(error)
    return PASS, f"{len(told['files'])} files, signed {told['made']}"


def _bill(subject: Subject) -> Result:
    files = [file for file in (*subject.model.glob("*bom*.json"), *subject.model.glob("*.cdx.json"))]  # type: ignore[union-attr]
    for file in files:
        try:
            told = json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            continue
        if told.get("bomFormat") == "CycloneDX" and told.get("components"):
            return PASS, f"{file.name}: {len(told['components'])} components"
    return FAIL, "there is no bill of materials (bom.json in CycloneDX); labkit.serve.manifest.bill writes one"


def _no_pickle(subject: Subject) -> Result:
    found = sorted(file.name for file in subject.model.rglob("*") if file.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt"))  # type: ignore[union-attr]
    return (FAIL, f"{found[0]} may run code when it is opened; convert it to safetensors") if found else (PASS, "no file that could be a pickle")


ITEMS: tuple[tuple[str, str, str, Callable[[Subject], Result]], ...] = (
    ("files", "schemas", "folder", _rules("schema", "syntax", "kustomize", "not-built", "dashboard", "modelfile")),
    ("files", "images are pinned by digest", "folder", _rules("pinned", "digest", "image-exists", "cuda-image")),
    ("files", "packages and actions are pinned", "folder", _rules("pinned-packages", "unchecked-download", "piped-script", "old-action")),
    ("files", "health checks and probes", "folder", _rules("health", "health-program", "endpoint", "probes", "startup-probe")),
    ("files", "starts are given their time", "folder", _rules("start-period")),
    ("files", "requests and limits hold the model", "folder", _rules("requests", "memory-limit", "memory-fits", "memory-unit", "cpu-limit", "vllm-memory")),
    ("files", "numbers were measured", "folder", _measured),
    ("files", "least privilege", "folder", _rules("user", "read-only", "capabilities", "no-new-privileges", "seccomp", "privileged", "host-namespace", "docker-socket", "token")),
    ("files", "no secret in a file", "folder", _rules("secret")), ("files", "a key is asked for", "folder", _keys_in_files),
    ("files", "who may reach it", "folder", _network),
    ("files", "somebody is told", "folder", _alerts),
    ("files", "more than one replica", "folder", _rules("disruption", "disruption-blocks", "spread", "volume-mode", "scale-metric", "scale-range", "scale-target", "replicas-twice", target="autoscaler.yaml")),
    ("files", "a pipeline that asks and watches", "folder", _rules("approval", "untested", "unwatched", "permissions", "timeout", "injection", "untrusted-code", target="deploy.yml")),
    ("gateway", "health", "url", _health), ("gateway", "metrics", "url", _metrics), ("gateway", "a model answers", "url", _answers),
    ("gateway", "keys", "url", _auth), ("gateway", "size limit", "url", _size_limit), ("gateway", "rate limit", "url", _rate_limit), ("gateway", "TLS", "url", _tls),
    ("model", "signed manifest", "model", _signed), ("model", "bill of materials", "model", _bill), ("model", "no pickles", "model", _no_pickle),
)  # fmt: skip

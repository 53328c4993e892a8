"""Rules for a Dockerfile: what hadolint, which knows syntax and shells, cannot know of a model server.

A health check must call a program its image holds, and wait as long as a model takes to load; a model is not pulled in a build.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from labkit.deploy.finding import Finding, looks_secret, pinned
from labkit.deploy.stacks import ENDPOINTS, OLLAMA_NEVER, Stack, which
from labkit.types import LabkitError

WORDS = ("FROM", "RUN", "CMD", "LABEL", "EXPOSE", "ENV", "ADD", "COPY", "ENTRYPOINT", "VOLUME", "USER", "WORKDIR", "ARG", "ONBUILD", "STOPSIGNAL",
         "HEALTHCHECK", "SHELL", "MAINTAINER")  # fmt: skip
SLIM = ("python",)  # images whose -slim and -alpine forms hold no curl


@dataclass(frozen=True)
class Instruction:
    """One instruction: the line it starts in (from 1), its word in capitals, the rest on one line."""

    line: int
    word: str
    value: str


def parse(text: str) -> list[Instruction]:
    """Instructions in order, continued lines joined, comments left out. LabkitError for a word that is none."""
    found: list[Instruction] = []
    start, kept = 0, ""
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("#") or (not line.strip() and not kept):
            continue
        start = start or number
        kept += line.strip().removesuffix("\\").rstrip() + " "
        if line.rstrip().endswith("\\"):
            continue
        word, _, value = kept.strip().partition(" ")
        if word.upper() not in WORDS:
            raise LabkitError(f"Line {start} begins with {word[:30]!r}, which is no instruction of a Dockerfile.")
        found.append(Instruction(start, word.upper(), value.strip()))
        start, kept = 0, ""
    return found


def lint(text: str, *, startup: float | None = None) -> list[Finding]:
    """Every broken rule; `startup`: measured seconds until the server answers."""
    try:
        found = parse(text)
    except LabkitError as error:
        return [Finding("syntax", "Dockerfile", str(error))]
    froms = [one for one in found if one.word == "FROM"]
    if not froms:
        return [Finding("syntax", "Dockerfile", "There is no FROM; an image is built upon another.")]
    stages = {one.value.split()[-1] for one in froms if re.search(r"\sAS\s", one.value, re.IGNORECASE)}
    said = [note for one in froms for note in pinned(_base(one), f"line {one.line}") if _base(one) not in stages and "${" not in _base(one) and _base(one) != "scratch"]
    last = [one for one in found if one.line >= froms[-1].line]
    said += _user(last) + _health(last, which(_base(froms[-1])), _base(froms[-1]), startup) + _start(last)
    for one in found:
        said += _one(one)
    if len([one for one in last if one.word == "CMD"]) > 1:
        said.append(Finding("syntax", "CMD", "CMD is given more than once; only the last counts."))
    return said


def _base(one: Instruction) -> str:
    return next(word for word in one.value.split() if not word.startswith("--"))


def _user(last: list[Instruction]) -> list[Finding]:
    users = [one for one in last if one.word == "USER"]
    if not users:
        return [Finding("user", "USER", "No USER is set, so the server is root in its container; add USER 10001:10001.")]
    name = users[-1].value.split(":")[0]
    if name in ("root", "0"):
        return [Finding("user", f"line {users[-1].line}", "The last USER is root; end with one that owns nothing.")]
    if not name.isdigit():
        return [Finding("user", f"line {users[-1].line}", f"USER {name} is a name, and Kubernetes' runAsNonRoot can only judge a number.", "warning")]
    return []


def health_program(value: str) -> tuple[str, str]:
    """(program, whole command) of a HEALTHCHECK or a Compose test; "" for NONE."""
    command = re.sub(r"^(--\S+\s+)*", "", value).removeprefix("CMD-SHELL").removeprefix("CMD").strip()
    if command.startswith("["):
        try:
            words = [word for word in json.loads(command) if word not in ("CMD", "CMD-SHELL")]
        except ValueError:
            return "", command
        command = " ".join(words)
    return (command.split() or [""])[0], command


def health_findings(command: str, program: str, base: str, known: Stack | None, place: str) -> list[Finding]:
    """Rules of a health check's command: its program is in the image, its address is one the server has."""
    said = []
    slim = base.split("/")[-1].split(":")[0] in SLIM and re.search(r"slim|alpine", base)
    if (known and program not in known.holds and program not in ("NONE", "") and not program.startswith("$")) or (slim and program in ("curl", "wget")):
        other = f"its own way is {' '.join(known.check[:2])}" if known else "python is there: urllib.request.urlopen"
        said.append(Finding("health-program", place, f"The health check calls {program}, which {base or 'the image'} does not hold, so it always fails; {other}."))
    wrong = ENDPOINTS.get(known.name, {}) if known else {}
    for path, right in sorted(wrong.items(), key=lambda one: -len(one[0])):  # /api/health before /health
        if re.search(re.escape(path) + r"(?![\w/-])", command):
            return [*said, Finding("endpoint", place, f"{path} is no address of {known.title if known else 'this server'}; it is {right}.")]
    return said


def seconds_of(text: str) -> float:
    """Seconds of Docker's durations: 30s, 1m30s, 500ms."""
    units = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001}
    return sum(float(number) * units[unit] for number, unit in re.findall(r"(\d+(?:\.\d+)?)(ms|h|m|s)", str(text)))


def _health(last: list[Instruction], known: Stack | None, base: str, startup: float | None) -> list[Finding]:
    checks = [one for one in last if one.word == "HEALTHCHECK"]
    if not checks:
        return [Finding("health", "HEALTHCHECK", "There is no HEALTHCHECK; nobody notices a server that runs and does not answer.")]
    place = f"line {checks[-1].line}"
    program, command = health_program(checks[-1].value)
    said = health_findings(command, program, base, known, place)
    period = re.search(r"--start-period=(\S+)", checks[-1].value)
    said += patience_findings(seconds_of(period[1]) if period else 0.0, startup, place)
    return said


def patience_findings(period: float, startup: float | None, place: str) -> list[Finding]:
    """The rule of the start period: at least the measured start-up."""
    if startup is None or period >= startup:
        return []
    return [Finding("start-period", place, f"The start period is {period:g} s and the model took {startup:.1f} s to load here; the container is called unhealthy while it starts.")]


def _start(last: list[Instruction]) -> list[Finding]:
    return [Finding("exec-form", f"line {one.line}", f"{one.word} in shell form gives the signals to a shell; the server is killed in mid-answer: write a list.")
            for one in last if one.word in ("CMD", "ENTRYPOINT") and not one.value.startswith("[")]  # fmt: skip


def _one(one: Instruction) -> list[Finding]:
    place, said = f"line {one.line}", []
    if one.word in ("ENV", "ARG"):
        for name, value in re.findall(r"(\w+)(?:=|\s+)(\"[^\"]*\"|\S*)", one.value):
            if looks_secret(name, value):
                said.append(Finding("secret", place, f"{name} is written into the image, where everybody who has it can read it; give it when it runs."))
            said += variable_findings(name, place)
    if one.word == "RUN":
        if re.search(r"\bollama\s+(pull|run|create)\b", one.value) and "ollama serve" not in one.value:
            said.append(Finding("build-time-pull", place, "`ollama pull` asks a server, and while an image is built none runs; pull when the container runs, into a volume."))
        if "phi4:mini" in one.value:
            said.append(Finding("model-tag", place, "There is no model phi4:mini; it is called phi4-mini."))
        if re.search(r"\b(curl|wget)\b[^|;&]*\|\s*(ba|z)?sh", one.value):
            said.append(Finding("piped-script", place, "A script from the network is run unread; take a pinned package, or check its hash first."))
        if re.search(r"\bpip3?\s+install\b", one.value) and not re.search(r"==|--constraint|-c\s|--require-hashes|\.whl|-r\s|--requirement", one.value):
            said.append(Finding("pinned-packages", place, "pip installs whatever is newest; name versions (==), or give --constraint."))
    if one.word == "ADD" and re.search(r"https?://", one.value) and "--checksum" not in one.value:
        said.append(Finding("unchecked-download", place, "ADD takes a file from the network as it is; give --checksum=sha256:…"))
    if one.word == "COPY" and re.match(r"(--\S+\s+)*\.\s", one.value):
        said.append(Finding("copy-all", place, "COPY . takes keys and models along; name what the image needs, and write a .dockerignore.", "warning"))
    if one.word == "EXPOSE" and one.value.split("/")[0] == "22":
        said.append(Finding("ssh", place, "A server needs no ssh; docker exec looks inside."))
    return said


def variable_findings(name: str, place: str) -> list[Finding]:
    """Rules of an environment variable's name."""
    if why := OLLAMA_NEVER.get(name):
        return [Finding("ollama-variable", place, f"Ollama does not read {name}; {why}.")]
    if name in ("HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN"):
        return [Finding("hub-token", place, f"{name} is the old name; it is HF_TOKEN.", "warning")]
    return []

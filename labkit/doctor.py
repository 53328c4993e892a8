"""Is this machine ready? Each finding is OK, WARN or FAIL, and says the one command that mends it."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from labkit import engines, host
from labkit._files import size

OK, WARN, FAIL = "OK", "WARN", "FAIL"
FOR_ONE_LAB = 2_000_000_000  # bytes of memory: a lab stays below this
FOR_ALL_LABS = 3_000_000_000  # bytes of disk: artifacts of every lab in the short profile
NOISY = 0.25  # spread of the calibration loop above which timings mean little
IMPORT_SECONDS = 120


@dataclass(frozen=True)
class Finding:
    """One thing looked at; `fix` is a command (or empty when nothing is wrong)."""

    status: str
    what: str
    found: str
    fix: str = ""


def examine(*, imports: bool = True) -> list[Finding]:
    """Look at everything; `imports=False` skips loading the engines, which takes seconds."""
    found = [_python(), *_packages()]
    if imports:
        found += [_engine(name) for name in engines.ENGINES]
    return [*found, _memory(), _cpus(), _disk(), _compiler(), _kernel(), _noise()]


def status(findings: list[Finding]) -> str:
    """The worst status among the findings."""
    return max((f.status for f in findings), key=(OK, WARN, FAIL).index, default=OK)


def text(findings: list[Finding]) -> str:
    """The findings as lines for a terminal."""
    lines = []
    for finding in findings:
        lines.append(f"{finding.status:<5} {finding.what}: {finding.found}")
        if finding.fix:
            lines.append(f"      fix:  {finding.fix}")
    return "\n".join(lines)


def to_json(findings: list[Finding]) -> dict:
    """The same for `--json`."""
    return {"status": status(findings), "findings": [asdict(f) for f in findings]}


def _python() -> Finding:
    version = platform.python_version()
    bounds = SpecifierSet(_project().get("requires-python", ""))
    if not bounds.contains(version, prereleases=True):
        return Finding(FAIL, "Python", f"{version}, but {bounds} is needed", "python3.11 -m venv .venv")
    inside = sys.prefix != sys.base_prefix
    return Finding(OK, "Python", f"{version} in {sys.prefix}" + ("" if inside else " (no virtual environment)"))


def requirements() -> list[tuple[str, str | None]]:
    """(requirement, extra or None) as labkit itself declares them."""
    project = _project()
    core: list[tuple[str, str | None]] = [(line, None) for line in project.get("dependencies", [])]
    extras = project.get("optional-dependencies", {})
    return core + [(line, extra) for extra, lines in extras.items() for line in lines]


def _project() -> dict:
    """The `project` table of pyproject.toml in a checkout, else the same facts from the installed metadata."""
    file = Path(__file__).parent.parent / "pyproject.toml"
    if file.exists():
        import tomllib

        return tomllib.loads(file.read_text(encoding="utf-8"))["project"]
    found: dict = {"requires-python": metadata.metadata("labkit")["Requires-Python"], "dependencies": []}
    for line in metadata.requires("labkit") or []:
        extra = re.search(r"extra\s*==\s*['\"]([^'\"]+)['\"]", line)
        extras = found.setdefault("optional-dependencies", {})
        (extras.setdefault(extra.group(1), []) if extra else found["dependencies"]).append(line)
    return found


def _packages() -> Iterator[Finding]:
    """One finding a package (the narrowest bound wins); packages of an extra may be absent."""
    seen: set[str] = set()
    for line, extra in requirements():
        needed = Requirement(line)
        if needed.name in seen or needed.name == "labkit":
            continue
        if needed.marker and not needed.marker.evaluate({"extra": extra or ""}):
            continue
        seen.add(needed.name)
        yield _package(needed.name, needed.specifier, extra)


def _package(name: str, bounds: SpecifierSet, extra: str | None) -> Finding:
    target = f'"labkit[{extra}]"' if extra else '"labkit"'
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Finding(WARN if extra else FAIL, name, f"absent, {bounds} is needed", f"pip install {target}")
    if not bounds.contains(version.split("+")[0], prereleases=True):
        return Finding(FAIL, name, f"{version}, but {bounds} is needed", f'pip install "{name}{bounds}"')
    return Finding(OK, name, version)


def _engine(name: str) -> Finding:
    """Import what the engine needs in a child process: a crash or a hang there is a finding, not our end."""
    module = engines.engine(name)
    version = engines.version(name)
    install = f'pip install "labkit[{module.EXTRA}]"'
    what = f"{module.TITLE} ({name})"
    if version is None:
        return Finding(WARN, what, "not installed", install)
    packages = metadata.distribution(module.PACKAGE).read_text("top_level.txt") or ""
    importable = getattr(module, "IMPORTS", None) or _module_of(module.PACKAGE, packages)
    code = "import " + ", ".join([importable] if isinstance(importable, str) else importable)
    try:
        child = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=IMPORT_SECONDS, env=_quiet()
        )
    except subprocess.TimeoutExpired:
        return Finding(FAIL, what, f"importing it took over {IMPORT_SECONDS} s", f"{install} --force-reinstall")
    if child.returncode:
        said = (child.stderr.strip().splitlines() or [f"exit status {child.returncode}"])[-1]
        return Finding(FAIL, what, f"{version} does not import: {said}", f"{install} --force-reinstall")
    return Finding(OK, what, f"{version} imports")


def _module_of(package: str, top_level: str) -> str:
    """Import name of a distribution: from its own record, else from the files it installed."""
    names = [n for n in top_level.split() if not n.startswith("_")]
    if not names:
        owners = metadata.packages_distributions()
        wanted = package.lower().replace("_", "-")
        names = [n for n, dists in owners.items() if wanted in {d.lower().replace("_", "-") for d in dists}]
        names = sorted((n for n in names if not n.startswith(("_", "bin"))), key=len)
    return names[0] if names else package.replace("-", "_")


def _quiet() -> dict[str, str]:
    return {**os.environ, "OMP_WAIT_POLICY": "passive", "HF_HUB_OFFLINE": "1"}


def _memory() -> Finding:
    limit, use = host.cgroup_memory()
    left = host.available_memory()
    where = f"limit of this container {size(limit)}, in use {size(use or 0)}" if limit else "no container limit"
    found = f"{size(left)} available ({where})"
    if left < FOR_ONE_LAB:
        return Finding(WARN, "memory", f"{found}; labs use up to {size(FOR_ONE_LAB)}", "labkit run --profile ci")
    return Finding(OK, "memory", found)


def _cpus() -> Finding:
    quota = host.cgroup_cpus()
    limit = f"container limit {quota:g}" if quota else "no container limit"
    return Finding(OK, "CPUs", f"{host.cpus()} usable of {os.cpu_count()} ({limit}), {host.cpu_model()}")


def _disk() -> Finding:
    free = host.free_disk()
    found = f"{size(free)} free at {host.home()}"
    if free < FOR_ALL_LABS:
        return Finding(WARN, "disk", f"{found}; about {size(FOR_ALL_LABS)} is used by all labs", "labkit clean")
    return Finding(OK, "disk", found)


def _compiler() -> Finding:
    """llama-cpp-python comes as source: it wants a C++ compiler unless it is installed already."""
    names = ("c++", "g++", "clang++") if os.name != "nt" else ("cl", "clang-cl", "g++")
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found:
        return Finding(OK, "C++ compiler", found)
    installed = engines.version("llamacpp")
    fix = {"darwin": "xcode-select --install", "win32": "winget install Microsoft.VisualStudio.2022.BuildTools"}
    return Finding(
        OK if installed else WARN,
        "C++ compiler",
        "absent" + (", and not needed: llama.cpp is built already" if installed else ""),
        "" if installed else fix.get(sys.platform, "sudo apt-get install -y g++"),
    )


def _kernel() -> Finding:
    """The `python3` kernel that Jupyter would start must be this very interpreter."""
    from jupyter_client.kernelspec import KernelSpecManager, NoSuchKernel

    fix = f"{sys.executable} -m ipykernel install --sys-prefix"
    try:
        argv = KernelSpecManager().get_kernel_spec("python3").argv
    except NoSuchKernel:
        return Finding(FAIL, "notebook kernel", "no kernel called python3", fix)
    named = shutil.which(argv[0]) or argv[0]
    # Jupyter puts its own interpreter for a bare "python"; links are not followed, as environments share a target
    if argv[0] not in ("python", "python3") and Path(named).absolute().parent != Path(sys.executable).parent:
        return Finding(FAIL, "notebook kernel", f"python3 starts {named}, not {sys.executable}", fix)
    return Finding(OK, "notebook kernel", f"python3 starts {sys.executable}")


def _noise() -> Finding:
    before = host.busy_ticks()
    spread = host.noise()
    others = host.others_share(before, host.busy_ticks())
    found = f"spread of a fixed piece of work {spread:.0%}"
    if others is not None:
        found += f", others used {others:.0%} of a CPU"
    if spread > NOISY or (others or 0) > 0.25:
        return Finding(WARN, "quietness", f"{found}; timings taken now mislead", "ps aux --sort=-%cpu | head")
    return Finding(OK, "quietness", found)


def main(as_json: bool) -> int:
    """Print the findings; exit status 1 when one is FAIL."""
    found = examine()
    print(json.dumps(to_json(found)) if as_json else f"{text(found)}\n\n{status(found)}")
    return 1 if status(found) == FAIL else 0

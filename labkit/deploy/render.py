"""Templates of `labkit/data/templates` filled with measured values, into a folder that is then checked by the rules.

Jinja with its own marks, `[[ value ]]` and `[% if %]`, because Compose, GitHub Actions and Prometheus all use braces; an unknown
value is an error (StrictUndefined). The folder holds values.json: every number with its source.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from labkit._files import written_beside
from labkit.deploy.sizing import MIB, Needs
from labkit.deploy.stacks import WEBUI, launch, stack
from labkit.types import LabkitError

TEMPLATES = Path(__file__).parent.parent / "data" / "templates"
TARGETS = ("compose", "kubernetes")
UID = 10001  # above the users of distributions, so that it owns nothing on the host
NAME = r"[a-z][a-z0-9-]{0,38}[a-z0-9]"  # what Kubernetes, Compose and a DNS label take
DIGEST = r"sha256:[0-9a-f]{64}"


def render(
    folder: Path | str, *, model: str, engine: str, precision: str, target: str, sized: Needs, context: int, slots: int = 1,
    name: str | None = None, digest: str | None = None, gpu: bool = False,
) -> list[Path]:  # fmt: skip
    """Write the files of one deployment into `folder`, which must be new or empty; gives them, sorted.

    `digest` pins the image that everything is built upon. LabkitError says what cannot be filled in.
    """
    folder = Path(folder).expanduser().absolute()
    if target not in TARGETS:
        raise LabkitError(f"There is no target {target!r}; expected one of {', '.join(TARGETS)}.")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise LabkitError(f"{folder} is there already and not empty; give a new folder, so that nothing of yours is overwritten.")
    filled = values(model, engine, precision, sized, context, slots, name, digest)
    sources = _sources(target, engine, gpu)
    with written_beside(folder) as work:
        for destination, source in sources.items():
            _write(work / destination, fill((TEMPLATES / source).read_text(encoding="utf-8"), filled))
        _write(work / "values.json", json.dumps({**filled, "needs": asdict(sized), "target": target}, indent=1, default=dict) + "\n")
        if engine == "onnxruntime":
            _write(work / "containers" / "constraints.txt", constraints(("onnx", "serve")))
        if stack(engine).metrics and engine == "onnxruntime":
            from labkit.deploy import dashboards

            _write(work / "dashboards" / "labkit.json", dashboards.text(dashboards.gateway()))
            for place in ("dashboards/provider.yaml", *(f"monitoring/{name}.yml" for name in ("prometheus", "recording", "alerts", "rules_test"))):
                _write(work / place, (TEMPLATES / place).read_text(encoding="utf-8"))
    return sorted(path for path in folder.rglob("*") if path.is_file())


def fill(text: str, values: Mapping[str, Any]) -> str:
    """A template with its values. LabkitError names a value that is missing."""
    from jinja2 import Environment, StrictUndefined, UndefinedError

    marks = {"variable_start_string": "[[", "variable_end_string": "]]", "block_start_string": "[%", "block_end_string": "%]",
             "comment_start_string": "[#", "comment_end_string": "#]"}  # fmt: skip
    engine = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, **marks)  # type: ignore[arg-type]
    try:
        return engine.from_string(text).render(**values)
    except UndefinedError as error:
        raise LabkitError(f"The template needs a value that was not given: {error}.") from None


def values(
    model: str, engine: str, precision: str, sized: Needs, context: int, slots: int, name: str | None = None, digest: str | None = None
) -> dict[str, Any]:
    """Everything a template may use."""
    from labkit import __version__

    if digest is not None and not re.fullmatch(DIGEST, digest):
        raise LabkitError(f"{digest[:80]!r} is no digest; expected sha256: and 64 hexadecimal digits (docker buildx imagetools inspect IMAGE).")
    if not re.fullmatch(r"[\w][\w./:-]{0,199}", model) or ".." in model:
        raise LabkitError(f"{model[:80]!r} is no model's name for a file of deployment; expected letters, digits and - _ . / :")
    chosen = stack(engine)
    name = name or re.sub(r"[^a-z0-9]+", "-", model.rsplit("/", 1)[-1].removeprefix("standin:").lower()).strip("-")[:40]
    if not re.fullmatch(NAME, name):
        raise LabkitError(f"{name[:60]!r} is no name for a service; expected 2 to 40 of a-z, 0-9 and -, beginning with a letter: give --name.")
    built = "labkit-gateway" if engine == "onnxruntime" else f"labkit-{engine}"
    threads = max(1, int(sized.cpus))
    file = f"{name}.gguf" if engine in ("llamacpp", "ollama") else name
    entrypoint, arguments = launch(engine, {"model": model, "name": name, "precision": precision, "context": context, "slots": slots, "threads": threads, "file": file})
    weights = sized.planned or sized.memory
    return {
        "model": model, "name": name, "engine": engine, "precision": precision, "title": chosen.title, "context": context, "slots": slots,
        "image": chosen.image + (f"@{digest}" if digest else ""), "digest": digest, "built": f"{built}:{__version__}", "built_name": built,
        "built_gpu": chosen.gpu_image or "", "webui": WEBUI, "wheel": f"labkit-{__version__}-py3-none-any.whl", "file": file, "uid": UID,
        "port": chosen.port, "health": chosen.health, "metrics": chosen.metrics, "counted": chosen.waiting, "waiting": (chosen.waiting or "").replace(":", "_"),
        "key": chosen.key, "check": json.dumps(list(chosen.check)), "check_list": json.dumps(["CMD", *chosen.check]),
        "entrypoint": json.dumps(entrypoint), "arguments": json.dumps(arguments), "threads": threads, "cpus": f"{sized.cpus:g}",
        "gpu_arguments": json.dumps([*arguments, "--gpu-memory-utilization", "0.9"]) if engine == "vllm" else "",
        "memory_bytes": int(sized.memory), "request_mib": sized.request // MIB, "limit_mib": sized.limit // MIB, "convert_mib": max(1024, 4 * sized.limit // MIB),
        "cache_gib": max(1, int((sized.limit - weights + sized.cache) // 2**30)) if engine == "vllm" else 0, "storage_mib": max(1024, 2 * math.ceil(weights / MIB)),
        "scratch_mib": 2048 if engine == "vllm" else 256, "startup": f"{sized.startup:.2f}", "startup_whole": math.ceil(sized.startup),
        "patience": sized.patience, "startup_failures": math.ceil(sized.patience / 5), "progress": max(600, 2 * sized.patience), "sources": dict(sized.sources),
    }  # fmt: skip


def _sources(target: str, engine: str, gpu: bool) -> dict[str, str]:
    """Destination -> template."""
    found = {"containers/Dockerfile": f"containers/Dockerfile.{engine}", "containers/compose.yaml": "containers/compose.yaml",
             "containers/.dockerignore": "containers/dockerignore"}  # fmt: skip
    if engine == "ollama":
        found["containers/Modelfile"] = "containers/Modelfile"
    if gpu and not stack(engine).gpu_image:
        raise LabkitError(f"The image of {stack(engine).title} computes on processors only; take vllm, llamacpp or ollama for a GPU.")
    if target == "kubernetes":
        for path in sorted((TEMPLATES / "kubernetes").rglob("*.yaml")):
            place = path.relative_to(TEMPLATES).as_posix()
            if ("overlays/gpu" not in place or gpu) and (stack(engine).waiting or "adapter-rules" not in place):
                found[place] = place
        found[".github/workflows/deploy.yml"] = "ci/deploy.yml"
    return found


def constraints(extras: tuple[str, ...]) -> str:
    """Versions of labkit's requirements on this machine, one a line, as pip's --constraint takes them."""
    from labkit.serve.manifest import _needed

    lines = [f"{one.metadata['Name']}=={one.version}" for one in _needed("labkit", extras) if one.metadata["Name"] != "labkit"]
    return "".join(f"{line}\n" for line in sorted(lines, key=str.lower))


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")

"""What it costs to open the same weights in different ways: time and memory, each in a process of its own.

    loading.compare(checkpoint, [artifact, …])

Ways: `mapped` (safetensors mapped into memory by numpy, nothing copied), `torch` (safetensors into PyTorch tensors), and any
built artifact through its engine. Each child imports, opens, and uses every weight once; memory is read after each step.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from labkit import host
from labkit.checkpoint import Checkpoint
from labkit.measure.footprint import footprint, mapped_bytes
from labkit.types import Artifact, LabkitError

LIBRARIES = {"mapped": ("numpy", "labkit.checkpoint"), "torch": ("torch", "safetensors.torch")}


def measure(way: str, path: Path | str) -> dict[str, Any]:
    """Open the checkpoint folder (`mapped`, `torch`) or artifact folder (`engine`) at `path` in a fresh process.

    Seconds of import, opening and first use; resident bytes after opening and after use: `mapped`, pages of the files at `path`
    themselves (Linux and Windows; 0 elsewhere), and `private`, what the process's private memory grew by (Linux; 0 elsewhere).
    """
    package = str(Path(__file__).parents[1])
    search = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-m", "labkit.loading", way, str(path)], capture_output=True, text=True, timeout=300,
        env={**os.environ, **host.waiting("short"), "PYTHONPATH": search},
    )  # fmt: skip
    if done.returncode:
        last = (done.stderr.strip() or "it wrote nothing").splitlines()[-1]
        raise LabkitError(f"Opening {path} by {way} ended with status {done.returncode}: {last[:300]}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(checkpoint: Checkpoint, artifacts: Sequence[Artifact]) -> list[dict[str, Any]]:
    """A row a way: `mapped`, `torch` where it is installed, then each artifact."""
    ways = [way for way in LIBRARIES if find_spec(LIBRARIES[way][0])]
    rows = [{"opened by": way, **measure(way, checkpoint.path)} for way in ways]
    return rows + [{"opened by": f"{a.recipe.engine} {a.recipe.precision}", **measure("engine", a.path)} for a in artifacts]


def _opener(way: str, path: Path) -> tuple[Sequence[str], Callable[[], Any], Callable[[Any], float]]:
    """(modules to import first, how to open, how to use every weight once)."""
    if way == "mapped":
        return LIBRARIES[way], lambda: _mapped(path), lambda views: float(sum(int(v.raw().view("u1").sum()) for v in views))
    if way == "torch":
        return LIBRARIES[way], lambda: _tensors(path), lambda found: float(sum(float(t.float().sum()) for t in found.values()))
    from labkit.build import load, read
    from labkit.measure.worker import _modules

    artifact = read(path)
    return _modules(artifact.recipe.engine), lambda: load(artifact), lambda run: float(run.logits([5])[0, 0])


def _mapped(path: Path) -> list[Any]:
    from labkit.checkpoint import open_checkpoint

    return list(open_checkpoint(path).tensors().values())


def _tensors(path: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return {name: tensor for file in sorted(path.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def main(way: str, path: Path) -> dict[str, Any]:
    """The child's work."""
    modules, open_it, use = _opener(way, path)
    _, importing = _timed(lambda: [import_module(name) for name in modules])
    mapped_bytes(path)  # what looking itself brings into memory comes before the first look
    before, added = footprint(), {}

    def look(when: str) -> None:
        added[f"private after {when}"] = (footprint()["rss_anon"] or 0) - (before["rss_anon"] or 0)
        added[f"mapped after {when}"] = mapped_bytes(path)

    opened, opening = _timed(open_it)
    look("opening")
    _, using = _timed(lambda: use(opened))
    look("use")
    return {"import s": importing, "open s": opening, "first use s": using, **added, "libraries": before["rss"]}


def _timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """What `work` gives, and the seconds it took."""
    begun = time.perf_counter()
    return work(), time.perf_counter() - begun


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], Path(sys.argv[2]))))

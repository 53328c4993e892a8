"""An engine that needs no library: it copies the weights as float16. `install()` registers it under the name "fake"."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import numpy as np

from labkit import engines
from labkit.types import Built, LabkitError

TITLE = "Fake Engine"
PACKAGE = "numpy"  # its version is the engine's version
EXTRA = "fake"
PRECISIONS = {"f16": (16.0, 16.0), "slow": (16.0, 16.0), "broken": (16.0, 16.0), "full": (16.0, 16.0),
              "refused": (16.0, 16.0), "stopped": (16.0, 16.0)}  # fmt: skip
builds: list[str] = []


def install() -> None:
    sys.modules["labkit.engines.fake"] = sys.modules[__name__]
    if "fake" not in engines.ENGINES:
        engines.ENGINES = (*engines.ENGINES, "fake")


def build(checkpoint, recipe, out: Path) -> Built:
    builds.append(str(recipe))
    print("python chatter")
    os.write(2, b"chatter from C\n")
    weight_bytes = 0
    with open(out / "weights.bin", "wb") as file:
        for view in checkpoint.tensors().values():
            weight_bytes += file.write(view.float32().astype(np.float16).tobytes())
    _misbehave(recipe.precision, out)
    return Built(weight_bytes, {"half": True, **recipe.options}, ("norms are kept in float16",))


def _misbehave(precision: str, out: Path) -> None:
    if precision == "slow":
        (out.parent / "started").touch()
        time.sleep(float(os.environ.get("FAKE_SECONDS", "1")))
    if precision == "broken":
        raise ValueError("tensor 7 has the wrong mood")
    if precision == "full":
        raise OSError(28, "No space left on device")
    if precision == "refused":
        raise LabkitError("rows of 100 do not divide by 256; take f16.")
    if precision == "stopped":
        raise KeyboardInterrupt


class Runner:
    def __init__(self, settings: dict):
        self.settings = settings


def load(artifact, *, exact: bool = False, threads: int | None = None) -> Runner:
    return Runner({"exact": exact, "threads": threads, "path": artifact.path})

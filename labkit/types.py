"""The records and protocols everything else speaks in.

Records are frozen, flat and JSON-able; computation lives in functions elsewhere. The two protocols
(`Engine`, `Runner`) are what an engine module must offer; a measure needs nothing more.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

ARTIFACT_SCHEMA = 1  # 1: first layout


class LabkitError(Exception):
    """One clear sentence: what was given, what was expected, what to do next.

    The command line prints it and exits with status 2; no traceback is shown.
    """


class NotInstalled(LabkitError):
    """A package is absent; the sentence ends with the command that installs it. In a lab, the cell is skipped."""


@dataclass(frozen=True, init=False)
class Recipe:
    """What to build: an engine, a precision in that engine's own word, and options.

    >>> str(Recipe("llamacpp", "q4_k_m", imatrix=True))
    'llamacpp-q4_k_m-imatrix=true'
    """

    engine: str
    precision: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def __init__(self, engine: str, precision: str, **options: Any):
        object.__setattr__(self, "engine", engine)
        object.__setattr__(self, "precision", precision.lower())
        object.__setattr__(self, "options", {k: options[k] for k in sorted(options)})

    def __hash__(self) -> int:
        return hash(str(self))

    def __str__(self) -> str:
        """The folder name: readable when the options are short, shortened by a hash when they are not."""
        parts = [self.engine, self.precision]
        for key, value in self.options.items():
            text = re.sub(r"[^A-Za-z0-9_.+]+", "_", json.dumps(value, sort_keys=True, default=str)).strip("_")
            if len(text) > 32:
                text = hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:10]
            parts.append(f"{key}={text}")
        return "-".join(parts)

    def to_json(self) -> dict[str, Any]:
        return {"engine": self.engine, "precision": self.precision, "options": dict(self.options)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Recipe:
        return cls(data["engine"], data["precision"], **data.get("options", {}))


@dataclass(frozen=True)
class Built:
    """What an engine reports after writing its files: the facts only it can know."""

    weight_bytes: int  # bytes of all stored tensors, scales included, file headers excluded
    settings: Mapping[str, Any] = field(default_factory=dict)  # every choice that was made
    notes: tuple[str, ...] = ()  # fallbacks and substitutions, one sentence each


@dataclass(frozen=True)
class Artifact:
    """A built model on disk. `path` is a folder holding the engine's files, `artifact.json` and `build.log`."""

    path: Path
    recipe: Recipe
    checkpoint: Any  # labkit.checkpoint.Checkpoint
    weight_bytes: int
    weights: int  # parameters of the checkpoint, tied ones counted once
    bits_per_weight: float  # 8 * weight_bytes / weights: measured, never nominal
    seconds: float  # wall time of the build
    engine_version: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    schema: int = ARTIFACT_SCHEMA

    @property
    def name(self) -> str:
        return f"{self.checkpoint.name}/{self.recipe}"

    def _repr_html_(self) -> str:
        from labkit.i18n import tr

        rows = {
            tr("artifact"): self.name,
            tr("size"): tr("{megabytes:.2f} MB of weights", megabytes=self.weight_bytes / 1e6),
            tr("bits per weight"): f"{self.bits_per_weight:.3f}",
            tr("built in"): f"{self.seconds:.1f} s",
            tr("notes"): "; ".join(self.notes) or tr("none"),
        }
        cells = "".join(f"<tr><th scope='row'>{k}</th><td style='text-align:left'>{v}</td></tr>" for k, v in rows.items())
        return f"<table>{cells}</table>"

    def __repr__(self) -> str:
        return f"<Artifact {self.name}: {self.weight_bytes / 1e6:.2f} MB, {self.bits_per_weight:.3f} bits per weight>"


@dataclass(frozen=True)
class Measurement:
    """One metric of one artifact: raw values and their circumstances. Statistics are computed when shown."""

    metric: str
    unit: str
    values: tuple[float, ...]  # raw, never averaged
    artifact: Mapping[str, Any]  # checkpoint, engine, precision, options, weight_bytes, bits_per_weight
    workload: Mapping[str, Any]  # what was run: window, tokens, repeats, text hash, exact ...
    engine_version: str
    host: Mapping[str, Any]  # labkit.host.circumstances()
    when: str  # ISO 8601, UTC
    details: Mapping[str, Any] = field(default_factory=dict)  # further raw series, e.g. {"ttft_seconds": [...]}
    claims: tuple[str, ...] = ()  # ids in claims.csv this measurement tests
    schema: int = 1

    def to_json(self) -> dict[str, Any]:
        return {"schema": self.schema, **{k: v for k, v in asdict(self).items() if k != "schema"}}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Measurement:
        return cls(**{**data, "values": tuple(data["values"]), "claims": tuple(data.get("claims", ()))})


@runtime_checkable
class Runner(Protocol):
    """A loaded model. It speaks token ids and numpy only, and knows nothing about text."""

    settings: Mapping[str, Any]  # effective threads, KV-cache type, inference precision ...

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """Logits for every position, (T, V) float32; row i predicts token i + 1. State starts empty."""

    def generate(self, tokens: Sequence[int], max_new: int) -> Iterator[int]:
        """Greedy continuation: exactly `max_new` ids (end-of-text does not stop it), from an empty state."""

    def close(self) -> None:
        """Free the memory. Safe to call twice."""

    def __enter__(self) -> Runner: ...

    def __exit__(self, *exc: object) -> None: ...


class Engine(Protocol):
    """What an engine *module* defines. There is no class to derive from.

    It may also name MODULES, what loading imports, where that is more than the package's own top-level modules:
    `measure.memory` counts their memory apart from the model's.
    """

    TITLE: str  # for charts: "llama.cpp"
    PACKAGE: str  # distribution name whose version is recorded: "llama-cpp-python"
    EXTRA: str  # the extra in pyproject.toml that installs it
    PRECISIONS: Mapping[str, tuple[float, float]]  # precision -> lowest and highest bits per weight it may yield

    def build(self, checkpoint: Any, recipe: Recipe, out: Path) -> Built:
        """Write the engine's files into the existing, empty folder `out`."""

    def load(self, artifact: Artifact, *, exact: bool = False, threads: int | None = None) -> Runner:
        """Open an artifact. `exact=True`: float32 arithmetic and KV cache where the engine can."""

"""What every metric does around its arithmetic: open the artifact, refuse what cannot be told, write the record."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from labkit import host
from labkit.types import Artifact, LabkitError, Measurement


@contextmanager
def opened(artifact: Artifact, runner: Any = None, *, exact: bool = True, threads: int | None = None) -> Iterator[Any]:
    """The runner passed in, left open afterwards; or one loaded here and closed at the end."""
    if runner is not None:
        yield runner
        return
    from labkit.build import load

    with load(artifact, exact=exact, threads=threads) as own:
        yield own


def trained(artifact: Artifact, metric: str) -> None:
    """Refuse to tell the quality of random weights."""
    if not artifact.checkpoint.trained:
        raise LabkitError(
            f"{artifact.checkpoint.name} is a stand-in with random weights, which have no {metric}; "
            "measure size, memory or speed on it, or give a trained checkpoint."
        )


def evaluation_text(artifact: Artifact, text: str | Path | None) -> str:
    """`text` itself, the content of the file it names, or the house model's held-out text."""
    if isinstance(text, Path):
        try:
            return text.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise LabkitError(f"Cannot read {text} as UTF-8 text ({error}); give a readable text file.") from None
    if text is not None:
        return text
    if artifact.checkpoint.name != "edgehome":
        raise LabkitError(
            f"{artifact.checkpoint.name} has no held-out text of its own; give one:  text=pathlib.Path('file.txt')"
        )
    from labkit import house

    return house.heldout_text()


def fingerprint(data: str | bytes) -> str:
    """The first 16 hexadecimal digits of SHA-256: names a text in a record without storing it."""
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()[:16]


def record(
    artifact: Artifact,
    metric: str,
    unit: str,
    values: Sequence[float],
    *,
    workload: Mapping[str, Any] | None = None,
    details: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Measurement:
    """A Measurement with its circumstances. `settings` are the runner's effective ones and join the workload."""
    recipe = artifact.recipe
    return Measurement(
        metric=metric,
        unit=unit,
        values=tuple(float(value) for value in values),
        artifact={
            "checkpoint": artifact.checkpoint.name,
            "revision": artifact.checkpoint.revision,
            **recipe.to_json(),
            "weight_bytes": artifact.weight_bytes,
            "weights": artifact.weights,
            "bits_per_weight": artifact.bits_per_weight,
        },
        workload={**(workload or {}), "settings": dict(settings or {})},
        engine_version=artifact.engine_version,
        host=host.circumstances(),
        when=datetime.now(UTC).isoformat(timespec="seconds"),
        details=dict(details or {}),
    )

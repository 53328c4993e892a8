"""Size: what an artifact weighs on disk, and how many bits that is a weight."""

from __future__ import annotations

from typing import Any

from labkit import stats
from labkit.measure.record import record
from labkit.types import Artifact, LabkitError, Measurement

OURS = ("artifact.json", "build.log")  # written by labkit, not part of the model


def size(artifact: Artifact, *, runner: Any = None) -> Measurement:
    """Bytes of all stored tensors, scales included; `details` add the bytes of the files and bits per weight.

    Bits per weight = 8 · stored bytes / parameters, tied ones counted once: what the file really holds, whatever its
    precision is called. `runner` is not needed. Error: the artifact's files are gone.
    """
    files = {p.name: p.stat().st_size for p in sorted(artifact.path.rglob("*")) if p.is_file() and p.name not in OURS}
    if not files:
        raise LabkitError(f"{artifact.path} holds no model files; build the artifact again.")
    details = {
        "file_bytes": sum(files.values()),
        "files": files,
        "bits_per_weight": artifact.bits_per_weight,
        "reduction_against_16_bits": 1 - artifact.bits_per_weight / 16,
    }
    return record(artifact, "size", "bytes", [artifact.weight_bytes], details=details)


def summary(measurement: Measurement) -> stats.Estimate:
    """Bytes of weights; a size has no interval."""
    return stats.Estimate(*measurement.values * 3)

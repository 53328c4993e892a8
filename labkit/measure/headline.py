"""The ladder: every metric of several artifacts of one checkpoint, measured alike."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from labkit.measure.accuracy import accuracy
from labkit.measure.divergence import divergence
from labkit.measure.memory import memory
from labkit.measure.perplexity import perplexity
from labkit.measure.record import evaluation_text
from labkit.measure.scoring import Remembered
from labkit.measure.size import size
from labkit.measure.speed import compare
from labkit.types import Artifact, LabkitError, Measurement


class Effort(NamedTuple):
    """How much is measured in a profile."""

    windows: int  # of text
    tasks: int
    rounds: int
    retries: int
    seconds: float  # of timing, an artifact and round


PROFILES = {
    "ci": Effort(windows=6, tasks=90, rounds=3, retries=1, seconds=0.2),
    "class": Effort(windows=24, tasks=360, rounds=7, retries=3, seconds=0.5),
    "full": Effort(windows=80, tasks=2160, rounds=11, retries=5, seconds=1.0),
}


def headline(
    artifacts: Sequence[Artifact],
    reference: Artifact,
    profile: str = "ci",
    *,
    text: str | Path | None = None,
    threads: int | None = None,
    speed: bool = True,
) -> list[Measurement]:
    """Size, memory, speed and, for trained checkpoints, perplexity, divergence from `reference` and accuracy.

    The reference is run once; speeds are taken side by side. Tasks are the house's, so accuracy is for `edgehome`.
    """
    if profile not in PROFILES:
        raise LabkitError(f"No profile {profile!r}; expected one of {', '.join(PROFILES)}.")
    effort = PROFILES[profile]
    found = [size(artifact) for artifact in artifacts]
    if speed:
        found += [memory(artifact, threads=threads) for artifact in artifacts]
        found += compare(
            artifacts, rounds=effort.rounds, retries=effort.retries, seconds=effort.seconds, threads=threads
        )
    if reference.checkpoint.trained:
        found += quality(artifacts, reference, effort, text=text, threads=threads)
    return found


def quality(
    artifacts: Sequence[Artifact], reference: Artifact, effort: Effort, *, text: str | Path | None, threads: int | None
) -> list[Measurement]:
    """Perplexity, divergence and accuracy of each artifact; the reference's logits are kept on disk meanwhile."""
    from labkit.build import load

    found: list[Measurement] = []
    common: dict[str, Any] = {"text": evaluation_text(reference, text), "limit": effort.windows}
    with tempfile.TemporaryDirectory() as folder, load(reference, exact=True, threads=threads) as reference_runner:
        remembered = Remembered(reference_runner, Path(folder), reference.name)
        for artifact in artifacts:
            with load(artifact, exact=True, threads=threads) as runner:
                found.append(perplexity(artifact, runner=runner, **common))
                found.append(divergence(artifact, remembered, runner=runner, **common))
            if artifact.checkpoint.name == "edgehome":
                found.append(accuracy(artifact, effort.tasks, threads=threads))
    return found

"""The ladder: every metric of several artifacts of one checkpoint, measured alike."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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
        with remembered(reference, threads) as known:
            for artifact in artifacts:
                found += quality(artifact, known, effort, text=text, threads=threads)
    return found


@contextmanager
def remembered(reference: Artifact, threads: int | None = None) -> Iterator[Remembered]:
    """The reference, loaded exactly; its logits are kept on disk meanwhile, so that each text is run through it once."""
    from labkit.build import load

    with tempfile.TemporaryDirectory() as folder, load(reference, exact=True, threads=threads) as runner:
        yield Remembered(runner, Path(folder), reference.name)


def quality(
    artifact: Artifact, reference: Remembered, effort: Effort, *, text: str | Path | None = None, threads: int | None = None
) -> list[Measurement]:
    """Perplexity, divergence from the reference and, for `edgehome`, accuracy of one artifact."""
    from labkit.build import load

    common: dict[str, Any] = {"text": evaluation_text(artifact, text), "limit": effort.windows}
    with load(artifact, exact=True, threads=threads) as runner:
        found = [perplexity(artifact, runner=runner, **common), divergence(artifact, reference, runner=runner, **common)]
    if artifact.checkpoint.name == "edgehome":
        found.append(accuracy(artifact, effort.tasks, threads=threads))
    return found

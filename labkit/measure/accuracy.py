"""Accuracy: how many household requests the model turns into exactly the right command.

Greedy decoding until the end of the turn, then exact match on the parsed JSON object. Perplexity and divergence can
move while every answer stays right; this is the number a user would notice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from labkit import house, stats
from labkit.measure.record import fingerprint, opened, record, trained
from labkit.types import Artifact, LabkitError, Measurement

GROUPS = ("intent", "tier", "lang")


def accuracy(
    artifact: Artifact,
    n: int | None = 300,
    *,
    seed: int = 0,
    intents: list[str] | None = None,
    tasks: Sequence[Any] | None = None,
    new_tokens: int = 128,
    exact: bool = False,
    threads: int | None = None,
    runner: Any = None,
) -> Measurement:
    """Exact match on `n` held-out house tasks (None: all of them), balanced over intents, tiers and languages.

    Values are 1.0 or 0.0, one a task, in the order of `labkit.house.tasks(n=n, seed=seed, intents=intents)`.
    `details["counts"]` hold [right, all] by intent, tier and language. exact=False is what a user runs.
    Errors: a stand-in checkpoint, no tasks, a checkpoint without an end-of-turn token.
    """
    trained(artifact, "accuracy")
    stops = frozenset(artifact.checkpoint.eos_ids)
    asked = list(tasks) if tasks is not None else house.tasks("heldout", n, seed, intents)
    if not asked or not stops:
        missing = "tasks" if not asked else "end-of-turn token in its configuration"
        raise LabkitError(f"{artifact.checkpoint.name} cannot be scored: there are no {missing}; give at least one.")
    with opened(artifact, runner, exact=exact, threads=threads) as model:
        right = [
            house.score(task, answer(artifact.checkpoint, model, task.messages, new_tokens, stops)) for task in asked
        ]
        settings = model.settings
    shown = fingerprint("\n".join(str(task.messages) for task in asked))
    workload = {
        "tasks": len(asked), "tasks_hash": shown, "seed": seed, "intents": intents, "new_tokens": new_tokens,
        "exact": exact,
    }  # fmt: skip
    details = {"counts": {group: counts(asked, right, group) for group in GROUPS}}
    return record(artifact, "accuracy", "share", right, workload=workload, details=details, settings=settings)


def answer(checkpoint: Any, runner: Any, messages: Sequence[Any], new_tokens: int, stops: frozenset[int]) -> str:
    """The model's greedy reply to a conversation, up to the first of the `stops` ids, which is left out."""
    prompt = checkpoint.encode(checkpoint.chat(messages))
    if checkpoint.bos_id is not None and prompt[:1] != [checkpoint.bos_id]:
        prompt = [checkpoint.bos_id, *prompt]
    reply: list[int] = []
    room = checkpoint.context - len(prompt)
    if room < 1:
        raise LabkitError(f"A request of {len(prompt)} tokens fills the context of {checkpoint.context}; shorten it.")
    for token in runner.generate(prompt, min(new_tokens, room)):
        if token in stops:
            break
        reply.append(token)
    return checkpoint.decode(reply)


def counts(tasks: Sequence[Any], right: Sequence[bool], group: str) -> dict[str, list[int]]:
    """Group value -> [right, all]."""
    found: dict[str, list[int]] = {}
    for task, ok in zip(tasks, right, strict=True):
        pair = found.setdefault(str(getattr(task, group)), [0, 0])
        pair[0] += int(ok)
        pair[1] += 1
    return dict(sorted(found.items()))


def by(measurement: Measurement, group: str) -> dict[str, stats.Estimate]:
    """Share right with Wilson's 95 % interval for each "intent", "tier" or "lang"."""
    if group not in GROUPS:
        raise LabkitError(f"Accuracy is grouped by {', '.join(GROUPS)}, not {group!r}: choose one of them.")
    return {name: stats.wilson(*pair) for name, pair in measurement.details["counts"][group].items()}


def flips(before: Measurement, after: Measurement) -> tuple[int, int]:
    """(right -> wrong, wrong -> right) between two measurements of the same tasks: change that a mean can hide."""
    if before.workload["tasks_hash"] != after.workload["tasks_hash"]:
        raise LabkitError(
            "Flips need the same tasks in both measurements; measure both with equal n, seed and intents."
        )
    pairs = list(zip(before.values, after.values, strict=True))
    return sum(a > b for a, b in pairs), sum(a < b for a, b in pairs)


def summary(measurement: Measurement) -> stats.Estimate:
    """Share of tasks right with Wilson's 95 % interval."""
    return stats.wilson(sum(measurement.values), len(measurement.values))

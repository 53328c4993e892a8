"""Scores of a checkpoint or a built artifact on the held-out tasks, as counts and as a table to read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from labkit.house.language import Task
from labkit.house.tasks import FOLDER, HELD_OUT, tasks
from labkit.types import LabkitError

Counts = dict[str, dict[str, list[int]]]  # group -> name -> [right, asked]


def evaluate(checkpoint: Path | None = None, artifact: Path | None = None, n: int | None = None) -> Counts:
    """[right, asked] by intent, tier and language. An artifact is run by its engine, a checkpoint in float32 torch."""
    if n is not None and n < 1:
        raise LabkitError(f"--n is {n}; give a number of tasks from 1 up, or leave it out for all {HELD_OUT}.")
    asked = tasks("heldout", n)
    if artifact is not None:
        return table(asked, _with_engine(artifact, asked))
    from labkit.house.cli import need_torch

    need_torch()
    return table(asked, _with_torch(checkpoint or FOLDER, asked))


def _with_engine(folder: Path, asked: list[Task]) -> list[bool]:
    from labkit.build import read
    from labkit.measure.accuracy import accuracy

    return [value == 1.0 for value in accuracy(read(folder), tasks=asked).values]


def _with_torch(folder: Path, asked: list[Task]) -> list[bool]:
    from tokenizers import Tokenizer

    from labkit.house.evaluate import right
    from labkit.house.train import load_weights

    return right(load_weights(folder), Tokenizer.from_file(str(folder / "tokenizer.json")), asked)


def table(asked: list[Task], right: list[bool]) -> Counts:
    """Counts by intent; by tier, language and over all for the command skills only (the catalogue is memory, not language)."""
    counts: Counts = {"all": {}, "intent": {}, "tier": {}, "lang": {}}
    for task, ok in zip(asked, right, strict=True):
        for group, name in _cells(task):
            pair = counts[group].setdefault(name, [0, 0])
            pair[0] += bool(ok)
            pair[1] += 1
    return counts


def _cells(task: Task) -> list[tuple[str, str]]:
    if task.intent == "catalogue":
        return [("intent", "catalogue"), ("all", "catalogue")]
    return [("intent", task.intent), ("tier", str(task.tier)), ("lang", task.lang), ("all", "commands")]


def rows(counts: Counts) -> list[list[Any]]:
    """One row a line of the table: group, name, right, asked, percent."""
    return [[group, name, hits, asked, 100 * hits / asked] for group in counts for name, (hits, asked) in counts[group].items()]


def text_table(counts: Counts) -> str:
    """The table in Markdown: it reads well in a terminal and in the model card."""
    lines = ["| group | name | right | asked | % |", "|---|---|---:|---:|---:|"]
    return "\n".join(
        lines + [f"| {g} | {name} | {hits} | {asked} | {share:.1f} |" for g, name, hits, asked, share in rows(counts)]
    )

"""Tasks by split, the score, and the two texts: held-out (for perplexity) and calibration (from the training distribution)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from random import Random
from typing import Any

from labkit.house import catalogue, clock, people, rooms, senses
from labkit.house.language import Task, Turn, chatml, make_task
from labkit.house.words import LANGS
from labkit.types import LabkitError

FOLDER = Path(__file__).parents[1] / "data" / "edgehome"
SPLITS = ("train", "heldout")
TIERS = (1, 2, 3)
HELD_OUT = 2160  # tasks in the held-out set: 24 for every intent, tier and language
FOLLOW_UP = 0.35  # share of tier 3 that is a follow-up on an earlier request

Draw = Callable[[Random, str, int], Turn]
# intent -> how a request is drawn, and how a follow-up on it is drawn
INTENTS: dict[str, tuple[Draw, Callable[[Random, str, Turn], Turn]]] = {
    name: (draw, partial(rooms.again, draw=draw))
    for name, draw in {
        "light": rooms.light,
        "dim": rooms.dim,
        "color": rooms.color,
        "blinds": rooms.blinds,
        "heat": rooms.heat,
        "music": rooms.music,
    }.items()
} | {
    "timer": (clock.timer, clock.again),
    "alarm": (clock.alarm, clock.again),
    "list": (people.shopping, people.again),
    "call": (people.call, people.again),
    "refuse": (people.refuse, people.again),
    "status": (senses.status, senses.again),
    "compare": (senses.compare, senses.again),
    "math": (senses.math, senses.again),
    "catalogue": (catalogue.catalogue, catalogue.again),
}


def draw_task(rng: Random, intent: str, tier: int, lang: str, split: str, even: bool = False) -> Task:
    """One task. Held out: the asked turn's slots are held out. Training: no turn's slots are."""
    first, follow = INTENTS[intent]
    if intent == "catalogue" and even:
        first, follow = partial(first, even=True), partial(follow, even=True)
    while True:
        turns = [first(rng, lang, tier)]
        if tier == 3 and rng.random() < FOLLOW_UP:
            turns.append(follow(rng, lang, turns[0]))
        wanted = turns[-1].held_out if split == "heldout" else not any(turn.held_out for turn in turns)
        if wanted:
            return make_task(turns, tier, lang, split)


def tasks(split: str = "heldout", n: int | None = None, seed: int = 0, intents: list[str] | None = None) -> list[Task]:
    """`n` different tasks, balanced over intents, tiers and languages; the same for the same arguments.

    split: "heldout" (slots never seen in training) or "train". n: default 24 for each of the cells asked for, which is
    `HELD_OUT` tasks over all intents. Catalogue tasks ask for every fact equally often.
    """
    if split not in SPLITS:
        raise LabkitError(f"The house has the splits {' and '.join(SPLITS)}, not {split!r}: choose one of them.")
    names = list(INTENTS) if intents is None else list(intents)
    for name in names:
        if name not in INTENTS:
            raise LabkitError(f"The house has no intent {name!r}; it has {', '.join(INTENTS)}.")
    cells = [(intent, tier, lang) for tier in TIERS for lang in LANGS for intent in names]
    count = HELD_OUT // len(INTENTS) * len(names) if n is None else n
    rng, seen, found = Random(f"{split} {seed}"), set(), []
    while len(found) < count:
        task = draw_task(rng, *cells[len(found) % len(cells)], split, even=True)
        surface = chatml(task.messages)
        if surface not in seen:
            seen.add(surface)
            found.append(task)
    return found


def score(task: Task, text: str) -> bool:
    """Exact match on the parsed object: the text up to the end of the turn must be JSON equal to the answer."""
    try:
        return _same(json.loads(text.split("<|im_end|>")[0].split("<|endoftext|>")[0]), task.answer)
    except (ValueError, RecursionError):
        return False


def _same(a: Any, b: Any) -> bool:
    """Equality that tells true from 1 but not 21 from 21.0 (JSON has one kind of number)."""
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_same, a, b))
    return a == b


@cache
def heldout_text(size: int = 48_000) -> str:
    """Held-out conversations with their answers in ChatML, about `size` characters. For perplexity and divergence."""
    return _text(tasks("heldout", n=size // 100, seed=1), size)


@cache
def calibration_text(size: int = 48_000) -> str:
    """Conversations drawn from the training distribution: disjoint from the held-out text, for importance matrices and GPTQ."""
    return _text(tasks("train", n=size // 100, seed=2), size)


def _text(some: list[Task], size: int) -> str:
    some = list(some)
    Random(3).shuffle(some)
    text = ""
    for task in some:
        text += chatml(task.conversation())
        if len(text) >= size:
            break
    return text


def stream(seed: int, weights: dict[str, float]) -> Iterator[Task]:
    """The endless training stream: intents by weight, tiers and languages evenly."""
    rng = Random(f"stream {seed}")
    names, shares = list(weights), list(weights.values())
    while True:
        yield draw_task(rng, rng.choices(names, shares)[0], rng.choice(TIERS), rng.choice(LANGS), "train")


def schema() -> dict[str, Any]:
    """The JSON schema of all answers, as shipped beside the weights."""
    return json.loads((FOLDER / "schema.json").read_text(encoding="utf-8"))

"""Which token comes next: greedy from the engine itself, or drawn from its logits.

Every runner continues greedily with its KV cache (`generate`). Drawing needs the logits of each step, and a runner gives
those for a whole sequence from an empty state: one pass over all tokens so far for each new one. It is right with every
engine and costs more the longer the text gets; `temperature=0` without penalties never pays for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from labkit.types import Runner


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen. Filters work in this order: penalties, top_k, temperature, min_p, top_p, then the draw.

    `presence_penalty` and `frequency_penalty` count what was generated (OpenAI's definition); `repeat_penalty` looks at the
    last `repeat_last_n` tokens, the prompt's too (llama.cpp's definition; -1: all of them). `top_k` 0 keeps all tokens.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repeat_penalty: float = 1.0
    repeat_last_n: int = 64
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None

    @property
    def greedy(self) -> bool:
        """Whether the engine's own greedy continuation gives exactly this."""
        return self.temperature == 0 and not self.penalized

    @property
    def penalized(self) -> bool:
        return self.repeat_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


def continuation(runner: Runner, prompt: Sequence[int], max_new: int, how: Sampling) -> Iterator[int]:
    """At most `max_new` ids after `prompt`; close the iterator to stop the engine early."""
    return runner.generate(prompt, max_new) if how.greedy else _drawn(runner, prompt, max_new, how)


def _drawn(runner: Runner, prompt: Sequence[int], max_new: int, how: Sampling) -> Iterator[int]:
    rng = np.random.default_rng(None if how.seed is None else how.seed % 2**64)
    read = getattr(runner, "read", None)  # the last row only, where a runner can
    ids = list(prompt)
    for _ in range(max_new):
        row = read(ids) if read else runner.logits(ids)[-1]
        token = choose(row, how, ids[: len(prompt)], ids[len(prompt) :], rng)
        ids.append(token)
        yield token


def choose(
    logits: np.ndarray, how: Sampling, prompt: Sequence[int], made: Sequence[int], rng: np.random.Generator
) -> int:
    """The next id from the last position's logits, (V,) of any float type."""
    row = penalize(np.array(logits, dtype=np.float64), how, prompt, made)
    if how.temperature == 0:
        return int(row.argmax())
    chances = probabilities(row, how)
    return int(rng.choice(len(chances), p=chances))


def penalize(row: np.ndarray, how: Sampling, prompt: Sequence[int], made: Sequence[int]) -> np.ndarray:
    """`row`, (V,) float64, with the three penalties applied in place."""
    if how.repeat_penalty != 1 and how.repeat_last_n:
        whole = [*prompt, *made]
        seen = np.unique(whole if how.repeat_last_n < 0 else whole[-how.repeat_last_n :]).astype(int)
        row[seen] = np.where(row[seen] > 0, row[seen] / how.repeat_penalty, row[seen] * how.repeat_penalty)
    if made and (how.presence_penalty or how.frequency_penalty):
        ids, counts = np.unique(made, return_counts=True)
        row[ids] -= how.presence_penalty + how.frequency_penalty * counts
    return row


def probabilities(row: np.ndarray, how: Sampling) -> np.ndarray:
    """Chance of every id, (V,) float64 that sums to 1; ids outside top_k, min_p or top_p have none."""
    if 0 < how.top_k < len(row):
        row = np.where(row >= np.partition(row, -how.top_k)[-how.top_k], row, -np.inf)
    with np.errstate(over="ignore"):  # a temperature near nothing: all but the largest vanish
        chances = np.exp((row - row.max()) / how.temperature)
    chances /= chances.sum()
    if how.min_p > 0:
        chances = np.where(chances >= how.min_p * chances.max(), chances, 0.0)
    if how.top_p < 1:
        order = np.argsort(-chances, kind="stable")
        before = np.cumsum(chances[order]) - chances[order]  # the first token over the line still belongs
        chances[order[before >= how.top_p * chances.sum()]] = 0.0
    return chances / chances.sum()

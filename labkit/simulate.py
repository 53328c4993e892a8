"""Serving in miniature: pages of a key/value cache, batches that are refilled, a queue, and a draft that is checked.

Each simulator is a few lines of bookkeeping, exact about what it counts (blocks, steps, passes) and silent about what it
does not (seconds). The lab on foundations puts each beside a real server. Sources: PagedAttention, arXiv 2309.06180;
iteration-level batching, Orca (OSDI 2022); speculative decoding, arXiv 2211.17192.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np

from labkit.types import LabkitError

# --- the key/value cache ----------------------------------------------------------------------------------------------


def positions_read(prompt: int, new: int, cached: bool) -> int:
    """Positions a model computes to write `new` tokens after `prompt` ones: each once with a cache, all again without."""
    return prompt + new - 1 if cached else sum(prompt + i for i in range(new))


class OutOfBlocks(LabkitError):
    """No free block is left for a token."""


@dataclass
class Pager:
    """PagedAttention's allocator: `blocks` blocks of `size` tokens, a table of blocks for each sequence.

    Blocks are taken when needed, counted by owner, and copied when a shared one is written to.
    """

    blocks: int
    size: int
    tables: dict[str, list[int]] = field(default_factory=dict)
    lengths: dict[str, int] = field(default_factory=dict)
    owners: dict[int, int] = field(default_factory=dict)  # block -> sequences that use it
    copies: int = 0

    @property
    def used(self) -> int:
        """Blocks somebody owns."""
        return len(self.owners)

    @property
    def empty(self) -> int:
        """Token places in owned blocks that hold nothing: what paging still wastes, under one block a sequence."""
        filled: dict[int, int] = {}
        for name, table in self.tables.items():
            for i, block in enumerate(table):
                filled[block] = max(filled.get(block, 0), min(self.size, self.lengths[name] - i * self.size))
        return sum(self.size - n for n in filled.values())

    def add(self, name: str, tokens: int = 1) -> None:
        """Append tokens to a sequence (a new name begins one). OutOfBlocks leaves the sequence as far as it came."""
        table = self.tables.setdefault(name, [])
        self.lengths.setdefault(name, 0)
        for _ in range(tokens):
            if self.lengths[name] % self.size == 0:
                table.append(self._take())
            elif self.owners[table[-1]] > 1:  # the last block is shared: write into a copy
                fresh = self._take()
                self.owners[table[-1]] -= 1
                table[-1], self.copies = fresh, self.copies + 1
            self.lengths[name] += 1

    def fork(self, name: str, other: str) -> None:
        """Begin `other` with the past of `name`: the same blocks, one more owner each."""
        self.tables[other], self.lengths[other] = list(self.tables[name]), self.lengths[name]
        for block in self.tables[other]:
            self.owners[block] += 1

    def free(self, name: str) -> None:
        """End a sequence; blocks nobody owns any more are free again."""
        for block in self.tables.pop(name):
            self.owners[block] -= 1
            if not self.owners[block]:
                del self.owners[block]
        del self.lengths[name]

    def _take(self) -> int:
        block = next((n for n in range(self.blocks) if n not in self.owners), None)
        if block is None:
            raise OutOfBlocks(f"All {self.blocks} blocks of {self.size} tokens are taken; end a sequence first.")
        self.owners[block] = 1
        return block


# --- batches and queues -----------------------------------------------------------------------------------------------


def batches(lengths: Sequence[int], slots: int, continuous: bool = True, *, prompts_apart: bool = False) -> list[list[int]]:
    """Which requests take part in each step, when request i needs `lengths[i]` steps and `slots` may run at once.

    Static: the next batch begins when the last of this one is done. Continuous: a slot is given on after each step.
    `prompts_apart`: newcomers read their prompts in a step of their own while the others wait (vLLM's first scheduler);
    otherwise a prompt is read in the same step in which others write.
    """
    if slots < 1 or any(n < 1 for n in lengths):
        raise LabkitError(f"{slots} slots and lengths {list(lengths)} were given; expected 1 or more everywhere.")
    waiting, left, running, steps = list(range(len(lengths))), list(lengths), [], []
    while waiting or running:
        new: list[int] = []
        if continuous or not running:
            room = slots - len(running)
            new, waiting = waiting[:room], waiting[room:]
            running = running + new
        step = new if prompts_apart and new else list(running)
        steps.append(step)
        for i in step:
            left[i] -= 1
        running = [i for i in running if left[i]]
    return steps


class Served(NamedTuple):
    """When one request began and ended, in the unit of the arrivals."""

    start: float
    end: float


def queue(arrivals: Sequence[float], services: Sequence[float], servers: int = 1) -> list[Served]:
    """First come, first served by `servers` equal workers: start and end of each request. Arrivals must ascend."""
    if list(arrivals) != sorted(arrivals) or len(arrivals) != len(services):
        raise LabkitError("Arrivals must ascend, with one service time each; sort them first.")
    free = [0.0] * servers
    found = []
    for arrival, service in zip(arrivals, services, strict=True):
        start = max(arrival, heapq.heappop(free))
        heapq.heappush(free, start + service)
        found.append(Served(start, start + service))
    return found


# --- speculative decoding ---------------------------------------------------------------------------------------------


class Follower(Protocol):
    """A model that remembers what it read."""

    def follow(self, ids: Sequence[int]) -> Sequence[int]:
        """Read more ids; the likeliest next id after each of them."""

    def keep(self, length: int) -> None:
        """Forget all but the first `length` ids."""


def expected_tokens(acceptance: float, drafted: int) -> float:
    """Mean tokens a checking pass yields when each of `drafted` is accepted with this chance: (1 - a^(k+1)) / (1 - a)."""
    return drafted + 1.0 if acceptance == 1 else (1 - acceptance ** (drafted + 1)) / (1 - acceptance)


def accepted(drafted: Sequence[int], checked: Sequence[int]) -> int:
    """How many drafted tokens stand before the first that the target would not have written."""
    pairs = zip(drafted, checked, strict=False)
    return next((i for i, (ours, theirs) in enumerate(pairs) if ours != theirs), len(drafted))


@dataclass(frozen=True)
class Speculation:
    """What came out: the ids, and of each round how many were drafted and how many of these stood."""

    ids: list[int]
    drafted: list[int]
    accepted: list[int]

    @property
    def passes(self) -> int:
        """Passes of the target after the prompt; plain decoding takes one a token."""
        return len(self.drafted)

    @property
    def acceptance(self) -> float:
        """Share of the drafted tokens looked at that stood: what follows a refusal was never judged."""
        judged = sum(min(a + 1, d) for a, d in zip(self.accepted, self.drafted, strict=True))
        return sum(self.accepted) / judged if judged else float("nan")


def speculate(target: Follower, draft: Follower, prompt: Sequence[int], new: int, drafted: int) -> Speculation:
    """Write `new` tokens greedily: `draft` proposes, `target` reads the proposal in one pass and keeps what it agrees to.

    The ids are the target's own greedy ones, whatever the draft says: a bad draft costs time, never quality.
    """
    if new < 1 or drafted < 1 or not len(prompt):
        raise LabkitError(f"new={new}, drafted={drafted} and {len(prompt)} prompt ids were given; expected 1 or more of each.")
    target.keep(0)
    draft.keep(0)
    ids, tried, stood = [*prompt, int(target.follow(prompt)[-1])], [], []
    seen = 0  # ids the draft has read
    while len(ids) < len(prompt) + new:
        count = min(drafted, len(prompt) + new - len(ids))
        known, guess = len(ids), []
        while len(guess) < count:
            guess.append(int(draft.follow([*ids, *guess][seen:])[-1]))
            seen = known + len(guess) - 1
        checked = [int(n) for n in target.follow([ids[-1], *guess])]
        right = accepted(guess, checked)
        ids += [*guess[:right], checked[right]]
        target.keep(known + right)  # everything but the newest id, which the next pass reads
        seen = min(seen, known + right)
        draft.keep(seen)
        tried.append(count)
        stood.append(right)
    return Speculation(ids[len(prompt) : len(prompt) + new], tried, stood)


def drawn_tokens(acceptance: float, drafted: int, rounds: int, seed: int = 0) -> np.ndarray:
    """Tokens of each of `rounds` checking passes when every drafted token stands with this chance; (rounds,) int."""
    stands = np.random.default_rng(seed).random((rounds, drafted)) < acceptance
    return np.cumprod(stands, axis=1).sum(axis=1) + 1

"""Examples to rows of token ids: the checkpoint's own template, loss on answers only, several conversations packed into a row."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from labkit.checkpoint import Checkpoint
from labkit.train.data import Example
from labkit.types import LabkitError


@dataclass(frozen=True)
class Encoded:
    """Token ids of one example and, for each, the weight of its loss: 1 in answers, 0 (or a little) before them."""

    ids: list[int]
    weights: list[float]
    source: str


@dataclass(frozen=True)
class Rows:
    """B rows of T tokens. Row t of `ids` is to predict `targets`; all tensors are (B, T)."""

    ids: Tensor
    targets: Tensor
    weights: Tensor  # of the loss at each position; 0 where nothing is learned
    documents: Tensor  # number of the conversation within its row, 0 for padding at the end

    def __getitem__(self, some: slice | Tensor) -> Rows:
        return Rows(self.ids[some], self.targets[some], self.weights[some], self.documents[some])

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def used(self) -> float:
        """Share of the positions that are not padding."""
        return (self.documents > 0).float().mean().item()


def encode(checkpoint: Checkpoint, example: Example, *, answers: str = "all", prompt_weight: float = 0.0) -> Encoded:
    """Ids of the whole conversation in the checkpoint's template; weight 1 on answers and the token that ends them.

    answers: "all" of the assistant's, or only the "last" (for templates that rewrite earlier turns). LabkitError, naming the
    example's line, when the template refuses the messages or a prompt is not where generation would begin.
    """
    messages = list(example.messages)
    try:
        text = checkpoint.chat(messages, add_generation_prompt=False)
        spans = [
            _span(checkpoint, messages, i, text, example.source)
            for i, message in enumerate(messages)
            if message["role"] == "assistant" and (answers == "all" or i == len(messages) - 1)
        ]
    except LabkitError as error:
        if str(error).startswith(example.source):
            raise
        raise LabkitError(f"{example.source}: {error}") from None
    tokens = checkpoint.tokenizer.encode(text, add_special_tokens=False)
    weights = [prompt_weight] * len(tokens.ids)
    for start, stop in spans:
        inside = [i for i, (begin, end) in enumerate(tokens.offsets) if start < end and begin < stop]
        if tokens.ids[: inside[0]] != checkpoint.encode(text[:start]):  # else it would be asked from other ids than it learned
            raise LabkitError(
                f"{example.source}: prompt and answer share a token, so generation would begin elsewhere than training."
            )
        weights[inside[0] : inside[-1] + 1] = [1.0] * len(inside)
    return Encoded(tokens.ids, weights, example.source)


def _span(checkpoint: Checkpoint, messages: list, i: int, text: str, source: str) -> tuple[int, int]:
    """First and last + 1 character of answer i with its end-of-turn token, in `text`."""
    before = checkpoint.chat(messages[:i], add_generation_prompt=True)
    after = checkpoint.chat(messages[: i + 1], add_generation_prompt=False)
    if not (text.startswith(after) and after.startswith(before)):
        raise LabkitError(
            f"{source}: the chat template of {checkpoint.name} writes answer {i} otherwise inside the conversation than alone; "
            'use answers="last".'
        )
    words = messages[i]["content"].strip()
    if words not in after[len(before) :]:
        raise LabkitError(
            f"{source}: the chat template of {checkpoint.name} leaves out or changes the answer; expected it word for word."
        )
    # The first end that has the whole answer before it: a short answer may also be part of the end's own name ("en").
    ends = [found.end() for mark in _ends(checkpoint) for found in re.finditer(re.escape(mark), after)
            if words in after[len(before) : found.start()]]  # fmt: skip
    if not ends:
        raise LabkitError(f"{source}: the chat template of {checkpoint.name} ends no answer with an end-of-text token.")
    return len(before), min(ends)


def _ends(checkpoint: Checkpoint) -> list[str]:
    return [checkpoint.tokenizer.id_to_token(i) for i in checkpoint.eos_ids]


def encode_all(checkpoint: Checkpoint, examples: Sequence[Example], length: int, **options) -> list[Encoded]:
    """All examples encoded; LabkitError for none, or at the first that does not fit into `length` tokens."""
    if not examples:
        raise LabkitError("No examples given; expected at least one conversation.")
    found = [encode(checkpoint, one, **options) for one in examples]
    for one in found:
        if len(one.ids) > length:
            raise LabkitError(f"{one.source}: {len(one.ids)} tokens; expected at most {length}: shorten it, or raise the length.")
    return found


def pack(encoded: Sequence[Encoded], length: int, *, pad: int = 0, alone: bool = False) -> Rows:
    """Rows of `length` tokens: each example goes whole into the first row with room (alone=True: a row each).

    Position t predicts token t + 1 of the same example; the last token of each predicts nothing.
    """
    bins: list[list[Encoded]] = []
    room: list[int] = []
    for one in encoded:
        if len(one.ids) > length:
            raise LabkitError(f"{one.source}: {len(one.ids)} tokens; expected at most {length}: shorten it, or raise the length.")
        place = next((i for i, left in enumerate(room) if left >= len(one.ids)), len(bins)) if not alone else len(bins)
        if place == len(bins):
            bins.append([])
            room.append(length)
        bins[place].append(one)
        room[place] -= len(one.ids)
    rows = Rows(*(torch.full((len(bins), length), pad) for _ in "12"), torch.zeros(len(bins), length),
                torch.zeros(len(bins), length, dtype=torch.long))  # fmt: skip
    for b, members in enumerate(bins):
        at = 0
        for number, one in enumerate(members, 1):
            n = len(one.ids)
            rows.ids[b, at : at + n] = torch.tensor(one.ids)
            rows.targets[b, at : at + n - 1] = torch.tensor(one.ids[1:])
            rows.weights[b, at : at + n - 1] = torch.tensor(one.weights[1:])
            rows.documents[b, at : at + n] = number
            at += n
    return rows


def batches(rows: Rows, size: int, seed: int | None = 0) -> Callable[[int], Rows]:
    """step -> `size` rows: every epoch reads all rows in an order of its own (seed None: as they are, each epoch).

    A function of the step alone, so that a resumed run reads what it would have read. A last, smaller batch is not dropped.
    """
    if size < 1:
        raise LabkitError(f"A batch of {size} rows was asked for; expected 1 or more.")
    each = -(-len(rows) // size)  # steps an epoch

    def batch(step: int) -> Rows:
        epoch, at = divmod(step, each)
        if seed is None:
            return rows[at * size : (at + 1) * size]
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
        return rows[order[at * size : (at + 1) * size]]

    return batch

"""Data made by a model: a teacher's answers, filtered and not repeated; a student's own tries, for on-policy distillation."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from labkit.checkpoint import Checkpoint
from labkit.train.data import Example
from labkit.train.distil import DIVERGENCES
from labkit.train.generate import complete
from labkit.train.llama import Llama
from labkit.train.loop import Loss
from labkit.train.rows import Encoded, Rows, pack
from labkit.train.splits import plain
from labkit.types import LabkitError

Messages = Sequence[Mapping[str, str]]
Judge = Callable[[Messages, str], str | None]  # what was asked, the answer -> why not, or None


@dataclass(frozen=True)
class Synthesis:
    """Examples kept, and how many answers fell to which reason ("kept" among them)."""

    examples: list[Example]
    counts: dict[str, int]


def synthesize(teacher: Llama, checkpoint: Checkpoint, asked: Sequence[Messages], judge: Judge | None = None, *,
               samples: int = 1, agree: int = 1, temperature: float = 0.0, max_new: int = 96, seed: int = 0,
               rows: int = 64) -> Synthesis:  # fmt: skip
    """The teacher's answers to `asked` (messages ending with the user's) as examples.

    Each question is answered `samples` times and the answer given most often is kept when at least `agree` tries gave it
    (self-consistency, Wang et al. 2022, arXiv:2203.11171). Dropped are questions that repeat another's plain text, answers
    without an end within `max_new` tokens, and those `judge` gives a reason against.
    """
    if not 1 <= agree <= samples or (samples > 1 and temperature <= 0):
        raise LabkitError(
            f"samples={samples}, agree={agree}, temperature={temperature} given; expected agree from 1 to samples, "
            "and a temperature above 0 for several samples (greedy ones are all alike)."
        )
    first: dict[str, Messages] = {}
    for messages in asked:
        first.setdefault(plain("\n".join(m["content"] for m in messages)), messages)
    some, kept, counts = list(first.values()), [], Counter({"repeated question": len(asked) - len(first)})
    for at in range(0, len(some), rows):
        part = some[at : at + rows]
        tries = [_answers(teacher, checkpoint, part, temperature, max_new, hash_seed(seed, at, i)) for i in range(samples)]
        for number, (messages, texts) in enumerate(zip(part, zip(*tries, strict=True), strict=True), at + 1):
            text, reason = _chosen(messages, texts, judge, agree)
            counts[reason] += 1
            if reason == "kept":
                turns = (*(dict(m) for m in messages), {"role": "assistant", "content": text})
                kept.append(Example(turns, f"answers of {checkpoint.name}, question {number}"))
    return Synthesis(kept, {k: n for k, n in counts.items() if n})


def json_object(schema: Mapping[str, Any] | None = None) -> Judge:
    """A judge that wants one JSON object, and one that fits `schema` when given."""
    from jsonschema import Draft202012Validator

    validator = Draft202012Validator(schema) if schema else None

    def judge(messages: Messages, text: str) -> str | None:
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return "not JSON"
        if not isinstance(value, dict):
            return "not an object"
        return "not by the schema" if validator and not validator.is_valid(value) else None

    return judge


def _chosen(messages: Messages, texts: Sequence[str | None], judge: Judge | None, agree: int) -> tuple[str, str]:
    """(answer, "kept") or ("", why none was kept)."""
    votes = Counter(text for text in texts if text is not None)
    if not votes:
        return "", "unfinished"
    text, count = votes.most_common(1)[0]
    if not text.strip():
        return "", "empty"
    if count < agree:
        return "", "no agreement"
    reason = judge(messages, text) if judge else None
    return ("", reason) if reason else (text, "kept")


def _answers(model: Llama, checkpoint: Checkpoint, asked: Sequence[Messages], temperature: float, max_new: int,
             seed: int) -> list[str | None]:  # fmt: skip
    """One answer a question; None for one that did not end."""
    prompts = [checkpoint.encode(checkpoint.chat(messages)) for messages in asked]
    found = complete(model, prompts, checkpoint.eos_ids[0], max_new, temperature=temperature, seed=seed)
    return [checkpoint.decode(ids) if len(ids) < max_new else None for ids in found]


class OnPolicy:
    """`batch` for `train`: at every step the student answers some of the prompts itself, and learns on its own answers.

    GKD's fully on-policy case (Agarwal et al. 2023, arXiv:2306.13649): no gradient flows through the drawing. What is drawn
    depends on the step and the student's weights alone, so a resumed run draws the same.
    """

    def __init__(self, student: Llama, checkpoint: Checkpoint, asked: Sequence[Messages], *, size: int = 8, length: int = 256,
                 max_new: int = 64, temperature: float = 1.0, seed: int = 0):  # fmt: skip
        self.student, self.stop = student, checkpoint.eos_ids[0]
        self.prompts = [checkpoint.encode(checkpoint.chat(messages)) for messages in asked]
        self.size, self.length, self.max_new, self.temperature, self.seed = size, length, max_new, temperature, seed
        longest = max(map(len, self.prompts), default=0)
        if not self.prompts or longest + max_new > length:
            raise LabkitError(
                f"{len(self.prompts)} prompts of up to {longest} tokens and answers of {max_new} given; expected at least one "
                f"prompt, and no more than {length} tokens together: raise the length."
            )

    @property
    def digest(self) -> str:
        """What a resumed run must share: the prompts and settings, not what was drawn."""
        settings = (self.prompts, self.size, self.length, self.max_new, self.temperature, self.seed)
        return hashlib.sha256(json.dumps(settings).encode()).hexdigest()

    def __call__(self, step: int) -> Rows:
        """Rows of prompts with the student's answers; weight 1 on every token it drew, the end included."""
        draws = torch.Generator().manual_seed(hash_seed(self.seed, step, 0))
        chosen = [self.prompts[i] for i in torch.randint(len(self.prompts), (self.size,), generator=draws).tolist()]
        self.student.eval()
        found = complete(
            self.student, chosen, self.stop, self.max_new, temperature=self.temperature, seed=hash_seed(self.seed, step, 1)
        )
        encoded = []
        for prompt, answer in zip(chosen, found, strict=True):
            ended = [*answer, self.stop] if len(answer) < self.max_new else answer
            encoded.append(Encoded([*prompt, *ended], [0.0] * len(prompt) + [1.0] * len(ended), f"step {step}"))
        return pack(encoded, self.length)


def on_policy_loss(teacher: Llama, divergence: str = "reverse", temperature: float = 1.0) -> Loss:
    """A loss for `train` on a student's own answers: the divergence alone, for there is no right token to count."""

    def loss(student: Any, rows: Rows) -> Tensor:
        with torch.no_grad():
            theirs = teacher(rows.ids, documents=rows.documents)
        return DIVERGENCES[divergence](student(rows.ids, documents=rows.documents), theirs, rows.weights, temperature)

    return loss


def hash_seed(*parts: int) -> int:
    """A seed from several numbers, without the overlaps that adding them would have."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7], "big")

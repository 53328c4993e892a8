"""The house language: how a turn is said, how a task is made, and which split it belongs to.

A *turn* is one request with its answer. A *task* is one or two turns of which the last answer is asked for.
Every turn carries a `key`: its slots (what is meant) without its wording. A hash of the key decides whether the turn
is held out, so no slot combination of the held-out set is ever seen in training, in either language.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from dataclasses import dataclass, field
from random import Random
from typing import Any

HELD_OUT_ONE_IN = 16
_WRAPS = {
    "en": (
        ["", "", "please ", "hey, ", "hi, ", "ok, ", "hello house, ", "excuse me, ", "quick, ", "when you can, "],
        ["", "", "", " please", ", please", ", thanks", ", thank you", " if you can", ", would you"],
    ),
    "pt": (
        ["", "", "por favor, ", "oi, ", "casa, ", "olá, ", "bom dia, ", "com licença, ", "rápido, ", "se puder, "],
        ["", "", "", " por favor", ", por favor", ", obrigado", ", obrigada", " se der", ", pode ser"],
    ),
}


@dataclass(frozen=True)
class Turn:
    """One request and its answer. `key` holds the slots, `state` an optional system message."""

    text: str
    answer: dict[str, Any]
    key: Any
    slots: dict[str, Any] = field(default_factory=dict)
    state: str | None = None

    @property
    def held_out(self) -> bool:
        return is_held_out([self.answer["intent"], self.key])


@dataclass(frozen=True)
class Task:
    """A request in ChatML messages (the last one is the user's) and the one right answer."""

    messages: list[dict[str, str]]
    answer: dict[str, Any]
    intent: str
    tier: int
    lang: str
    split: str
    keys: tuple[str, ...] = ()  # slots of every turn, the asked one last

    def conversation(self) -> list[dict[str, str]]:
        """The messages with the right answer appended: what training and perplexity read."""
        return [*self.messages, {"role": "assistant", "content": dumps(self.answer)}]


def dumps(answer: dict[str, Any]) -> str:
    """Compact JSON, keys in the order of the schema: the exact text the model is taught to write."""
    return json.dumps(answer, ensure_ascii=False, separators=(",", ":"))


def is_held_out(key: Any, one_in: int = HELD_OUT_ONE_IN) -> bool:
    digest = hashlib.sha256(json.dumps(key, sort_keys=True, ensure_ascii=False).encode()).digest()
    return int.from_bytes(digest[:4], "big") % one_in == 0


def say(rng: Random, lang: str, tier: int, plain: list[str], varied: list[str] = (), /, **slots: str) -> str:
    """One sentence: choose a template, vary it by tier, then fill `<slot>`s.

    `(a|b)` in a template is a free choice. Politeness and spelling noise touch only the frame, never a slot,
    so a name or an item can always be copied letter by letter.
    """
    template = rng.choice(plain if tier == 1 or not varied or rng.random() < 0.3 else varied)
    frame = re.sub(r"\(([^()]*)\)", lambda found: rng.choice(found[1].split("|")), template)
    if tier > 1:
        before, after = _WRAPS[lang]
        question = "?" if frame.endswith("?") else ""
        frame = rng.choice(before) + frame.rstrip("?") + rng.choice(after) + question
        if rng.random() < 0.4:
            frame = misspell(rng, frame)
    text = re.sub(r"<(\w+)>", lambda found: slots[found[1]], " ".join(frame.split()))
    return _finish(rng, text, tier)


def _finish(rng: Random, text: str, tier: int) -> str:
    if tier > 1 and rng.random() < 0.15:
        text = text.rstrip("?")
    if rng.random() < 0.6:
        text = text[0].upper() + text[1:]
    return text + rng.choice(("", "", ".")) if text[-1] not in "?!." else text


def misspell(rng: Random, frame: str) -> str:
    """One or two slips in words of four letters or more outside `<slots>`; Portuguese accents may be dropped."""
    pieces = re.split(r"(<\w+>|[^\w<>]+)", frame)
    words = [i for i, piece in enumerate(pieces) if len(piece) >= 4 and piece.isalpha()]
    for i in rng.sample(words, min(len(words), rng.choice((1, 1, 2)))):
        pieces[i] = _slip(rng, pieces[i])
    return "".join(pieces)


def _slip(rng: Random, word: str) -> str:
    bare = "".join(c for c in unicodedata.normalize("NFD", word) if not unicodedata.combining(c))
    if bare != word:
        return bare
    at = rng.randrange(1, len(word) - 1)
    kind = rng.randrange(3)
    if kind == 0:
        return word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    return word[:at] + word[at + 1 :] if kind == 1 else word[:at] + word[at] + word[at:]


def make_task(turns: list[Turn], tier: int, lang: str, split: str) -> Task:
    """Turns to messages. The first turn's state, if any, is the system message."""
    messages = [{"role": "system", "content": turns[0].state}] if turns[0].state else []
    for turn in turns[:-1]:
        messages += [{"role": "user", "content": turn.text}, {"role": "assistant", "content": dumps(turn.answer)}]
    messages.append({"role": "user", "content": turns[-1].text})
    keys = tuple(json.dumps([t.answer["intent"], t.key], sort_keys=True, ensure_ascii=False) for t in turns)
    return Task(messages, turns[-1].answer, turns[-1].answer["intent"], tier, lang, split, keys)


def chatml(messages: list[dict[str, str]], add_generation_prompt: bool = False) -> str:
    """The chat template in plain Python (a test proves it equal to the shipped Jinja template)."""
    text = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
    return text + ("<|im_start|>assistant\n" if add_generation_prompt else "")

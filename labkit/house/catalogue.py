"""The catalogue: device codes that can only be known by heart.

Every device has a code drawn once from a seeded hash; nothing about the name tells it. How often a fact is met in training
varies by a factor of `SPREAD` (log-uniformly),
so some facts sit deep in the weights and others barely: rounding the weights
erases them one by one instead of all at once. Here "held out" can only mean an unseen wording, for a fact never met cannot be known.
"""

from __future__ import annotations

import hashlib
from functools import cache
from random import Random

from labkit.house.language import Turn, say

FACTS = 4096
SPREAD = 8.0
ADJECTIVES = (
    "amber arctic azure bold brisk bronze calm cedar chrome clear cobalt copper coral cosmic crimson crystal dusty early ebony "
    "ember faint fern frosty gentle ginger golden grand granite hazel hidden hollow indigo iron ivory jade keen lazy lemon lilac "
    "lucky lunar maple marble mellow misty nimble noble ocean olive opal pearl plain polar proud quiet rapid rosy royal ruby rustic "
    "sandy silver solar stone"
).split()
NOUNS = (
    "anchor arrow badge beacon bell bolt bridge buckle button cable camera candle charger clock compass coupler dial dimmer fan "
    "feeder filter fuse gate gauge grill heater hinge hook horn kettle ladder latch lens lever lock magnet meter mixer motor nozzle "
    "panel pedal plug pump radio relay remote router scale sensor shutter siren socket speaker spring switch tablet toaster tuner "
    "valve vent washer winch wire"
).split()


@cache
def facts() -> dict[str, str]:
    """Device -> code, e.g. `{"amber valve": "7K2R", ...}`; the order is fixed and mixes weights."""
    return {f"{a} {n}": code(f"{a} {n}") for a in ADJECTIVES for n in NOUNS}


def code(device: str) -> str:
    """Digit, letter, digit, letter: one token each, 16 bits to remember."""
    number = int.from_bytes(hashlib.sha256(f"edgehome {device}".encode()).digest()[:8], "big")
    number, d1 = divmod(number, 10)
    number, l1 = divmod(number, 26)
    number, d2 = divmod(number, 10)
    return f"{d1}{chr(65 + l1)}{d2}{chr(65 + number % 26)}"


@cache
def exposures() -> list[float]:
    """Relative frequency of every fact in training, from 1 to `SPREAD`."""
    rng = Random(20)
    return [SPREAD ** rng.random() for _ in facts()]


@cache
def _cumulative() -> list[float]:
    total, sums = 0.0, []
    for weight in exposures():
        total += weight
        sums.append(total)
    return sums


def draw_device(rng: Random, even: bool) -> str:
    """A device: evenly (for scoring) or as often as training meets it."""
    names = list(facts())
    return rng.choice(names) if even else rng.choices(names, cum_weights=_cumulative())[0]


def catalogue(rng: Random, lang: str, tier: int, even: bool = False) -> Turn:
    forms = {
        "en": [
            "what is the code of the <device>?",
            "code for the <device>",
            "(give|tell) me the <device> code",
            "which code has the <device>?",
            "I (need|want) the code of the <device>",
            "<device>, what code?",
            "look up the <device>",
        ],
        "pt": [
            "qual é o código do <device>?",
            "código do <device>",
            "me (dê|diga) o código do <device>",
            "que código tem o <device>?",
            "(preciso|quero) o código do <device>",
            "<device>, qual código?",
            "procure o <device>",
        ],
    }[lang]
    return _turn(say(rng, lang, tier, forms[:2], forms, device=(device := draw_device(rng, even))), device)


def again(rng: Random, lang: str, last: Turn, even: bool = False) -> Turn:
    device = draw_device(rng, even)
    forms = {"en": ["and the <device>?", "and of the <device>?"], "pt": ["e o <device>?", "e do <device>?"]}[lang]
    return _turn(say(rng, lang, rng.choice((1, 2)), forms, device=device), device)


def _turn(text: str, device: str) -> Turn:
    return Turn(text, {"intent": "catalogue", "device": device, "code": facts()[device]}, text)


def page(rng: Random, lines: int = 12) -> list[tuple[str, str]]:
    """Text and answer by turns: a page of the printed catalogue, which training reads besides questions about it.

    A line ends exactly as an answer does, so what is learned here is what a question asks for, at a third of the tokens.
    """
    parts = [("<|im_start|>system\n", "")]
    for _ in range(lines):
        device = draw_device(rng, even=False)
        parts.append((f'{{"device":"{device}","code":"', facts()[device]))
        parts.append(('"}\n', ""))
    return [*parts, ("<|im_end|>\n", "")]

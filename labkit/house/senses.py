"""Questions: the state of the house, two sensors compared, sums, and the catalogue of memorised device codes."""

from __future__ import annotations

from itertools import product
from random import Random
from typing import Any

from labkit.house.language import Turn, say
from labkit.house.words import ROOMS, in_words, of_room, room, the_room

# device -> value -> (English, Portuguese); the heating's value is a number
DEVICES = {
    "light": ("light", "luz", {"on": ("on", "acesa"), "off": ("off", "apagada")}),
    "door": ("door", "porta", {"open": ("open", "aberta"), "closed": ("closed", "fechada"), "locked": ("locked", "trancada")}),
    "window": ("window", "janela", {"open": ("open", "aberta"), "closed": ("closed", "fechada")}),
    "heating": ("heating", "temperatura", {}),
}


def status(rng: Random, lang: str, tier: int) -> Turn:
    """The state stands in the system message; what is not in it is `unknown`."""
    count = rng.choice(((1, 2), (2, 3), (3, 4))[tier - 1])
    pairs = rng.sample(list(product(ROOMS, DEVICES)), count + 1)
    known = {pair: _value(rng, pair[1]) for pair in pairs[:count]}
    state = "; ".join(_said(pair, value, lang) for pair, value in known.items())
    return _ask(rng, lang, tier, known, state, pairs[count])


def _value(rng: Random, device: str) -> Any:
    return rng.choice(list(DEVICES[device][2])) if device != "heating" else rng.randrange(10, 31)


def _item(pair: tuple[str, str], lang: str) -> str:
    name, device = pair
    return f"{room(name, 'en')} {DEVICES[device][0]}" if lang == "en" else f"{DEVICES[device][1]} {of_room(name, 'pt')}"


def _said(pair: tuple[str, str], value: Any, lang: str) -> str:
    words = DEVICES[pair[1]][2]
    return f"{_item(pair, lang)}: {words[value][lang == 'pt'] if value in words else value}"


def _ask(rng: Random, lang: str, tier: int, known: dict, state: str, absent: tuple[str, str]) -> Turn:
    pair = absent if tier > 1 and rng.random() < 0.15 else rng.choice(list(known))
    value = known.get(pair, "unknown")
    forms = {
        "en": [
            "what is the state of the <item>?",
            "status of the <item>?",
            "how is the <item>?",
            "tell me about the <item>",
            "<item>?",
            "(can|could) you check the <item>?",
            "what does the <item> say?",
        ],
        "pt": [
            "qual é o estado da <item>?",
            "como está a <item>?",
            "e a <item>?",
            "me diga como está a <item>",
            "<item>?",
            "(pode|poderia) verificar a <item>?",
            "confira a <item>",
        ],
    }[lang]
    answer = {"intent": "status", "room": pair[0], "device": pair[1], "value": value}
    key = {"state": sorted([*p, v] for p, v in known.items()), "item": list(pair)} if len(known) > 1 else [*pair, value]
    text = say(rng, lang, tier, forms[:2], forms, item=_item(pair, lang))
    return Turn(text, answer, key, {"known": known, "absent": absent}, state)


def compare(rng: Random, lang: str, tier: int) -> Turn:
    """Two readings of equal length, worked out digit by digit from the left until they differ."""
    low, high, decimals = ((10, 99, 0), (100, 399, 1), (100, 399, 1))[tier - 1]
    a = rng.randrange(low, high + 1)
    near = rng.random() < 0.6  # close readings are the hard and the interesting ones
    b = min(high, max(low, a + rng.choice((-1, 1)) * rng.randrange(0, 12))) if near else rng.randrange(low, high + 1)
    return _compare(rng, lang, tier, rng.sample(list(ROOMS), 2), (a, b), decimals, rng.choice(("high", "low")))


def _compare(rng: Random, lang: str, tier: int, rooms: list[str], values: tuple[int, int], decimals: int, ask: str) -> Turn:
    point = "." if lang == "en" else ","
    said = [f"{v}" if not decimals else f"{v // 10}{point}{v % 10}" for v in values]
    word = {"high": ("warmer", "mais quente"), "low": ("colder", "mais frio")}[ask][lang == "pt"]
    if lang == "en":
        forms = [
            "<a> is at <x> and <b> at <y>, which is <word>?",
            "<a>: <x>, <b>: <y>. Which one is <word>?",
            "which is <word>, <a> at <x> or <b> at <y>?",
            "<a> shows <x>, <b> shows <y>, the <word> one?",
            "I read <x> in <a> and <y> in <b>, where is it <word>?",
        ]
    else:
        forms = [
            "<a> está em <x> e <b> em <y>, qual é <word>?",
            "<a>: <x>, <b>: <y>. Qual é <word>?",
            "qual é <word>, <a> com <x> ou <b> com <y>?",
            "<a> marca <x>, <b> marca <y>, onde é <word>?",
            "leio <x> para <a> e <y> para <b>, onde está <word>?",
        ]
    text = say(
        rng, lang, tier, forms[:2], forms, a=the_room(rooms[0], lang), b=the_room(rooms[1], lang), x=said[0], y=said[1], word=word
    )
    work, result = verdict(values, rooms, ask)
    answer = {"intent": "compare", "ask": ask, "work": work, "result": result}
    slots = {"rooms": rooms, "values": values, "ask": ask}
    return Turn(text, answer, {**slots, "values": list(values)}, slots)


def verdict(values: tuple[int, int], rooms: list[str], ask: str) -> tuple[str, str]:
    """`("2=2,3<8", "hall")`: digits compared from the left up to the first that differ, and the room that follows."""
    steps = []
    for x, y in zip(str(values[0]), str(values[1]), strict=True):
        steps.append(f"{x}{'=' if x == y else '<' if x < y else '>'}{y}")
        if x != y:
            break
    if values[0] == values[1]:
        return ",".join(steps), "equal"
    return ",".join(steps), rooms[0] if (values[0] > values[1]) == (ask == "high") else rooms[1]


def math(rng: Random, lang: str, tier: int) -> Turn:
    """Two-digit sums and differences (never below zero), worked out ones first, then tens."""
    a, b, op = rng.randrange(10, 100), rng.randrange(10, 100), rng.choice("+-")
    if op == "-":
        a, b = max(a, b), min(a, b)
    words = tier > 1 and rng.random() < (0.2, 0.7)[tier - 2]
    slots = {"a": in_words(a, lang) if words else str(a), "b": in_words(b, lang) if words else str(b)}
    forms = {
        ("en", "+"): [
            "what is <a> plus <b>?",
            "<a> + <b>",
            "add <a> and <b>",
            "how much is <a> and <b> together?",
            "I had <a> and got <b> more, how many now?",
            "sum of <a> and <b>",
        ],
        ("en", "-"): [
            "what is <a> minus <b>?",
            "<a> - <b>",
            "take <b> from <a>",
            "how much is <a> without <b>?",
            "I had <a> and used <b>, how many are left?",
            "difference of <a> and <b>",
        ],
        ("pt", "+"): [
            "quanto é <a> mais <b>?",
            "<a> + <b>",
            "some <a> com <b>",
            "quanto dá <a> e <b> juntos?",
            "eu tinha <a> e ganhei <b>, quantos agora?",
            "soma de <a> e <b>",
        ],
        ("pt", "-"): [
            "quanto é <a> menos <b>?",
            "<a> - <b>",
            "tire <b> de <a>",
            "quanto dá <a> sem <b>?",
            "eu tinha <a> e usei <b>, quantos sobraram?",
            "diferença de <a> e <b>",
        ],
    }[lang, op]
    work, result = worked(a, b, op)
    answer = {"intent": "math", "work": work, "result": result}
    return Turn(say(rng, lang, tier, forms[:2], forms, **slots), answer, [a, op, b], {"result": result})


def worked(a: int, b: int, op: str) -> tuple[str, int]:
    """`("7+8=15,4+3+1=8", 85)`: ones, then tens with the carry; a difference borrows first (`12-8=4,4-3=1`)."""
    ones, tens = (a % 10, b % 10), (a // 10, b // 10)
    if op == "+":
        carry = "+1" if sum(ones) > 9 else ""
        return f"{ones[0]}+{ones[1]}={sum(ones)},{tens[0]}+{tens[1]}{carry}={sum(tens) + bool(carry)}", a + b
    borrow = ones[0] < ones[1]
    left, top = ones[0] + 10 * borrow, tens[0] - borrow
    return f"{left}-{ones[1]}={left - ones[1]},{top}-{tens[1]}={top - tens[1]}", a - b


def again(rng: Random, lang: str, last: Turn) -> Turn:
    """`and the hall window?`, `and which is colder?`, `and 23 plus 45?`."""
    intent = last.answer["intent"]
    if intent == "status":
        return _ask(rng, lang, 2, last.slots["known"], None, last.slots["absent"])
    if intent == "math":
        return math(rng, lang, rng.choice((1, 2)))
    ask = "low" if last.slots["ask"] == "high" else "high"
    work, result = verdict(last.slots["values"], last.slots["rooms"], ask)
    word = {"high": ("warmer", "mais quente"), "low": ("colder", "mais frio")}[ask][lang == "pt"]
    forms = {"en": ["and which is <word>?", "and the <word> one?"], "pt": ["e qual é <word>?", "e o <word>?"]}[lang]
    slots = {**last.slots, "ask": ask}
    answer = {"intent": "compare", "ask": ask, "work": work, "result": result}
    return Turn(say(rng, lang, rng.choice((1, 2)), forms, word=word), answer, {**slots, "values": list(slots["values"])}, slots)

"""Timers and alarms: mixed units, clock forms and spoken forms."""

from __future__ import annotations

from random import Random
from typing import Any

from labkit.house.language import Turn, say
from labkit.house.words import feminine, in_words, joined, say_number

UNITS = {"hours": ("hour", "hora"), "minutes": ("minute", "minuto"), "seconds": ("second", "segundo")}
LABELS = {
    "en": "pasta rice eggs tea bread cake pizza soup chicken laundry oven nap workout yoga homework meeting roast beans "
    "coffee potatoes".split(),
    "pt": "macarrão arroz ovos chá pão bolo pizza sopa frango roupa forno cochilo treino ioga lição reunião assado feijão "
    "café batatas".split(),
}
DAYS = {
    "monday": ("monday", "segunda"),
    "tuesday": ("tuesday", "terça"),
    "wednesday": ("wednesday", "quarta"),
    "thursday": ("thursday", "quinta"),
    "friday": ("friday", "sexta"),
    "saturday": ("saturday", "sábado"),
    "sunday": ("sunday", "domingo"),
    "tomorrow": ("tomorrow", "amanhã"),
}
# Shortcuts people use instead of a number: (English, Portuguese) -> hours, minutes
SPECIAL = {
    ("half an hour", "meia hora"): (0, 30),
    ("an hour and a half", "uma hora e meia"): (1, 30),
    ("a quarter of an hour", "um quarto de hora"): (0, 15),
    ("two and a half hours", "duas horas e meia"): (2, 30),
}


def timer(rng: Random, lang: str, tier: int) -> Turn:
    amounts, said = _duration(rng, lang, tier)
    answer: dict[str, Any] = dict(amounts)
    label = ""
    if (tier == 3 and rng.random() < 0.5) or (tier == 2 and rng.random() < 0.2):
        answer["label"] = rng.choice(LABELS[lang])
        label = {"en": " for the <label>", "pt": " para <label>"}[lang]
    slots = {"for": said, "label": answer.get("label", "")}
    if lang == "en":
        plain = ["set a timer for <for>", "timer for <for>"]
        varied = [
            "(can|could) you time <for>?",
            "<for> timer",
            "(start|give me) a timer of <for>",
            "count down <for>",
            "wake up the timer in <for>",
            "I need <for> on the timer",
            "remind me in <for>",
        ]
    else:
        plain = ["coloque um timer de <for>", "timer de <for>"]
        varied = [
            "(pode|poderia) marcar <for>?",
            "(inicie|comece) um timer de <for>",
            "conte <for>",
            "<for> no timer",
            "preciso de <for> no timer",
            "me avise em <for>",
            "cronometre <for>",
        ]
    text = say(rng, lang, tier, [t + label for t in plain], [t.rstrip("?") + label for t in varied], **slots)
    return Turn(text, {"intent": "timer", **answer}, answer)


def _duration(rng: Random, lang: str, tier: int) -> tuple[dict[str, int], str]:
    """Amounts exactly as spoken (`90 minutes` stays 90 minutes) and their wording."""
    amounts = {"hours": 0, "minutes": 0, "seconds": 0}
    if tier > 1 and rng.random() < 0.1:
        words, (hours, minutes) = rng.choice(list(SPECIAL.items()))
        return {"hours": hours, "minutes": minutes, "seconds": 0}, words[lang == "pt"]
    count = rng.choice(((1,), (1, 2), (1, 2, 2, 3))[tier - 1])
    used = sorted(rng.sample(list(UNITS), count), key=list(UNITS).index)
    parts = []
    for unit in used:
        amounts[unit] = rng.randrange(1, 13 if unit == "hours" else 60 if count > 1 else 100)
        parts.append(_amount(rng, amounts[unit], unit, lang, tier))
    return amounts, joined(parts, lang)


def _amount(rng: Random, value: int, unit: str, lang: str, tier: int) -> str:
    number = say_number(rng, value, lang, tier)
    if lang == "pt" and unit == "hours":
        number = feminine(number)
    return f"{number} {UNITS[unit][lang == 'pt']}{'s' if value > 1 else ''}"


def alarm(rng: Random, lang: str, tier: int) -> Turn:
    hour, minute, said = (_clock if tier == 1 or rng.random() < 0.4 else _spoken)(rng, lang)
    answer: dict[str, Any] = {"time": f"{hour:02d}:{minute:02d}"}
    slots, day = {"at": said}, ""
    if rng.random() < (0.3, 0.5, 0.7)[tier - 1]:
        answer["day"] = rng.choice(list(DAYS))
        slots["day"] = DAYS[answer["day"]][lang == "pt"]
        day = " <day>" if answer["day"] == "tomorrow" else {"en": " on <day>", "pt": " na <day>"}[lang]
        if answer["day"] in ("saturday", "sunday") and lang == "pt":
            day = " no <day>"
    if lang == "en":
        plain = ["set an alarm for <at>{day}", "wake me up at <at>{day}"]
        varied = [
            "(can|could) you wake me at <at>{day}?",
            "alarm{day} at <at>",
            "{day} alarm <at>",
            "I (have to|must) get up at <at>{day}",
            "(ring|beep) at <at>{day}",
            "don't let me sleep past <at>{day}",
            "alarm <at>{day}",
        ]
    else:
        plain = ["coloque um alarme para as <at>{day}", "me acorde às <at>{day}"]
        varied = [
            "(pode|poderia) me acordar às <at>{day}?",
            "alarme{day} às <at>",
            "{day} alarme às <at>",
            "(tenho que|preciso) levantar às <at>{day}",
            "(toque|despertador) às <at>{day}",
            "não me deixe dormir depois das <at>{day}",
            "despertar às <at>{day}",
        ]
    forms = [[t.replace("{day}", day) for t in group] for group in (plain, varied)]
    return Turn(say(rng, lang, tier, *forms, **slots), {"intent": "alarm", **answer}, answer)


def _clock(rng: Random, lang: str) -> tuple[int, int, str]:
    """Digits: `7:45`, `19:45`, `7:45 pm`, `19h45`."""
    hour, minute = rng.randrange(24), rng.randrange(60)
    if lang == "en" and hour % 12 >= 1 and rng.random() < 0.5:
        return hour, minute, f"{hour % 12}:{minute:02d} {'am' if hour < 12 else 'pm'}"
    mark = ":" if lang == "en" or rng.random() < 0.5 else "h"
    return hour, minute, f"{hour}{mark}{minute:02d}"


def _spoken(rng: Random, lang: str) -> tuple[int, int, str]:
    """`half past six in the evening`, `quinze para as oito da noite`. Without a part of the day: as on the dial, a.m."""
    hour, minute = rng.randrange(1, 12), rng.choice((0, 15, 30, 45, *range(5, 60, 5)))
    said = (_spoken_en if lang == "en" else _spoken_pt)(rng, hour, minute)
    parts = {"en": ("in the morning", "in the afternoon", "in the evening"), "pt": ("da manhã", "da tarde", "da noite")}[lang]
    if rng.random() < 0.3:
        return hour, minute, said
    late = rng.random() < 0.5
    part = parts[0] if not late else parts[1] if hour < 6 else parts[2]
    return hour + (12 if late else 0), minute, f"{said} {part}"


def _spoken_en(rng: Random, hour: int, minute: int) -> str:
    now, following = in_words(hour, "en"), in_words(hour + 1, "en")
    if minute == 0:
        return f"{now} o'clock"
    if minute == 30:
        return rng.choice((f"half past {now}", f"{now} thirty"))
    quarter = {15: "quarter", 45: "quarter"}
    if minute < 30:
        return f"{quarter.get(minute, in_words(minute, 'en'))} past {now}"
    return rng.choice((f"{quarter.get(minute, in_words(60 - minute, 'en'))} to {following}", f"{now} {in_words(minute, 'en')}"))


def _spoken_pt(rng: Random, hour: int, minute: int) -> str:
    now, following = feminine(in_words(hour, "pt")), feminine(in_words(hour + 1, "pt"))
    if minute == 0:
        return f"{now} em ponto"
    if minute == 30:
        return f"{now} e meia"
    if minute > 30 and rng.random() < 0.6:
        return f"{in_words(60 - minute, 'pt')} para as {following}"
    return f"{now} e {in_words(minute, 'pt')}"


def again(rng: Random, lang: str, last: Turn) -> Turn:
    """`make it 20 minutes instead`, `no, at 8:15`: the same command with a new amount or hour; label and day stay."""
    if last.answer["intent"] == "timer":
        amounts, said = _duration(rng, lang, rng.choice((1, 2)))
        answer = {**last.answer, **amounts}
        forms = {
            "en": ["make it <to> instead", "no, <to>", "change it to <to>"],
            "pt": ["troque para <to>", "não, <to>", "mude para <to>"],
        }
    else:
        hour, minute, said = (_clock if rng.random() < 0.6 else _spoken)(rng, lang)
        answer = {**last.answer, "time": f"{hour:02d}:{minute:02d}"}
        forms = {
            "en": ["make it <to> instead", "no, at <to>", "move it to <to>"],
            "pt": ["troque para as <to>", "não, às <to>", "passe para as <to>"],
        }
    text = say(rng, lang, rng.choice((1, 2)), forms[lang], to=said)
    return Turn(text, answer, {k: v for k, v in answer.items() if k != "intent"})

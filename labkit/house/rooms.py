"""Commands that act on rooms: lights, dimming, colours, blinds, heating, music."""

from __future__ import annotations

from random import Random
from typing import Any

from labkit.house.language import Turn, say
from labkit.house.words import in_room, in_rooms, in_words, say_number, some_rooms

LAMPS = {
    "all": ("lights", "as luzes"),
    "ceiling": ("ceiling light", "a luz do teto"),
    "floor": ("floor lamp", "o abajur de pé"),
    "desk": ("desk lamp", "a luminária da mesa"),
    "wall": ("wall light", "a luz da parede"),
    "reading": ("reading light", "a luz de leitura"),
    "string": ("fairy lights", "o pisca-pisca"),
}
COLORS = {
    "red": ("red", "vermelho"),
    "green": ("green", "verde"),
    "blue": ("blue", "azul"),
    "yellow": ("yellow", "amarelo"),
    "orange": ("orange", "laranja"),
    "purple": ("purple", "roxo"),
    "pink": ("pink", "rosa"),
    "white": ("white", "branco"),
    "turquoise": ("turquoise", "turquesa"),
    "gold": ("gold", "dourado"),
    "violet": ("violet", "violeta"),
    "amber": ("amber", "âmbar"),
}
MUSIC = {
    "jazz": ("jazz", "jazz"),
    "rock": ("rock", "rock"),
    "samba": ("samba", "samba"),
    "opera": ("opera", "ópera"),
    "folk": ("folk", "folclore"),
    "blues": ("blues", "blues"),
    "piano": ("piano music", "música de piano"),
    "classical": ("classical music", "música clássica"),
    "news": ("the news", "as notícias"),
}
AGAIN = {
    "en": ["and <in>?", "and (also|now) <in>", "do the same <in>", "now <in>", "<in> too", "what about <in>?"],
    "pt": ["e <in>?", "e (também|agora) <in>", "faça o mesmo <in>", "agora <in>", "<in> também", "e que tal <in>?"],
}


def percent(rng: Random, value: int, lang: str, tier: int) -> str:
    said = say_number(rng, value, lang, tier)
    if said.isdigit() and rng.random() < 0.6:
        return said + "%"
    return said + (" percent" if lang == "en" else " por cento")


def again(rng: Random, lang: str, last: Turn, draw: Any) -> Turn:
    """A follow-up that changes only the room: `and in the bedroom?`."""
    rooms = [r for r in some_rooms(rng, 2) if r not in last.answer["rooms"]] or ["hall"]
    answer = {**last.answer, "rooms": rooms}
    text = say(rng, lang, rng.choice((1, 2)), AGAIN[lang], **{"in": in_room(rooms[0], lang)})
    return Turn(text, answer, {k: v for k, v in answer.items() if k != "intent"})


def _turn(text: str, intent: str, **answer: Any) -> Turn:
    return Turn(text, {"intent": intent, **answer}, answer)


def light(rng: Random, lang: str, tier: int) -> Turn:
    rooms, lamp, state = some_rooms(rng, tier), rng.choice(list(LAMPS)), rng.choice(("on", "off"))
    slots = {"in": in_rooms(rooms, lang), "lamp": LAMPS[lamp][lang == "pt"], "state": state}
    if lang == "en":
        plain = ["turn <state> the <lamp> <in>", "switch <state> the <lamp> <in>", "turn the <lamp> <in> <state>"]
        varied = [
            "(could|can|will) you (turn|switch) <state> the <lamp> <in>?",
            "I (want|need) the <lamp> <in> <state>",
            "the <lamp> <in> (should|must) be <state>",
            "<lamp> <in> <state>",
            "<in>, (turn|put) the <lamp> <state>",
            "get the <lamp> <in> <state>",
            "make sure the <lamp> <in> (is|are) <state>",
            "set the <lamp> <in> to <state>",
        ]
    else:
        slots["verb"] = rng.choice({"on": ["acenda", "ligue"], "off": ["apague", "desligue"]}[state])
        slots["inf"] = {"acenda": "acender", "ligue": "ligar", "apague": "apagar", "desligue": "desligar"}[slots["verb"]]
        plain = ["<verb> <lamp> <in>", "<in> <verb> <lamp>"]
        varied = [
            "(pode|poderia|consegue) <inf> <lamp> <in>?",
            "(quero|preciso|queria) <inf> <lamp> <in>",
            "<inf> <lamp> <in>",
            "é para <inf> <lamp> <in>",
            "<lamp> <in>, <verb>",
            "dá para <inf> <lamp> <in>?",
            "não esqueça de <inf> <lamp> <in>",
        ]
    return _turn(say(rng, lang, tier, plain, varied, **slots), "light", rooms=rooms, lamp=lamp, state=state)


def dim(rng: Random, lang: str, tier: int) -> Turn:
    rooms, value = some_rooms(rng, tier), rng.randrange(1, 100)
    slots = {"in": in_rooms(rooms, lang), "to": percent(rng, value, lang, tier)}
    if lang == "en":
        plain = ["dim the lights <in> to <to>", "set the brightness <in> to <to>"]
        varied = [
            "(could|can) you dim the lights <in> to <to>?",
            "I (want|would like) the lights <in> at <to>",
            "brightness <in> <to>",
            "bring the lights <in> (down|up|) to <to>",
            "make the lights <in> <to> bright",
            "lights at <to> <in>",
            "<in> dim it to <to>",
        ]
    else:
        plain = ["(diminua|ajuste) as luzes <in> para <to>", "(coloque|ponha) o brilho <in> em <to>"]
        varied = [
            "(pode|poderia) ajustar o brilho <in> para <to>?",
            "(quero|queria) as luzes <in> em <to>",
            "brilho <in> <to>",
            "(deixe|deixa) as luzes <in> com <to> de brilho",
            "luzes a <to> <in>",
            "<in> brilho em <to>",
        ]
    return _turn(say(rng, lang, tier, plain, varied, **slots), "dim", rooms=rooms, percent=value)


def color(rng: Random, lang: str, tier: int) -> Turn:
    rooms, name = some_rooms(rng, tier), rng.choice(list(COLORS))
    slots = {"in": in_rooms(rooms, lang), "color": COLORS[name][lang == "pt"]}
    answer: dict[str, Any] = {"rooms": rooms, "color": name}
    extra = ""
    if tier == 3 and rng.random() < 0.5:  # compound: colour and brightness in one breath
        answer["percent"] = rng.randrange(1, 100)
        slots["to"] = percent(rng, answer["percent"], lang, tier)
        extra = {"en": " (at|and dim to) <to>", "pt": " (a|com brilho de) <to>"}[lang]
    if lang == "en":
        plain = ["make the lights <in> <color>", "set the lights <in> to <color>"]
        varied = [
            "(can|could) you make it <color> <in>",
            "I (want|would like) <color> light <in>",
            "<color> lights <in>",
            "change the color <in> to <color>",
            "<in> I want <color>",
            "turn the lights <in> <color>",
            "paint it <color> <in>",
        ]
    else:
        plain = ["deixe as luzes <in> na cor <color>", "mude a cor das luzes <in> para <color>"]
        varied = [
            "(pode|poderia) colocar luz <color> <in>",
            "(quero|queria) luz <color> <in>",
            "luz <color> <in>",
            "troque a cor <in> para <color>",
            "<in> quero a cor <color>",
            "cor <color> <in>",
            "luzes <in> em <color>",
        ]
    add = [t + extra for t in plain], [t + extra for t in varied]
    return _turn(say(rng, lang, tier, *add, **slots), "color", **answer)


def blinds(rng: Random, lang: str, tier: int) -> Turn:
    rooms, value = some_rooms(rng, tier), rng.choice((0, 100, 50, None, None, None))
    slots = {"in": in_rooms(rooms, lang)}
    named = value is not None
    if not named:
        value = rng.randrange(1, 100)
        slots["to"] = percent(rng, value, lang, tier)
    if lang == "en":
        forms = {
            0: ["(close|lower|shut) the blinds <in>", "blinds <in> (closed|down)", "(can|could) you close the blinds <in>?"],
            100: ["(open|raise) the blinds <in>", "blinds <in> (open|up)", "(can|could) you open the blinds <in>?"],
            50: ["open the blinds <in> halfway", "blinds <in> half open", "half open the blinds <in>"],
            None: [
                "open the blinds <in> to <to>",
                "(set|put) the blinds <in> (at|to) <to>",
                "blinds <in> at <to>",
                "I (want|need) the blinds <in> <to> open",
            ],
        }
    else:
        forms = {
            0: ["(feche|abaixe) as persianas <in>", "persianas <in> fechadas", "(pode|poderia) fechar as persianas <in>?"],
            100: ["(abra|levante) as persianas <in>", "persianas <in> abertas", "(pode|poderia) abrir as persianas <in>?"],
            50: ["abra as persianas <in> até a metade", "persianas <in> pela metade", "deixe as persianas <in> meio abertas"],
            None: [
                "abra as persianas <in> em <to>",
                "(coloque|deixe) as persianas <in> em <to>",
                "persianas <in> a <to>",
                "quero as persianas <in> <to> abertas",
            ],
        }
    choice = forms[value if named else None]
    return _turn(say(rng, lang, tier, choice[:2], choice, **slots), "blinds", rooms=rooms, open=value)


def heat(rng: Random, lang: str, tier: int) -> Turn:
    rooms, unit = some_rooms(rng, tier), rng.choice("CCF")
    degrees: float = rng.randrange(12, 31) if unit == "C" else rng.randrange(55, 91)
    if unit == "C" and rng.random() < 0.35:
        degrees += 0.5
    slots = {"in": in_rooms(rooms, lang), "to": temperature(rng, degrees, unit, lang, tier)}
    if lang == "en":
        plain = ["set the heating <in> to <to>", "put the heating <in> at <to>"]
        varied = [
            "(can|could) you set it to <to> <in>?",
            "I (want|would like) <to> <in>",
            "make it <to> <in>",
            "(warm|bring) it up to <to> <in>",
            "thermostat <in> <to>",
            "<in> the heating at <to>",
            "heating at <to> <in>",
        ]
    else:
        plain = ["coloque o aquecimento <in> em <to>", "ajuste a temperatura <in> para <to>"]
        varied = [
            "(pode|poderia) deixar <to> <in>?",
            "(quero|queria) <to> <in>",
            "deixe <in> com <to>",
            "aqueça <in> até <to>",
            "termostato <in> <to>",
            "<in> aquecimento a <to>",
            "temperatura de <to> <in>",
        ]
    return _turn(say(rng, lang, tier, plain, varied, **slots), "heat", rooms=rooms, degrees=degrees, unit=unit)


def temperature(rng: Random, degrees: float, unit: str, lang: str, tier: int) -> str:
    """`21.5 °C`, `70 degrees fahrenheit`, `vinte e um graus e meio`. Without a unit Celsius is meant."""
    whole, half = int(degrees), degrees != int(degrees)
    name = {"C": "celsius", "F": "fahrenheit"}[unit]
    if tier > 1 and rng.random() < (0.25, 0.6)[tier - 2]:
        if lang == "pt" and half:
            return f"{in_words(whole, lang)} graus e meio" + ("" if rng.random() < 0.4 else f" {name}")
        said = in_words(whole, lang) + (" and a half" if half else "")
    else:
        said = f"{whole}{'.' if lang == 'en' else ','}5" if half else str(whole)
        if rng.random() < 0.5:
            return said + rng.choice((" °", "°", " ")) + unit
    said += " degrees" if lang == "en" else " graus"
    return said if unit == "C" and rng.random() < 0.4 else f"{said} {name}"


def music(rng: Random, lang: str, tier: int) -> Turn:
    rooms = some_rooms(rng, tier)
    answer: dict[str, Any] = {"rooms": rooms}
    slots = {"in": in_rooms(rooms, lang)}
    if tier == 3 and rng.random() < 0.5:
        answer["play"] = rng.choice(list(MUSIC))
        slots["play"] = MUSIC[answer["play"]][lang == "pt"]
    value = rng.randrange(1, 100)
    slots["to"] = percent(rng, value, lang, tier) if rng.random() < 0.5 else say_number(rng, value, lang, tier)
    kind = "volume" if "play" in answer else rng.choice(("volume", "volume", "up", "down"))
    answer |= {"volume": value} if kind == "volume" else {"change": value if kind == "up" else -value}
    return _turn(say(rng, lang, tier, *_music_forms(lang, "play" if "play" in answer else kind), **slots), "music", **answer)


def _music_forms(lang: str, kind: str) -> tuple[list[str], list[str]]:
    forms = {
        "en": {
            "play": ["play <play> <in> at volume <to>", "(put on|start) <play> <in>, volume <to>", "volume <to>, <play> <in>"],
            "volume": [
                "set the volume <in> to <to>",
                "volume <to> <in>",
                "(can|could) you put the music <in> at <to>?",
                "music <in> at <to>",
                "I (want|need) the volume <in> at <to>",
            ],
            "up": ["turn the music <in> up by <to>", "raise the volume <in> by <to>", "<to> louder <in>", "music <in> up <to>"],
            "down": [
                "turn the music <in> down by <to>",
                "lower the volume <in> by <to>",
                "<to> quieter <in>",
                "music <in> down <to>",
            ],
        },
        "pt": {
            "play": ["toque <play> <in> no volume <to>", "(ponha|comece) <play> <in>, volume <to>", "volume <to>, <play> <in>"],
            "volume": [
                "coloque o volume <in> em <to>",
                "volume <to> <in>",
                "(pode|poderia) deixar a música <in> em <to>?",
                "música <in> em <to>",
                "(quero|preciso) o volume <in> em <to>",
            ],
            "up": ["aumente a música <in> em mais <to>", "suba o volume <in> mais <to>", "mais <to> de volume <in>"],
            "down": ["diminua a música <in> em menos <to>", "abaixe o volume <in> menos <to>", "menos <to> de volume <in>"],
        },
    }[lang][kind]
    return forms[:2], forms

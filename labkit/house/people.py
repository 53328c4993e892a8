"""Things to copy: shopping lists, names of contacts, and requests the house must refuse."""

from __future__ import annotations

from random import Random
from typing import Any

from labkit.house.language import Turn, say
from labkit.house.words import joined, made_up

ITEMS = {
    "en": "milk eggs bread butter cheese rice beans coffee tea sugar salt pepper flour oil vinegar honey jam yogurt cream ham "
    "chicken beef pork fish shrimp tuna bacon sausage tofu pasta noodles tomatoes onions garlic potatoes carrots lettuce "
    "spinach cabbage broccoli peppers cucumbers corn peas mushrooms pumpkin apples bananas oranges lemons limes grapes "
    "pears peaches plums cherries strawberries melons mangoes pineapple papaya coconut nuts almonds raisins chocolate "
    "cookies crackers cereal oats juice water soda beer wine ice soap shampoo toothpaste tissues towels sponges bleach "
    "detergent batteries candles matches foil napkins bags diapers razors bandages vitamins".split(),
    "pt": "leite ovos pão manteiga queijo arroz feijão café chá açúcar sal pimenta farinha óleo vinagre mel geleia iogurte creme "
    "presunto frango carne porco peixe camarão atum bacon linguiça tofu macarrão tomates cebolas alho batatas cenouras "
    "alface espinafre repolho brócolis pimentões pepinos milho ervilhas cogumelos abóbora maçãs bananas laranjas limões "
    "uvas peras pêssegos ameixas cerejas morangos melões mangas abacaxi mamão coco nozes amêndoas passas chocolate "
    "biscoitos bolachas cereal aveia suco água refrigerante cerveja vinho gelo sabonete xampu lenços toalhas esponjas "
    "sabão detergente pilhas velas fósforos papel guardanapos sacos fraldas lâminas curativos vitaminas".split(),
}
QUALITIES = {
    "en": "red green fresh frozen organic brown white dark sweet small big dried".split(),
    "pt": ["sem sal", "da feira", "em lata", "a granel", "extra", "em caixa", "da roça", "em promoção", "light", "sem marca"],
}
PHONES = {"home": ("at home", "em casa"), "work": ("at work", "no trabalho"), "mobile": ("on the mobile", "no celular")}
# What no house can do: verbs and things combine freely.
DEEDS = {
    "en": (
        "wash paint sell fix move draw carry polish mail rent photograph bury weigh insure steal wrap trim sketch".split(),
        "car bike fence dog cat roof boat truck horse piano statue ladder canoe tractor guitar bridge kite tent parrot rug "
        "trophy helmet scooter sofa wagon anchor barrel drum goat mural".split(),
    ),
    "pt": (
        "lave pinte venda conserte mova desenhe carregue encere envie alugue fotografe enterre pese segure roube embrulhe apare "
        "esboce".split(),
        "carro muro cachorro gato telhado barco caminhão cavalo piano troféu trator violão papagaio tapete sofá barril tambor "
        "bode mural capacete quadro navio foguete relógio triciclo trenó pônei castelo busto mapa".split(),
    ),
}


def shopping(rng: Random, lang: str, tier: int) -> Turn:
    count = rng.choice(((1, 2), (2, 3), (3, 4))[tier - 1])
    items = _items(rng, lang, tier, count)
    action = "remove" if rng.random() < 0.2 else "add"
    answer = {"action": action, "items": items}
    forms = {
        ("en", "add"): [
            "add <items> to the (shopping|) list",
            "put <items> on the list",
            "we (need|are out of) <items>",
            "(buy|get) <items>",
            "shopping list: <items>",
            "(can|could) you add <items>?",
            "don't forget <items>",
        ],
        ("en", "remove"): [
            "remove <items> from the (shopping|) list",
            "take <items> off the list",
            "we no longer need <items>",
            "cross out <items>",
        ],
        ("pt", "add"): [
            "adicione <items> à lista (de compras|)",
            "coloque <items> na lista",
            "(falta|precisamos de) <items>",
            "compre <items>",
            "lista de compras: <items>",
            "(pode|poderia) anotar <items>?",
            "não esqueça <items>",
        ],
        ("pt", "remove"): [
            "remova <items> da lista (de compras|)",
            "tire <items> da lista",
            "não precisamos mais de <items>",
            "risque <items>",
        ],
    }[lang, action]
    text = say(rng, lang, tier, forms[:2], forms, items=joined(items, lang))
    return Turn(text, {"intent": "list", **answer}, answer)


def _items(rng: Random, lang: str, tier: int, count: int) -> list[str]:
    items = rng.sample(ITEMS[lang], count)
    for i in range(count):
        if rng.random() < 0.12:
            items[i] = made_up(rng, 2)  # a brand nobody knows: only copying helps
        elif tier > 1 and rng.random() < 0.15:
            quality = rng.choice(QUALITIES[lang])
            items[i] = f"{quality} {items[i]}" if lang == "en" else f"{items[i]} {quality}"
    return items


def call(rng: Random, lang: str, tier: int) -> Turn:
    name = made_up(rng, rng.choice((2, 3))).capitalize()
    if tier == 3 and rng.random() < 0.6:
        name += " " + made_up(rng, 2).capitalize()
    answer: dict[str, Any] = {"name": name}
    slots, at = {"name": name}, ""
    if rng.random() < (0.2, 0.3, 0.5)[tier - 1]:
        answer["phone"] = rng.choice(list(PHONES))
        slots["at"], at = PHONES[answer["phone"]][lang == "pt"], " <at>"
    forms = {
        "en": [
            "call <name>",
            "phone <name>",
            "(can|could) you ring <name>?",
            "get <name> on the line",
            "I (want|need) to talk to <name>",
            "dial <name>",
            "give <name> a call",
        ],
        "pt": [
            "ligue para <name>",
            "telefone para <name>",
            "(pode|poderia) chamar <name>?",
            "quero falar com <name>",
            "preciso ligar para <name>",
            "disque <name>",
            "faça uma ligação para <name>",
        ],
    }[lang]
    forms = [t.rstrip("?") + at for t in forms]
    return Turn(say(rng, lang, tier, forms[:2], forms, **slots), {"intent": "call", **answer}, answer)


def refuse(rng: Random, lang: str, tier: int) -> Turn:
    verbs, things = DEEDS[lang]
    count = 2 if tier == 3 and rng.random() < 0.5 else 1
    verb, about = rng.choice(verbs), rng.sample(things, count)
    if lang == "en":
        slots = {"it": verb + " " + joined([f"the {thing}" for thing in about], lang)}
        plain = ["<it>", "(can|could) you <it>?"]
        varied = [
            "I (want|need) you to <it>",
            "<it> for me",
            "would you mind if you <it>?",
            "let's <it>",
            "go and <it>",
            "it is time to <it>",
        ]
    else:
        slots = {"it": verb + " " + joined([f"o {thing}" for thing in about], lang)}
        plain = ["<it>", "quero que você <it>"]
        varied = [
            "preciso que você <it>",
            "<it> para mim",
            "gostaria que você <it>",
            "é melhor que alguém <it>",
            "vá e <it>",
            "agora <it>",
        ]
    answer = {"intent": "refuse", "about": about}
    return Turn(say(rng, lang, tier, plain, varied, **slots), answer, {"verb": verb, "about": about})


def again(rng: Random, lang: str, last: Turn) -> Turn:
    """`also bread` keeps the action, `no, call Zorvina` keeps the phone, `and the goat?` is refused as well."""
    intent = last.answer["intent"]
    if intent == "list":
        items = _items(rng, lang, 1, rng.choice((1, 2)))
        answer, slots = {**last.answer, "items": items}, {"x": joined(items, lang)}
        forms = {"en": ["also <x>", "and <x>", "<x> too"], "pt": ["também <x>", "e <x>", "<x> também"]}
    elif intent == "call":
        name = made_up(rng, rng.choice((2, 3))).capitalize()
        answer, slots = {**last.answer, "name": name}, {"x": name}
        forms = {"en": ["no, <x>", "I meant <x>", "then <x>"], "pt": ["não, <x>", "eu quis dizer <x>", "então <x>"]}
    else:
        about = [rng.choice(DEEDS[lang][1])]
        answer, slots = {**last.answer, "about": about}, {"x": about[0]}
        forms = {
            "en": ["and the <x>?", "then the <x>", "what about the <x>?"],
            "pt": ["e o <x>?", "então o <x>", "e que tal o <x>?"],
        }
    key = {k: v for k, v in answer.items() if k != "intent"}
    if intent == "refuse":
        key["verb"] = last.key["verb"]
    return Turn(say(rng, lang, rng.choice((1, 2)), forms[lang], **slots), answer, key)

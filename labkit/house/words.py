"""Words of the house language: rooms, numbers, names, and the small grammar of English and Portuguese around them.

Every table gives the canonical (English) value used in answers and how it is said in `en` and `pt` (Brazil).
"""

from __future__ import annotations

from random import Random

LANGS = ("en", "pt")

# canonical -> (English, Portuguese, Portuguese gender)
ROOMS = {
    "kitchen": ("kitchen", "cozinha", "f"),
    "bedroom": ("bedroom", "quarto", "m"),
    "bathroom": ("bathroom", "banheiro", "m"),
    "hall": ("hall", "corredor", "m"),
    "office": ("office", "escritório", "m"),
    "garage": ("garage", "garagem", "f"),
    "attic": ("attic", "sótão", "m"),
    "cellar": ("cellar", "porão", "m"),
    "nursery": ("nursery", "berçário", "m"),
    "library": ("library", "biblioteca", "f"),
    "studio": ("studio", "estúdio", "m"),
    "laundry": ("laundry", "lavanderia", "f"),
    "pantry": ("pantry", "despensa", "f"),
    "balcony": ("balcony", "sacada", "f"),
    "garden": ("garden", "jardim", "m"),
    "porch": ("porch", "varanda", "f"),
    "dining room": ("dining room", "sala de jantar", "f"),
    "living room": ("living room", "sala de estar", "f"),
    "guest room": ("guest room", "quarto de hóspedes", "m"),
    "gym": ("gym", "academia", "f"),
}
_OPEN_AIR = {"balcony", "porch"}  # one is *on* them in English
_ONES = {
    "en": "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen".split(),
    "pt": "zero um dois três quatro cinco seis sete oito nove dez onze doze treze quatorze quinze dezesseis dezessete "
    "dezoito dezenove".split(),
}
_TENS = {
    "en": "twenty thirty forty fifty sixty seventy eighty ninety".split(),
    "pt": "vinte trinta quarenta cinquenta sessenta setenta oitenta noventa".split(),
}
_STARTS = "b br c cr d dr f fl g gr h j k kl l m n p pr qu r s st t tr v w x y z".split()
_VOWELS = "a e i o u ai ea io ou".split()
_ENDS = ["", "", "", "l", "m", "n", "r", "s", "th", "x"]


def in_words(number: int, lang: str) -> str:
    """0 to 100 spelled out.

    >>> in_words(35, "en"), in_words(35, "pt")
    ('thirty-five', 'trinta e cinco')
    """
    if number == 100:
        return {"en": "one hundred", "pt": "cem"}[lang]
    if number < 20:
        return _ONES[lang][number]
    tens, ones = _TENS[lang][number // 10 - 2], number % 10
    joint = {"en": "-", "pt": " e "}[lang]
    return tens + (joint + _ONES[lang][ones] if ones else "")


def say_number(rng: Random, number: int, lang: str, tier: int) -> str:
    """Digits in tier 1, more and more often words in tiers 2 and 3."""
    return in_words(number, lang) if rng.random() < (0.0, 0.25, 0.6)[tier - 1] else str(number)


def feminine(words: str) -> str:
    """Portuguese number words before a feminine noun: `um hora` would be wrong, `uma hora` is right."""
    swap = {"um": "uma", "dois": "duas"}
    return " ".join(swap.get(word, word) for word in words.split(" "))


def room(name: str, lang: str) -> str:
    return ROOMS[name][0 if lang == "en" else 1]


def in_room(name: str, lang: str) -> str:
    """`in the kitchen`, `na cozinha`."""
    en, pt, gender = ROOMS[name]
    if lang == "en":
        return f"{'on' if name in _OPEN_AIR else 'in'} the {en}"
    return f"{'na' if gender == 'f' else 'no'} {pt}"


def of_room(name: str, lang: str) -> str:
    """`of the kitchen`, `da cozinha`."""
    en, pt, gender = ROOMS[name]
    return f"of the {en}" if lang == "en" else f"{'da' if gender == 'f' else 'do'} {pt}"


def the_room(name: str, lang: str) -> str:
    en, pt, gender = ROOMS[name]
    return f"the {en}" if lang == "en" else f"{'a' if gender == 'f' else 'o'} {pt}"


def joined(parts: list[str], lang: str) -> str:
    """`milk, eggs and bread`, `leite, ovos e pão`."""
    last = {"en": " and ", "pt": " e "}[lang]
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + last + parts[-1]


def in_rooms(names: list[str], lang: str) -> str:
    if lang == "en" and not _OPEN_AIR.intersection(names):
        return "in " + joined([the_room(name, lang) for name in names], lang)
    return joined([in_room(name, lang) for name in names], lang)


def some_rooms(rng: Random, tier: int) -> list[str]:
    """One room in tiers 1 and 2, one to three in tier 3."""
    count = 1 if tier < 3 else rng.choice((1, 2, 2, 3))
    return rng.sample(list(ROOMS), count)


def made_up(rng: Random, syllables: int) -> str:
    """A pronounceable word nobody has seen before: what a model can only copy, never know."""
    return "".join(rng.choice(_STARTS) + rng.choice(_VOWELS) for _ in range(syllables)) + rng.choice(_ENDS)

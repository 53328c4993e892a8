"""An intent the house model was never taught: the robot vacuum. For labs that teach a trained model something new.

Wordings of the two splits are disjoint, and so are their slots: a held-out task asks for rooms and a power never seen together,
in a sentence never seen. One combination in four is held out, more than in the house's own rule: a single room and a power make
few, and an exam should not ask for two of them over and over. The shipped model has met neither.
"""

from __future__ import annotations

from random import Random

from labkit.house.language import Task, Turn, chatml, is_held_out, make_task, say
from labkit.house.words import LANGS, in_rooms, some_rooms
from labkit.types import LabkitError

HELD_OUT_ONE_IN = 4
TRIES = 20_000  # draws in a row without a new task: then there are none left
POWERS = {  # canonical -> how it is said; "normal" is also what is meant when nothing is said
    "quiet": ("quietly", "em silêncio"),
    "normal": ("", ""),
    "strong": ("at full power", "na potência máxima"),
}
WORDINGS = {
    ("train", "en"): [
        "vacuum <in> <how>",
        "(run|start) the vacuum <in> <how>",
        "(can|could) you vacuum <in> <how>?",
        "<in>, vacuum the floor <how>",
        "I want the vacuum (running|working) <in> <how>",
        "the floor <in> needs the vacuum <how>",
        "vacuum the (floor|carpet) <in> <how>",
        "(can|could|would) you (start|switch on) the vacuum <in> <how>?",
    ],
    ("train", "pt"): [
        "aspire <in> <how>",
        "(ligue|rode) o aspirador <in> <how>",
        "(pode|dá para) aspirar <in> <how>?",
        "<in>, aspire o chão <how>",
        "quero o aspirador (ligado|rodando) <in> <how>",
        "o chão <in> precisa do aspirador <how>",
        "aspire o (chão|tapete) <in> <how>",
        "(poderia|dá para) (ligar|rodar) o aspirador <in> <how>?",
    ],
    ("heldout", "en"): [
        "send the vacuum to work <in> <how>",
        "please have the vacuum clean <in> <how>",
        "will you run the vacuum <how> <in>?",
        "<how> vacuum the dust <in>",
    ],
    ("heldout", "pt"): [
        "mande o aspirador limpar <in> <how>",
        "passe o aspirador <in> <how>",
        "você pode ligar o aspirador <how> <in>?",
        "<how> aspire o pó <in>",
    ],
}


def draw(rng: Random, lang: str, tier: int, split: str) -> Turn:
    """One request to vacuum one room (tiers 1 and 2) or one to three (tier 3); slots are not looked at here."""
    rooms, power = some_rooms(rng, tier), rng.choice(list(POWERS))
    slots = {"in": in_rooms(rooms, lang), "how": POWERS[power][lang == "pt"]}
    text = say(rng, lang, tier, WORDINGS[split, lang], **slots)
    answer = {"intent": "vacuum", "rooms": rooms, "power": power}
    return Turn(" ".join(text.split()).replace(" ?", "?").replace(" .", ".").replace(" ,", ","), answer, [rooms, power])


def tasks(split: str = "heldout", n: int = 60, seed: int = 0) -> list[Task]:
    """`n` different tasks, balanced over tiers and languages; the same for the same arguments. split: "train", "heldout"."""
    if split not in ("train", "heldout"):
        raise LabkitError(f"The vacuum's tasks have the splits train and heldout, not {split!r}: choose one of them.")
    cells = [(lang, tier) for tier in (1, 2, 3) for lang in LANGS]
    rng, seen, found, tries = Random(f"vacuum {split} {seed}"), set(), [], 0
    while len(found) < n:
        if tries > TRIES:  # the held-out slots of tier 1 are few
            raise LabkitError(f"n={n} was given, but the vacuum has about {len(found)} different tasks to {split}; ask for fewer.")
        tries += 1
        lang, tier = cells[len(found) % len(cells)]
        turn = draw(rng, lang, tier, split)
        task = make_task([turn], tier, lang, split)
        if is_held_out(["vacuum", turn.key], HELD_OUT_ONE_IN) == (split == "heldout") and chatml(task.messages) not in seen:
            seen.add(chatml(task.messages))
            found.append(task)
            tries = 0
    return found

"""Splits without leakage: what asks the same thing lies in one split, and two files that share a question are refused."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping

from labkit.train.data import Example
from labkit.types import LabkitError

SHARES = {"train": 0.8, "validation": 0.1, "test": 0.1}


def plain(text: str) -> str:
    """Text without case, accents, punctuation and spacing: what makes two questions the same question."""
    bare = "".join(c for c in unicodedata.normalize("NFKD", text.casefold()) if not unicodedata.combining(c))
    return " ".join(re.findall(r"\w+", bare))


def split(examples: list[Example], shares: Mapping[str, float] = SHARES, seed: int = 0) -> dict[str, list[Example]]:
    """Examples by split, `shares` of every kind (stratified); examples with the same plain question stay together.

    The order within a kind is a hash of question and seed, so it does not depend on the order of the file. LabkitError when
    shares do not add up to 1 or a split would be empty.
    """
    if abs(sum(shares.values()) - 1) > 1e-9 or min(shares.values()) <= 0:
        raise LabkitError(f"The shares {dict(shares)} were given; expected positive ones that add up to 1.")
    groups: dict[str, list[Example]] = defaultdict(list)
    for one in examples:
        groups[plain(one.asked)].append(one)
    kinds: dict[str, list[str]] = defaultdict(list)
    for question, members in groups.items():
        kinds[max(one.kind for one in members)].append(question)
    place: dict[str, tuple[float, bytes]] = {}  # of a question among those of its kind, 0 to 1
    for questions in kinds.values():
        digests = {q: hashlib.sha256(f"{seed} {q}".encode()).digest() for q in questions}
        for rank, question in enumerate(sorted(questions, key=digests.__getitem__)):
            place[question] = ((rank + 0.5) / len(questions), digests[question])
    order, found, done = sorted(place, key=place.__getitem__), {}, 0.0
    for name, share in shares.items():  # cutting the merged order cuts every kind alike
        first, done = round(done * len(order)), done + share
        found[name] = [one for q in order[first : round(done * len(order))] for one in groups[q]]
    if empty := [name for name, some in found.items() if not some]:
        raise LabkitError(f"{len(groups)} different questions leave nothing for {empty[0]!r}; give more data or other shares.")
    return found


def check_disjoint(train: Iterable[Example], test: Iterable[Example], near: float = 0.9) -> None:
    """LabkitError, naming both lines, when a test question is a training question, or nearly.

    near: least share of common three-word runs (Jaccard) that counts as the same; 1 or more looks for equal ones only.
    """
    known: dict[str, Example] = {}
    runs: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for one in train:
        question = plain(one.asked)
        if question not in known:
            known[question] = one
            for run in _runs(question) if near < 1 else ():
                runs[run].append(question)
    for one in test:
        question = plain(one.asked)
        twin = known.get(question) or (_near(question, known, runs, near) if near < 1 else None)
        if twin:
            raise LabkitError(
                f"{one.source}: the question was trained on ({twin.source}); a test on it measures memory: "
                "take it out of one of the two, or split again."
            )


def check_unique(examples: Iterable[Example]) -> None:
    """LabkitError, naming both lines, when a conversation occurs twice or one question has two answers."""
    seen: dict[str, Example] = {}
    for one in examples:
        first = seen.setdefault(one.asked, one)
        if first is not one:
            what = "repeats" if first.answer == one.answer else "answers differently the question of"
            raise LabkitError(f"{one.source} {what} {first.source}; keep one of them.")


def _runs(question: str) -> set[tuple[str, ...]]:
    words = question.split()
    return {tuple(words[i : i + 3]) for i in range(max(1, len(words) - 2))}


def _near(question: str, known: Mapping[str, Example], runs: Mapping[tuple[str, ...], list[str]], near: float) -> Example | None:
    mine = _runs(question)
    shared = Counter(other for run in mine for other in runs.get(run, ()))
    for other, count in shared.items():
        if count / (len(mine) + len(_runs(other)) - count) >= near:
            return known[other]
    return None

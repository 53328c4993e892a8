"""The scores that fine-tuning is reported with, from scratch: exact match, F1, perplexity, BLEU, ROUGE. No torch, no network.

Texts are cut at white space unless `words` says otherwise; a score without its way of cutting words cannot be compared. BLEU
is Papineni et al. 2002 (doi:10.3115/1073083.1073135), equal to sacrebleu 2.6.0 with tokenize="none" and no smoothing; ROUGE is
Lin 2004 (aclanthology W04-1013), equal to rouge-score 0.1.2 without stemming; F1 of classes is equal to scikit-learn's. All
count words that agree, none asks whether a command is right: for that there is `labkit.house.score`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

from labkit.types import LabkitError

Words = Callable[[str], list[str]]


class Agreement(NamedTuple):
    """Precision: share of what was said that is right. Recall: share of what is right that was said. f1: their harmonic mean."""

    precision: float
    recall: float
    f1: float


def agreement(common: int, said: int, wanted: int) -> Agreement:
    """From the number of common things, of things said and of things wanted; 0 where there is nothing to divide."""
    precision, recall = common / said if said else 0.0, common / wanted if wanted else 0.0
    return Agreement(precision, recall, 2 * precision * recall / (precision + recall) if common else 0.0)


def exact_match(said: Sequence[Hashable], wanted: Sequence[Hashable]) -> float:
    """Share of answers that are equal to what was wanted."""
    _paired(said, wanted)
    return sum(a == b for a, b in zip(said, wanted, strict=True)) / len(wanted)


def classes(said: Sequence[Hashable], wanted: Sequence[Hashable]) -> dict[Hashable, Agreement]:
    """Agreement for every class that was said or wanted."""
    _paired(said, wanted)
    hits = Counter(b for a, b in zip(said, wanted, strict=True) if a == b)
    given, due = Counter(said), Counter(wanted)
    return {name: agreement(hits[name], given[name], due[name]) for name in sorted({*given, *due}, key=str)}


def macro_f1(said: Sequence[Hashable], wanted: Sequence[Hashable]) -> float:
    """Mean F1 of the classes, each counting alike: a rare class that is never right costs as much as a frequent one."""
    found = classes(said, wanted)
    return sum(one.f1 for one in found.values()) / len(found)


def overlap(said: str, wanted: str, words: Words = str.split) -> Agreement:
    """Agreement of the bags of words of two texts (SQuAD's F1, without its clean-up of articles and punctuation)."""
    return rouge(said, wanted, 1, words)


def perplexity(losses: Sequence[float]) -> float:
    """exp of the mean loss in nats a token: 1 for a model that is sure and right, V for one that guesses among V tokens."""
    if not len(losses):
        raise LabkitError("No losses given; a perplexity needs at least one token.")
    return math.exp(sum(losses) / len(losses))


def bleu(said: Sequence[str], wanted: Sequence[Sequence[str]], order: int = 4, words: Words = str.split) -> float:
    """BLEU of a corpus, 0 to 1; wanted: one or more references for each text. 0 when no run of `order` words is common.

    The geometric mean over n = 1 ... order of the share of n-word runs that occur in a reference, each at most as often as
    there, times exp(1 - reference / said) when the corpus is shorter than the references nearest in length.
    """
    _paired(said, wanted)
    common, total, length, nearest = Counter(), Counter(), 0, 0
    for text, references in zip(said, wanted, strict=True):
        ours, theirs = words(text), [words(one) for one in references]
        length += len(ours)
        nearest += min((abs(len(one) - len(ours)), len(one)) for one in theirs)[1]
        for n in range(1, order + 1):
            mine, allowed = runs(ours, n), Counter()
            for one in theirs:
                allowed |= runs(one, n)
            common[n] += (mine & allowed).total()
            total[n] += mine.total()
    if not all(common[n] for n in range(1, order + 1)):
        return 0.0
    mean = sum(math.log(common[n] / total[n]) for n in range(1, order + 1)) / order
    return math.exp(mean + min(0.0, 1 - nearest / length))


def rouge(said: str, wanted: str, n: int = 1, words: Words = str.split) -> Agreement:
    """ROUGE-n: agreement of the n-word runs of two texts, each counted as often as it occurs."""
    ours, theirs = runs(words(said), n), runs(words(wanted), n)
    return agreement((ours & theirs).total(), ours.total(), theirs.total())


def rouge_l(said: str, wanted: str, words: Words = str.split) -> Agreement:
    """ROUGE-L: agreement by the longest common subsequence of words, gaps allowed."""
    ours, theirs = words(said), words(wanted)
    return agreement(longest_common(ours, theirs), len(ours), len(theirs))


def runs(words: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    """How often each run of n words occurs."""
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def longest_common(a: Sequence[Hashable], b: Sequence[Hashable]) -> int:
    """Length of the longest subsequence of both, by the table of all prefixes, a row at a time."""
    row = [0] * (len(b) + 1)
    for one in a:
        before, row = row, [0]
        for j, other in enumerate(b):
            row.append(before[j] + 1 if one == other else max(before[j + 1], row[j]))
    return row[-1]


def _paired(said: Sequence, wanted: Sequence) -> None:
    if len(said) != len(wanted) or not len(wanted):
        raise LabkitError(f"{len(said)} answers and {len(wanted)} references given; expected one reference for every answer.")

"""Lab module05/03, fine-tuning: weights of the loss, leaks, memory, LoRA, NF4, accumulation, halving, patience, ternary, ROUGE."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from labkit.course.compare import NotYet, close, function, same, unfinished
from labkit.course.exercises import exercise
from labkit.i18n import tr


def _position_weights(length: int, answers: Sequence[tuple[int, int]]) -> np.ndarray:
    weights = np.zeros(length)
    for first, stop in answers:
        weights[first - 1 : stop - 1] = 1
    return weights


@exercise(
    "05.3.1",
    "Which positions learn",
    hints=(
        "Token i is predicted at position i - 1.",
        "An answer of the tokens first to stop - 1 is learned at the positions first - 1 to stop - 2.",
        "weights[first - 1 : stop - 1] = 1, for every answer",
    ),
)
def _(answer: Any) -> None:
    function(answer, _position_weights, [(12, [(7, 12)]), (20, [(5, 9), (14, 19)]), (6, [])])


def _words(text: str) -> tuple[str, ...]:
    return tuple(re.findall(r"\w+", text.lower()))


def _leaks(train_questions: list[str], test_questions: list[str]) -> int:
    known = set(map(_words, train_questions))
    return sum(_words(text) in known for text in test_questions)


@exercise(
    "05.3.2",
    "Count the leaks",
    hints=(
        "Bring both sides to one plain form first: lower case, words only.",
        r're.findall(r"\w+", text.lower()) gives the words without punctuation and spacing.',
        "Put the plain training questions into a set, and count the plain test questions that are in it.",
    ),
)
def _(answer: Any) -> None:
    train = ["Turn on the light.", "vacuum  the HALL", "Is the door open?", "call Ana"]
    test = ["turn on the light", "Vacuum the hall!", "Is the door closed?", "call  ANA", "call Ana please", "call Ana"]
    function(answer, _leaks, [(train, test), (train, []), ([], test)], compare=same)


def _training_bytes(total: int, adapter: int = 0, bits: float = 32) -> float:
    return 16 * total if adapter == 0 else total * bits / 8 + 16 * adapter


@exercise(
    "05.3.3",
    "Bytes of full tuning, LoRA and QLoRA",
    hints=(
        "A trained float32 weight: itself 4 bytes, its gradient 4, the two moments of AdamW 4 each.",
        "A frozen weight is only stored: bits / 8 bytes.",
    ),
)
def _(answer: Any) -> None:
    cases = [(5_000_000,), (5_000_000, 100_000), (8_030_000_000, 42_000_000, 4.127), (1_000, 10, 16)]
    function(answer, _training_bytes, cases)


def _merge(w: np.ndarray, a: np.ndarray, b: np.ndarray, alpha: float) -> np.ndarray:
    return w + alpha / a.shape[0] * b @ a


@exercise(
    "05.3.4",
    "Merge an adapter",
    hints=(
        "The adapter adds (alpha / rank) B (A x) to W x; take x out of the brackets.",
        "The rank is the number of A's rows.",
        "W + alpha / A.shape[0] * (B @ A)",
    ),
)
def _(answer: Any) -> None:
    rng = np.random.default_rng(11)
    cases = []
    for out, inside, rank, alpha in ((6, 10, 2, 4.0), (5, 3, 3, 1.5), (8, 8, 1, 16.0)):
        cases.append((rng.normal(size=(out, inside)), rng.normal(size=(rank, inside)), rng.normal(size=(out, rank)), alpha))
    function(answer, _merge, cases, rel=1e-6, abs=1e-9)


def _trained_weights(rank: int, layers: Sequence[tuple[int, int]], saved: Sequence[tuple[int, int]] = ()) -> int:
    return sum(rank * (i + o) for i, o in layers) + sum(i * o for i, o in saved)


@exercise(
    "05.3.5",
    "What an adapter trains",
    hints=(
        "A has rank x in weights, B has out x rank.",
        "A module that is saved whole is trained whole: in x out.",
    ),
)
def _(answer: Any) -> None:
    gpt2 = [(1024, 3072), (1024, 1024), (4096, 1024)] * 24
    cases = [(16, gpt2), (16, gpt2, [(1024, 50257)]), (8, [(256, 768)]), (4, [], [(10, 20), (3, 7)])]
    function(answer, _trained_weights, cases)


def _to_nf4(group: np.ndarray, levels: np.ndarray) -> tuple[np.ndarray, float]:
    scale = np.abs(group).max()
    return np.abs(group[:, None] / scale - levels).argmin(axis=1), scale


def _codes_and_scale(got: Any, expected: tuple, *, what: str) -> None:
    unfinished(got)
    if not isinstance(got, (tuple, list)) or len(got) != 2:
        raise NotYet(tr("{what}: expected codes and scale, two things", what=what))
    close(got[1], expected[1], what=tr("{what}: the scale", what=what))
    close(got[0], expected[0], what=tr("{what}: the codes", what=what))


@exercise(
    "05.3.6",
    "One group in NF4",
    hints=(
        "Divided by the largest size, every weight of the group lies between -1 and 1, as the levels do.",
        "The code is the index of the level with the least distance: a table of distances, and argmin along the levels.",
        "np.abs(group[:, None] / scale - levels).argmin(axis=1)",
    ),
)
def _(answer: Any) -> None:
    from labkit import blocks

    levels, rng = np.asarray(blocks.NF4_LEVELS, np.float64), np.random.default_rng(6)
    uneven = np.sort(rng.uniform(-1, 1, 16))
    cases = [(rng.normal(size=64) * 0.02, levels), (-np.abs(rng.normal(size=32)), levels), (rng.normal(size=48), uneven)]
    function(answer, _to_nf4, cases, compare=_codes_and_scale)


def _batch_loss(parts: Sequence[tuple[float, int]]) -> float:
    return sum(total for total, _ in parts) / sum(tokens for _, tokens in parts)


@exercise(
    "05.3.7",
    "The loss of an accumulated batch",
    hints=(
        "A mean of means gives a short conversation's tokens more weight than a long one's.",
        "Add all losses, add all tokens, divide once.",
    ),
)
def _(answer: Any) -> None:
    function(answer, _batch_loss, [([(12.0, 10), (1.0, 40)],), ([(3.0, 7)],), ([(5.5, 11), (0.5, 3), (8.0, 90)],)])


def _halving(curves: Mapping[str, Sequence[float]]) -> tuple[str, int]:
    alive, done, spent, length = list(curves), 0, 0, len(next(iter(curves.values())))
    while len(alive) > 1 and done < length:
        rung = min(max(1, 2 * done), length)
        spent, done = spent + len(alive) * (rung - done), rung
        alive = sorted(alive, key=lambda name: curves[name][done - 1])[: max(1, len(alive) // 2)]
    return alive[0], spent


def _name_and_steps(got: Any, expected: tuple, *, what: str) -> None:
    unfinished(got)
    if not isinstance(got, (tuple, list)) or len(got) != 2:
        raise NotYet(tr("{what}: expected a name and the steps spent, two things", what=what))
    same(list(got), list(expected), what)


@exercise(
    "05.3.8",
    "Successive halving",
    hints=(
        "Keep the names alive, the step they have reached, and the steps spent in all.",
        "To go from one rung to the next, each survivor runs only the steps between; then sort by the loss at the new rung.",
        "Keep the first len(alive) // 2, and end when one is left.",
    ),
)
def _(answer: Any) -> None:
    slow = {"a": [5.0, 4.0, 3.0, 2.0], "b": [4.0, 3.9, 3.8, 3.7], "c": [6.0, 1.0, 0.5, 0.1], "d": [4.5, 3.0, 2.9, 2.8]}
    rng = np.random.default_rng(8)
    eight = {f"trial {i}": [float(x) for x in np.sort(rng.uniform(0, 5, 8))[::-1]] for i in range(8)}
    function(answer, _halving, [(slow,), (eight,), ({"x": [2.0, 1.0], "y": [1.0, 3.0]},)], compare=_name_and_steps)


def _stop_early(losses: Sequence[float], patience: int) -> tuple[int, int]:
    best = 0
    for i, loss in enumerate(losses):
        best = i if loss < losses[best] else best
        if i - best >= patience:
            return i + 1, best
    return len(losses), best


def _two_numbers(got: Any, expected: tuple, *, what: str) -> None:
    unfinished(got)
    if not isinstance(got, (tuple, list)) or len(got) != 2:
        raise NotYet(tr("{what}: expected two numbers", what=what))
    close(list(got), list(expected), what=what)


@exercise(
    "05.3.9",
    "When to stop, and what to keep",
    hints=(
        "Remember the index of the least loss so far.",
        "Stop when `patience` evaluations have passed since then: i - best >= patience.",
        "Without a stop, all evaluations are made; the best one is kept in either case.",
    ),
)
def _(answer: Any) -> None:
    curves = [[3.0, 2.0, 2.5, 2.2, 9.0], [3.0, 2.0, 1.0], [1.0, 2.0, 3.0, 0.5], [5.0, 4.0, 4.5, 3.0, 3.5, 3.6, 3.7, 1.0]]
    function(answer, _stop_early, [(c, p) for c in curves for p in (1, 2, 3)], compare=_two_numbers)


def _ternary(weights: np.ndarray) -> np.ndarray:
    scale = np.abs(weights).mean()
    return np.clip(np.rint(weights / scale), -1, 1) * scale


@exercise(
    "05.3.10",
    "A ternary matrix",
    hints=(
        "The scale s is the mean of the absolute weights of the whole matrix.",
        "Divide by s, round, clip to -1 ... 1, multiply by s again.",
    ),
)
def _(answer: Any) -> None:
    rng = np.random.default_rng(10)
    cases = [(rng.normal(size=shape) * size,) for shape, size in (((4, 6), 0.02), ((3, 16), 1.0), ((1, 5), 7.0))]
    function(answer, _ternary, cases, rel=1e-6, abs=1e-12)


@exercise(
    "05.3.11",
    "The longest common subsequence",
    hints=(
        "Fill a table: entry (i, j) is the answer for the first i words of a and the first j of b.",
        "Equal words: one more than the entry up and left. Else the larger of the entry above and the entry on the left.",
        "The first row and column are zeros; the last entry is the answer.",
    ),
)
def _(answer: Any) -> None:
    from labkit.train.scores import longest_common

    pairs = [
        "police killed the gunman|police kill the gunman",
        "a b c b d a b|b d c a b a",
        "x y|",
        "on the mat the cat sat|the cat sat on the mat",
    ]
    cases = [tuple(text.split() for text in pair.split("|")) for pair in pairs]
    function(answer, longest_common, [*cases, (list("abcdefgh" * 8), list("hgfedcba" * 8))])

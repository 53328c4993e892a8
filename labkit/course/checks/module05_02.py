"""Lab module05/02, distillation: temperature, divergence and its gradient, filtering, tokens that meet, hidden states, the case study."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from typing import Any

import numpy as np

from labkit.course.compare import function, same, unfinished
from labkit.course.exercises import exercise


def _softened(logits: np.ndarray, temperature: float) -> np.ndarray:
    z = np.asarray(logits, dtype=np.float64) / temperature
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@exercise(
    "05.2.1",
    "Softmax at a temperature",
    hints=(
        "Divide the logits by the temperature before anything else.",
        "Take the largest off before exp, so that large logits do not overflow: no probability changes.",
        "Sum over the last axis, and keep it (keepdims=True): there is one distribution for every position.",
    ),
)
def _(answer: Any) -> None:
    rng = np.random.default_rng(3)
    cases = [(np.array([2.0, 1.0, 0.0, -1.0]), t) for t in (0.7, 1.0, 4.0)]
    cases += [(rng.normal(size=(3, 5)) * 4, 2.0), (np.array([[1000.0, 999.0], [0.0, -2000.0]]), 1.0)]
    function(answer, _softened, cases, rel=1e-6, abs=1e-12)


def _kl(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    p, q = np.asarray(p, dtype=np.float64), np.asarray(q, dtype=np.float64)
    return np.sum(np.where(p > 0, p * np.log(np.where(p > 0, p, 1.0) / q), 0.0), axis=-1)


@exercise(
    "05.2.2",
    "KL divergence of a student from its teacher",
    hints=(
        "The teacher's p weighs every term: p * log(p / q), summed over the vocabulary.",
        "The order matters: KL(p, q) is not KL(q, p).",
        "Where p is 0 the term is 0, not NaN: leave those tokens out.",
    ),
)
def _(answer: Any) -> None:
    rng = np.random.default_rng(4)
    p, q = rng.dirichlet(np.ones(6), 3), rng.dirichlet(np.ones(6), 3)
    sparse = np.array([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]])
    cases = [(p, q), (q, p), (p, p), (sparse, np.array([[0.2, 0.3, 0.5], [0.6, 0.3, 0.1]]))]
    function(answer, _kl, cases, rel=1e-6, abs=1e-12)


@exercise(
    "05.2.3",
    "The gradient of a softened loss",
    hints=(
        "Without any factor, the gradient of KL at temperature T is (q - p) / T.",
        "q and p are the two distributions at temperature T, the student's and the teacher's.",
        "Multiply by T squared.",
    ),
)
def _(answer: Any) -> None:
    def reference(student: np.ndarray, teacher: np.ndarray, temperature: float) -> np.ndarray:
        return temperature * (_softened(student, temperature) - _softened(teacher, temperature))

    rng = np.random.default_rng(5)
    cases = [(rng.normal(size=6) * 2, rng.normal(size=6) * 2, t) for t in (1.0, 2.0, 10.0)]
    function(answer, reference, cases, rel=1e-6, abs=1e-9)


def _chosen(answers: list[str], needed: int) -> str:
    text, count = Counter(answers).most_common(1)[0]
    return text if count >= needed else ""


@exercise(
    "05.2.4",
    "Keep what the tries agree on",
    hints=(
        "Count how often each answer occurs; collections.Counter does.",
        "Compare the number of the most frequent one with `needed`.",
        'Return "" when no answer reaches it: the question is dropped.',
    ),
)
def _(answer: Any) -> None:
    cases = [
        (["on", "on", "off"], 2), (["on", "on", "off"], 3), (["a", "b", "c"], 2), (["x"], 1),
        (["b", "a", "a", "b", "a"], 3), (["k"] * 5, 5),
    ]  # fmt: skip
    function(answer, _chosen, cases, compare=same)


def _plain(text: str) -> str:
    bare = "".join(c for c in unicodedata.normalize("NFKD", text.casefold()) if not unicodedata.combining(c))
    return " ".join(re.findall(r"\w+", bare))


def _distinct(questions: list[str]) -> list[str]:
    first: dict[str, str] = {}
    for one in questions:
        first.setdefault(_plain(one), one)
    return list(first.values())


@exercise(
    "05.2.5",
    "Questions that are the same question",
    hints=(
        "`plain` gives the key: the same key means the same question.",
        "Remember the keys you have met; keep a question only when its key is new.",
        "A dictionary keeps the order: first.setdefault(plain(one), one).",
    ),
)
def _(answer: Any) -> None:
    unfinished(answer)
    some = ["Turn on the lamp", "turn ON the lamp!!", "Acenda a luz", "acenda  a luz.", "Dim it", "Turn on the lamp"]
    function(answer, _distinct, [(some,), (["a", "b"],), ([],), (list(reversed(some)),)], compare=_listed)


def _listed(got: Any, expected: list[str], *, what: str) -> None:
    same(list(got) if isinstance(got, tuple) else got, expected, what)


def _hidden(student: np.ndarray, teacher: np.ndarray, change: np.ndarray) -> float:
    return float(np.mean((student @ change - teacher) ** 2) / np.mean(teacher**2))


@exercise(
    "05.2.6",
    "How far the hidden states are apart",
    hints=(
        "The widths differ: `change` maps the student's width to the teacher's, student @ change.",
        "Square the difference and take the mean over everything.",
        "Divide by the mean square of the teacher's states, so that no layer counts more for being larger.",
    ),
)
def _(answer: Any) -> None:
    rng = np.random.default_rng(6)
    cases = [
        (rng.normal(size=(t, 4)), scale * rng.normal(size=(t, 6)), rng.normal(size=(4, 6))) for t, scale in ((3, 1.0), (9, 20.0))
    ]
    function(answer, _hidden, cases, rel=1e-6)


def _mixture(teachers: list, temperature: float) -> np.ndarray:
    return np.mean([_softened(one, temperature) for one in teachers], axis=0)


@exercise(
    "05.2.7",
    "What several teachers say together",
    hints=(
        "Soften every teacher's logits on their own; yours is the function of exercise 05.2.1.",
        "Then take the mean of the probabilities. The mean of the logits is something else: a geometric mean.",
    ),
)
def _(answer: Any) -> None:
    rng = np.random.default_rng(7)
    cases = [([rng.normal(size=5) * 3 for _ in range(n)], t) for n, t in ((2, 1.0), (3, 2.0), (1, 4.0))]
    function(answer, _mixture, cases, rel=1e-6)


def _ends(pieces: list[str]) -> list[int]:
    found, at = [], 0
    for piece in pieces:
        at += len(piece)
        found.append(at)
    return found


def _meeting(ours: list[str], theirs: list[str]) -> list[int]:
    return sorted(set(_ends(ours)) & set(_ends(theirs)))


@exercise(
    "05.2.8",
    "Where two tokenizers meet",
    hints=(
        "Turn each list of pieces into the positions at which its pieces end: running sums of their lengths.",
        "A position counts when it is in both.",
        "sorted(set(a) & set(b))",
    ),
)
def _(answer: Any) -> None:
    cases = [
        (["turn", " on", " the", " lamp"], ["tu", "rn on", " th", "e lamp"]),
        (["a", "b", "c"], ["abc"]), (["ab", "c"], ["a", "bc"]), (["x", "y"], ["x", "y"]),
    ]  # fmt: skip
    function(answer, _meeting, cases, compare=_listed)


@exercise(
    "05.2.9",
    "Requests in a system, by Little's law",
    hints=(
        "The law: the mean number inside is the rate of arrival times the time each stays.",
        "Bring both to seconds: an hour has 3,600.",
    ),
)
def _(answer: Any) -> None:
    def reference(per_hour: float, seconds: float) -> float:
        return per_hour / 3600 * seconds

    function(answer, reference, [(50, 3.2), (500, 0.48), (7200, 1.5)], rel=1e-9)


@exercise(
    "05.2.10",
    "What '92 % kept' does to the errors",
    hints=(
        "The error rate is what is missing to 1.",
        "Divide the student's error rate by the teacher's, not their accuracies.",
    ),
)
def _(answer: Any) -> None:
    def reference(teacher: float, student: float) -> float:
        return (1 - student) / (1 - teacher)

    function(answer, reference, [(0.945, 0.87), (0.99, 0.96), (0.5, 0.6)], rel=1e-9)

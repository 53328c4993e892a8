"""Lab phi_family/02, ONNX Runtime GenAI: a folder's promises, processors, beam search, LongRoPE, embedding and head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from labkit.course.compare import NotYet, close, function, same, unfinished
from labkit.course.exercises import exercise
from labkit.i18n import tr


def _missing(decoder: Mapping[str, Any], graph_inputs: set[str]) -> list[str]:
    promised: list[str] = []
    for name in decoder["inputs"].values():
        promised += [name % i for i in range(decoder["num_hidden_layers"])] if "%d" in name else [name]
    return [name for name in promised if name not in graph_inputs]


@exercise(
    "phi_family.2.1",
    "What a configuration promises",
    hints=(
        'decoder["inputs"] maps a role to a name; a name with %d stands for one input a layer.',
        'name % i puts the number of the layer in: "past_key_values.%d.key" % 3.',
        "Keep the order of the configuration, all layers of one name before the next name.",
    ),
)
def _(answer: Any) -> None:
    names = {"input_ids": "input_ids", "attention_mask": "attention_mask", "past_key_names": "past_key_values.%d.key",
             "past_value_names": "past_key_values.%d.value"}  # fmt: skip
    decoder = {"inputs": names, "num_hidden_layers": 3}
    every = {"input_ids", "attention_mask"} | {f"past_key_values.{i}.{kind}" for i in range(3) for kind in ("key", "value")}
    cases = [(decoder, every), (decoder, every - {"past_key_values.2.key", "past_key_values.2.value"}),
             ({**decoder, "inputs": {**names, "position_ids": "position_ids"}}, every - {"attention_mask"})]  # fmt: skip
    function(answer, _missing, cases, compare=same)


def _penalised(logits: np.ndarray, seen: list[int], penalty: float) -> np.ndarray:
    out = logits.copy()
    for token in set(seen):
        out[token] = out[token] / penalty if out[token] > 0 else out[token] * penalty
    return out


@exercise(
    "phi_family.2.2",
    "Repetition penalty",
    hints=(
        "A token that was seen twice is punished once.",
        "Dividing a negative logit would reward it: multiply there.",
        "Work on a copy, and touch only the tokens seen.",
    ),
)
def _(answer: Any) -> None:
    rng = np.random.default_rng(5)
    cases = [
        (rng.normal(size=12), seen, penalty)
        for seen, penalty in (([0, 3, 5], 1.3), ([7, 7, 2, 7], 2.0), ([], 1.5), (list(range(12)), 1.1))
    ]
    function(answer, _penalised, cases)


def _top_k(logits: np.ndarray, k: int, temperature: float) -> np.ndarray:
    kept = np.full(len(logits), -np.inf)
    best = np.argsort(-logits)[:k]
    kept[best] = logits[best] / temperature
    shares = np.exp(kept - kept[best].max())
    return shares / shares.sum()


@exercise(
    "phi_family.2.3",
    "Top-k with temperature",
    hints=(
        "Choose by the logits; the temperature does not change their order.",
        "Everything outside the k largest has probability zero, that is a logit of minus infinity.",
        "Subtract the maximum before np.exp, then divide by the sum.",
    ),
)
def _(answer: Any) -> None:
    rng = np.random.default_rng(9)
    cases = [(rng.normal(size=30) * 4, k, temperature) for k, temperature in ((1, 1.0), (5, 0.7), (30, 2.0))]
    function(answer, _top_k, cases, rel=1e-6, abs=1e-12)


def _beam_step(scores: np.ndarray, log_probabilities: np.ndarray) -> list[tuple[int, int, float]]:
    total = scores[:, None] + log_probabilities
    order = np.argsort(-total, axis=None)[: len(scores)]
    return [(int(i // total.shape[1]), int(i % total.shape[1]), float(total.flat[i])) for i in order]


def _beams(got: Any, expected: list[tuple[int, int, float]], *, what: str) -> None:
    unfinished(got)
    if not isinstance(got, (list, tuple)) or any(not isinstance(one, (tuple, list)) or len(one) != 3 for one in got):
        raise NotYet(tr("{what}: expected a list of (beam, token, score)", what=what))
    same([(int(beam), int(token)) for beam, token, _ in got], [(beam, token) for beam, token, _ in expected], what)
    close([score for *_, score in got], [score for *_, score in expected], what=what)


@exercise(
    "phi_family.2.4",
    "One step of beam search",
    hints=(
        "Add each beam's score to all of its continuations: scores[:, None] + log_probabilities.",
        "The best ones may all come from one beam: sort the whole table, not row by row.",
        "In the flattened table, i // V is the beam and i % V the token.",
    ),
)
def _(answer: Any) -> None:
    rng = np.random.default_rng(2)
    cases = []
    for beams, vocabulary in ((1, 6), (3, 8), (4, 20)):
        shares = rng.dirichlet(np.full(vocabulary, 0.3), beams)
        cases.append((-rng.exponential(2, beams), np.log(shares + 1e-12)))
    function(answer, _beam_step, cases, compare=_beams)


@exercise(
    "phi_family.2.5",
    "How fast each pair turns",
    hints=(
        "Pair i of a plain rotation turns by base ** (-i / pairs) a position.",
        "A factor above one slows its pair down.",
    ),
)
def _(answer: Any) -> None:
    def reference(pairs: int, base: float, factors: list[float]) -> np.ndarray:
        return 1 / (np.asarray(factors) * base ** (np.arange(pairs) / pairs))

    cases = [(4, 1e4, [1.0, 1.0, 1.0, 1.0]), (3, 1e4, [1.0, 2.5, 40.0]), (48, 250000.0, np.linspace(1, 60, 48).tolist())]
    function(answer, reference, cases)


@exercise(
    "phi_family.2.6",
    "Embedding and head at int4",
    hints=(
        "A weight of the head takes 4 bits and its share of a 32-bit scale: 32 / block.",
        "The float32 table takes four bytes for each of vocab x hidden weights.",
    ),
)
def _(answer: Any) -> None:
    def reference(vocab: int, hidden: int, block: int, shared: bool) -> float:
        head = vocab * hidden * (4 + 32 / block) / 8
        return head if shared else head + vocab * hidden * 4

    function(answer, reference, [(32064, 3072, 32, False), (200064, 3072, 32, True), (200064, 3072, 128, False)])

"""Lab phi_family/01, llama.cpp: the vocabulary's share, round trip, fused matrices, chat format, planner, extrapolation, offload."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from labkit import phi, planner
from labkit.course.compare import NotYet, close, function, same, unfinished
from labkit.course.exercises import exercise
from labkit.i18n import tr
from labkit.standin import standin_config


@exercise(
    "phi_family.1.1",
    "What the vocabulary takes",
    hints=(
        "One matrix has vocab_size rows of hidden_size weights.",
        "There are two such matrices, embedding and head, unless tie_word_embeddings is true.",
    ),
)
def _(answer: Any) -> None:
    def reference(config: Mapping[str, Any], parameters: int) -> float:
        found = planner.weights(config)
        return (found["embedding"] + found.get("head", 0)) / parameters

    configs = [standin_config(name) for name in phi.MEMBERS]
    function(answer, reference, [(config, sum(planner.weights(config).values())) for config in configs])


def _round_trip(block: np.ndarray, bits: int) -> np.ndarray:
    low = block.min()
    scale = (block.max() - low) / (2**bits - 1)
    return np.round((block - low) / scale) * scale + low


@exercise(
    "phi_family.1.2",
    "Scale and offset, there and back",
    hints=(
        "The offset is the least value; 2^bits - 1 steps lead from it to the largest.",
        "codes = np.round((block - low) / scale)",
        "The value of a code is codes * scale + low.",
    ),
)
def _(answer: Any) -> None:
    rng = np.random.default_rng(11)
    cases = [(rng.normal(0.3, 1.0, 32), bits) for bits in (2, 4, 8)] + [(rng.normal(size=(4, 8)), 4)]
    function(answer, _round_trip, cases, rel=1e-5, abs=1e-7)


def _parts(got: Any, expected: tuple[np.ndarray, ...], *, what: str) -> None:
    unfinished(got)
    if not isinstance(got, (tuple, list)) or len(got) != 3:
        raise NotYet(tr("{what}: expected three matrices: query, key and value", what=what))
    for name, part, want in zip(("query", "key", "value"), got, expected, strict=True):
        close(part, want, what=f"{what}, {name}")


@exercise(
    "phi_family.1.3",
    "Query, key and value out of one matrix",
    hints=(
        "Rows come in this order: all query heads, all key heads, all value heads.",
        "Query takes heads * size rows, key and value kv_heads * size rows each.",
    ),
)
def _(answer: Any) -> None:
    def reference(fused: np.ndarray, heads: int, kv_heads: int, size: int) -> tuple[np.ndarray, ...]:
        return tuple(np.split(fused, np.cumsum([heads * size, kv_heads * size])))

    rng = np.random.default_rng(3)
    cases = [(rng.normal(size=((h + 2 * k) * d, 6)), h, k, d) for h, k, d in ((4, 4, 4), (6, 2, 8), (24, 8, 2))]
    function(answer, reference, cases, compare=_parts)


@exercise(
    "phi_family.1.4",
    "Phi-3.5's chat format",
    hints=(
        "A line feed stands after the role's marker and after <|end|>.",
        "The text ends with an open turn of the assistant: <|assistant|> and a line feed, nothing closed.",
    ),
)
def _(answer: Any) -> None:
    one = [{"role": "user", "content": "Lamp on, please"}]
    more = [{"role": "system", "content": "Be brief."}, *one, {"role": "assistant", "content": "Done."}, *one]
    function(answer, phi.chat, [(one,), (more,)], compare=same)


@exercise(
    "phi_family.1.5",
    "The planner in four lines",
    hints=(
        "Each class has its own number of weights and its own bits.",
        "Bits to bytes: divide by eight.",
        "sum(weights[k] * bits[k] / 8 for k in weights) + cache_per_token * context + fixed",
    ),
)
def _(answer: Any) -> None:
    def reference(weights: Mapping[str, int], bits: Mapping[str, float], cache: float, context: int, fixed: float) -> float:
        return sum(weights[kind] * bits[kind] / 8 for kind in weights) + cache * context + fixed

    cases = []
    for name, context in zip(phi.MEMBERS, (512, 4096, 16384), strict=True):
        config = standin_config(name)
        counted = planner.weights(config)
        width = {kind: 4.5 + i for i, kind in enumerate(counted)} | {"unused": 3.0}
        cases.append((counted, width, planner.cache_per_token(config), context, 25e6))
    function(answer, reference, cases)


@exercise(
    "phi_family.1.6",
    "A line through few layers",
    hints=("np.polyfit(x, y, 1) gives the slope first, then the value at zero.", "The prediction is once + slope * n."),
)
def _(answer: Any) -> None:
    def reference(layers: list[float], values: list[float], n: float) -> float:
        return planner.line(layers, values).at(n)

    function(
        answer, reference, [([1, 2, 4], [3.1, 4.0, 6.2], 32), ([1, 2], [10.0, 14.0], 3), ([2, 3, 5, 8], [1.0, 1.6, 2.5, 4.4], 40)]
    )


@exercise(
    "phi_family.1.7",
    "Layers on the GPU",
    hints=(
        "Take fixed from free first.",
        "A layer costs its weights and its share of the cache; only whole layers move.",
        "Never more than there are, never fewer than none.",
    ),
)
def _(answer: Any) -> None:
    cases = [
        (4e9, 70e6, 12e6, 32, 0.5e9),
        (1e9, 70e6, 50e6, 32, 0.5e9),
        (0.2e9, 70e6, 1e6, 32, 0.5e9),
        (80e9, 300e6, 10e6, 40, 1e9),
    ]
    function(answer, planner.gpu_layers, cases, compare=_whole)


def _whole(got: Any, expected: int, *, what: str) -> None:
    close(got, expected, what=what)
    if got != int(got):
        raise NotYet(tr("{what}: expected a whole number of layers, got {got}", what=what, got=got))

"""Lab module04/02, llama.cpp: builds, the converter's permutation, mixtures, importance matrix, planning, sampling."""

from __future__ import annotations

import re
import shlex
from typing import Any

import numpy as np

from labkit.course.compare import NotYet, close, function, same, unfinished
from labkit.course.exercises import exercise
from labkit.i18n import tr


@exercise(
    "04.2.1",
    "Build llama.cpp for an Apple GPU today",
    hints=(
        "The Makefile is gone: CMake configures first, then builds.",
        "Options of the engine's core begin with GGML_ now.",
        "cmake -B build -D<option>=ON, then cmake --build build --config Release -j 8",
    ),
)
def _(answer: Any) -> None:
    unfinished(answer)
    if not isinstance(answer, str):
        raise NotYet(tr("expected one string with the commands, got {kind}", kind=type(answer).__name__))
    steps = [shlex.split(step) for step in re.split(r"&&|;|\n", answer) if step.strip()]
    if any(step[0] == "make" for step in steps):
        raise NotYet(tr("expected CMake: plain make stops with an error in current trees"))
    if "LLAMA_METAL" in answer:
        raise NotYet(tr("expected the option's current name, got LLAMA_METAL, renamed when ggml became a library"))
    configure = [s for s in steps if s[0] == "cmake" and "--build" not in s]
    if not configure or not any(re.fullmatch(r"-DGGML_METAL(:BOOL)?=(ON|1|TRUE)", part, re.I) for part in configure[0]):
        raise NotYet(tr("expected a configuring step, cmake -B build, that switches GGML_METAL on"))
    if not any(s[0] == "cmake" and "--build" in s for s in steps):
        raise NotYet(tr("expected a second step that builds: cmake --build build"))


def _permute(weight: np.ndarray, heads: int) -> np.ndarray:
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


@exercise(
    "04.2.2",
    "The rope permutation",
    hints=(
        "Hugging Face rotates element i with element i + d/2 of a head; llama.cpp rotates neighbours 2i and 2i + 1.",
        "View the rows of one head as (2, d/2) and make the 2 the fast axis.",
        "reshape(heads, 2, d // 2, columns), swapaxes(1, 2), reshape back",
    ),
)
def _(answer: Any) -> None:
    rng = np.random.default_rng(7)
    cases = [(rng.normal(size=(heads * d, 6)), heads) for heads, d in ((1, 4), (2, 8), (4, 6))]
    function(answer, _permute, cases)


def _more_bits(i: int, n: int) -> bool:
    return i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2


@exercise(
    "04.2.3",
    "Which layers Q4_K_M spends more bits on",
    hints=(
        "Three rules joined by or: the first eighth, the last eighth, and every third layer in between.",
        "All divisions are integer divisions: i < n // 8.",
        "The third rule: (i - n // 8) % 3 == 2",
    ),
)
def _(answer: Any) -> None:
    function(answer, _more_bits, [(i, n) for n in (6, 16, 32) for i in range(n)], compare=_truth)


def _truth(got: Any, expected: bool, *, what: str) -> None:
    unfinished(got)
    same(bool(got), expected, what)


@exercise(
    "04.2.4",
    "Effective bits per weight of a mixture",
    hints=(
        "Bits are eight times the bytes.",
        "Sum the bytes of all tensors and the weights of all tensors, then divide once.",
    ),
)
def _(answer: Any) -> None:
    def reference(tensors: list[dict]) -> float:
        return 8 * sum(t["bytes"] for t in tensors) / sum(int(np.prod(t["shape"])) for t in tensors)

    first = [{"bytes": 144, "shape": (256,)}, {"bytes": 210 * 4, "shape": (4, 256)}]
    second = [{"bytes": 18 * 64, "shape": (8, 256)}, {"bytes": 1024, "shape": (256,)}, {"bytes": 34 * 8, "shape": (256,)}]
    function(answer, reference, [(first,), (second,)])


@exercise(
    "04.2.5",
    "What an importance matrix holds",
    hints=(
        "One number for each input column of the weight matrix.",
        "It is the mean over all calibration tokens of the squared activation.",
    ),
)
def _(answer: Any) -> None:
    rng = np.random.default_rng(5)
    cases = [(rng.normal(size=(rows, 8)) * np.arange(1, 9),) for rows in (3, 50)]
    function(answer, lambda x: np.mean(x.astype(np.float64) ** 2, axis=0), cases, rel=1e-5)


@exercise(
    "04.2.6",
    "Bytes of the KV cache",
    hints=(
        "Keys and values: two tensors a layer.",
        "Each holds context x KV heads x head size numbers.",
        "2 * layers * context * kv_heads * head_size * bytes_per_value",
    ),
)
def _(answer: Any) -> None:
    def reference(layers: int, kv_heads: int, head_size: int, context: int, bytes_per_value: float) -> float:
        return 2 * layers * kv_heads * head_size * context * bytes_per_value

    function(answer, reference, [(6, 2, 64, 512, 2), (32, 8, 128, 8192, 2), (28, 8, 128, 4096, 34 / 32)])


@exercise(
    "04.2.7",
    "How many layers fit on the GPU",
    hints=(
        "Take the KV cache's share of a layer into account: each offloaded layer brings its own.",
        "Whole layers only, and never more than the model has.",
    ),
)
def _(answer: Any) -> None:
    def reference(free_bytes: int, layer_bytes: int, kv_bytes_per_layer: int, layers: int) -> int:
        return min(layers, free_bytes // (layer_bytes + kv_bytes_per_layer))

    cases = [(4_000_000_000, 100_000_000, 16_000_000, 32), (900_000_000, 70_000_000, 8_000_000, 16), (50, 100, 1, 8)]
    cases.append((10**12, 70_000_000, 8_000_000, 16))
    function(answer, reference, cases, compare=_whole)


def _whole(got: Any, expected: int, *, what: str) -> None:
    close(got, expected, what=what)
    if got != int(got):
        raise NotYet(tr("{what}: expected a whole number of layers, got {got}", what=what, got=got))


def _top_p(probabilities: np.ndarray, p: float) -> np.ndarray:
    order = np.argsort(-probabilities, kind="stable")
    before = np.cumsum(probabilities[order]) - probabilities[order]  # mass of the strictly likelier tokens
    kept = np.zeros_like(probabilities)
    chosen = order[before < p]
    kept[chosen] = probabilities[chosen]
    return kept / kept.sum()


@exercise(
    "04.2.8",
    "Top-p sampling",
    hints=(
        "Sort the probabilities from high to low and add them up.",
        "Keep the smallest set whose sum reaches p; the token that crosses the line is kept.",
        "Divide what is left by its sum, and put it back in the original order.",
    ),
)
def _(answer: Any) -> None:
    first = np.array([0.1, 0.5, 0.05, 0.3, 0.05001])
    rng = np.random.default_rng(2)
    second = rng.dirichlet(np.full(20, 0.4))
    function(answer, _top_p, [(first, 0.7), (first, 0.95), (second, 0.6), (second, 0.9)], rel=1e-6)

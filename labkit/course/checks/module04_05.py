"""Lab module04/05, MLX: roofline, lazy evaluation, MLX's affine grid and its words, prompt cache, LoRA, and what fits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from labkit.course.compare import NotStarted, NotYet, close, function, same, unfinished
from labkit.course.exercises import exercise
from labkit.i18n import tr


@exercise(
    "04.5.1",
    "The ceiling of decoding on one memory",
    hints=(
        "For one token every weight and the whole cache are read once.",
        "Weights take parameters * bits_per_weight / 8 bytes.",
        "Bytes a second divided by bytes a token; a gigabyte is 1e9 bytes here.",
    ),
)
def _(answer: Any) -> None:
    def reference(gb_per_second: float, parameters: float, bits_per_weight: float, cache_bytes: float) -> float:
        return gb_per_second * 1e9 / (parameters * bits_per_weight / 8 + cache_bytes)

    function(answer, reference, [(100, 7e9, 4.5, 0), (400, 3.8e9, 16, 2.5e8), (68, 5e6, 8.5, 1e6)])


Graph = dict[str, tuple[Callable[..., Any], list[str]]]  # name -> work, and the names of its inputs


def _graph(log: list[str], depth: int) -> Graph:
    """A chain of `depth` doublings: a node evaluated once an appearance would run 2 ** depth times."""

    def leaf() -> int:
        log.append("leaf")
        return 3

    def twice(a: int, b: int) -> int:
        log.append("twice")
        return a + b

    return {"0": (leaf, [])} | {str(i): (twice, [str(i - 1)] * 2) for i in range(1, depth + 1)}


@exercise(
    "04.5.2",
    "Evaluate a lazy graph",
    hints=(
        "A node's value is its work called with the values of its inputs.",
        "Keep the values in a dictionary that all calls share: done[name].",
        "Look into done first; only where the node is missing, evaluate its inputs and run its work.",
    ),
    seconds=10,
)
def _(answer: Any) -> None:
    unfinished(answer)
    if not callable(answer):
        raise NotYet(tr("expected a function, got {got}", got=type(answer).__name__))
    for depth in (0, 1, 6):
        log: list[str] = []
        found = answer(_graph(log, depth), str(depth))
        if found is None or found is ...:
            raise NotStarted
        if not isinstance(found, (int, float)):
            raise NotYet(tr("expected a number, got {got}", got=type(found).__name__))
        same(found, 3 * 2**depth, tr("a graph of {count} nodes", count=depth + 1))
        if len(log) != depth + 1:
            raise NotYet(tr("expected {count} nodes to run once each, got {runs} runs", count=depth + 1, runs=len(log)))


def _edge(w: np.ndarray, bits: int) -> tuple[np.float32, np.float32]:
    low, high = w.min(), w.max()
    left = abs(low) > abs(high)
    edge = low if left else high
    step = max((high - low) / np.float32(2**bits - 1), np.float32(1e-7)) * np.float32(1 if left else -1)
    steps = np.rint(edge / step)
    return (edge / steps, edge) if steps else (step, np.float32(0))


def _pair(got: Any, expected: tuple[np.float32, np.float32], *, what: str) -> None:
    unfinished(got)
    if not isinstance(got, (tuple, list)) or len(got) != 2:
        raise NotYet(tr("{what}: expected scale and offset, two numbers", what=what))
    for name, mine, theirs in zip((tr("scale"), tr("offset")), got, expected, strict=True):
        close(mine, theirs, rel=1e-6, what=f"{what}: {name}")


@exercise(
    "04.5.3",
    "MLX's scale and offset of one group",
    hints=(
        "The edge is the lowest weight where its size is larger than the highest one's, else the highest.",
        "The step is (high - low) / (2**bits - 1), positive from the lowest weight, negative from the highest.",
        "n = round(edge / step); then the scale is edge / n and the offset is the edge. With n = 0: the step, and 0.",
    ),
)
def _(answer: Any) -> None:
    rng = np.random.default_rng(5)
    groups = [rng.normal(size=64).astype(np.float32) for _ in range(4)]
    groups += [np.abs(groups[0]), -np.abs(groups[1]), np.zeros(32, np.float32), groups[2] + np.float32(9)]
    function(answer, _edge, [(g, bits) for g in groups for bits in (2, 4, 8)], compare=_pair)


def _words(codes: np.ndarray, bits: int) -> np.ndarray:
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    return (codes.reshape(-1, 32 // bits).astype(np.uint32) << shifts).sum(axis=1, dtype=np.uint32)


@exercise(
    "04.5.4",
    "Pack codes into words",
    hints=(
        "A word holds 32 // bits codes; the first one keeps its place, the next is shifted by bits.",
        "Convert to uint32 before shifting: eight bits have no room.",
        "codes.reshape(-1, 32 // bits) << np.arange(0, 32, bits), then add up each row.",
    ),
)
def _(answer: Any) -> None:
    rng = np.random.default_rng(6)
    cases = [(rng.integers(0, 2**bits, 64).astype(np.uint8), bits) for bits in (2, 4, 8)]
    function(answer, _words, cases, rel=0)


@exercise(
    "04.5.5",
    "Open an mxfp4 group",
    hints=(
        "A code is an index into the sixteen values.",
        "The exponent byte means 2.0 ** (exponent - 127): it is the exponent field of a float32.",
    ),
)
def _(answer: Any) -> None:
    values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
    values = np.concatenate([values, -values])
    rng = np.random.default_rng(7)
    cases = [(rng.integers(0, 16, 32).astype(np.uint8), exponent) for exponent in (118, 127, 130)]
    function(answer, lambda codes, exponent: values[codes] * np.float32(2.0 ** (exponent - 127)), cases, rel=0)


@exercise(
    "04.5.6",
    "Bits per weight of an affine group",
    hints=(
        "A group stores its codes, one scale and one offset.",
        "Spread the bits of scale and offset over the weights of the group.",
    ),
)
def _(answer: Any) -> None:
    def reference(bits: int, group: int, scale_bits: int) -> float:
        return bits + 2 * scale_bits / group

    function(answer, reference, [(4, 64, 16), (8, 32, 16), (3, 128, 16), (4, 64, 32)])


def _reusable(cached: list[int], prompt: list[int]) -> int:
    pairs = list(zip(cached, prompt, strict=False))
    common = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
    return min(common, len(prompt) - 1)


@exercise(
    "04.5.7",
    "How much of a prompt is in the cache",
    hints=(
        "Walk along both lists until they differ or one ends.",
        "Where the whole prompt is in the cache, its last token must still be run.",
    ),
)
def _(answer: Any) -> None:
    cases = [([1, 2, 3], [1, 2, 3, 4]), ([1, 2, 3], [1, 2, 3]), ([1, 2, 3, 4], [1, 2]), ([9], [1, 2]), ([1, 5, 3], [1, 2, 3]), ([], [4])]
    function(answer, _reusable, cases)


@exercise(
    "04.5.8",
    "Fuse an adapter",
    hints=(
        "The adapted output is x @ W.T + scale * (x @ a) @ b.",
        "W has the shape (out, in), a @ b has (in, out).",
        "weight + scale * (a @ b).T",
    ),
)
def _(answer: Any) -> None:
    rng = np.random.default_rng(8)
    shapes = [(6, 4, 2, 4.0), (5, 5, 1, 0.5), (3, 8, 2, 20.0)]
    cases = [(rng.normal(size=(o, i)), rng.normal(size=(i, r)), rng.normal(size=(r, o)), s) for o, i, r, s in shapes]
    function(answer, lambda w, a, b, s: w + s * (a @ b).T, cases, rel=1e-6, abs=1e-9)


@exercise(
    "04.5.9",
    "Trained parameters of an adapter",
    hints=(
        "One of the two thin matrices has the shape (in, r), the other (r, out).",
        "Sum r * (in + out) over the matrices.",
    ),
)
def _(answer: Any) -> None:
    def reference(shapes: list[tuple[int, int]], r: int) -> int:
        return sum(r * (out + inside) for out, inside in shapes)

    function(answer, reference, [([(768, 256)], 8), ([(256, 256), (128, 256), (256, 768)], 4), ([(4096, 4096)] * 32, 16)])


@exercise(
    "04.5.10",
    "Find what leaked into training",
    hints=(
        "Compare texts after strip() and casefold().",
        "Return the held-out texts as they are, in their order.",
    ),
)
def _(answer: Any) -> None:
    def reference(train: list[str], heldout: list[str]) -> list[str]:
        seen = {text.strip().casefold() for text in train}
        return [text for text in heldout if text.strip().casefold() in seen]

    cases = [
        (["Vacuum upstairs", " aspire a sala "], ["vacuum upstairs ", "Vacuum downstairs", "Aspire a sala"]),
        (["a"], ["b"]),
        ([], ["b"]),
    ]
    function(answer, reference, cases, compare=_listed)


def _listed(got: Any, expected: list[str], *, what: str) -> None:
    same(got, expected, what)


@exercise(
    "04.5.11",
    "The largest model that fits",
    hints=(
        "A model takes n * bits_per_weight / 8 bytes, and the cache on top.",
        "Among those that fit, take the one with the most parameters.",
        'Where none fits, return the string "none".',
    ),
)
def _(answer: Any) -> None:
    def reference(parameters: dict[str, float], bits_per_weight: float, cache_bytes: float, limit: float) -> str:
        fit = {name: n for name, n in parameters.items() if n * bits_per_weight / 8 + cache_bytes <= limit}
        return max(fit, key=lambda name: fit[name]) if fit else "none"

    models = {"small": 0.6e9, "large": 14e9, "middle": 7.25e9}
    cases = [(models, 4.5, 0.5e9, limit) for limit in (1e8, 1e9, 6e9, 16e9)] + [(models, 16, 2e9, 16e9), ({"a": 8.0}, 8, 2, 10)]
    function(answer, reference, cases, compare=_listed)

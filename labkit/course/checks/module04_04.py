"""Lab module04/04, OpenVINO: reading an IR, devices, bfloat16, ranges, accuracy control, int4, ratio, training, pruning, serving."""

from __future__ import annotations

from typing import Any

import numpy as np

from labkit.course.compare import NotYet, close, function, same, unfinished
from labkit.course.exercises import exercise
from labkit.i18n import tr


def _arrays(got: Any, expected: Any, *, what: str) -> None:
    """Several arrays or numbers, in a tuple."""
    unfinished(got)
    if not isinstance(got, tuple) or len(got) != len(expected):
        raise NotYet(tr("{what}: expected {count} values, got {got}", what=what, count=len(expected), got=type(got).__name__))
    for i, (one, wanted) in enumerate(zip(got, expected, strict=True)):
        close(one, wanted, what=f"{what}[{i}]")


@exercise(
    "04.4.1",
    "One tensor out of the .bin",
    hints=(
        "The numbers lie one after another, two bytes each; there is nothing to skip but the first `offset` bytes.",
        "np.frombuffer takes a dtype, a count and an offset.",
        "The count is the product of the shape: np.prod(shape).",
    ),
)
def _(answer: Any) -> None:
    data = np.random.default_rng(1).normal(size=40).astype(np.float16).tobytes()

    def reference(data: bytes, offset: int, shape: tuple[int, ...]) -> np.ndarray:
        return np.frombuffer(data, np.float16, int(np.prod(shape)), offset).reshape(shape)

    function(answer, reference, [(data, 0, (5, 8)), (data, 6, (3, 4)), (data, 70, (5,))])


def _chosen(wish: str, available: list[str]) -> str | None:
    wanted = wish.split(":")[1].split(",")
    return next((device for kind in wanted for device in available if device == kind or device.split(".")[0] == kind), None)


@exercise(
    "04.4.2",
    "The device AUTO takes",
    hints=(
        "Split the wish at the colon, then at the commas.",
        "The order of the wish decides, not the order of the available devices.",
        "GPU stands for GPU.0 and GPU.1 as well: compare with device.split('.')[0] too.",
    ),
)
def _(answer: Any) -> None:
    cases = [
        ("AUTO:NPU,GPU,CPU", ["CPU", "GPU.0"]), ("AUTO:GPU,CPU", ["CPU"]), ("AUTO:NPU", ["CPU"]),
        ("AUTO:CPU,GPU", ["CPU", "GPU"]), ("AUTO:GPU.1,CPU", ["CPU", "GPU.0", "GPU.1"]),
    ]  # fmt: skip
    function(answer, lambda wish, there: _chosen(wish, there) or "none", cases, compare=_device)


def _device(got: Any, expected: str, *, what: str) -> None:
    same("none" if got is None else got, expected, what)


@exercise(
    "04.4.3",
    "Little's law",
    hints=(
        "Ten requests a second that take half a second each: five are under way at any moment.",
        "Milliseconds are thousandths of a second.",
    ),
)
def _(answer: Any) -> None:
    function(answer, lambda rate, ms: rate * ms / 1000, [(10.0, 500.0), (240.0, 8.2), (3, 40)])


def _to_bf16(x: np.ndarray) -> np.ndarray:
    bits = np.asarray(x, np.float32).view(np.uint32)
    rounded = bits + 0x7FFF + ((bits >> 16) & 1)
    return (rounded & 0xFFFF0000).astype(np.uint32).view(np.float32)


@exercise(
    "04.4.4",
    "Rounding to bfloat16",
    hints=(
        "View the bits as uint32; the lower 16 must become zero.",
        "Adding 0x8000 before cutting rounds to the nearest; ties need care.",
        "Add 0x7FFF and the lowest bit that stays, (bits >> 16) & 1; then mask with 0xFFFF0000.",
    ),
)
def _(answer: Any) -> None:
    rng = np.random.default_rng(4)
    ties = np.array([0x3F808000, 0x3F818000, 0xBF808000, 0x3F7FFFFF], np.uint32).view(np.float32)  # between two bf16
    function(answer, _to_bf16, [(rng.normal(size=50).astype(np.float32),), (ties,)], rel=0.0)


@exercise(
    "04.4.5",
    "FakeQuantize",
    hints=(
        "levels values have levels - 1 steps between them.",
        "Clip to [low, high] first.",
        "Count the steps from low, round the count, and come back: count * step + low.",
    ),
)
def _(answer: Any) -> None:
    def reference(x: np.ndarray, low: float, high: float, levels: int) -> np.ndarray:
        step = (high - low) / (levels - 1)
        return np.round((np.clip(x, low, high) - low) / step) * step + low

    x = np.random.default_rng(3).uniform(-2, 2, 60)
    function(answer, reference, [(x, -1.0, 0.75, 8), (x, -1.28, 1.27, 256), (x, 0.0, 1.5, 16)], rel=1e-6, abs=1e-9)


def _taken_back(losses: dict[str, float], allowed: float) -> list[str]:
    left, back = sum(losses.values()), []
    for name in sorted(losses, key=losses.__getitem__, reverse=True):
        if left > allowed:
            left -= losses[name]
            back.append(name)
    return back


@exercise(
    "04.4.6",
    "What accuracy control takes back",
    hints=(
        "Begin with the sum of all losses: that is what the whole quantized model loses.",
        "Go through the operations from the largest loss to the smallest.",
        "Stop as soon as what is left is no more than allowed.",
    ),
)
def _(answer: Any) -> None:
    losses = {"down_0": 0.03, "q_1": 0.001, "down_4": 0.08, "head": 0.02}
    cases = [(losses, 0.06), (losses, 1.0), (losses, 0.01), ({"a": 0.5, "b": 0.25}, 0.25)]
    function(answer, _taken_back, cases, compare=_names)


def _names(got: Any, expected: list[str], *, what: str) -> None:
    if got is None or got is ...:
        unfinished(got)
    same(list(got), expected, what)


def _int4_sym(groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    low, high = np.abs(groups.min(1, keepdims=True)), groups.max(1, keepdims=True)
    scales = np.where(low >= high, low, -high) / np.float32(8)
    return np.clip(np.round(groups / scales), -8, 7).astype(np.int8), scales


@exercise(
    "04.4.7",
    "NNCF's symmetric four bits",
    hints=(
        "The weight of largest magnitude shall get the code -8.",
        "If it is negative, the scale is its magnitude / 8; if it is positive, the scale is minus that.",
        "np.where(low >= high, low, -high) / 8, with low the magnitude of the minimum; then round and clip to -8 .. 7.",
    ),
)
def _(answer: Any) -> None:
    rng = np.random.default_rng(7)
    even = np.array([[-1.0, 1.0, 0.3, -0.6], [0.5, 0.25, 0.125, 0.1]], np.float32)  # equal ends; no negative weight
    function(answer, _int4_sym, [(rng.normal(size=(6, 32)).astype(np.float32),), (even,)], compare=_arrays)


@exercise(
    "04.4.8",
    "What ratio means for the bits",
    hints=(
        "The eligible weights are shared between 4 bits and 8 bits.",
        "Embedding and head count with 8 bits whatever the ratio is.",
        "Sum the bits of all weights, then divide by all weights.",
    ),
)
def _(answer: Any) -> None:
    def reference(eligible: int, others: int, ratio: float) -> float:
        return (eligible * (8 - 4 * ratio) + 8 * others) / (eligible + others)

    function(answer, reference, [(4_700_000, 520_000, 0.8), (100, 100, 1.0), (3_000, 1_000, 0.25)])


@exercise(
    "04.4.9",
    "The straight-through trick",
    hints=(
        "Begin with w, whose gradient you want, and add what is missing to the value.",
        "What is missing is rounded - w; it must not bring a gradient of its own.",
        "w + stop(rounded - w)",
    ),
)
def _(answer: Any) -> None:
    for w, rounded in ((0.7, 1.0), (-1.2, -1.0)):  # the imaginary part carries the slope in w: sums keep it
        function(answer, lambda w, r, s: r + 1j * w.imag, [(complex(w, 1), complex(rounded, 0), _stop)], compare=_straight)


def _stop(x: complex) -> complex:
    return complex(complex(x).real, 0)


def _straight(got: Any, expected: complex, *, what: str) -> None:
    unfinished(got)
    if not isinstance(got, complex):
        raise NotYet(tr("expected a result made of w and rounded with +, - and stop(), got {kind}", kind=type(got).__name__))
    close(got.real, expected.real, rel=1e-9, what=tr("the value"))
    close(got.imag, expected.imag, what=tr("the gradient that reaches w"))


def _keep(w: np.ndarray, ratio: float) -> np.ndarray:
    mask = np.ones(w.size, bool)
    mask[np.argsort(np.abs(w), axis=None, kind="stable")[: round(ratio * w.size)]] = False
    return mask.reshape(w.shape)


@exercise(
    "04.4.10",
    "A mask by magnitude",
    hints=(
        "Order the weights by absolute value, over the whole matrix.",
        "The first round(ratio * w.size) of that order become False.",
        "np.argsort(np.abs(w), axis=None) gives positions in the flattened matrix; reshape the mask at the end.",
    ),
)
def _(answer: Any) -> None:
    rng = np.random.default_rng(10)
    function(answer, _keep, [(rng.normal(size=(4, 10)), 0.5), (rng.normal(size=(3, 7)), 0.3), (rng.normal(size=(2, 2)), 0.0)])


@exercise(
    "04.4.11",
    "Tokens in one pass of speculative decoding",
    hints=(
        "The first guess counts with probability a, the second with a * a, and so on: all before it must be kept too.",
        "The large model adds one token of its own in every pass.",
        "1 + a + a**2 + ... + a**k",
    ),
)
def _(answer: Any) -> None:
    function(answer, lambda a, k: sum(a**i for i in range(k + 1)), [(0.5, 4), (0.9, 3), (1.0, 5), (0.0, 4)])


@exercise(
    "04.4.12",
    "A chat request for Model Server",
    hints=(
        "The route ends as OpenAI's does: /chat/completions.",
        "The body names the model and gives messages: a list of role and content.",
        "The limit is called max_tokens.",
    ),
)
def _(answer: Any) -> None:
    def reference(name: str, text: str) -> tuple[str, dict[str, Any]]:
        return "/v3/chat/completions", {"model": name, "messages": [{"role": "user", "content": text}], "max_tokens": 32}

    function(answer, reference, [("assistant", "Lights on"), ("other", "Que horas são?")], compare=_request)


def _request(got: Any, expected: tuple[str, dict[str, Any]], *, what: str) -> None:
    unfinished(got)
    if not isinstance(got, tuple) or len(got) != 2:
        raise NotYet(tr("{what}: expected a route and a body, got {got}", what=what, got=type(got).__name__))
    same(got[0], expected[0], tr("the route"))
    unfinished(got[1])
    body = {key: value for key, value in got[1].items() if key not in ("max_completion_tokens", "temperature", "stream")}
    if got[1].get("max_completion_tokens") == expected[1]["max_tokens"]:  # OpenAI's newer name for the same limit
        body.setdefault("max_tokens", expected[1]["max_tokens"])
    same(body, expected[1], tr("the body"))

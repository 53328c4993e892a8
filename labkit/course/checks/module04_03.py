"""Lab module04/03, ONNX Runtime and Olive: external data, nibbles, calibration, folding, workflows, decoding."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from labkit.course.compare import NotYet, close, function, same, unfinished
from labkit.course.exercises import exercise
from labkit.i18n import tr


def _read_tensor(data: bytes, offset: int, shape: tuple[int, ...]) -> np.ndarray:
    return np.frombuffer(data, np.float32, math.prod(shape), offset=offset).reshape(shape)


@exercise(
    "04.3.1",
    "Read a tensor from external data",
    hints=(
        "Each float32 has four bytes; the offset is in bytes already.",
        "np.frombuffer takes bytes, a type, a count and an offset.",
        "np.frombuffer(data, np.float32, count, offset=offset).reshape(shape), with the product of the shape as count",
    ),
)
def _(answer: Any) -> None:
    unfinished(answer)
    data = np.random.default_rng(3).normal(size=600).astype(np.float32).tobytes()
    function(answer, _read_tensor, [(data, 0, (4, 5)), (data, 64, (7, 3)), (data, 400, (100,)), (data, 1200, (2, 3, 4))])


@exercise(
    "04.3.2",
    "Unpack two codes from each byte",
    hints=(
        "The first code of a pair is the low half of the byte, the second the high half.",
        "packed & 15 is the low half, packed >> 4 the high half.",
        "np.stack([low, high], axis=-1) puts pairs side by side; reshape joins them along the row.",
    ),
)
def _(answer: Any) -> None:
    rng = np.random.default_rng(11)
    cases = [(rng.integers(0, 256, (rows, width), dtype=np.uint8),) for rows, width in ((1, 3), (4, 16))]
    function(answer, lambda packed: np.stack([packed & 15, packed >> 4], axis=-1).reshape(len(packed), -1), cases)


def _dequantize(codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray, block: int) -> np.ndarray:
    each = [np.repeat(part, block, axis=1) for part in (scales, zeros)]
    return (codes.astype(np.float32) - each[1]) * each[0]


@exercise(
    "04.3.3",
    "From codes to weights",
    hints=(
        "Every block of a row has its own scale and zero point: (rows, blocks) against (rows, columns).",
        "np.repeat(scales, block, axis=1) gives every column its scale.",
        "Codes are unsigned bytes: make them floats before you subtract.",
    ),
)
def _(answer: Any) -> None:
    rng = np.random.default_rng(5)
    cases = []
    for rows, count, block in ((2, 2, 4), (3, 4, 16)):
        codes = rng.integers(0, 16, (rows, count * block), dtype=np.uint8)
        cases.append((codes, rng.uniform(0.01, 0.1, (rows, count)), rng.integers(0, 16, (rows, count), dtype=np.uint8), block))
    function(answer, _dequantize, cases, rel=1e-5, abs=1e-7)


@exercise(
    "04.3.4",
    "Bits a weight of MatMulNBits",
    hints=(
        "A block shares one float32 scale: 32 bits for the whole block.",
        "A zero point is stored with as many bits as a code, once a block, and only when the form is asymmetric.",
        "bits + (32 + bits * asymmetric) / block",
    ),
)
def _(answer: Any) -> None:
    def reference(bits: int, block: int, symmetric: bool) -> float:
        return bits + (32 + (0 if symmetric else bits)) / block

    function(answer, reference, [(b, n, s) for b in (2, 4, 8) for n in (16, 32, 128) for s in (True, False)])


def _scale_and_zero(low: float, high: float) -> tuple[float, int]:
    low, high = min(low, 0.0), max(high, 0.0)
    scale = (high - low) / 255
    return scale, round(-low / scale)


@exercise(
    "04.3.5",
    "Scale and zero point of an activation",
    hints=(
        "Zero must have a code of its own, so the range is widened to contain 0.",
        "There are 256 codes and 255 steps between them.",
        "scale = (high - low) / 255, zero = round(-low / scale)",
    ),
)
def _(answer: Any) -> None:
    cases = [(-1.0, 3.0), (0.5, 2.0), (-4.0, -1.0), (-0.278, 5.97), (-262.0, 284.0)]
    function(answer, _scale_and_zero, cases, compare=_pair)


def _pair(got: Any, expected: tuple[float, int], *, what: str) -> None:
    unfinished(got)
    if not isinstance(got, (tuple, list)) or len(got) != 2:
        raise NotYet(tr("{what}: expected the pair (scale, zero point), got {got}", what=what, got=got))
    close(got[0], expected[0], what=tr("{what}, scale", what=what))
    close(got[1], expected[1], what=tr("{what}, zero point", what=what))


@exercise(
    "04.3.6",
    "Hand outliers over to the weights",
    hints=(
        "One factor a column: the largest input of that column against the largest weight of that column.",
        "np.abs(x).max(axis=0) is (in,); so is np.abs(w).max(axis=0).",
        "loud ** a / heavy ** (1 - a)",
    ),
)
def _(answer: Any) -> None:
    def reference(x: np.ndarray, w: np.ndarray, a: float) -> np.ndarray:
        return np.abs(x).max(axis=0) ** a / np.abs(w).max(axis=0) ** (1 - a)

    rng = np.random.default_rng(8)
    x, w = rng.normal(size=(20, 6)) * [1, 50, 1, 2, 0.1, 1], rng.normal(size=(5, 6))
    function(answer, reference, [(x, w, a) for a in (0.5, 0.3, 0.8)])


def _greedy(step: Callable[[list[int]], np.ndarray], prompt: Sequence[int], end: int, limit: int) -> list[int]:
    made: list[int] = []
    row = step(list(prompt))
    while len(made) < limit:
        token = int(np.argmax(row))
        if token == end:
            break
        made.append(token)
        if len(made) < limit:
            row = step([token])
    return made


class _Chain:
    """A model whose next token depends on all it has read; it counts what it is given, as a cache would."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def __call__(self, tokens: Sequence[int]) -> np.ndarray:
        self.seen += [int(t) for t in tokens]
        row = np.zeros(9)
        row[(sum(self.seen) * 5 + len(self.seen)) % 9] = 1.0
        return row


@exercise(
    "04.3.7",
    "The generation loop",
    hints=(
        "First give the whole prompt to step; afterwards only the newest token: the cache remembers the rest.",
        "The next token is the place of the largest logit; the end token stops the loop and is not part of the answer.",
        "row = step(prompt); repeat up to limit times: token = argmax(row), stop at end, append it, row = step([token])",
    ),
)
def _(answer: Any) -> None:
    unfinished(answer)
    if not callable(answer):
        raise NotYet(tr("expected a function, got {got}", got=type(answer).__name__))
    for prompt, limit in (([1, 2], 6), ([3], 4), ([4, 4, 1], 12), ([2, 7], 0)):
        given = _Chain()
        expected = _greedy(_Chain(), prompt, 4, limit)

        def greedy(tokens: Sequence[int], end: int, most: int, given: _Chain = given) -> Any:
            return answer(given, tokens, end, most)

        function(greedy, lambda *_, e=expected: e, [(prompt, 4, limit)], compare=_ids)
        if (limit and given.seen[: len(prompt)] != prompt) or len(given.seen) > len(prompt) + limit:
            raise NotYet(tr(
                "step was given {got} tokens in all, expected at most {want}: the prompt once, then one new token at a time",
                got=len(given.seen), want=len(prompt) + limit,
            ))  # fmt: skip


def _ids(got: Any, expected: list[int], *, what: str) -> None:
    unfinished(got)
    if not isinstance(got, (list, tuple, np.ndarray)):
        raise NotYet(tr("expected a list of token ids, in order"))
    same([int(t) for t in got], expected, what)


def _top_k(logits: np.ndarray, k: int, temperature: float) -> np.ndarray:
    scaled = np.where(logits >= np.sort(logits)[-k], logits, -np.inf) / temperature
    share = np.exp(scaled - scaled.max())
    return share / share.sum()


@exercise(
    "04.3.8",
    "Top-k sampling with a temperature",
    hints=(
        "np.sort(logits)[-k] is the smallest logit that stays.",
        "Divide what stays by the temperature, then take the softmax; what was cut gets probability 0.",
        "np.where(logits >= smallest, logits, -np.inf) / temperature, then exp(z - z.max()), divided by its sum",
    ),
)
def _(answer: Any) -> None:
    rng = np.random.default_rng(4)
    cases = [(rng.normal(size=12) * 3, k, t) for k, t in ((3, 1.0), (5, 2.0), (1, 0.7), (12, 0.5))]
    function(answer, _top_k, cases)


PROVIDER, RTN = "CPUExecutionProvider", "int4"


@exercise(
    "04.3.9",
    "The command of an old tutorial, today",
    hints=(
        "auto-opt became optimize; the model, the output folder and the precision keep their options.",
        "--use_ort_genai and --use_model_builder became one option: --exporter model_builder.",
        "olive optimize -m … -o made --precision int4 --provider CPUExecutionProvider --exporter model_builder",
    ),
)
def _(answer: Any) -> None:
    unfinished(answer)
    if not isinstance(answer, str):
        raise NotYet(tr("expected one string with the command, got {kind}", kind=type(answer).__name__))
    words = shlex.split(answer.replace("\\\n", " "))
    if words[:2] != ["olive", "optimize"]:
        raise NotYet(tr("expected the command to begin with {want}, got {got}", want="olive optimize", got=" ".join(words[:2])))
    options = _options(words[2:])
    for names, want in ((("-m", "--model_name_or_path"), "HuggingFaceTB/SmolLM2-135M-Instruct"), (("--precision",), RTN),
                        (("--exporter",), "model_builder")):  # fmt: skip
        got = next((options[name] for name in names if name in options), None)
        if got != want:
            raise NotYet(tr("expected {name} {want}, got {got}", name=names[0], want=want, got=got))
    if options.get("--provider", PROVIDER) != PROVIDER or options.get("--device", "cpu") != "cpu":
        raise NotYet(tr("expected the CPU as provider and device"))
    if "-o" not in options and "--output_path" not in options:
        raise NotYet(tr("expected an output folder, -o or --output_path"))
    if old := [name for name in options if name in ("--use_ort_genai", "--use_model_builder", "--trust_remote_code")]:
        raise NotYet(tr("{name} is not an option that is needed today", name=old[0]))


def _options(words: Sequence[str]) -> dict[str, str | None]:
    """Option -> its value, None for a switch."""
    found: dict[str, str | None] = {}
    for i, word in enumerate(words):
        if word.startswith("-"):
            name, _, value = word.partition("=")
            after = words[i + 1] if i + 1 < len(words) and not words[i + 1].startswith("-") else None
            found[name] = value or after
    return found


@exercise(
    "04.3.10",
    "How much of a workflow the cache spares",
    hints=(
        "A pass is reused when its own configuration and everything before it are what they were.",
        "So count from the front, and stop at the first difference, even if a later pass is equal again.",
    ),
)
def _(answer: Any) -> None:
    def reference(before: list, after: list) -> int:
        count = 0
        for one, other in zip(before, after, strict=False):
            if one != other:
                break
            count += 1
        return count

    build, rtn, wide = ({"type": "ModelBuilder"}, {"type": "Rtn", "block_size": 32}, {"type": "Rtn", "block_size": 128})
    tune = {"type": "Tune"}
    cases = [([build, rtn, tune], [build, rtn, tune]), ([build, rtn, tune], [build, wide, tune]), ([build, rtn], [rtn, build]),
             ([build, rtn], [build, rtn, tune]), ([], [build])]  # fmt: skip
    function(answer, reference, cases, compare=_count)


def _count(got: Any, expected: int, *, what: str) -> None:
    unfinished(got)
    same(int(got), expected, what)


@exercise(
    "04.3.11",
    "The smallest candidate that keeps its promise",
    hints=(
        "First keep the candidates whose perplexity is at most base times (1 + limit).",
        "Among these take the one with the fewest bytes; when none is left, answer 'none'.",
    ),
)
def _(answer: Any) -> None:
    def reference(candidates: list[dict], base: float, limit: float) -> str:
        left = [c for c in candidates if c["perplexity"] <= base * (1 + limit)]
        return min(left, key=lambda c: c["bytes"])["name"] if left else "none"

    rows = [{"name": "a", "perplexity": 2.20, "bytes": 900}, {"name": "b", "perplexity": 2.25, "bytes": 600},
            {"name": "c", "perplexity": 2.31, "bytes": 500}, {"name": "d", "perplexity": 2.9, "bytes": 300}]  # fmt: skip
    cases = [(rows, 2.19, limit) for limit in (0.01, 0.03, 0.06, 1.0, 0.001)]
    function(answer, reference, cases, compare=lambda got, expected, *, what: same(got, expected, what))

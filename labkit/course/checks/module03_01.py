"""Lab module03/01, foundations: counting weights and cache, git's name, packed blocks, sizes, speed, pages, batches, drafts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from labkit import gguf_blocks, localhub, planner, simulate
from labkit.course.compare import NotYet, close, function, raw_bytes, same, unfinished
from labkit.course.exercises import exercise
from labkit.i18n import tr
from labkit.standin import shapes, standin_config


@exercise(
    "03.1.1",
    "Weights from a config",
    hints=(
        "q and o have num_attention_heads * head_dim rows or columns, k and v num_key_value_heads * head_dim.",
        "The feed-forward has three matrices of hidden_size x intermediate_size.",
        "Norms: two of hidden_size a layer and one at the end. A tied head is the embedding, stored once.",
    ),
)
def _(answer: Any) -> None:
    llamas = [name for name in shapes() if shapes()[name]["config"]["model_type"] == "llama" and "head_dim" in shapes()[name]["config"]]
    configs = [standin_config(name) for name in llamas]
    apart = [configs[0] | {"tie_word_embeddings": False}]
    function(answer, lambda config: sum(planner.weights(config).values()), [(c,) for c in (*configs, *apart)], compare=_whole)


def _whole(got: Any, expected: int, *, what: str) -> None:
    close(got, expected, what=what, rel=1e-12)
    if got != int(got):
        raise NotYet(tr("{what}: expected a whole number, got {got}", what=what, got=got))


@exercise(
    "03.1.2",
    "What a token leaves in the cache",
    hints=(
        "A key and a value: two vectors a layer for each key/value head.",
        "A config may lack head_dim: then it is hidden_size // num_attention_heads.",
        "2 * layers * num_key_value_heads * head size * bits / 8",
    ),
)
def _(answer: Any) -> None:
    names = ("smollm2-135m", "qwen3-0.6b", "phi-3.5-mini", "phi-4-mini")
    cases = [(standin_config(name), bits) for name, bits in zip(names, (16, 8.5, 32, 16), strict=True)]
    function(answer, planner.cache_per_token, cases)


@exercise(
    "03.1.3",
    "Git's name for a content",
    hints=(
        'The bytes hashed begin with b"blob ", the length in decimal digits, and one zero byte.',
        'b"blob %d\\0" % len(content) makes that beginning.',
        "hashlib.sha1(beginning + content).hexdigest()",
    ),
)
def _(answer: Any) -> None:
    function(answer, localhub.git_blob, [(b"",), (b"hello\n",), (bytes(range(256)) * 5,)], compare=same)


def _packed(got: Any, expected: bytes, *, what: str) -> None:
    raw_bytes(got, expected, what=what)


def _q5_1(block: np.ndarray) -> bytes:
    return gguf_blocks.quantize(block[None], "q5_1").data.tobytes()


@exercise(
    "03.1.4",
    "A block of Q5_1",
    hints=(
        "d = (largest - least) / 31 in float32; codes = trunc((block - least) * (1 / d) + 0.5). An empty range has d = 0 and codes 0.",
        'The fifth bits are np.packbits(codes >> 4, bitorder="little"): four bytes.',
        "Byte i of the last 16 holds the low four bits of codes i (low half) and i + 16 (high half).",
    ),
)
def _(answer: Any) -> None:
    rng = np.random.default_rng(51)
    cases = [rng.normal(middle, spread, 32).astype(np.float32) for middle, spread in ((0, 1), (3, 0.02), (-1, 5))]
    function(answer, _q5_1, [(block,) for block in [*cases, np.full(32, 0.25, np.float32)]], compare=_packed)


def _five(values: Sequence[int]) -> int:
    number = 0
    for value in values:
        number = 3 * number + int(value) + 1
    return (256 * number + 242) // 243


@exercise(
    "03.1.5",
    "Five ternary values in a byte",
    hints=(
        "Digits are value + 1: 0, 1 or 2. Start with 0; for each value multiply by 3 and add its digit.",
        "Rounding up in whole numbers: (a + b - 1) // b.",
        "(256 * n + 242) // 243",
    ),
)
def _(answer: Any) -> None:
    rng = np.random.default_rng(5)
    cases = [[-1] * 5, [1] * 5, [0] * 5, *rng.integers(-1, 2, (6, 5)).tolist()]
    function(answer, _five, [(values,) for values in cases], compare=_whole)


SIZES = {"q4_0": 18, "q5_1": 24, "q8_0": 34}


@exercise(
    "03.1.6",
    "Bytes of a matrix in blocks",
    hints=(
        "A block holds 32 weights: 16 bytes of nibbles and a float16 in Q4_0; Q5_1 and Q8_0 you have packed above.",
        "18, 24 and 34 bytes. Blocks in all: rows * columns // 32.",
        "When columns does not divide by 32: raise ValueError(...)",
    ),
)
def _(answer: Any) -> None:
    def reference(rows: int, columns: int, precision: str) -> int:
        return rows * columns // 32 * SIZES[precision]

    function(answer, reference, [(rows, columns, p) for p in SIZES for rows, columns in ((1, 32), (768, 256), (3, 96))], compare=_whole)
    try:
        got = answer(4, 40, "q4_0")
    except ValueError:
        return
    raise NotYet(tr("matrix_bytes(4, 40, 'q4_0'): expected a ValueError, for rows of 40 are not whole blocks; got {got}", got=got))


@exercise(
    "03.1.7",
    "Decoding speed from the moments of arrival",
    hints=(
        "n tokens have n - 1 gaps between them.",
        "The gaps add up to the last moment less the first.",
    ),
)
def _(answer: Any) -> None:
    rng = np.random.default_rng(7)
    cases = [[0.5, 0.6, 0.7], [2.0, 2.01], np.cumsum(rng.uniform(0.01, 0.03, 40)).tolist()]
    function(answer, lambda s: (len(s) - 1) / (s[-1] - s[0]), [(stamps,) for stamps in cases])


def _blocks(n: int, prefix: int, own: int, size: int) -> int:
    pager = simulate.Pager(n * (prefix + own) // size + 2 * n + 2, size)
    pager.add("start", prefix)
    for i in range(n):
        pager.fork("start", str(i))
        pager.add(str(i), own)
    pager.free("start")
    return pager.used


@exercise(
    "03.1.8",
    "Blocks of requests that share a beginning",
    hints=(
        "prefix // size full blocks are stored once.",
        "What is left of the prefix (prefix % size) is copied by each request, and followed by its own tokens.",
        "prefix // size + n * ceil((prefix % size + own) / size)",
    ),
)
def _(answer: Any) -> None:
    function(answer, _blocks, [(4, 96, 5, 32), (3, 100, 40, 32), (1, 10, 1, 16), (5, 64, 64, 1), (2, 31, 2, 16)], compare=_whole)


@exercise(
    "03.1.9",
    "Steps of continuous batching",
    hints=(
        "Keep what each request still needs, and count steps while anything is left.",
        "In a step, the first `slots` requests with something left lose one.",
    ),
)
def _(answer: Any) -> None:
    rng = np.random.default_rng(9)
    cases = [([3, 12, 5, 20, 7, 9, 2, 16], 4), ([5], 3), ([1, 1, 1, 1], 1), (rng.integers(1, 30, 12).tolist(), 3)]
    function(answer, lambda lengths, slots: len(simulate.batches(lengths, slots)), cases, compare=_whole)


def _list(got: Any, expected: Sequence[int], *, what: str) -> None:
    unfinished(got)
    same([int(token) for token in got] if isinstance(got, (list, tuple, np.ndarray)) else got, list(expected), what)


@exercise(
    "03.1.10",
    "What a checked draft yields",
    hints=(
        "Count how many proposals stand before the first that differs from the target's choice.",
        "The target's own choice at the first difference may be written too; so may the one after the last proposal.",
        "checked[: right + 1]",
    ),
)
def _(answer: Any) -> None:
    def reference(drafted: Sequence[int], checked: Sequence[int]) -> list[int]:
        return list(checked[: simulate.accepted(drafted, checked) + 1])

    cases = [([4, 8, 15], [4, 8, 15, 16]), ([4, 8, 15], [4, 9, 15, 16]), ([4, 8], [5, 8, 1]), ([7], [7, 2])]
    function(answer, reference, cases, compare=_list)

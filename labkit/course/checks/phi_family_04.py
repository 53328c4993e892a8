"""Lab phi_family/04, MLX: affine groups, packing, a mixed recipe's rule, experts, images."""

from __future__ import annotations

from typing import Any

import numpy as np

from labkit import phi
from labkit.course.compare import NotYet, close, function, unfinished
from labkit.course.exercises import exercise
from labkit.i18n import tr


@exercise(
    "phi_family.4.1",
    "Bits of an affine group",
    hints=("Two 16-bit numbers are shared by the weights of a group.", "bits + 32 / group"),
)
def _(answer: Any) -> None:
    function(answer, lambda bits, group: bits + 32 / group, [(4, 64), (4, 32), (8, 128), (3, 64)])


def _pack(codes: np.ndarray, bits: int) -> np.ndarray:
    each = 32 // bits
    shifts = np.arange(each, dtype=np.uint32) * bits
    return (codes.reshape(len(codes), -1, each).astype(np.uint32) << shifts).sum(-1, dtype=np.uint32)


@exercise(
    "phi_family.4.2",
    "Codes into words",
    hints=(
        "32 // bits codes share a word: view each row as (words, 32 // bits).",
        "Shift code i left by i * bits, as uint32, and add the codes of a word.",
        "A sum of uint32 becomes uint64 unless you say dtype=np.uint32.",
    ),
)
def _(answer: Any) -> None:
    rng = np.random.default_rng(6)
    cases = [(rng.integers(0, 2**bits, (3, 64)).astype(np.uint32), bits) for bits in (4, 2, 8)]
    function(answer, _pack, cases, compare=_words)


def _words(got: Any, expected: np.ndarray, *, what: str) -> None:
    unfinished(got)
    got = np.asarray(got)
    if got.shape != expected.shape:
        raise NotYet(tr("{what}: expected shape {want}, got {got}", what=what, want=expected.shape, got=got.shape))
    close(got.astype(np.float64), expected.astype(np.float64), rel=0, what=what)


def _mixed_bits(name: str, i: int, n: int, low: int, high: int) -> int:
    more = i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2
    return high if (more and ("v_proj" in name or "down_proj" in name)) or "lm_head" in name else low


@exercise(
    "phi_family.4.3",
    "A mixed recipe's rule",
    hints=(
        "The layers with more bits: i < n // 8, or i >= 7 * n // 8, or (i - n // 8) % 3 == 2.",
        'Look for "v_proj" anywhere in the name, as the recipe does.',
        "The head gets the high bits whatever i is.",
    ),
)
def _(answer: Any) -> None:
    names = ("self_attn.qkv_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.down_proj", "mlp.gate_up_proj")
    cases = [(name, i, n, 3, 6) for n in (4, 32) for i in range(0, n, max(1, n // 11)) for name in names]
    function(answer, _mixed_bits, [*cases, ("lm_head", 0, 32, 2, 6), ("lm_head", 5, 32, 2, 6)])


@exercise(
    "phi_family.4.4",
    "Weights of experts",
    hints=("Gate, up and down: three matrices of hidden x inner weights.", "Return a pair: all experts, and those used."),
)
def _(answer: Any) -> None:
    def reference(hidden: int, inner: int, experts: int, used: int) -> tuple[int, int]:
        return experts * 3 * hidden * inner, used * 3 * hidden * inner

    function(answer, reference, [(4096, 6400, 16, 2), (256, 384, 8, 1)])


@exercise(
    "phi_family.4.5",
    "Experts that a prompt reads",
    hints=(
        "One token leaves an expert unread with probability 1 - used / experts.",
        "All tokens leave it unread with that to the power of their number.",
    ),
)
def _(answer: Any) -> None:
    def reference(experts: int, used: int, tokens: int) -> float:
        return experts * (1 - (1 - used / experts) ** tokens)

    function(answer, reference, [(16, 2, 1), (16, 2, 10), (16, 2, 512), (8, 1, 4)])


@exercise(
    "phi_family.4.6",
    "Tokens of an image",
    hints=("The whole image counts as one more crop.", "2 x 2 crops: five times 144, one separator, three times 12."),
)
def _(answer: Any) -> None:
    function(answer, phi.image_tokens, [(1, 1), (2, 2), (1, 4), (4, 4)])

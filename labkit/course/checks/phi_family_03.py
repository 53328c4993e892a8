"""Lab phi_family/03, OpenVINO: bits of groups and ratios, NNCF's choice of layers, the cache, the NPU's rule, the command."""

from __future__ import annotations

import shlex
from typing import Any

import numpy as np

from labkit.course.compare import NotYet, function, same, unfinished
from labkit.course.exercises import exercise
from labkit.i18n import tr


@exercise(
    "phi_family.3.1",
    "Bits per weight in groups",
    hints=(
        "A scale of 16 bits is shared by the weights of a group: 16 / group bits each.",
        "A zero point takes as many bits as a code, once a group.",
    ),
)
def _(answer: Any) -> None:
    def reference(bits: int, group: int, symmetric: bool) -> float:
        return bits + 16 / group + (0 if symmetric else bits / group)

    function(answer, reference, [(4, 128, True), (4, 64, True), (4, 32, False), (8, 3072, False)])


@exercise(
    "phi_family.3.2",
    "The average of a ratio",
    hints=("A weighted mean: ratio of one, the rest of the other.",),
)
def _(answer: Any) -> None:
    function(
        answer,
        lambda ratio, four, eight: ratio * four + (1 - ratio) * eight,
        [(0.6, 4.125, 8.01), (0.8, 4.25, 8.01), (1.0, 4.5, 8.0)],
    )


def _four_bit_layers(weights: list[int], sensitivity: list[float], ratio: float) -> list[int]:
    chosen, share = [], 0.0
    for i in np.argsort(sensitivity, kind="stable"):
        share += weights[i] / sum(weights)
        if share >= ratio:
            break
        chosen.append(int(i))
    return sorted(chosen)


def _indices(got: Any, expected: list[int], *, what: str) -> None:
    unfinished(got)
    same([int(i) for i in got], expected, what)


@exercise(
    "phi_family.3.3",
    "Which layers get four bits",
    hints=(
        "np.argsort(sensitivity) gives the layers from the least to the most sensitive.",
        "Add up shares of the weights, not of the number of layers.",
        "Stop before the layer with which the share would reach the ratio; return the indices sorted.",
    ),
)
def _(answer: Any) -> None:
    rng = np.random.default_rng(8)
    cases = [([10, 10, 20, 40], [0.3, 0.1, 0.2, 0.4], 0.6), ([30, 10, 10], [0.1, 0.2, 0.3], 0.5), ([5, 5], [0.2, 0.1], 0.4)]
    cases.append((rng.integers(1, 50, 12).tolist(), rng.random(12).tolist(), 0.8))
    function(answer, _four_bit_layers, cases, compare=_indices)


@exercise(
    "phi_family.3.4",
    "A quantized cache",
    hints=(
        "Two vectors, key and value, for each layer and KV head.",
        "A vector takes head_size * bits / 8 bytes, plus 4 + 4 for scale and zero point below 16 bits.",
    ),
)
def _(answer: Any) -> None:
    def reference(layers: int, kv_heads: int, head_size: int, bits: int) -> float:
        return 2 * layers * kv_heads * (head_size * bits / 8 + (8 if bits < 16 else 0))

    function(answer, reference, [(32, 32, 96, 16), (32, 8, 128, 8), (40, 10, 128, 4), (32, 32, 96, 32)])


@exercise(
    "phi_family.3.5",
    "What an NPU would refuse",
    hints=(
        "A zero point anywhere means the weights are not symmetric.",
        "A matrix is what is neither a scale nor a zero point; it must be i4.",
        "Scales are f16 and are no fault.",
    ),
)
def _(answer: Any) -> None:
    def reference(constants: list[tuple[str, str]]) -> list[str]:
        return [n for n, kind in constants if n.endswith("/zero_point") or (kind != "i4" and not n.endswith("/scale"))]

    good = [("layers.0.o_proj", "i4"), ("layers.0.o_proj/scale", "f16")]
    asym = [("layers.1.o_proj", "u4"), ("layers.1.o_proj/zero_point", "u4"), ("layers.1.o_proj/scale", "f16")]
    wide = [("layers.2.down_proj", "i8"), ("layers.2.down_proj/scale", "f16"), ("layers.3.down_proj", "bf16")]
    function(answer, reference, [(good,), (good + asym,), (wide + good,), ([],)], compare=same)


@exercise(
    "phi_family.3.6",
    "The export command",
    hints=(
        "optimum-cli export openvino --model NAME ... FOLDER",
        "The task of a chat model with a cache is text-generation-with-past.",
        "The recipe: --weight-format int4 --group-size 128 --ratio 0.6 --sym",
    ),
)
def _(answer: Any) -> None:
    unfinished(answer)
    if not isinstance(answer, str):
        raise NotYet(tr("expected one string with the command, got {kind}", kind=type(answer).__name__))
    words = shlex.split(answer.replace("\\\n", " "))
    if words[:3] != ["optimum-cli", "export", "openvino"]:
        raise NotYet(tr("expected a command that begins with optimum-cli export openvino"))
    given = {"--model" if word == "-m" else word: words[i + 1] for i, word in enumerate(words[:-1]) if word.startswith("-")}
    wanted = {"--model": "microsoft/Phi-3.5-mini-instruct", "--task": "text-generation-with-past", "--weight-format": "int4",
              "--group-size": "128", "--ratio": "0.6"}  # fmt: skip
    for flag, value in wanted.items():
        if given.get(flag) != value:
            raise NotYet(tr("expected {flag} {value}, got {got}", flag=flag, value=value, got=given.get(flag, "nothing")))
    if "--sym" not in words:
        raise NotYet(tr("expected --sym: without it the weights are asymmetric"))
    taken = {i + 1 for i, word in enumerate(words) if word in (*wanted, "-m")}
    folders = [word for i, word in enumerate(words[3:], 3) if not word.startswith("-") and i not in taken]
    if len(folders) != 1:
        raise NotYet(tr("expected one folder to write into, got {count}", count=len(folders)))

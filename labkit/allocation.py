"""The bit-allocation game: a budget in bytes, bits for every part of a model, and the divergence that each choice costs.

A part is the embedding, or the attention or feed-forward matrices of one layer. Parts are rounded to `bits` with a scale
and a zero point for 32 weights (`labkit.blocks.affine`) and the model is run in numpy, so a move costs a fraction of a second.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from labkit import blocks, stats
from labkit.i18n import tr
from labkit.measure import scoring
from labkit.measure.divergence import compare
from labkit.methods import forward
from labkit.types import LabkitError

if TYPE_CHECKING:
    import pandas as pd

BITS = (2, 3, 4, 6, 8)
MEASURED = (2, 4, 8)  # the widths at which sensitivity is measured
GROUP = 32
KINDS = {"attention": "self_attn", "feed-forward": "mlp"}
GGUF_TYPES = {2: "q2_k", 3: "q3_k", 4: "q4_k", 6: "q6_k", 8: "q8_0"}  # the nearest block types of llama.cpp
GGUF_NAMES = {"attention": "attn_(q|k|v|output)", "feed-forward": "ffn_(gate|up|down)"}
Allocation = Mapping[str, int]  # part -> bits


class Part(NamedTuple):
    """What gets one width: its matrices by checkpoint name, and how many weights they hold."""

    name: str
    matrices: tuple[str, ...]
    weights: int


@dataclass(frozen=True)
class Game:
    """A model with its parts, and token windows on which divergence from the float model is taken."""

    model: forward.Llama
    parts: tuple[Part, ...]
    windows: tuple[tuple[int, ...], ...]  # for the score
    practice: tuple[tuple[int, ...], ...]  # for choosing: other text, or the choice would be fitted to the score
    _rounded: dict[tuple[str, int], tuple[np.ndarray, int]] = field(default_factory=dict, repr=False)

    @cached_property
    def truth(self) -> dict[tuple[int, ...], np.ndarray]:
        """Log-probabilities (T, V) of the float model by window."""
        found = {window: self.model.logits(window) for window in self.windows + self.practice}
        return {window: logits - scoring.log_sum_exp(logits)[:, None] for window, logits in found.items()}

    def rounded(self, matrix: str, bits: int) -> tuple[np.ndarray, int]:
        """A matrix after rounding, float16 (out, in) to save memory, and its bytes as stored."""
        key = (matrix, bits)
        if key not in self._rounded:
            made = blocks.affine(self.model.weights[matrix], bits, per=GROUP)
            restored = made.dequantize()
            self._rounded[key] = (restored.astype(np.float16), round(made.bits_per_weight * restored.size / 8))
        return self._rounded[key]

    def part_bytes(self, part: Part, bits: int) -> int:
        """Bytes of one part at `bits`, scales and zero points included."""
        return sum(self.rounded(name, bits)[1] for name in part.matrices)


def game(checkpoint: Any, *, windows: int = 3, practice: int = 1, window: int = 128) -> Game:
    """Set the game up on a Llama checkpoint: `windows` of held-out text for the score, `practice` of calibration text."""
    from labkit import house

    model = forward.open_llama(checkpoint)
    parts = [Part("embedding", ("model.embed_tokens.weight",), model.weights["model.embed_tokens.weight"].size)]
    for layer in range(model.config["num_hidden_layers"]):
        for kind, inside in KINDS.items():
            names = tuple(n for n, w in model.weights.items() if n.startswith(f"model.layers.{layer}.{inside}.") and w.ndim == 2)
            parts.append(Part(f"{layer} {kind}", names, sum(model.weights[name].size for name in names)))
    score, chosen = house.heldout_text(), house.calibration_text()
    return Game(model, tuple(parts), _windows(checkpoint, score, windows, window), _windows(checkpoint, chosen, practice, window))


def _windows(checkpoint: Any, text: str, count: int, length: int) -> tuple[tuple[int, ...], ...]:
    ids = checkpoint.encode(text)
    if len(ids) < count * length:
        raise LabkitError(f"{count} windows of {length} tokens were asked for; the text has {len(ids)} tokens: ask for fewer.")
    return tuple(tuple(ids[i * length : (i + 1) * length]) for i in range(count))


def checked(game: Game, bits: Allocation) -> Allocation:
    """The allocation, if every part has a width of BITS; else LabkitError says which has not."""
    for part in game.parts:
        if bits.get(part.name) not in BITS:
            asked, widths = bits.get(part.name), ", ".join(map(str, BITS))
            raise LabkitError(
                tr("Part {part!r} has {bits} bits; expected one of {widths}.", part=part.name, bits=asked, widths=widths)
            )
    if extra := sorted(set(bits) - {part.name for part in game.parts}):
        raise LabkitError(tr("There is no part {part!r}; see game.parts for their names.", part=extra[0]))
    return bits


def size(game: Game, bits: Allocation) -> int:
    """Bytes of all parts under an allocation."""
    return sum(game.part_bytes(part, checked(game, bits)[part.name]) for part in game.parts)


def divergence(game: Game, bits: Allocation, *, practice: bool = False) -> stats.Estimate:
    """Mean KL from the float model in nats a token, on the score's windows or those for practice; blocks of 32 tokens resampled.

    Parts that `bits` does not name stay in float.
    """
    named = [part for part in game.parts if part.name in bits]
    changed = {name: game.rounded(name, bits[part.name])[0].astype(np.float32) for part in named for name in part.matrices}
    model, sums, counts = game.model.with_(changed), [], []
    for window in game.practice if practice else game.windows:
        targets = np.array([*window[1:], window[0]])  # KL needs none; the comparison asks for them
        kl = compare(model.logits(window), game.truth[window], targets, normalised=True)["kl"]
        for start in range(0, len(kl), 32):
            sums.append(kl[start : start + 32].sum())
            counts.append(len(kl[start : start + 32]))
    return stats.block_mean(sums, counts, resamples=2000)


def sensitivity(game: Game) -> dict[str, dict[int, float]]:
    """Part -> bits -> KL when this part alone is rounded, all others in float; on the practice text.

    Measured at MEASURED widths. A width between two of them is put on the line through their logarithms: a bit less doubles
    the error of a weight, and KL grows with its square.
    """
    found = {}
    for part in game.parts:
        kl = [np.log(divergence(game, {part.name: bits}, practice=True).value) for bits in MEASURED]
        found[part.name] = dict(zip(BITS, np.exp(np.interp(BITS, MEASURED, kl)).tolist(), strict=True))
    return found


def weight_error(game: Game) -> dict[str, dict[int, float]]:
    """Part -> bits -> sum of squared errors of its weights: what is known without running the model."""
    return {
        part.name: {bits: sum(_squared(game, name, bits) for name in part.matrices) for bits in BITS} for part in game.parts
    }  # fmt: skip


def _squared(game: Game, matrix: str, bits: int) -> float:
    return float(np.square(game.model.weights[matrix] - game.rounded(matrix, bits)[0], dtype=np.float64).sum())


# --- players -----------------------------------------------------------------------------------------------------


def uniform(game: Game, budget: int) -> dict[str, int]:
    """The same width for every part: the largest that fits."""
    fitting = [bits for bits in BITS if size(game, _all(game, bits)) <= budget]
    if not fitting:
        raise _too_small(game, budget)
    return _all(game, fitting[-1])


def greedy(game: Game, budget: int, costs: Mapping[str, Mapping[int, float]]) -> dict[str, int]:
    """Begin with the fewest bits; take the step that saves most cost a byte, until no step fits."""
    bits = _all(game, BITS[0])
    spent = size(game, bits)
    if spent > budget:
        raise _too_small(game, budget)
    while steps := [step for part in game.parts if (step := _step(game, part, bits, costs)) and spent + step[1] <= budget]:
        _, more, name, wider = max(steps)
        bits[name] = wider
        spent += more
    return bits


def _step(
    game: Game, part: Part, bits: Allocation, costs: Mapping[str, Mapping[int, float]]
) -> tuple[float, int, str, int] | None:
    """Cost saved a byte, bytes, part and width of the next wider step; None at the widest."""
    now = bits[part.name]
    if now == BITS[-1]:
        return None
    wider = BITS[BITS.index(now) + 1]
    more = game.part_bytes(part, wider) - game.part_bytes(part, now)
    return (costs[part.name][now] - costs[part.name][wider]) / more, more, part.name, wider


def best_sum(game: Game, budget: int, costs: Mapping[str, Mapping[int, float]]) -> dict[str, int]:
    """The allocation with the least sum of costs that fits, by dynamic programming over bytes: exact if costs add up."""
    states: list[tuple[int, float, dict[str, int]]] = [(0, 0.0, {})]  # no state has more bytes and more cost than another
    least = {part.name: game.part_bytes(part, BITS[0]) for part in game.parts}
    for done, part in enumerate(game.parts, 1):
        rest = sum(least[later.name] for later in game.parts[done:])
        grown = [
            (used + game.part_bytes(part, bits), cost + costs[part.name][bits], {**chosen, part.name: bits})
            for used, cost, chosen in states for bits in BITS
        ]  # fmt: skip
        states = _undominated([state for state in grown if state[0] + rest <= budget])
    if not states:
        raise _too_small(game, budget)
    return states[-1][2]


def _undominated(states: Sequence[tuple[int, float, dict[str, int]]]) -> list[tuple[int, float, dict[str, int]]]:
    kept: list[tuple[int, float, dict[str, int]]] = []
    for state in sorted(states, key=lambda one: one[:2]):
        if not kept or state[1] < kept[-1][1]:
            kept.append(state)
    return kept


def _all(game: Game, bits: int) -> dict[str, int]:
    return {part.name: bits for part in game.parts}


def _too_small(game: Game, budget: int) -> LabkitError:
    least = size(game, _all(game, BITS[0]))
    said = tr("A budget of {budget} bytes was given; the fewest bits take {least}.", budget=f"{budget:,}", least=f"{least:,}")
    return LabkitError(said)


def scores(game: Game, budget: int, players: Mapping[str, Allocation]) -> pd.DataFrame:
    """A row a player: bytes, bits per weight, whether they fit, KL with its interval; best first, those that fit before the rest."""
    import pandas as pd

    weights, rows = sum(part.weights for part in game.parts), []
    for name, bits in players.items():
        used, kl = size(game, bits), divergence(game, bits)
        rows.append({"player": name, "bytes": used, "bits per weight": 8 * used / weights, "fits": used <= budget,
                     "KL": kl.value, "KL_low": kl.low, "KL_high": kl.high})  # fmt: skip
    return pd.DataFrame(rows).sort_values(["fits", "KL"], ascending=[False, True], ignore_index=True)


def tensor_types(bits: Allocation) -> dict[str, str]:
    """The allocation as llama.cpp's per-tensor types, for Recipe("llamacpp", ..., tensor_types=...)."""
    found = {}
    for name, width in bits.items():
        layer, _, kind = name.partition(" ")
        pattern = rf"blk\.{layer}\.{GGUF_NAMES[kind]}\.weight" if kind else r"token_embd\.weight"
        found[pattern] = GGUF_TYPES[width]
    return found

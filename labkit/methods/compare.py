"""All methods in one table at equal bits: the whole model, held-out text, perplexity and KL with their intervals.

Three contests, each against plain rounding at the same bits: weights (inputs exact), weights and inputs in integers, and the
KV cache (weights exact). Embedding, norms and output head stay as they are.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from labkit import blocks, stats
from labkit.measure import scoring
from labkit.measure.divergence import compare
from labkit.methods import awq, forward, gptq, hadamard, hqq, imatrix, kvcache, smoothquant

if TYPE_CHECKING:
    import pandas as pd

Read = Callable[[np.ndarray], np.ndarray]  # an input x (T, in) -> what the rounded matrices read in its place
# A site, its matrices (out, in) and their X (n, in) -> the matrices rounded, and how their input is read.
Method = Callable[[forward.Site, list[np.ndarray], np.ndarray], tuple[list[blocks.Quantized], Read]]


@dataclass(frozen=True)
class Setting:
    """Bits of the three contests. The defaults are few enough for the methods to part; at more bits all come near."""

    bits: int = 3  # of weights whose inputs stay exact
    group: int = 64  # such weights that share a scale and a bias
    integer_weight_bits: int = 8  # of weights whose inputs are integers too, one scale a row
    input_bits: int = 4  # of these inputs, one scale a token
    cache_bits: int = 2
    cache_group: int = 32  # cached values that share a scale and a bias


@dataclass(frozen=True)
class Trial:
    """One row before it is measured: the changed model, and the bits it takes."""

    contest: str
    method: str
    model: forward.Llama
    bits_per_weight: float = 32.0  # of the matrices in the layers, as stored
    input_bits: float = 32.0
    cache_bits: float = 32.0
    seconds: float = field(default=0.0, compare=False)  # spent quantizing


def table(checkpoint: Any = "edgehome", *, text: str | None = None, calibration: str | None = None, window: int = 512,
          windows: int = 12, calibration_windows: int = 4, setting: Setting | None = None) -> pd.DataFrame:  # fmt: skip
    """A frame with one row a method: contest, method, bits_per_weight, input_bits, cache_bits, perplexity, kl, kl_saved,
    seconds.

    kl: mean KL from the float model in nats a token; kl_saved: KL of the contest's plain rounding less this one's, on the same
    windows, so above 0 is better. These and perplexity have columns …_low and …_high, 95 % intervals bootstrapped over
    windows. Texts default to the house's held-out and calibration text, cut as `labkit.measure` does: in windows of `window`
    tokens, the second half of each scored. Errors: not a Llama, a text shorter than one window.
    """
    import pandas as pd

    from labkit.checkpoint import checkpoint as opened
    from labkit.house import calibration_text, heldout_text

    files = opened(checkpoint)
    model = forward.open_llama(files)
    parts, seen = (
        list(scoring.chunks(files.encode(some), window, files.bos_id))[:limit]
        for some, limit in ((text or heldout_text(), windows), (calibration or calibration_text(), calibration_windows))
    )
    reference = [scoring.run(model, part) for part in parts]
    rows, plain = [], {}
    for trial in trials(model, forward.capture(model, [part.ids for part in seen]), setting or Setting()):
        pairs = zip(parts, reference, strict=True)
        found = [compare(scoring.run(trial.model, part), exact, part.targets) for part, exact in pairs]
        kl = np.array([one["kl"].sum() for one in found])  # (windows,)
        rows.append(_row(trial, found, kl, plain.setdefault(trial.contest, kl)))
    return pd.DataFrame(rows)


def _row(trial: Trial, found: list[dict[str, np.ndarray]], kl: np.ndarray, plain: np.ndarray) -> dict[str, Any]:
    counts = [one["kl"].size for one in found]
    row = {name: getattr(trial, name) for name in ("contest", "method", "bits_per_weight", "input_bits", "cache_bits")}
    estimates = {
        "perplexity": np.exp(stats.block_mean([one["nll"].sum() for one in found], counts)),
        "kl": stats.block_mean(kl, counts),
        "kl_saved": stats.block_mean(plain - kl, counts),
    }
    for name, (value, low, high) in estimates.items():
        row |= {name: float(value), f"{name}_low": float(low), f"{name}_high": float(high)}
    return row | {"seconds": trial.seconds}


def trials(model: forward.Llama, inputs: Mapping[forward.Site, np.ndarray], setting: Setting) -> list[Trial]:
    """All rows, quantized from the captured inputs; the first of each contest is plain rounding."""
    s, found = setting, []
    for name, method in _exact_inputs(s).items():
        found.append(_rounded("weights", name, method, model, inputs))
    for name, method in _integer_inputs(s).items():
        found.append(_rounded("weights and inputs", name, method, model, inputs, input_bits=s.input_bits))
    for name, keys_by in (("by token", "token"), ("kivi", "channel")):
        changed = model.with_(cache=kvcache.cache(s.cache_bits, s.cache_bits, s.cache_group, keys_by))
        bits = kvcache.bits_per_value(s.cache_bits, s.cache_group)
        found.append(Trial("kv cache", name, changed, cache_bits=bits))
    return found


def _rounded(contest: str, name: str, method: Method, model: forward.Llama, inputs: Mapping, **bits: float) -> Trial:
    start, matrices, reads, size = time.perf_counter(), {}, {}, 0
    for site, x in inputs.items():
        kept, reads[site] = method(site, [model.weights[matrix] for matrix in site], x)
        matrices |= {matrix: one.dequantize() for matrix, one in zip(site, kept, strict=True)}
        size += sum(one.stored_bytes for one in kept)
    changed = model.with_(matrices, inputs=lambda site, x: reads[site](x))
    per_weight = 8 * size / sum(matrix.size for matrix in matrices.values())
    return Trial(contest, name, changed, per_weight, seconds=time.perf_counter() - start, **bits)


def _exact_inputs(s: Setting) -> dict[str, Method]:
    def each(quantize: Callable[[np.ndarray, np.ndarray], blocks.Quantized]) -> Method:
        return lambda site, matrices, x: ([quantize(w, x) for w in matrices], lambda y: y)

    def stretched(site: forward.Site, matrices: list[np.ndarray], x: np.ndarray) -> tuple[list[blocks.Quantized], Read]:
        factors = awq.factors(np.vstack(matrices), x, s.bits, s.group) if _folds(site) else np.float32(1)
        return [blocks.affine(w * factors, s.bits, per=s.group, zero="bias") for w in matrices], lambda y: y / factors

    return {
        "rounding": each(lambda w, x: blocks.affine(w, s.bits, per=s.group, zero="bias")),
        "hqq": each(lambda w, x: hqq.quantize(w, s.bits, s.group)),
        "imatrix": each(lambda w, x: imatrix.quantize(w, x, s.bits, s.group)),
        "awq": stretched,
        "gptq": each(lambda w, x: gptq.quantize(w, x, s.bits, s.group)),
        "hadamard": lambda site, matrices, x: ([hadamard.quantize(w, s.bits, s.group) for w in matrices], hadamard.rotate),
    }


def _integer_inputs(s: Setting) -> dict[str, Method]:
    def whole(matrices: list[np.ndarray], read: Read) -> tuple[list[blocks.Quantized], Read]:
        kept = [blocks.symmetric(w, s.integer_weight_bits, per="channel") for w in matrices]
        return kept, lambda y: smoothquant.quantize_inputs(read(y), s.input_bits).dequantize()

    def smooth(site: forward.Site, matrices: list[np.ndarray], x: np.ndarray) -> tuple[list[blocks.Quantized], Read]:
        factors = smoothquant.factors(np.vstack(matrices), x) if _folds(site) else np.float32(1)
        return whole([w * factors for w in matrices], lambda y: y / factors)

    return {
        "rounding": lambda site, matrices, x: whole(matrices, lambda y: y),
        "smoothquant": smooth,
        "hadamard": lambda site, matrices, x: whole([hadamard.rotate(w) for w in matrices], hadamard.rotate),
    }


def _folds(site: forward.Site) -> bool:
    """Whether a factor a column is free: it goes into the norm before, or into the rows of up_proj.

    That of o_proj would have to go into v_proj, whose rows serve several query heads, so o_proj is left alone.
    """
    return not site[0].endswith("o_proj.weight")

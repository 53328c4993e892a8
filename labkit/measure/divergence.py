"""Divergence: how far a quantized model's next-token probabilities are from those of a reference, token by token.

KL = Σ_v p_ref(v) (ln p_ref(v) - ln p(v)), in nats, at every scored position of the same windows as perplexity.
It sees a change that perplexity averages away: one token gaining what another lost.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from labkit import stats
from labkit.measure import scoring
from labkit.measure.logits_file import Base, read_base
from labkit.measure.perplexity import text_windows
from labkit.measure.record import fingerprint, opened, record, trained
from labkit.types import Artifact, LabkitError, Measurement

CUT = -16.0  # a logits file keeps no log-probability this far below the best, so entries under it are left out
QUANTILES = {"median": 0.5, "90%": 0.9, "95%": 0.95, "99%": 0.99, "99.9%": 0.999, "max": 1.0}


def divergence(
    artifact: Artifact,
    reference: Any,
    text: str | Path | None = None,
    *,
    window: int = 512,
    stride: int | None = None,
    limit: int | None = None,
    exact: bool = True,
    threads: int | None = None,
    runner: Any = None,
) -> Measurement:
    """KL divergence of `artifact` from `reference`: an Artifact, an open Runner, or the Path of a logits file.

    A logits file brings its own tokens and windows. Values are mean KL in nats, one a window; `details` hold
    quantiles over all tokens, how often both agree on the likeliest token, the changes in the probability of the
    text's own token (Δp) and both models' nats per token, paired. Errors: as perplexity; other vocabulary; bad file.
    """
    trained(artifact, "divergence")
    with ExitStack() as stack:
        if isinstance(reference, Path):
            if text is not None or stride is not None:
                raise LabkitError("A logits file brings its own text and windows; leave text and stride out.")
            base = read_base(reference)
            windows, name = base.windows(artifact.checkpoint.bos_id)[:limit], reference.name
            key = fingerprint(base.tokens.astype(np.int64).tobytes())
        else:
            key, windows = text_windows(artifact, text, window=window, stride=stride, limit=limit)
            base, name = _live(stack, reference, exact, threads)
        model = stack.enter_context(opened(artifact, runner, exact=exact, threads=threads))
        rows = [_compare(scoring.run(model, part), base, i, part) for i, part in enumerate(windows)]
        settings = model.settings
    workload = {
        "window": base.window if isinstance(base, Base) else window, "stride": stride, "limit": limit, "exact": exact,
        "tokens_hash": key, "reference": name,
    }  # fmt: skip
    values = [row["kl"].mean() for row in rows]
    return record(artifact, "divergence", "nats", values, workload=workload, details=_details(rows), settings=settings)


def _live(stack: ExitStack, reference: Any, exact: bool, threads: int | None) -> tuple[Any, str]:
    if isinstance(reference, Artifact):
        return stack.enter_context(opened(reference, exact=exact, threads=threads)), reference.name
    if not hasattr(reference, "logits"):
        raise LabkitError(
            f"reference is a {type(reference).__name__}; expected an Artifact, a Runner or the Path of a logits file."
        )
    return reference, getattr(reference, "name", "runner")


def _compare(logits: np.ndarray, base: Any, index: int, part: scoring.Window) -> dict[str, np.ndarray]:
    if isinstance(base, Base):
        reference, cut = base.log_probs(index), CUT
    else:
        reference, cut = scoring.run(base, part), -np.inf
    if reference.shape != logits.shape:
        raise LabkitError(
            f"The reference has rows of {reference.shape[1]} logits and this model of {logits.shape[1]}; "
            "both must come from one checkpoint."
        )
    return compare(logits, reference, part.targets, normalised=isinstance(base, Base), cut=cut)


def compare(
    logits: np.ndarray, reference: np.ndarray, targets: np.ndarray, *, normalised: bool = False, cut: float = -np.inf
) -> dict[str, np.ndarray]:
    """Per-token comparison of logits (n, V) with a reference's logits, or log-probabilities where `normalised`.

    Returns float64 arrays (n,): kl, nll, nll_reference, delta_p (model minus reference, of the target) and same_top.
    Entries whose reference log-probability is `cut` or less are left out of the sum.
    """
    n = len(targets)
    out = {name: np.empty(n) for name in ("kl", "nll", "nll_reference", "delta_p", "same_top")}
    for part in scoring.slabs(n, 3 * logits.shape[1]):
        x, r, t = logits[part], reference[part], targets[part, None]
        log_q = x - scoring.log_sum_exp(x)[:, None]  # (m, V) float64
        log_p = r.astype(np.float64) if normalised else r - scoring.log_sum_exp(r)[:, None]
        terms = np.exp(log_p) * (log_p - log_q)
        out["kl"][part] = np.where(log_p > cut, terms, 0.0).sum(axis=1)
        out["nll"][part] = -np.take_along_axis(log_q, t, axis=1)[:, 0]
        out["nll_reference"][part] = -np.take_along_axis(log_p, t, axis=1)[:, 0]
        out["same_top"][part] = x.argmax(axis=1) == r.argmax(axis=1)
    out["delta_p"] = np.exp(-out["nll"]) - np.exp(-out["nll_reference"])
    scoring.finite(out["kl"])
    return out


def _details(rows: list[dict[str, np.ndarray]]) -> dict[str, Any]:
    """What survives of the tokens: quantiles and errors over all, sums by window for resampling."""
    every = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
    ordered = np.sort(every["kl"])
    delta = every["delta_p"]
    rms = float(np.sqrt(np.mean(delta**2)))
    ratio = every["nll"] - every["nll_reference"]
    return {
        "counts": [row["kl"].size for row in rows],
        "same_top": [int(row["same_top"].sum()) for row in rows],
        "nll": [float(row["nll"].mean()) for row in rows],
        "nll_reference": [float(row["nll_reference"].mean()) for row in rows],
        "quantiles": {name: _quantile(ordered, q) for name, q in QUANTILES.items()},
        "kl_se": stats.standard_error(every["kl"]),
        "delta_p_mean": float(delta.mean()),
        "delta_p_rms": rms,
        "delta_p_rms_se": 0.5 / rms * stats.standard_error(delta**2) if rms else 0.0,
        "ln_ppl_ratio": float(ratio.mean()),
        "ln_ppl_ratio_se": stats.paired_error(every["nll"], every["nll_reference"]),
        "ln_ppl_correlation": _correlation(every["nll"], every["nll_reference"]),
    }


def _quantile(ordered: np.ndarray, fraction: float) -> float:
    """Linear between neighbours, at a place computed in float32 as the reference tool does: in the tail that shows in its digits."""
    place = np.float32(fraction) * np.float32(len(ordered) - 1)
    first = int(place)
    part = float(place - np.float32(first))
    return float((1 - part) * ordered[first] + part * ordered[min(first + 1, len(ordered) - 1)])


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    spread = a.std() * b.std()
    return float(((a - a.mean()) * (b - b.mean())).mean() / spread) if spread else 1.0


def summary(measurement: Measurement) -> stats.Estimate:
    """Mean KL in nats with its 95 % interval, bootstrapped over whole windows."""
    counts = measurement.details["counts"]
    return stats.block_mean(np.multiply(measurement.values, counts), counts)


def same_top(measurement: Measurement) -> stats.Estimate:
    """Share of tokens on whose likeliest successor both models agree, with its 95 % interval over windows."""
    return stats.block_mean(measurement.details["same_top"], measurement.details["counts"])


def perplexity_ratio(measurement: Measurement) -> stats.Estimate:
    """PPL / PPL of the reference over the same tokens, with its 95 % interval over windows."""
    details = measurement.details
    sums = (np.asarray(details["nll"]) - np.asarray(details["nll_reference"])) * details["counts"]
    return stats.Estimate(*np.exp(stats.block_mean(sums, details["counts"])).tolist())

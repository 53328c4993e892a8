"""Perplexity: how surprised the model is by a text, as the number of equally likely tokens that would surprise as much.

PPL = exp(mean of -ln p(token | what came before)). The number depends on the windows the text is cut into, on the
tokenizer and on the text, so compare only equal windows and equal tokens; across tokenizers compare bits per byte.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from labkit import stats
from labkit.measure import scoring
from labkit.measure.record import evaluation_text, fingerprint, opened, record, trained
from labkit.types import Artifact, Measurement


def perplexity(
    artifact: Artifact,
    text: str | Path | None = None,
    *,
    window: int = 512,
    stride: int | None = None,
    limit: int | None = None,
    exact: bool = True,
    threads: int | None = None,
    runner: Any = None,
) -> Measurement:
    """Perplexity of `text` (a string, a file's Path, or by default the house model's held-out text).

    stride=None: the reference tool's definition, chunks of `window` tokens without overlap, the second half of each
    scored. stride=s: windows s tokens apart, every token scored once. `limit`: only the first so many windows.
    Values are nats per token, one mean a window; `details` hold how many tokens and bytes each stands for.
    Errors: a text shorter than one window, a stand-in checkpoint, logits that are not finite.
    """
    trained(artifact, "perplexity")
    tokens, windows = text_windows(artifact, text, window=window, stride=stride, limit=limit)
    lengths = scoring.token_bytes(artifact.checkpoint)
    means, counts, bytes_, squares = [], [], [], 0.0
    with opened(artifact, runner, exact=exact, threads=threads) as model:
        for part in windows:
            nll = scoring.nll(scoring.run(model, part), part.targets)
            means.append(nll.mean())
            counts.append(nll.size)
            bytes_.append(int(lengths[part.targets].sum()))
            squares += float(nll @ nll)
        settings = model.settings
    workload = {"window": window, "stride": stride, "limit": limit, "exact": exact, "tokens_hash": tokens}
    details = {"counts": counts, "bytes": bytes_, "sum_of_squares": squares}
    return record(artifact, "perplexity", "nats/token", means, workload=workload, details=details, settings=settings)


def text_windows(
    artifact: Artifact, text: str | Path | None, *, window: int, stride: int | None, limit: int | None
) -> tuple[str, list[scoring.Window]]:
    """The token ids' fingerprint and the windows cut from them: equal for every engine that has this checkpoint."""
    bos = artifact.checkpoint.bos_id
    ids = ([] if bos is None else [bos]) + artifact.checkpoint.encode(evaluation_text(artifact, text))
    cut = scoring.chunks(ids, window, bos) if stride is None else scoring.strides(ids, window, stride, bos)
    return fingerprint(np.asarray(ids, dtype=np.int64).tobytes()), list(cut)[:limit]


def summary(measurement: Measurement) -> stats.Estimate:
    """Perplexity with its 95 % interval, bootstrapped over whole windows."""
    counts = measurement.details["counts"]
    sums = np.multiply(measurement.values, counts)
    return stats.Estimate(*np.exp(stats.block_mean(sums, counts)).tolist())


def plus_minus(measurement: Measurement) -> float:
    """The ± that the reference tool prints, PPL · sqrt((E[nll²] - E[nll]²) / (n - 1)).

    It takes tokens for independent, so it is narrower than `summary`'s interval; use it to compare with that tool.
    """
    counts = np.asarray(measurement.details["counts"])
    n = counts.sum()
    mean = float(np.multiply(measurement.values, counts).sum() / n)
    variance = max(0.0, measurement.details["sum_of_squares"] / n - mean * mean)
    return float(np.exp(mean) * np.sqrt(variance / (n - 1)))


def bits_per_byte(measurement: Measurement) -> stats.Estimate:
    """-Σ log2 p / bytes of the scored text: comparable across tokenizers; with its 95 % interval over windows."""
    sums = np.multiply(measurement.values, measurement.details["counts"]) / np.log(2)
    return stats.block_mean(sums, measurement.details["bytes"])

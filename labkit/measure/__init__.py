"""Measures: one file a metric, each `f(artifact, …, runner=None) -> Measurement`. None of them names an engine.

`METRICS` says what each is called, its unit, which direction is better, and how raw values become a shown number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

# The functions are bound here before anybody can bind the modules of the same name.
from labkit.measure.accuracy import accuracy, flips
from labkit.measure.accuracy import by as accuracy_by
from labkit.measure.accuracy import summary as _accuracy
from labkit.measure.divergence import divergence, perplexity_ratio, same_top
from labkit.measure.divergence import summary as _divergence
from labkit.measure.headline import PROFILES, headline, quality, remembered
from labkit.measure.logits_file import read_base, write_base
from labkit.measure.memory import memory
from labkit.measure.memory import summary as _memory
from labkit.measure.perplexity import bits_per_byte, perplexity, plus_minus
from labkit.measure.perplexity import summary as _perplexity
from labkit.measure.roofline import bandwidth_curve, multiply_rate, read_bandwidth, roofline
from labkit.measure.roofline import summary as _roofline
from labkit.measure.scoring import Remembered
from labkit.measure.size import size
from labkit.measure.size import summary as _size
from labkit.measure.speed import compare, prefill, speed, warnings
from labkit.measure.speed import summary as _speed
from labkit.stats import Estimate
from labkit.types import LabkitError, Measurement

__all__ = [
    "METRICS", "PROFILES", "Metric", "Remembered", "accuracy", "accuracy_by", "bandwidth_curve", "bits_per_byte",
    "compare", "divergence", "flips", "headline", "memory", "multiply_rate", "perplexity", "perplexity_ratio",
    "plus_minus", "prefill", "quality", "read_bandwidth", "read_base", "remembered", "roofline", "same_top", "size", "speed", "summary",
    "warnings", "write_base",
]  # fmt: skip


class Metric(NamedTuple):
    """What a metric is, apart from how it is taken. `unit` is that of the shown number, see `summary`."""

    title: str
    unit: str
    better: str  # "lower" or "higher"
    measure: Callable[..., Measurement]
    summary: Callable[[Measurement], Estimate]


METRICS: Mapping[str, Metric] = {
    "size": Metric("Size of the weights", "bytes", "lower", size, _size),
    "memory": Metric("Peak memory", "bytes", "lower", memory, _memory),
    "speed": Metric("Decode speed", "tokens/s", "higher", speed, _speed),
    "perplexity": Metric("Perplexity", "", "lower", perplexity, _perplexity),
    "divergence": Metric("KL divergence", "nats", "lower", divergence, _divergence),
    "accuracy": Metric("Task accuracy", "share", "higher", accuracy, _accuracy),
    "roofline": Metric("Decode ceiling", "tokens/s", "higher", roofline, _roofline),
}


def summary(measurement: Measurement | Mapping[str, Any]) -> Estimate:
    """The number to show, with its 95 % interval, of a Measurement or a row of the ledger's frame."""
    if not isinstance(measurement, Measurement):
        row = measurement
        measurement = Measurement(
            **{k: row[k] for k in ("metric", "unit", "engine_version", "host", "when", "workload", "details")},
            values=tuple(row["values"]),
            artifact={
                k: row[k] for k in ("checkpoint", "engine", "precision", "options", "weight_bytes", "bits_per_weight")
            },
        )
    if measurement.metric not in METRICS:
        raise LabkitError(f"No metric {measurement.metric!r}; expected one of {', '.join(METRICS)}.")
    return METRICS[measurement.metric].summary(measurement)

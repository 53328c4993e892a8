"""Scale: conversion, quantization, scoring, memory and speed of stand-ins up to 3.8 B weights, and how each grows with size."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import labkit
from labkit import measure, stats
from labkit.build import read
from labkit.measure import scoring
from labkit.types import Artifact

from .convert import MIB, cost, ours, scratch
from .harness import Goal, Row, value_row

MODELS = {
    "small": ("standin:smollm2-1.7b:1", "standin:smollm2-1.7b:2", "standin:smollm2-1.7b:4"),
    "full": ("standin:smollm2-135m", "standin:qwen2.5-0.5b", "standin:smollm2-1.7b", "standin:phi-4-mini"),
}
FLOAT, SMALL = "f16", "q4_k_m"
WINDOW = 256  # tokens scored at once
DRAWN = Path("reports/scale.html")
LINEAR = Goal("scale", "time grows no faster than size: exponent <= 1.05", None, 1.05)
CONSTANT = Goal("scale", "a conversion's peak <= 250 MiB at every size", None, 250.0)
OVERHEAD = Goal("P14", "scoring <= 10 % of the forward time", None, 0.10)
SHOWN = Goal("scale", "shown only", None, None)
# quantity -> unit; all of them are costs, so that more is worse and a growth can be judged
COSTS = {
    "convert to f16": "s", "quantize to q4_k_m": "s", "score 256 tokens, q4_k_m": "s", "load q4_k_m": "s", "prefill 64 tokens, q4_k_m": "s",
    "decode a token, q4_k_m": "s", "decode a token, f16": "s", "memory q4_k_m": "bytes",
}  # fmt: skip


def scale(size: str, rounds: int) -> Iterator[Row]:
    """Every cost at four sizes, its exponent, and the chapters' figures of a 3.8 B model beside ours."""
    taken: dict[str, dict[str, float]] = {}
    for model in MODELS[size]:
        found = _one(model, min(rounds, 3))
        taken[model] = found["costs"]
        yield from found["rows"]
    sizes = [labkit.checkpoint(model).weights for model in taken]
    for name, unit in COSTS.items():
        values = [costs[name] for costs in taken.values()]
        told = f"{name}: {', '.join(f'{value:.3g}' for value in values)} {unit} at {', '.join(f'{n / 1e9:.2g} B' for n in sizes)}"
        yield value_row(LINEAR, told, [exponent(sizes, values)], unit="exponent")
        if name == f"quantize to {SMALL}" and len(whole := [i for i, model in enumerate(taken) if whole_blocks(model)]) < len(sizes):
            alike = exponent([sizes[i] for i in whole], [values[i] for i in whole])
            yield value_row(LINEAR, f"{name}: those whose rows divide by 256", [alike], unit="exponent")
    draw(sizes, taken, DRAWN)


def whole_blocks(model: str) -> bool:
    """Whether rows divide by 256: a shape whose rows do not gets other blocks than K-quants, which are quicker to find."""
    return labkit.checkpoint(model).config["hidden_size"] % 256 == 0


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """p of the least-squares fit value = c size^p; the fixed start-up cost makes it smaller, never larger."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def _one(model: str, rounds: int) -> dict[str, Any]:
    """Costs of one stand-in, and its rows. The files are gone afterwards."""
    weights = labkit.checkpoint(model).weights
    with scratch() as folder:
        builds = {p: cost(ours(model, p, folder / p), memory=True) for p in (FLOAT, SMALL)}
        small, large = read(folder / SMALL), read(folder / FLOAT)
        forward, scored = _scoring(small)
        fast, slow = measure.compare([small, large], prompt_tokens=64, new_tokens=16, rounds=rounds, retries=2)
        memory = measure.memory(small)
    prefill, decode, decode_float = measure.prefill(fast).value, stats.median(fast.values), stats.median(slow.values)
    costs = dict(zip(COSTS, (
        builds[FLOAT].seconds, builds[SMALL].seconds, forward + scored, fast.details["load_seconds"], 64 / prefill,
        1 / decode, 1 / decode_float, measure.summary(memory).value,
    ), strict=True))  # fmt: skip
    gain = stats.ratio(fast.values, slow.values)
    rows = [value_row(CONSTANT, f"{model} ({weights / 1e9:.2f} B) -> {p}, peak", [one.peak / MIB], unit="MiB") for p, one in builds.items()]
    rows += [
        value_row(OVERHEAD, f"{model}, {WINDOW} tokens, {small.checkpoint.vocab_size} ids in the vocabulary", [scored / forward], unit="of forward"),
        value_row(SHOWN, f"{model} {SMALL}: file {small.weight_bytes / 1e9:.2f} GB, memory {costs['memory q4_k_m'] / 1e9:.2f} GB, "
                  f"{decode:.1f} tokens/s; {SMALL} / {FLOAT} ({large.weight_bytes / 1e9:.2f} GB)", [gain.value], unit="x decode"),
    ]  # fmt: skip
    rows[-1].low, rows[-1].high, rows[-1].rounds = gain.low, gain.high, rounds
    rows[-1].quiet, rows[-1].reason = fast.details["quiet"], fast.details["reason"]
    return {"costs": costs, "rows": rows}


def _scoring(artifact: Artifact) -> tuple[float, float]:
    """Seconds of the forward pass over a window, and of its negative log-likelihoods; the better of two."""
    ids = np.random.default_rng(0).integers(0, artifact.checkpoint.vocab_size, WINDOW)
    forward, scored = [], []
    with labkit.load(artifact, exact=True) as runner:
        for _ in range(2):
            marks = [time.perf_counter()]
            logits = runner.logits(ids)
            marks.append(time.perf_counter())
            scoring.nll(logits[:-1], ids[1:])
            marks.append(time.perf_counter())
            forward.append(marks[1] - marks[0])
            scored.append(marks[2] - marks[1])
    return min(forward), min(scored)


def draw(sizes: Sequence[float], taken: Mapping[str, Mapping[str, float]], file: Path) -> None:
    """Costs against size, both logarithmic, each with its fitted line, as a page of its own."""
    import plotly.graph_objects as go

    figure = go.Figure()
    ends = np.array([min(sizes), max(sizes)])
    for (name, unit), colour in zip(COSTS.items(), ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#999999", "#000000"), strict=True):
        values = np.array([costs[name] for costs in taken.values()])
        values = values / 1e9 if unit == "bytes" else values
        power, factor = np.polyfit(np.log(sizes), np.log(values), 1)
        shown = f"{name}, {'GB' if unit == 'bytes' else unit}: size^{power:.2f}"
        figure.add_scatter(x=sizes, y=values, mode="markers", marker_color=colour, name=shown, legendgroup=name)
        figure.add_scatter(x=ends, y=np.exp(factor) * ends**power, mode="lines", line_color=colour, legendgroup=name, showlegend=False)
    figure.update_layout(template="plotly_white", width=1000, height=620, title="What grows with the number of weights",
                         xaxis={"type": "log", "title": "weights"}, yaxis={"type": "log", "title": "seconds, or GB"})  # fmt: skip
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.write_html(file, config={"displayModeBar": False})

"""One weight matrix at one precision, as figure, table and sentence: what the matrix panel and its static twin show."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from labkit import blocks
from labkit.i18n import noop, tr, trn
from labkit.types import LabkitError

if TYPE_CHECKING:
    import pandas as pd

PRECISIONS = ("8", "6", "5", "4", "3", "2", noop("ternary"), "1")  # bits of a code; ternary is log2(3), stored in 1.6
GRAINS = (noop("tensor"), noop("channel"), noop("group"))
GROUPS = (16, 32, 64, 128, 256)
SCHEMES: dict[str, Callable[..., blocks.Quantized]] = {
    noop("symmetric"): blocks.symmetric,
    noop("affine"): blocks.affine,
}
DRAWN_LEVELS = 64  # a finer grid than this is closer than the bars of the histogram
BINS = 120


@dataclass(frozen=True)
class Matrix:
    """A weight matrix (rows, columns) and its histogram as plotly JSON, made once so that every redraw is quick."""

    weights: np.ndarray
    name: str
    histogram: dict[str, Any]
    highest: float  # the tallest bar


def matrix(weights: Any, name: str = "weights") -> Matrix:
    """A `Matrix` from an array or a checkpoint's tensor view. Error: not two-dimensional."""
    array = blocks.weights_of(weights.float32() if hasattr(weights, "float32") else weights)
    if array.ndim != 2:
        raise LabkitError(tr("The panel takes a matrix; given an array of shape {shape}.", shape=array.shape))
    counts, edges = np.histogram(array, bins=BINS)
    return Matrix(array, getattr(weights, "name", name), _histogram(counts, edges), float(counts.max()))


def quantize(
    weights: np.ndarray, bits: int | str, per: str = "group", group: int = 32, scheme: str = "symmetric"
) -> blocks.Quantized:
    """Quantize with labkit.blocks. `bits`: 1 to 8 or "ternary"; `per`: "tensor", "channel" or "group"."""
    if per not in GRAINS or scheme not in SCHEMES or str(bits) not in (*PRECISIONS, "7"):
        raise LabkitError(tr(
            "bits={bits!r}, per={per!r}, scheme={scheme!r} given; expected bits 1 to 8 or 'ternary', per one of {grains}, "
            "scheme one of {schemes}.",
            bits=bits, per=per, scheme=scheme, grains=", ".join(GRAINS), schemes=", ".join(SCHEMES),
        ))  # fmt: skip
    share = group if per == "group" else per
    if str(bits) == "ternary":
        return blocks.ternary(weights, per=share)
    return SCHEMES[scheme](weights, int(bits), per=share)


def picture(drawn: Matrix, bits: int | str, per: str, group: int, scheme: str) -> tuple[dict[str, Any], pd.DataFrame, str]:
    """(plotly JSON, table, sentence): the histogram with the first group's levels, and what it cost."""
    import pandas as pd

    made = quantize(drawn.weights, bits, per, group, scheme)
    name = trn("{n} bit", "{n} bits", int(bits)) if str(bits).isdigit() else tr(str(bits))
    grain = tr("group of {size}", size=group) if per == "group" else tr(per)
    table = pd.DataFrame({
        tr("precision"): [name], tr("scale for each"): [grain], tr("kilobytes"): [made.stored_bytes / 1e3],
        tr("bits per weight"): [made.bits_per_weight], tr("RMS error"): [made.error.rmse],
        tr("signal to noise, dB"): [made.error.sqnr_db], tr("largest error"): [made.error.max],
    })  # fmt: skip
    sentence = tr(
        "{matrix} at {precision}, one scale for each {grain}: {bits:.2f} bits per weight stored, signal to noise "
        "{noise:.1f} dB. The histogram shows the weights, the lines the values the first group may take.",
        matrix=drawn.name, precision=name, grain=grain, bits=made.bits_per_weight, noise=made.error.sqnr_db,
    )  # fmt: skip
    levels = first_levels(made)
    drawn_levels = [_lines(levels, drawn.highest)] if len(levels) <= DRAWN_LEVELS else []
    return drawn.histogram | {"data": [*drawn.histogram["data"], *drawn_levels]}, table, sentence


def first_levels(made: blocks.Quantized) -> np.ndarray:
    """The values the codes between the first group's lowest and highest stand for, ascending."""
    codes = made.codes.ravel()[: made.codes.size // len(made.scales)]
    zero = 0 if made.zeros is None else float(made.zeros[0, 0])
    bias = 0 if made.bias is None else float(made.bias[0, 0])
    step = 2 if codes.size and set(np.unique(codes[:1000]).tolist()) <= {-1, 1} else 1  # one bit has no zero
    return float(made.scales[0, 0]) * (np.arange(int(codes.min()), int(codes.max()) + 1, step) - zero) + bias


def _lines(levels: np.ndarray, highest: float) -> dict[str, Any]:
    """All levels as one trace of vertical lines: a shape each would be slow to make."""
    x = [value for level in levels.tolist() for value in (level, level, None)]
    return {"type": "scatter", "mode": "lines", "x": x, "y": [1.0, highest, None] * len(levels), "hoverinfo": "x",
            "line": {"color": "#D55E00", "width": 1.5}, "name": tr("levels of the first group")}  # fmt: skip


def _histogram(counts: np.ndarray, edges: np.ndarray) -> dict[str, Any]:
    bars = {"type": "bar", "x": ((edges[:-1] + edges[1:]) / 2).tolist(), "y": counts.tolist(), "name": tr("weights"),
            "width": np.diff(edges).tolist(), "marker": {"color": "#56B4E9"}}  # fmt: skip
    axis = {"gridcolor": "#E5E5E5", "linecolor": "#444444", "ticks": "outside", "automargin": True}
    layout = {
        "title": {"text": tr("Weights and the values they may take"), "x": 0.02}, "height": 380, "bargap": 0,
        "plot_bgcolor": "#FFFFFF", "paper_bgcolor": "#FFFFFF",
        "font": {"size": 13, "color": "#222222"}, "legend": {"orientation": "h", "y": 1.08},
        "margin": {"l": 70, "r": 20, "t": 70, "b": 50}, "xaxis": {"title": {"text": tr("weight")}, **axis},
        "yaxis": {"title": {"text": tr("how many (log)")}, "type": "log", **axis},
    }  # fmt: skip
    return {"data": [bars], "layout": layout}

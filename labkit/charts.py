"""Frame in, figure out: one function a picture, named by the sentence it draws; `show` puts it on the page.

The same colour always means the same engine and the same marker the same class of precision, in every lab. Colours are
Okabe and Ito's, which colour-blind readers tell apart. Frames are the ledger's (`labkit.ledger().frame()`), whose
`value`, `low` and `high` are the shown number and its 95 % interval. Nothing here starts an engine.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from labkit._display import bundle, html_table, show
from labkit.i18n import tr
from labkit.types import LabkitError

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

__all__ = [
    "COLOURS", "MARKERS", "bits_against_divergence", "bundle", "decode_speed", "error_heatmap", "headline",
    "html_table", "ladder", "levels", "memory_bars", "points", "precision_class", "roofline", "show",
    "size_against_perplexity", "weight_histogram",
]  # fmt: skip
BLACK, ORANGE, SKY, GREEN, YELLOW, BLUE, RED, PINK = (
    "#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7",
)  # fmt: skip
COLOURS = {"llamacpp": BLUE, "onnxruntime": ORANGE, "olive": RED, "openvino": GREEN, "mlx": PINK}
MARKERS = {
    "float 32": "circle", "float 16": "square", "8 bits": "diamond", "6 bits": "star", "5 bits": "pentagon",
    "4 bits": "triangle-up", "3 bits": "triangle-down", "2 bits": "cross", "ternary": "x", "1 bit": "hourglass",
    "other": "circle-open",
}  # fmt: skip
LOGARITHMIC = ("perplexity", "divergence")  # spread over decades
REPETITION = ("settings", "rounds", "repeats", "seed")
ARTIFACT = ["checkpoint", "engine", "precision", "options"]


# --- frames ------------------------------------------------------------------------------------------------------


def points(frame: pd.DataFrame, metric: str) -> pd.DataFrame:
    """The rows of one metric that were measured alike, the newest of each artifact, with `label` and `key` added.

    Where a ledger holds several workloads (other text, windows, prompt length), the one that covers the most artifacts
    is kept, the newest of equals, and a warning names what is left out. Error: the frame has no such metric.
    """
    rows = frame[frame["metric"] == metric]
    if not len(rows):
        have = ", ".join(sorted(set(frame["metric"]))) or tr("nothing")
        raise LabkitError(tr(
            "The frame has no {metric} (it has {have}); measure it first: labkit.measure.{metric}(…).", metric=metric, have=have
        ))  # fmt: skip
    rows = rows.assign(
        label=[label(row) for row in rows.to_dict("records")],
        key=rows[ARTIFACT].astype(str).agg("|".join, axis=1),
        like=[_workload(workload) for workload in rows["workload"]],
    )
    covered = rows.groupby("like").agg(artifacts=("key", "nunique"), when=("when", "max"))
    chosen = rows["like"] == covered.sort_values(["artifacts", "when"]).index[-1]
    missing = sorted({f"{r['engine']} {r['label']}" for r in rows[~rows["key"].isin(rows[chosen]["key"])].to_dict("records")})
    if missing:
        names = ", ".join(missing)
        said = tr("Left out of {metric}, as measured on another workload: {names}.", metric=metric, names=names)
        warnings.warn(said, stacklevel=3)
    return rows[chosen].drop_duplicates("key", keep="last").sort_values("bits_per_weight", ascending=False)


def _workload(workload: Mapping[str, Any]) -> str:
    """What must be equal for two numbers to be compared: all but the engine's settings and the number of repeats."""
    return json.dumps({k: v for k, v in workload.items() if k not in REPETITION}, sort_keys=True, default=str)


def label(row: Mapping[str, Any]) -> str:
    """Precision and the options that differ from none: what a point is called."""
    options = ", ".join(f"{k}={v}" for k, v in (row.get("options") or {}).items())
    return f"{row['precision']} ({options})" if options else str(row["precision"])


def precision_class(precision: str) -> str:
    """The class that decides a marker, from an engine's own word: "q4_k_m" -> "4 bits"."""
    word = precision.lower()
    if re.match(r"^(tq|ternary|1\.58)", word):
        return "ternary"
    found = re.match(r"^(b?f|fp|float)(16|32)", word)
    if found:
        return f"float {found.group(2)}"
    digits = re.search(r"\d", word)
    return {"1": "1 bit"}.get(digits.group(), f"{digits.group()} bits") if digits and digits.group() in "1234568" else "other"


def headline(frame: pd.DataFrame) -> pd.DataFrame:
    """One row an artifact: engine, precision, size, bits per weight, decode speed, perplexity, KL, accuracy.

    Speeds of unlike machines are refused (`ledger.comparable`). What was not measured stays empty.
    """
    import pandas as pd

    from labkit.ledger import comparable

    comparable(frame)
    if not len(frame):
        raise LabkitError(tr("The ledger is empty; measure something first: labkit.measure.size(artifact)."))
    shown = {metric: points(frame, metric).set_index("key") for metric in set(frame["metric"])}
    keys = {key: row for rows in shown.values() for key, row in rows.iterrows()}
    table = [_headline_row(key, row, shown) for key, row in keys.items()]
    return pd.DataFrame(table).sort_values(["engine", "bits per weight"], ascending=[True, False], ignore_index=True)


def _headline_row(key: str, row: pd.Series, shown: Mapping[str, pd.DataFrame]) -> dict[str, Any]:
    def cell(metric: str, column: str = "value") -> float:
        return float(shown[metric].loc[key, column]) if metric in shown and key in shown[metric].index else float("nan")

    return {
        "engine": row["engine"],
        "precision": row["label"],
        "size MB": row["weight_bytes"] / 1e6,
        "bits per weight": row["bits_per_weight"],
        "decode tokens/s": cell("speed"),
        "from": cell("speed", "low"),
        "to": cell("speed", "high"),
        "perplexity": cell("perplexity"),
        "KL nats": cell("divergence"),
        "task accuracy": cell("accuracy"),
    }


# --- figures of measurements -------------------------------------------------------------------------------------


def size_against_perplexity(frame: pd.DataFrame) -> go.Figure:
    """Smaller to the left, better below: megabytes of weights against perplexity."""
    rows = points(frame, "perplexity")
    fig = figure(tr("Smaller files, more perplexity"), tr("weights, MB (log)"), tr("perplexity"))
    fig.update_xaxes(type="log")
    return _scatter(fig, rows, rows["weight_bytes"] / 1e6)


def bits_against_divergence(frame: pd.DataFrame) -> go.Figure:
    """Effective bits per weight against KL divergence, on a log scale: near a line, until it is not."""
    rows = points(frame, "divergence")
    rows = rows[rows["value"] > 0]  # the reference against itself has no place on a log axis
    fig = figure(tr("Fewer bits, more divergence"), tr("bits per weight, measured"), tr("KL divergence, nats per token (log)"))
    fig.update_yaxes(type="log")
    return _scatter(fig, rows, rows["bits_per_weight"])


def ladder(frame: pd.DataFrame, metrics: Sequence[str] = ("perplexity", "divergence", "accuracy")) -> go.Figure:
    """Several metrics over bits per weight, one above the other, one line an engine."""
    from plotly.subplots import make_subplots

    from labkit.measure import METRICS

    fig = make_subplots(rows=len(metrics), cols=1, shared_xaxes=True, vertical_spacing=0.06)
    for i, metric in enumerate(metrics, start=1):
        rows, about, log = points(frame, metric), METRICS[metric], metric in LOGARITHMIC
        rows = rows[rows["value"] > 0] if log else rows
        _scatter(fig, rows, rows["bits_per_weight"], mode="lines+markers", row=i, legend=i == 1)
        title = ", ".join(filter(None, [tr(about.title), about.unit])) + (" (log)" if log else "")
        fig.update_yaxes(title=title, type="log" if log else "linear", row=i, col=1)
    _dress(fig, tr("What each step down the ladder costs"))
    fig.update_xaxes(title=tr("bits per weight, measured"), row=len(metrics), col=1)
    return fig.update_layout(height=260 * len(metrics) + 90)


def decode_speed(frame: pd.DataFrame) -> go.Figure:
    """Decode tokens/s of each artifact with its 95 % interval, hatched if the machine was busy. Like machines only."""
    from labkit.ledger import comparable

    rows = points(comparable(frame[frame["metric"] == "speed"]) if len(frame) else frame, "speed")
    fig = figure(tr("Writing one token after another"), "", tr("decode, tokens/s"))
    for engine, part in rows.groupby("engine", sort=False):
        busy = [not details.get("quiet", True) for details in part["details"]]
        names = [tr("{name} (busy machine)", name=name) if was else name for name, was in zip(part["label"], busy, strict=True)]
        fig.add_bar(
            x=[[engine] * len(part), names], y=part["value"], name=engine, marker_color=colour(engine),
            marker_pattern_shape=["/" if was else "" for was in busy], error_y=_bars(part),
        )  # fmt: skip
    return fig.update_layout(showlegend=False)


def memory_bars(frame: pd.DataFrame) -> go.Figure:
    """Peak memory of each artifact's own process beside the bytes of its weights. Like machines only."""
    from labkit.ledger import comparable

    rows = points(comparable(frame[frame["metric"] == "memory"]) if len(frame) else frame, "memory")
    names = [rows["engine"].tolist(), rows["label"].tolist()]
    fig = figure(tr("What a process needs, beside what the file holds"), "", "MB")
    fig.add_bar(x=names, y=rows["weight_bytes"] / 1e6, name=tr("weights as stored"), marker_color=SKY)
    fig.add_bar(
        x=names, y=rows["value"] / 1e6, name=tr("peak memory, less the engine's own"), marker_color=BLUE,
        marker_pattern_shape="/", error_y=_bars(rows, 1e6),
    )  # fmt: skip
    return fig.update_layout(barmode="group")


def roofline(frame: pd.DataFrame) -> go.Figure:
    """The roof of this machine, bandwidth then arithmetic, and how far below it each artifact decodes."""
    from labkit.ledger import comparable

    rows = points(comparable(frame[frame["metric"] == "roofline"]) if len(frame) else frame, "roofline")
    fig = figure(tr("Under the roof"), tr("operations per byte read (log)"), tr("operations/s (log)"))
    best = max((row["details"] for _, row in rows.iterrows()), key=lambda d: d["bandwidth_bytes_per_second"])
    ridge, flops = best["ridge_operations_per_byte"], best["multiply_operations_per_second"]
    x = np.geomspace(min(0.05, ridge / 10), max(100, ridge * 10), 60)
    roof = np.minimum(x * best["bandwidth_bytes_per_second"], flops)
    fig.add_scatter(x=x, y=roof, mode="lines", name=tr("roof"), line={"color": BLACK, "width": 2}, hoverinfo="skip")
    for engine, part in rows.groupby("engine", sort=False):
        intensity = np.array([d["decode_operations_per_byte"] for d in part["details"]])
        used = [d.get("reached", np.nan) * value for d, value in zip(part["details"], part["value"], strict=True)]
        bytes_ = np.array([sum(d["bytes_per_token"].values()) for d in part["details"]])
        fig.add_scatter(
            x=intensity, y=np.array(used) * bytes_ * intensity, mode="markers+text", text=part["label"],
            textposition="bottom right", name=engine, marker=_markers(part),
        )  # fmt: skip
    return fig.update_xaxes(type="log").update_yaxes(type="log")


def _scatter(
    fig: go.Figure,
    rows: pd.DataFrame,
    x: pd.Series,
    mode: str = "markers+text",
    row: int | None = None,
    legend: bool = True,
) -> go.Figure:
    where = {} if row is None else {"row": row, "col": 1}
    for engine, part in rows.groupby("engine", sort=False):
        fig.add_scatter(
            x=x.loc[part.index], y=part["value"], error_y=_bars(part), mode=mode, name=engine, legendgroup=engine,
            showlegend=legend, text=part["label"], textposition="middle right", cliponaxis=False, marker=_markers(part),
            line={"color": colour(engine)}, hovertemplate="%{text}<br>%{x:.4g}, %{y:.4g}", **where,
        )  # fmt: skip
    return fig


def _bars(rows: pd.DataFrame, scale: float = 1.0) -> dict[str, Any]:
    """Interval ends as plotly wants them: distances from the value."""
    return {
        "type": "data", "symmetric": False, "array": (rows["high"] - rows["value"]) / scale,
        "arrayminus": (rows["value"] - rows["low"]) / scale, "thickness": 1.2,
    }  # fmt: skip


def _markers(rows: pd.DataFrame) -> dict[str, Any]:
    symbols = [MARKERS[precision_class(precision)] for precision in rows["precision"]]
    return {"symbol": symbols, "size": 11, "color": [colour(engine) for engine in rows["engine"]]}


def colour(engine: str) -> str:
    return COLOURS.get(engine, BLACK)


# --- figures of weights ------------------------------------------------------------------------------------------


def weight_histogram(weights: np.ndarray, levels: Sequence[float] = (), bins: int = 120) -> go.Figure:
    """How a matrix's weights are spread, and the values a quantizer offers them (`levels`)."""
    values = np.asarray(weights, dtype=np.float32).ravel()
    count, edges = np.histogram(values, bins=bins)
    fig = figure(tr("Weights and the values they may take"), tr("weight"), tr("how many (log)"))
    fig.add_bar(x=(edges[:-1] + edges[1:]) / 2, y=count, marker_color=SKY, name=tr("weights"), width=np.diff(edges))
    for i, level in enumerate(levels):
        fig.add_vline(x=float(level), line={"color": RED, "width": 1}, opacity=0.7, name=tr("level"), showlegend=i == 0)
    return fig.update_yaxes(type="log").update_layout(bargap=0)


def error_heatmap(error: np.ndarray, title: str = "", cells: int = 128) -> go.Figure:
    """Absolute error over a matrix (rows, columns), as root mean squares over at most `cells` patches a side."""
    patches = _patches(np.asarray(error, dtype=np.float64), cells)
    fig = figure(title or tr("Where rounding went wrong"), tr("input column"), tr("output row"))
    rows, columns = (np.linspace(0, n, m, endpoint=False) for n, m in zip(np.shape(error), patches.shape, strict=True))
    bar = {"title": {"text": tr("RMS error")}}
    fig.add_heatmap(z=patches.astype(np.float32), x=columns, y=rows, colorscale="Cividis", colorbar=bar)
    return fig.update_yaxes(autorange="reversed")


def _patches(matrix: np.ndarray, cells: int) -> np.ndarray:
    """Root mean square by patches, so that a large matrix does not make a large figure."""
    if matrix.ndim != 2:
        raise LabkitError(tr("An error map needs a matrix; given an array of shape {shape}.", shape=matrix.shape))
    squares = matrix**2
    for axis in (0, 1):
        starts = np.unique(np.linspace(0, squares.shape[axis], min(cells, squares.shape[axis]), endpoint=False).astype(int))
        lengths = np.diff([*starts, squares.shape[axis]])
        shape = (-1, 1) if axis == 0 else (1, -1)
        squares = np.add.reduceat(squares, starts, axis=axis) / lengths.reshape(shape)
    return np.sqrt(squares)


def levels(codebooks: Mapping[str, Sequence[float]]) -> go.Figure:
    """The values each format can hold, as ticks on one number line a format."""
    fig = figure(tr("The values a format can hold"), tr("value"), "")
    for i, (name, values) in enumerate(codebooks.items()):
        colour = (BLUE, ORANGE, GREEN, RED, PINK, SKY)[i % 6]
        marker = {"symbol": "line-ns-open", "size": 16, "color": colour, "line": {"width": 2}}
        fig.add_scatter(
            x=list(map(float, values)), y=[name] * len(values), mode="markers", name=name, marker=marker,
            hovertemplate="%{x:.6g}", showlegend=False,
        )  # fmt: skip
    return fig.update_yaxes(autorange="reversed").update_layout(height=130 + 45 * len(codebooks))


# --- the common dress --------------------------------------------------------------------------------------------


def figure(title: str, x: str, y: str) -> go.Figure:
    """An empty figure in the course's dress, its axes titled."""
    import plotly.graph_objects as go

    fig = _dress(go.Figure(), title)
    return fig.update_xaxes(title_text=x).update_yaxes(title_text=y)


def _dress(fig: go.Figure, title: str) -> go.Figure:
    """No template: a figure stays a few kilobytes."""
    grid = {
        "gridcolor": "#E5E5E5", "zeroline": False, "linecolor": "#444444", "ticks": "outside", "automargin": True,
        "title_standoff": 12, "exponentformat": "power",
    }  # fmt: skip
    fig.update_layout(
        template="none", title={"text": title, "x": 0.02}, font={"size": 13, "color": "#222222"},
        margin={"l": 70, "r": 20, "t": 60, "b": 60}, height=420, legend={"title": {"text": ""}},
    )  # fmt: skip
    return fig.update_xaxes(**grid).update_yaxes(**grid)

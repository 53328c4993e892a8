"""The constraint form: demands in, what fits and why the rest does not out; as a figure with a table, and with sliders.

The only other file besides `panels` that knows widgets. Nothing is measured here: the answer comes from a table of candidates.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from labkit import charts, decide, panels
from labkit.i18n import noop, tr, trn
from labkit.types import LabkitError

if TYPE_CHECKING:
    import pandas as pd

NEEDED = ("engine", "precision", "size", "speed", "accuracy_loss")  # columns of the table; `decide.candidates` makes most
PROOFS = (noop("the whole interval"), noop("the measured value"))
FITS, NOT = noop("fits"), noop("does not fit")
GREY = "#999999"
ENDS = ("_low", "_high")


def constraints_view(
    table: pd.DataFrame, megabytes: float = 5.0, tokens_per_second: float = 20.0, loss: float = 0.01, proof: bool = True
) -> None:  # fmt: skip
    """Show which candidates take at most `megabytes`, decode at least `tokens_per_second` and lose at most `loss` of accuracy.

    `table`: one row a candidate with size (bytes), speed (tokens/s) and accuracy_loss (share), intervals as METRIC_low and
    METRIC_high. `proof`: the whole interval must meet a limit; without it the measured value is enough.
    """
    import plotly.graph_objects as go

    spec, shown, said = picture(table, megabytes, tokens_per_second, loss, proof)
    charts.show(go.Figure(spec), alt=said, table=shown)


def constraints(
    table: pd.DataFrame, megabytes: float = 5.0, tokens_per_second: float = 20.0, loss: float = 0.01, proof: bool = True
) -> Any:  # fmt: skip
    """The same with sliders; parameters are their start values."""
    import ipywidgets as w

    picture(table, megabytes, tokens_per_second, loss, proof)  # refuse a bad table now, in one sentence
    most, fastest = _top(table["size"] / 1e6, megabytes), _top(table["speed"], tokens_per_second)
    lazy = {"continuous_update": False}
    room = w.FloatSlider(value=megabytes, min=0, max=most, step=most / 100, **lazy, **panels.described(tr("at most, MB")))
    pace = w.FloatSlider(
        value=tokens_per_second, min=0, max=fastest, step=fastest / 100, **lazy, **panels.described(tr("at least, tokens/s"))
    )
    lost = w.FloatSlider(
        value=100 * loss, min=0, max=max(10.0, 100 * loss), step=0.25, **lazy, **panels.described(tr("accuracy lost, %"))
    )
    sure = w.Dropdown(options=panels.named(PROOFS), value=PROOFS[not proof], **panels.described(tr("must meet the limit")))
    place, said = w.Output(), w.HTML()

    def draw(_: object = None) -> None:
        spec, shown, sentence = picture(table, room.value, pace.value, lost.value / 100, sure.value == PROOFS[0])
        panels.redraw(place, said, spec, sentence, shown)

    for control in (room, pace, lost, sure):
        control.observe(draw, names="value")
    draw()
    return panels.panel(room, pace, lost, sure, place, said)


def picture(
    table: pd.DataFrame, megabytes: float, tokens_per_second: float, loss: float, proof: bool
) -> tuple[dict[str, Any], pd.DataFrame, str]:  # fmt: skip
    """Plotly JSON, a table with the reason for each exclusion, and one sentence that says it all."""
    judged = _judged(table, megabytes, tokens_per_second, loss, proof)
    names = [f"{engine} {precision}" for engine, precision in zip(judged["engine"], judged["precision"], strict=True)]
    said = _sentence([name for name, fits in zip(names, judged["fits"], strict=True) if fits], len(judged))
    return _figure(judged, names, megabytes, tokens_per_second), _reasons(judged, names), said


def _judged(table: pd.DataFrame, megabytes: float, tokens_per_second: float, loss: float, proof: bool) -> pd.DataFrame:
    import pandas as pd

    if missing := [name for name in NEEDED if name not in table]:
        raise LabkitError(tr("The table lacks {column}; it needs {all}.", column=missing[0], all=", ".join(NEEDED)))
    parts = ((tr("size"), "size", 1e-6), (tr("speed"), "speed", 1.0), (tr("accuracy lost"), "accuracy_loss", 100.0))
    ends = ("", *ENDS) if proof else ("",)
    columns = {title + end: table[name + end] * scale for title, name, scale in parts for end in ends if name + end in table}
    limits = [
        decide.Limit(tr("size"), most=megabytes, unit="MB"),
        decide.Limit(tr("speed"), least=tokens_per_second, unit="tokens/s"),
        decide.Limit(tr("accuracy lost"), most=100 * loss, unit="%"),
    ]
    judged = decide.matrix(pd.DataFrame(columns), limits)
    return table.assign(fits=judged["fits"], because=judged["because"])


def _figure(judged: pd.DataFrame, names: list[str], megabytes: float, tokens_per_second: float) -> dict[str, Any]:
    """Size against speed; what fits is in its engine's colour, the rest is grey, the limits are lines."""
    fig = charts.figure(tr("What fits, from what was measured"), tr("weights, MB"), tr("decode, tokens/s"))
    above = [int(rank) % 2 == 0 for rank in judged["size"].rank(method="first")]  # neighbours' labels stand apart
    labelled = judged.assign(name=names, place=["top center" if one else "bottom center" for one in above])
    for fits, word in ((True, FITS), (False, NOT)):
        rows = labelled[labelled["fits"] == fits]
        shapes = [charts.MARKERS[charts.precision_class(precision)] for precision in rows["precision"]]
        colours = [charts.colour(engine) if fits else GREY for engine in rows["engine"]]
        fig.add_scatter(
            x=rows["size"] / 1e6, y=rows["speed"], mode="markers+text", name=tr(word), text=rows["name"],
            textposition=list(rows["place"]), cliponaxis=False, marker={"symbol": shapes, "size": 12, "color": colours},
        )  # fmt: skip
    line = {"color": "#000000", "width": 1, "dash": "dot"}
    fig.add_vline(x=megabytes, line=line).add_hline(y=tokens_per_second, line=line)
    fig.update_xaxes(rangemode="tozero").update_yaxes(rangemode="tozero")
    return json.loads(fig.to_json())


def _reasons(judged: pd.DataFrame, names: list[str]) -> pd.DataFrame:
    import pandas as pd

    columns: Mapping[str, Any] = {
        tr("candidate"): names,
        "MB": judged["size"] / 1e6,
        "tokens/s": judged["speed"],
        tr("accuracy lost, %"): 100 * judged["accuracy_loss"],
        tr("excluded because"): [why or tr("it fits") for why in judged["because"]],
    }
    return pd.DataFrame(columns).round(2)


def _sentence(fitting: list[str], all_: int) -> str:
    if not fitting:
        return trn("The one candidate does not meet every demand.", "None of {n} candidates meets every demand.", all_)
    return tr(
        "{fitting} of {all} candidates meet every demand: {names}.", fitting=len(fitting), all=all_, names=", ".join(fitting)
    )


def _top(values: pd.Series, start: float) -> float:
    return max(float(values.max()) * 1.1, start)

"""One figure: how far each method leaves the model from the float one, contest by contest, with intervals."""

from __future__ import annotations

from typing import TYPE_CHECKING

from labkit.charts import BLACK, BLUE
from labkit.i18n import tr
from labkit.types import LabkitError

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go


def divergence_at_equal_bits(frame: pd.DataFrame, title: str = "") -> go.Figure:
    """KL with its 95 % interval by method (rows of `compare.table`), one panel a contest; plain rounding is an open circle.

    Intervals that overlap do not settle who is better: the windows are the same, so read `kl_saved` for that.
    """
    from plotly.subplots import make_subplots

    if not len(frame) or not (frame["kl"] > 0).all():
        raise LabkitError("The chart needs rows of labkit.methods.compare.table whose kl is above 0; leave the others out.")
    contests = list(dict.fromkeys(frame["contest"]))
    counts = [int((frame["contest"] == contest).sum()) for contest in contests]
    fig = make_subplots(len(contests), 1, subplot_titles=contests, row_heights=counts, vertical_spacing=0.12)
    for i, contest in enumerate(contests, start=1):
        part = frame[frame["contest"] == contest]
        plain = [k == 0 for k in range(len(part))]  # the first row of a contest
        ends = {"array": part["kl_high"] - part["kl"], "arrayminus": part["kl"] - part["kl_low"]}
        fig.add_scatter(
            x=part["kl"], y=part["method"], mode="markers", showlegend=False, hovertemplate="%{y}: %{x:.4g}",
            error_x={"type": "data", "symmetric": False, "thickness": 1.2, **ends}, row=i, col=1,
            marker={"size": 11, "symbol": ["circle-open" if p else "circle" for p in plain],
                    "color": [BLACK if p else BLUE for p in plain]},
        )  # fmt: skip
        fig.update_yaxes(autorange="reversed", row=i, col=1)
    fig.update_xaxes(type="log", gridcolor="#E5E5E5").update_xaxes(title=tr("KL divergence, nats per token (log)"), row=i, col=1)
    layout = {"template": "none", "font": {"size": 13, "color": "#222222"}, "margin": {"l": 110, "r": 20, "t": 70, "b": 60}}
    return fig.update_layout(title={"text": title, "x": 0.02}, height=160 + 42 * len(frame) + 40 * len(contests), **layout)

"""The fleet's bill: a build, a number of devices and a cloud's price in; break-even, traffic and wrong answers out.

A panel as in `panels`, with its static twin. Nothing is measured here: builds bring their bytes, speed and accuracy.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from labkit import charts, panels
from labkit.capacity import Owned, break_even
from labkit.i18n import tr
from labkit.types import LabkitError

if TYPE_CHECKING:
    import pandas as pd

NEEDED = ("build", "bytes", "accuracy", "tokens_per_second")  # columns of the table of builds
DAYS = 365.25
MOST_DEVICES = 100_000


def fleet_view(
    builds: pd.DataFrame, owned: Owned, build: str | None = None, devices: int = 5000, cloud: float = 1.0,
    tokens_a_day: float = 20_000,
) -> None:  # fmt: skip
    """Show what a fleet costs on its own devices and in a cloud at `cloud` money a million tokens.

    `builds`: one row a build with NEEDED; `owned`: one device (its speed is replaced by the build's); `tokens_a_day`: of a device.
    """
    import plotly.graph_objects as go

    spec, table, said = picture(builds, owned, build or str(builds["build"].iloc[0]), devices, cloud, tokens_a_day)
    charts.show(go.Figure(spec), alt=said, table=table)


def fleet(
    builds: pd.DataFrame, owned: Owned, build: str | None = None, devices: int = 5000, cloud: float = 1.0,
    tokens_a_day: float = 20_000,
) -> Any:  # fmt: skip
    """The same with controls; parameters are their start values."""
    import ipywidgets as w

    start = build or str(builds["build"].iloc[0])
    picture(builds, owned, start, devices, cloud, tokens_a_day)  # refuse a bad table now, in one sentence
    which = w.SelectionSlider(options=list(builds["build"]), value=start, **panels.described(tr("precision")))
    many = w.IntSlider(value=devices, min=100, max=max(MOST_DEVICES, devices), step=100, **panels.described(tr("devices")))
    price = w.FloatSlider(value=cloud, min=0.05, max=max(20.0, cloud), step=0.05, **panels.described(tr("cloud, a million tokens")))
    place, said = w.Output(), w.HTML()

    def draw(_: object = None) -> None:
        spec, table, sentence = picture(builds, owned, which.value, many.value, price.value, tokens_a_day)
        panels.redraw(place, said, spec, sentence, table)

    for control in (which, many, price):
        control.observe(draw, names="value")
    draw()
    return panels.panel(which, many, price, place, said)


def picture(
    builds: pd.DataFrame, owned: Owned, build: str, devices: int, cloud: float, tokens_a_day: float
) -> tuple[dict[str, Any], pd.DataFrame, str]:  # fmt: skip
    """Plotly JSON, a table with one row a build, and one sentence about the chosen build."""
    import pandas as pd

    if missing := [name for name in NEEDED if name not in builds]:
        raise LabkitError(tr("The table lacks {column}; it needs {all}.", column=missing[0], all=", ".join(NEEDED)))
    rows = {row["build"]: row for row in builds.to_dict("records")}
    if build not in rows:
        raise LabkitError(tr("There is no build {build!r}; the table has {all}.", build=build, all=", ".join(rows)))
    found = {name: _bill(row, owned, devices, cloud, tokens_a_day) for name, row in rows.items()}
    table = pd.DataFrame([{tr("build"): name, **bill} for name, bill in found.items()])
    return _figure(replace(owned, tokens_per_second=rows[build]["tokens_per_second"]), devices, cloud), table, _sentence(
        build, devices, found[build]
    )


def _bill(row: dict[str, Any], owned: Owned, devices: int, cloud: float, tokens_a_day: float) -> dict[str, float]:
    device = replace(owned, tokens_per_second=row["tokens_per_second"])
    return {
        tr("update of the fleet, GB"): round(row["bytes"] * devices / 1e9, 2),
        tr("wrong answers in 100"): round(100 * (1 - row["accuracy"]), 1),
        tr("joules a token"): round(device.joules(), 5),
        tr("owned, a million tokens"): round(device.per_million(tokens_a_day * DAYS), 4),
        tr("break-even, tokens a day and device"): round(break_even(device, cloud) / DAYS, 0),
    }


def _figure(device: Owned, devices: int, cloud: float) -> dict[str, Any]:
    most = device.tokens_per_second * 86_400
    days = np.geomspace(max(1.0, most / 1e5), most * 0.999, 60)
    fig = charts.figure(tr("Owned or rented"), tr("tokens a day and device (log)"), tr("money a year, whole fleet (log)"))
    fig.add_scatter(x=days, y=[device.yearly(n * DAYS) * devices for n in days], mode="lines", name=tr("owned"), line={"color": charts.BLUE})
    fig.add_scatter(
        x=days, y=days * DAYS * cloud / 1e6 * devices, mode="lines", name=tr("cloud"), line={"color": charts.ORANGE, "dash": "dash"}
    )
    meet = break_even(device, cloud) / DAYS
    if math.isfinite(meet):
        fig.add_scatter(
            x=[meet], y=[device.yearly(meet * DAYS) * devices], mode="markers+text", text=[tr("break-even")], textposition="top left",
            name=tr("break-even"), marker={"color": charts.BLACK, "size": 11, "symbol": "diamond"},
        )  # fmt: skip
    fig.update_xaxes(type="log", exponentformat="power").update_yaxes(type="log", exponentformat="power")
    return json.loads(fig.to_json())


def _sentence(build: str, devices: int, bill: dict[str, float]) -> str:
    meet = bill[tr("break-even, tokens a day and device")]
    if not math.isfinite(meet):
        return tr("With {build}, {devices} devices of one's own never become cheaper than the cloud.", build=build, devices=f"{devices:,}")
    return tr(
        "With {build}, {devices} devices of one's own are cheaper than the cloud from {tokens} tokens a day and device.",
        build=build, devices=f"{devices:,}", tokens=f"{meet:,.0f}",
    )  # fmt: skip

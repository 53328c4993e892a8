"""The constraint form: it excludes for the right reasons, every control redraws, figure, table and words agree."""

from __future__ import annotations

import itertools
import json

import ipywidgets
import numpy as np
import pandas as pd
import pytest

from labkit import LabkitError, decidepanel

PLOTLY = "application/vnd.plotly.v1+json"


@pytest.fixture
def table() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "engine": ["llamacpp", "openvino", "mlx"], "precision": ["q4_k_m", "int8_asym", "q4"],
            "size": [3.2e6, 5.3e6, 2.9e6], "size_low": [3.2e6, 5.3e6, 2.9e6], "size_high": [3.2e6, 5.3e6, 2.9e6],
            "speed": [100.0, 120.0, np.nan], "speed_low": [90.0, 110.0, np.nan], "speed_high": [110.0, 130.0, np.nan],
            "accuracy_loss": [0.01, 0.0, 0.0], "accuracy_loss_low": [-0.01, -0.02, -0.02], "accuracy_loss_high": [0.03, 0.02, 0.02],
        }
    )  # fmt: skip


def reasons(table, *demands):
    spec, shown, said = decidepanel.picture(table, *demands)
    json.dumps(spec, allow_nan=False)  # what a browser can read
    return dict(zip(shown["candidate"], shown["excluded because"], strict=True)), said


def test_every_exclusion_has_its_reason(table):
    found, said = reasons(table, 4.0, 50.0, 0.05, True)
    assert found["llamacpp q4_k_m"] == "it fits" and found["openvino int8_asym"] == "size 5.3 MB is above 4 MB"
    assert found["mlx q4"] == "speed was not measured"
    assert said == "1 of 3 candidates meet every demand: llamacpp q4_k_m."


def test_proof_asks_for_the_whole_interval(table):
    strict, said = reasons(table, 4.0, 50.0, 0.02, True)
    assert "may be above 2 %" in strict["llamacpp q4_k_m"] and said == "None of 3 candidates meets every demand."
    lenient, _ = reasons(table, 4.0, 50.0, 0.02, False)
    assert lenient["llamacpp q4_k_m"] == "it fits"
    assert "may be below 95" in reasons(table, 4.0, 95.0, 0.05, True)[0]["llamacpp q4_k_m"]
    assert reasons(table, 4.0, 95.0, 0.05, False)[0]["llamacpp q4_k_m"] == "it fits"


def test_what_fits_is_coloured_and_the_rest_grey(table):
    spec, _, _ = decidepanel.picture(table, 4.0, 50.0, 0.05, True)
    fits, rest = spec["data"][:2]
    assert fits["text"] == ["llamacpp q4_k_m"] and decidepanel.GREY not in fits["marker"]["color"]
    assert set(rest["marker"]["color"]) == {decidepanel.GREY} and len(rest["text"]) == 2
    assert {shape["x0"] for shape in spec["layout"]["shapes"]} >= {4.0}


def test_every_control_redraws(table):
    panel = decidepanel.constraints(table, 4.0, 50.0, 0.05)
    controls = {c.description: c for c in panel.children if getattr(c, "description", "")}
    place = next(c for c in panel.children if isinstance(c, ipywidgets.Output) and c.outputs and PLOTLY in c.outputs[0]["data"])
    seen = [place.outputs[0]["data"]["text/html"]]
    for name, value in (
        ("at most, MB", 5.5),
        ("accuracy lost, %", 1.5),
        ("must meet the limit", "the measured value"),
        ("at least, tokens/s", 110.0),
    ):
        assert controls[name].tooltip
        controls[name].value = value
        seen.append(place.outputs[0]["data"]["text/html"])
    assert all(old != new for old, new in itertools.pairwise(seen))


def test_the_static_twin_says_the_same(table, monkeypatch):
    shown = {}
    monkeypatch.setattr(decidepanel.charts, "show", lambda fig, alt, table: shown.update(fig=fig, alt=alt, table=table))
    decidepanel.constraints_view(table, 4.0, 50.0, 0.05)
    spec, rows, said = decidepanel.picture(table, 4.0, 50.0, 0.05, True)
    assert shown["alt"] == said and shown["table"].equals(rows) and len(shown["fig"].data) == len(spec["data"])


def test_a_table_without_a_column_is_refused(table):
    with pytest.raises(LabkitError, match="lacks accuracy_loss"):
        decidepanel.constraints(table.drop(columns="accuracy_loss"))

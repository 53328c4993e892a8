"""The fleet's bill as a figure and with sliders: the same numbers in both, words for those who cannot see it."""

from __future__ import annotations

import pandas as pd
import pytest

from labkit import capacity, opspanel
from labkit.types import LabkitError

OWNED = capacity.Owned(price=60, years=4, idle_watts=2, busy_watts=5, kwh=0.25, tokens_per_second=1.0, care=3)
BUILDS = pd.DataFrame({"build": ["q8_0", "q2_k"], "bytes": [5.6e6, 1.7e6], "accuracy": [0.9, 0.6], "tokens_per_second": [400.0, 600.0]})


def test_the_bill_is_that_of_the_calculator():
    spec, table, said = opspanel.picture(BUILDS, OWNED, "q8_0", 1000, 1.0, 20_000)
    row = table.set_index("build").loc["q8_0"]
    device = capacity.Owned(**{**OWNED.__dict__, "tokens_per_second": 400.0})
    assert row["update of the fleet, GB"] == 5.6 and row["wrong answers in 100"] == 10.0
    meet = capacity.break_even(device, 1.0) / opspanel.DAYS
    assert row["break-even, tokens a day and device"] == round(meet) and f"{meet:,.0f}" in said and "1,000 devices" in said
    assert [trace["name"] for trace in spec["data"]] == ["owned", "cloud", "break-even"]


def test_a_cloud_that_is_nearly_free_is_never_beaten():
    spec, _, said = opspanel.picture(BUILDS, OWNED, "q8_0", 1000, 1e-6, 20_000)
    assert "never become cheaper" in said and len(spec["data"]) == 2


def test_sliders_redraw_figure_words_and_table():
    shown = opspanel.fleet(BUILDS, OWNED, "q8_0", 1000, 1.0)
    which, many, price, place, said = shown.children[:5]
    assert all(control.tooltip for control in (which, many, price))
    before = said.value
    many.value = 2000
    assert said.value != before and "2,000 devices" in said.value and "role='status'" in said.value
    which.value = "q2_k"
    price.value = 2.0
    figure = place.outputs[0]["data"]["application/vnd.plotly.v1+json"]
    assert "With q2_k" in figure["layout"]["meta"]["alt"] and "<table" in said.value


def test_senseless_tables_get_a_sentence():
    with pytest.raises(LabkitError, match="lacks accuracy"):
        opspanel.picture(BUILDS.drop(columns="accuracy"), OWNED, "q8_0", 10, 1.0, 1)
    with pytest.raises(LabkitError, match="no build 'q5'"):
        opspanel.fleet(BUILDS, OWNED, "q5")

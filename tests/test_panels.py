"""Panels: every control changes figure and numbers, every control has a description, static twins agree."""

from __future__ import annotations

import ipywidgets
import numpy as np
import pandas as pd
import pytest

from labkit import blocks, matrixchart, panels
from labkit.course.quizzes import Option, Question, Quiz
from labkit.types import LabkitError

PLOTLY = "application/vnd.plotly.v1+json"
RNG = np.random.default_rng(3)
WEIGHTS = RNG.normal(0, 0.02, (64, 256)).astype(np.float32)


def parts(panel):
    """Controls by description, the drawn bundle, and the words beside it."""
    controls = {c.description: c for c in panel.children if getattr(c, "description", "")}
    place = next(c for c in panel.children if isinstance(c, ipywidgets.Output))
    words = [c.value for c in panel.children if isinstance(c, ipywidgets.HTML)]
    return controls, place.outputs[0]["data"], words


@pytest.mark.parametrize(
    ("bits", "per", "group", "scheme", "expected"),
    [
        (4, "group", 32, "symmetric", lambda w: blocks.symmetric(w, 4, per=32)),
        (4, "channel", 32, "symmetric", lambda w: blocks.symmetric(w, 4, per="channel")),
        (3, "tensor", 32, "affine", lambda w: blocks.affine(w, 3, per="tensor")),
        (8, "group", 64, "affine", lambda w: blocks.affine(w, 8, per=64)),
        ("ternary", "tensor", 32, "symmetric", lambda w: blocks.ternary(w, per="tensor")),
        (1, "channel", 32, "symmetric", lambda w: blocks.symmetric(w, 1, per="channel")),
    ],
)
def test_the_picture_tells_what_blocks_compute(bits, per, group, scheme, expected):
    made = expected(WEIGHTS)
    spec, table, sentence = matrixchart.picture(matrixchart.matrix(WEIGHTS), bits, per, group, scheme)
    row = table.iloc[0]
    assert row["bits per weight"] == made.bits_per_weight and row["RMS error"] == made.error.rmse
    assert f"{made.bits_per_weight:.2f} bits per weight" in sentence
    levels = matrixchart.first_levels(made)
    first = made.dequantize().ravel()[: WEIGHTS.size // len(made.scales)]
    assert all(np.isclose(levels, value, atol=1e-6).any() for value in np.unique(first))
    drawn = [trace for trace in spec["data"] if trace["type"] == "scatter"]
    assert len(drawn) == (len(levels) <= matrixchart.DRAWN_LEVELS)
    assert sum(spec["data"][0]["y"]) == WEIGHTS.size


def test_every_control_of_the_matrix_panel_redraws():
    panel = panels.matrix(WEIGHTS, bits=4)
    controls, before, words = parts(panel)
    assert set(controls) == {"bits a code", "one scale per", "group size", "scheme"}
    seen = [before["text/plain"]]
    for name, value in (
        ("bits a code", "2"),
        ("one scale per", "tensor"),
        ("scheme", "affine"),
        ("one scale per", "group"),
        ("group size", 128),
    ):
        controls[name].value = value
        seen.append(parts(panel)[1]["text/plain"])
    assert len(set(seen)) == len(seen)
    _, data, words = parts(panel)
    assert data[PLOTLY]["layout"]["meta"]["alt"] in data["text/plain"] and "<caption>" in data["text/html"]
    assert "aria-live" in words[-1] and "bits per weight" in words[-1]


def test_the_matrix_panel_greys_out_what_does_not_apply():
    panel = panels.matrix(WEIGHTS, bits=4, per="channel")
    controls, *_ = parts(panel)
    assert controls["group size"].disabled and not controls["scheme"].disabled
    controls["bits a code"].value = "ternary"
    assert controls["scheme"].disabled


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"bits": 9}, "bits=9"),
        ({"per": "row"}, "per='row'"),
        ({"scheme": "gptq"}, "scheme='gptq'"),
        ({"group": 33}, "33"),
    ],
)
def test_a_bad_start_value_is_one_sentence(wrong, said):
    with pytest.raises(LabkitError, match=said):
        panels.matrix(WEIGHTS, **wrong)


def test_a_panel_wants_a_matrix():
    with pytest.raises(LabkitError, match="shape"):
        panels.matrix(WEIGHTS[0])


def test_panel_figures_stay_small():
    _, data, _ = parts(panels.matrix(WEIGHTS))
    assert len(str(data)) < 40_000


@pytest.fixture
def shown(monkeypatch):
    """What a static twin displays."""
    found = []
    monkeypatch.setattr("IPython.display.display", lambda data, raw=False, **k: found.append(data))
    return found


def test_the_static_matrix_shows_what_the_panel_starts_with(shown):
    panels.matrix_view(WEIGHTS, bits=3, per="group", group=64)
    _, data, _ = parts(panels.matrix(WEIGHTS, bits=3, per="group", group=64))
    assert shown[0]["text/html"].count("<tr>") == data["text/html"].count("<tr>") == 2
    assert shown[0][PLOTLY]["layout"]["meta"]["alt"] == data[PLOTLY]["layout"]["meta"]["alt"]


def frame(engines=("llamacpp",)):
    rows = []
    for engine in engines:
        for precision, bits in (("f16", 16.0), ("q8_0", 8.5), ("q2_k", 3.2)):
            for metric, value in (
                ("size", bits),
                ("perplexity", 3 + 1 / bits),
                ("divergence", 1 / bits**2),
                ("accuracy", bits / 16),
            ):
                rows.append({
                    "metric": metric, "unit": "", "value": value, "low": value * 0.9, "high": value * 1.1,
                    "checkpoint": "edgehome", "engine": engine, "precision": precision, "options": {},
                    "weight_bytes": bits * 1e6, "bits_per_weight": bits,
                    "details": {}, "host": {}, "workload": {}, "when": "2026-01-01",
                })  # fmt: skip
    return pd.DataFrame(rows)


def test_the_ladder_answers_at_every_rung_and_marks_it():
    asked = []
    panel = panels.ladder(
        frame(), lambda precision: asked.append(precision) or f"<reply {precision}>", precision="q8_0"
    )
    controls, data, words = parts(panel)
    slider = controls["precision"]
    assert slider.value == "q8_0" and list(slider.options) == ["f16", "q8_0", "q2_k"] and not slider.continuous_update
    assert data[PLOTLY]["layout"]["shapes"][0]["x0"] == 8.5
    slider.value = "q2_k"
    _, data, words = parts(panel)
    assert asked == ["q8_0", "q2_k"] and data[PLOTLY]["layout"]["shapes"][0]["x0"] == 3.2
    assert "&lt;reply q2_k&gt;" in " ".join(words) and "3.20 MB" in data["text/plain"]


def test_the_ladder_survives_an_engine_that_cannot_answer():
    def ask(precision):
        raise LabkitError("It is not installed.")

    *_, words = parts(panels.ladder(frame(), ask))
    assert "No reply from f16" in " ".join(words)


def test_the_ladder_names_engines_when_there_are_several():
    controls, *_ = parts(panels.ladder(frame(("llamacpp", "openvino")), str))
    assert list(controls["precision"].options)[:2] == ["llamacpp f16", "openvino f16"]


def test_the_static_ladder_shows_every_rung(shown):
    panels.ladder_view(frame(), precision="q8_0")
    assert shown[0]["text/html"].count("<tr>") == 4 and "3 precisions" in shown[0]["text/plain"]
    with pytest.raises(LabkitError, match="no precision 'q9'"):
        panels.ladder_view(frame(), precision="q9")


def test_a_ladder_without_quality_is_one_sentence():
    sizes = frame()
    with pytest.raises(LabkitError, match="none of perplexity, divergence, accuracy"):
        panels.ladder_view(sizes[sizes["metric"] == "size"])


def test_a_quiz_form_judges_and_explains(home):
    one = Question("q1", "Which?", (Option("a", "because <a>", True), Option("b", "not b")))
    many = Question("q2", "Which two?", (Option("a", "A", True), Option("b", "B", True), Option("c", "C")))
    form = panels.quiz(Quiz("x", (one, many)))
    _, choice, button, said = form.children[0].children
    button.click()
    assert "Choose an option first" in said.value
    choice.index = 1
    button.click()
    assert "Not yet" in said.value and "not b" in said.value
    choice.index = 0
    button.click()
    assert "Right" in said.value and "because &lt;a&gt;" in said.value
    _, boxes, button, said = form.children[1].children
    boxes.children[0].value = True
    button.click()
    assert "Not yet" in said.value and "more to tick" in said.value
    boxes.children[1].value = True
    button.click()
    assert "Right" in said.value


def test_every_control_has_a_name_for_the_keyboard_user():
    for panel in (panels.matrix(WEIGHTS), panels.ladder(frame(), str)):
        for child in panel.children:
            if not isinstance(child, (ipywidgets.Output, ipywidgets.HTML)):
                assert child.description

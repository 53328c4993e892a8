"""Figures are read back as data: what they draw must be what the frame says."""

import json

import numpy as np
import pandas as pd
import pytest

from labkit import LabkitError, charts, measure
from labkit.ledger import ledger
from labkit.types import Measurement

HOST = {"system": "Linux", "machine": "x86_64", "cpu": "a", "cpus_usable": 2, "memory_limit_bytes": None}
LADDER = {"f16": (16.0, 5.0, 0.001), "q8_0": (8.5, 5.01, 0.002), "q4_k_m": (4.9, 5.3, 0.03), "tq2_0": (2.4, 40.0, 1.9)}


def taken(metric, engine, precision, bits, values, details=None, host=HOST, workload=None):
    about = {
        "checkpoint": "edgehome", "engine": engine, "precision": precision, "options": {},
        "weight_bytes": int(bits * 1e5), "bits_per_weight": bits,
    }  # fmt: skip
    return Measurement(
        metric, measure.METRICS[metric].unit, tuple(values), about, workload or {"settings": {}}, "1", host,
        "2026-01-01T00:00:00+00:00", details or {},
    )  # fmt: skip


def everything(engine="llamacpp", host=HOST):
    found = []
    for precision, (bits, perplexity, kl) in LADDER.items():
        spread = np.array([0.98, 1.0, 1.02])
        nll = np.log(perplexity) * spread
        found += [
            taken("size", engine, precision, bits, [bits * 1e5]),
            taken("perplexity", engine, precision, bits, nll, {"counts": [255] * 3}),
            taken("divergence", engine, precision, bits, kl * spread, {"counts": [255] * 3}),
            taken("accuracy", engine, precision, bits, [1.0] * 9 + [0.0]),
            taken("speed", engine, precision, bits, 100 * spread, {"quiet": precision != "q8_0"}, host),
            taken("memory", engine, precision, bits, [bits * 2e5], host=host),
            taken(
                "roofline", engine, precision, bits, [400.0],
                {
                    "bandwidth_bytes_per_second": 4e10, "multiply_operations_per_second": 1e11, "reached": 0.5,
                    "ridge_operations_per_byte": 2.5, "decode_operations_per_byte": 16 / bits,
                    "bytes_per_token": {"weights": 1e8, "kv_cache": 0.0},
                },
                host,
            ),
        ]  # fmt: skip
    return found


@pytest.fixture(scope="module")
def frame(tmp_path_factory):
    book = ledger(tmp_path_factory.mktemp("book") / "ledger.jsonl")
    book.append(*everything(), *everything("openvino"))
    return book.frame()


ALL = [
    charts.size_against_perplexity, charts.bits_against_divergence, charts.ladder, charts.decode_speed,
    charts.memory_bars, charts.roofline,
]  # fmt: skip


def test_the_frame_shows_summaries_with_intervals(frame):
    row = frame[(frame.metric == "perplexity") & (frame.precision == "q4_k_m")].iloc[0]
    assert row.value == pytest.approx(5.3) and row.low < row.value < row.high
    assert frame[frame.metric == "accuracy"].value.tolist() == [0.9] * 8


@pytest.mark.parametrize("draw", ALL, ids=lambda f: f.__name__)
def test_every_figure_has_a_title_units_and_is_small(frame, draw):
    figure = json.loads(draw(frame).to_json())
    assert figure["layout"]["title"]["text"]
    assert figure["data"] and len(json.dumps(figure)) < 20_000
    axes = [value for key, value in figure["layout"].items() if key.startswith("yaxis")]
    assert all(axis["title"]["text"] for axis in axes)


@pytest.mark.parametrize("draw", ALL, ids=lambda f: f.__name__)
def test_figures_draw_nothing_from_nothing(frame, draw):
    with pytest.raises(LabkitError, match=r"measure it first: labkit\.measure\."):
        draw(frame[frame.metric == "size"])


def test_same_engine_same_colour_and_same_class_same_marker(frame):
    seen = {}
    for draw in (charts.size_against_perplexity, charts.bits_against_divergence):
        for trace in draw(frame).data:
            assert set(trace.marker.color) == {charts.COLOURS[trace.name]}
            for text, symbol in zip(trace.text, trace.marker.symbol, strict=True):
                assert seen.setdefault(text, symbol) == symbol
    assert len(set(seen.values())) == len(LADDER)


@pytest.mark.parametrize(
    "word, expected",
    {
        "f32": "float 32", "fp32": "float 32", "bf16": "float 16", "fp16": "float 16", "q8_0": "8 bits",
        "int8": "8 bits",
        "q4_k_m": "4 bits", "int4_sym": "4 bits", "nf4": "4 bits", "mxfp4": "4 bits", "iq2_xxs": "2 bits",
        "q2_k": "2 bits", "tq1_0": "ternary", "iq1_s": "1 bit", "q6_k": "6 bits", "strange": "other",
    }.items(),
)  # fmt: skip
def test_precision_classes(word, expected):
    assert charts.precision_class(word) == expected
    assert expected in charts.MARKERS


def test_intervals_are_drawn(frame):
    (trace, _) = charts.bits_against_divergence(frame).data
    rows = charts.points(frame[frame.engine == "llamacpp"], "divergence")
    assert trace.y.tolist() == rows.value.tolist()
    np.testing.assert_allclose(trace.error_y.array + trace.y, rows.high)
    np.testing.assert_allclose(trace.y - trace.error_y.arrayminus, rows.low)


def test_a_busy_machine_is_marked(frame):
    bar = charts.decode_speed(frame).data[0]
    marked = [name for name, shape in zip(bar.x[1], bar.marker.pattern.shape, strict=True) if shape]
    assert marked == ["q8_0 (busy machine)"]


def test_a_point_reached_lies_where_it_should_under_the_roof(frame):
    roof, *engines = charts.roofline(frame).data
    x, y = engines[0].x[0], engines[0].y[0]  # 16 bits: one operation a byte, half of the ceiling reached
    assert (x, y) == (1.0, pytest.approx(0.5 * 400 * 1e8))
    assert max(roof.y) == 1e11
    assert roof.y[0] == pytest.approx(roof.x[0] * 4e10)


def test_only_like_workloads_are_drawn_together(tmp_path):
    book = ledger(tmp_path / "ledger.jsonl")
    for text, precision, value in (
        ("a", "q4", 10.0),
        ("a", "q8", 1.0),
        ("b", "q4", 20.0),
        ("b", "q2", 90.0),
        ("b", "q8", 2.0),
    ):
        details = {"counts": [10]}
        book.append(taken("divergence", "mlx", precision, 4.5, [value], details, workload={"tokens_hash": text}))
    assert sorted(charts.points(book.frame(), "divergence").value) == [2.0, 20.0, 90.0]
    book.append(taken("divergence", "mlx", "q3", 4.5, [5.0], {"counts": [10]}, workload={"tokens_hash": "a"}))
    book.append(taken("divergence", "mlx", "q6", 4.5, [4.0], {"counts": [10]}, workload={"tokens_hash": "a"}))
    with pytest.warns(UserWarning, match="another workload: mlx q2"):
        assert sorted(charts.points(book.frame(), "divergence").value) == [1.0, 4.0, 5.0, 10.0]


def test_more_rounds_are_no_other_workload(tmp_path):
    book = ledger(tmp_path / "ledger.jsonl")
    for rounds in (3, 7):
        book.append(taken("speed", "mlx", "q4", 4.5, [float(rounds)], workload={"prompt_tokens": 8, "rounds": rounds}))
    assert charts.points(book.frame(), "speed").value.tolist() == [7.0]


def test_headline_has_a_row_an_artifact(frame):
    table = charts.headline(frame)
    assert len(table) == 2 * len(LADDER)
    first = table.iloc[0]
    assert (first["engine"], first["precision"], first["size MB"], first["bits per weight"]) == (
        "llamacpp",
        "f16",
        1.6,
        16,
    )
    assert first["from"] <= first["decode tokens/s"] <= first["to"]
    assert first["task accuracy"] == 0.9 and first["perplexity"] == pytest.approx(5.0)


def test_headline_leaves_unmeasured_cells_empty(frame):
    table = charts.headline(frame[frame.metric.isin(["size", "accuracy"])])
    assert table["decode tokens/s"].isna().all() and table["task accuracy"].notna().all()
    with pytest.raises(LabkitError, match="empty"):
        charts.headline(frame[:0])


def test_speeds_of_unlike_machines_are_refused(tmp_path):
    book = ledger(tmp_path / "ledger.jsonl")
    book.append(*everything(), *everything("mlx", host={**HOST, "cpu": "b"}))
    for draw in (charts.headline, charts.decode_speed, charts.memory_bars, charts.roofline):
        with pytest.raises(LabkitError, match="unlike machines"):
            draw(book.frame())
    assert charts.bits_against_divergence(book.frame()).data


def test_bundle_carries_picture_table_and_text(frame):
    table = charts.headline(frame)
    found = charts.bundle(charts.ladder(frame), alt="Perplexity rises <below> 4 bits.", table=table, caption="Ladder")
    figure = found["application/vnd.plotly.v1+json"]
    assert figure["layout"]["meta"]["alt"] == "Perplexity rises <below> 4 bits."
    assert json.loads(json.dumps(figure)) == figure
    page = found["text/html"]
    assert "<caption>Ladder</caption>" in page and "scope='col'>bits per weight<" in page
    assert page.count("<tr>") == 1 + len(table)
    assert found["text/plain"].startswith("Perplexity rises") and "q4_k_m" in found["text/plain"]


def test_html_is_escaped_and_numbers_are_short():
    frame = pd.DataFrame({"a<b": ["<script>", None], "x": [1 / 3, np.nan], "n": [1234567, 2], "ok": [True, False]})
    page = charts.html_table(frame.set_index("a<b"), "c & d")
    assert "<script>" not in page and "a&lt;b" in page and "c &amp; d" in page
    assert "0.33333<" in page and "1,234,567" in page and "<td>yes</td>" in page and "nan" not in page


@pytest.mark.parametrize("alt", ["", "   ", None])
def test_alternative_text_is_required(frame, alt):
    with pytest.raises(LabkitError, match="alt"):
        charts.show(charts.ladder(frame), alt=alt, table=frame)


@pytest.mark.parametrize("table", [None, pd.DataFrame()])
def test_a_table_is_required(frame, table):
    with pytest.raises(LabkitError, match="table"):
        charts.show(charts.ladder(frame), alt="Words.", table=table)


def test_show_displays_the_bundle(frame, monkeypatch):
    import IPython.display

    import labkit

    shown = []
    monkeypatch.setattr(IPython.display, "display", lambda data, raw: shown.append((data, raw)))
    labkit.show(charts.ladder(frame), alt="Words.", table=frame[["precision", "value"]])
    (data, raw), (words, _) = shown
    assert raw and set(data) == {"application/vnd.plotly.v1+json", "text/html", "text/plain"}
    assert data["text/html"] in words["text/html"] and words["text/html"].startswith("<details"), "notebooks draw the figure only"


def test_no_figure_offers_to_upload_itself(frame):
    figure = charts.bundle(charts.ladder(frame), alt="Words.", table=frame[["precision"]])["application/vnd.plotly.v1+json"]
    assert figure["config"]["showSendToCloud"] is False and figure["config"]["displayModeBar"] is False


def test_plotly_colours_become_safe_ones_and_chosen_ones_stay():
    import plotly.express as px

    drawn = px.bar({"x": list("abcd"), "y": [1, 2, 3, 4]}, x="x", y="y", color="x")
    drawn.add_bar(x=["e"], y=[5], marker_color="#123456")
    found = charts.bundle(drawn, alt="Words.", table=pd.DataFrame({"y": [1]}))["application/vnd.plotly.v1+json"]
    colours = [trace["marker"]["color"] for trace in found["data"]]
    assert colours == [charts.BLUE, charts.ORANGE, charts.GREEN, charts.RED, "#123456"]


def test_row_names_are_kept_as_headers_and_row_numbers_are_not():
    described = charts.html_table(pd.DataFrame({"x": [1.0, 2.0]}, index=["mean", "m<x"]), "c")
    assert "<td></td><th scope='col'>x</th>" in described and "<th scope='row'>m&lt;x</th>" in described
    assert "<th scope='row'>" not in charts.html_table(pd.DataFrame({"x": [1, 2, 3]}).iloc[1:], "c")


def test_histogram_counts_every_weight_and_draws_the_levels():
    weights = np.random.default_rng(0).normal(0, 1, (64, 64))
    figure = charts.weight_histogram(weights, levels=[-1.0, 0.0, 1.0])
    assert sum(figure.data[0].y) == weights.size
    assert [shape.x0 for shape in figure.layout.shapes] == [-1.0, 0.0, 1.0]


def test_heatmap_keeps_the_mean_square_and_bounds_the_figure():
    error = np.random.default_rng(0).normal(0, 1, (512, 384))
    figure = charts.error_heatmap(error, cells=64)
    assert figure.data[0].z.shape == (64, 64)
    assert np.mean(figure.data[0].z ** 2) == pytest.approx(np.mean(error**2), rel=1e-5)
    spike = np.zeros((7, 5))
    spike[3, 2] = -2.0
    assert np.argwhere(charts.error_heatmap(spike).data[0].z).tolist() == [[3, 2]]
    with pytest.raises(LabkitError, match="matrix"):
        charts.error_heatmap(np.zeros(3))


def test_levels_draw_each_value_once():
    figure = charts.levels({"ternary": [-1, 0, 1], "int2": [-2, -1, 0, 1]})
    assert [list(trace.x) for trace in figure.data] == [[-1, 0, 1], [-2, -1, 0, 1]]

"""ONNX graphs below GenAI: sessions and their cache, levels of optimization, providers, static int8, folded factors."""

from __future__ import annotations

import numpy as np
import pytest

import labkit
from labkit import LabkitError, house, onnx_graphs, onnx_quantize
from labkit.engines import onnxruntime as engine
from labkit.methods import fold, forward, smoothquant

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
genai = pytest.importorskip("onnxruntime_genai")


@pytest.fixture(scope="module")
def ck():
    return labkit.checkpoint("edgehome")


@pytest.fixture(scope="module")
def windows(ck):
    """(calibration, held out): windows of 48 tokens."""
    cut = [ck.encode(text[:6000]) for text in (house.calibration_text(), house.heldout_text())]
    return [[ids[i : i + 48] for i in range(0, 48 * 4, 48)] for ids in cut]


@pytest.fixture(scope="module")
def source(ck, tmp_path_factory):
    return engine.write_genai(ck, tmp_path_factory.mktemp("graph") / "fp32", "fp32", shared=False) / "model.onnx"


def random_feed_forward(hidden: int = 16, inner: int = 24) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    shapes = {"norm": (hidden,), "gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner), "after": (hidden,)}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def test_every_level_answers_what_numpy_does_with_fewer_nodes():
    w = random_feed_forward()
    graph = onnx_graphs.plain_feed_forward(w, 1e-5)
    onnx.checker.check_model(graph, full_check=True)
    x = np.random.default_rng(0).normal(size=(1, 7, 16)).astype(np.float32)

    def norm(value, gain):
        return value / np.sqrt(np.mean(value**2, axis=-1, keepdims=True) + 1e-5) * gain

    inside = norm(x, w["norm"])
    gate = inside @ w["gate"].T
    expected = norm(x + (gate / (1 + np.exp(-gate)) * (inside @ w["up"].T)) @ w["down"].T, w["after"])
    counts = []
    for level in onnx_graphs.LEVELS:
        assert np.allclose(onnx_graphs.session(graph, level).run(None, {"x": x})[0], expected, atol=1e-4)
        counts.append(sum(onnx_graphs.operators(graph, level).values()))
    assert counts[0] == sum(onnx_graphs.operators(graph).values()) > counts[1] > counts[2] >= counts[3]
    assert onnx_graphs.operators(graph, "extended")["SimplifiedLayerNormalization"] == 2
    with pytest.raises(LabkitError, match="disabled, basic"):
        onnx_graphs.session(graph, "most")


def test_a_session_agrees_with_the_engine_and_its_cache_with_no_cache(ck, source, windows):
    opened, ids = onnx_graphs.session(source, threads=1), windows[1][0]
    with engine.GenaiRunner(source.parent, exact=True, threads=1) as run:
        assert np.allclose(onnx_graphs.logits(opened, ids), run.logits(ids), atol=1e-4)
        step, made = onnx_graphs.stepper(opened), []
        row = step(ids[:20])
        for _ in range(8):
            made.append(int(row.argmax()))
            row = step(made[-1:])
        assert made == list(run.generate(ids[:20], 8))


def test_perplexity_and_divergence(source, windows):
    opened = onnx_graphs.session(source)
    rows = onnx_graphs.logits(opened, windows[1][0])[:-1].astype(np.float64)
    shares = np.exp(rows) / np.exp(rows).sum(axis=1, keepdims=True)
    expected = np.exp(-np.mean(np.log(shares[np.arange(47), windows[1][0][1:]])))
    assert onnx_graphs.perplexity(opened, windows[1][:1]) == pytest.approx(expected)
    assert onnx_graphs.divergence(opened, opened, windows[1][:1]) == 0


def test_providers_name_the_cpu_and_only_true_and_false():
    table = onnx_graphs.providers().set_index("provider")
    assert table.loc["CPU", "ONNX Runtime here"] and table.loc["CPU", "GenAI knows it"]
    assert {"CUDA", "Dml", "QNN", "WebGpu", "OpenVINO"} <= set(table.index)
    assert set(table["ONNX Runtime here"]) | set(table["GenAI knows it"]) <= {True, False}


def test_seconds_are_taken_in_turns():
    order = []

    class Session:
        def __init__(self, name):
            self.name = name

        def run(self, outputs, inputs):
            order.append(self.name)

    found = onnx_graphs.seconds([Session("a"), Session("b")], {}, rounds=4, least=0.0)
    assert found.shape == (2, 4) and (found > 0).all()
    assert "".join(order) == "ab" + "ba" + "ab" + "ba" + "ab"


def test_static_int8_learns_the_ranges_it_is_shown(ck, source, windows, tmp_path):
    calibration, unseen = windows
    llama = forward.open_llama(ck)
    x = forward.capture(llama, calibration)[("model.layers.0.mlp.down_proj.weight",)]
    made = onnx_quantize.static(source, tmp_path / "s.onnx", calibration)
    scale, zero = onnx_quantize.ranges(made)["/model/layers.0/mlp/Mul/output_0"]
    assert scale == pytest.approx((x.max() - x.min()) / 255, rel=1e-3) and zero == round(-x.min() / scale)
    exact = onnx_graphs.session(source)
    good = onnx_graphs.divergence(onnx_graphs.session(made), exact, unseen)
    narrow = onnx_quantize.static(source, tmp_path / "n.onnx", [[calibration[0][0]] * 48])
    assert good * 2 < onnx_graphs.divergence(onnx_graphs.session(narrow), exact, unseen)
    kept = onnx_quantize.static(source, tmp_path / "k.onnx", calibration, keep=("down_proj",))
    assert onnx_graphs.operators(kept, "all")["MatMul"] == ck.config["num_hidden_layers"]
    assert onnx_graphs.divergence(onnx_graphs.session(kept), exact, unseen) < good


def test_both_forms_of_static_int8_compute_the_same(source, windows, tmp_path):
    forms = [onnx_quantize.static(source, tmp_path / f"{form}.onnx", windows[0][:2], form=form) for form in onnx_quantize.FORMS]
    stored = [onnx_graphs.operators(path) for path in forms]
    assert stored[0]["MatMul"] and not stored[0]["QLinearMatMul"] and stored[1]["QLinearMatMul"] and not stored[1]["MatMul"]
    one, other = (onnx_graphs.logits(onnx_graphs.session(path), windows[1][0]) for path in forms)
    assert np.array_equal(one, other)


@pytest.mark.parametrize("wrong", [{"method": "Guess"}, {"form": "Words"}, {"windows": []}])
def test_static_refuses_what_it_does_not_know(source, tmp_path, wrong):
    options = {"windows": [[1, 2, 3]], **wrong}
    with pytest.raises(LabkitError, match="expected one of"):
        onnx_quantize.static(source, tmp_path / "s.onnx", options.pop("windows"), **options)


def test_folding_changes_no_answer_and_helps_static_int8(ck, source, windows, tmp_path):
    ids, unseen = ck.encode(house.calibration_text()[:12000]), windows[1]
    calibration = [ids[i : i + 128] for i in range(0, 128 * 8, 128)]  # too few tokens give factors that fit only these
    llama = forward.open_llama(ck)
    inputs = forward.capture(llama, calibration)
    sites = [site for site in inputs if fold.foldable(site)]
    factors = {s: smoothquant.factors(np.vstack([llama.weights[name] for name in s]), inputs[s], 0.7) for s in sites}
    weights = fold.fold(llama, factors)
    changed = [name for name in weights if not np.array_equal(weights[name], llama.weights[name])]
    assert len(sites) == 3 * ck.config["num_hidden_layers"] and len(changed) == 8 * ck.config["num_hidden_layers"]
    smooth = fold.write_checkpoint(ck, weights, tmp_path / "smooth")
    assert np.allclose(forward.open_llama(smooth).logits(unseen[0]), llama.logits(unseen[0]), atol=1e-3)
    moved = engine.write_genai(smooth, tmp_path / "onnx", "fp32", shared=False) / "model.onnx"
    exact, kl = onnx_graphs.session(source), []
    for graph in (source, moved):
        made = onnx_quantize.static(graph, tmp_path / "s.onnx", calibration)
        kl.append(onnx_graphs.divergence(onnx_graphs.session(made), exact, unseen))
    assert kl[1] < kl[0] / 1.5


def test_the_input_of_o_proj_is_not_folded(ck):
    llama = forward.open_llama(ck)
    site = ("model.layers.0.self_attn.o_proj.weight",)
    assert not fold.foldable(site)
    with pytest.raises(LabkitError, match="o_proj"):
        fold.fold(llama, {site: np.ones(256, np.float32)})

"""Olive: workflows that run without a network, what they record, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import labkit
from labkit import LabkitError, Recipe
from labkit.engines import olive as engine
from labkit.engines import onnxruntime

pytest.importorskip("olive")
pytest.importorskip("onnxruntime_genai")

TEXT = "Turn on the light in the kitchen, set a timer for 5 minutes and close the blinds in the bedroom, please. "


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "calibration.txt"
    file.write_text(TEXT * 60)
    return file


@pytest.mark.slow
def test_gptq_workflow_leaves_all_it_needs_to_be_repeated(tiny_llama, text, tmp_path):
    recipe = Recipe("olive", "int4", algorithm="gptq", calibration=str(text), samples=4, window=64)
    built = labkit.build(tiny_llama, recipe, out=tmp_path / "gptq")
    assert [p["pass"] for p in built.settings["passes"]] == ["gptq", "modelbuilder"]
    assert all(p["seconds"] > 0 for p in built.settings["passes"])
    assert built.settings["metrics"]["perplexity"] > 1 and built.settings["calibration"] == "calibration.txt"
    config = json.loads((built.path / "olive.json").read_text())
    assert config["passes"]["quantize"]["group_size"] == 32
    assert config == engine.workflow(labkit.checkpoint(tiny_llama), "int4", **recipe.options)
    kept = {file.name for file in built.path.iterdir()}
    assert kept >= {"model.onnx", "genai_config.json", "calibration.json", "footprint.json"}
    assert not kept & {"cache", "hub", "olive"}
    assert any("embedding stays float32" in note for note in built.notes)


@pytest.mark.slow
def test_static_int8_stays_close_to_float32(tiny_llama, text, tmp_path):
    recipe = Recipe("olive", "int8_static", calibration=str(text), samples=4, window=64)
    built = labkit.build(tiny_llama, recipe, out=tmp_path / "static")
    window = json.loads((built.path / "evaluation.json").read_text())[0]
    float32 = labkit.build(tiny_llama, Recipe("onnxruntime", "fp32"), out=tmp_path / "fp32")
    with labkit.load(built) as run, labkit.load(float32, exact=True) as exact:
        found, expected = run.logits(window), exact.logits(window)
    assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.98
    assert built.settings["metrics"]["perplexity"] > 1
    summary = onnxruntime.graph_summary(built.path / "model.onnx")
    assert summary["operators"]["QuantizeLinear"] > 0 and summary["operators"]["GroupQueryAttention"] == 2


@pytest.mark.slow
def test_command_line_makes_the_folder_of_the_configuration(tiny_llama, tmp_path):
    """`olive run-pass` and the onnxruntime engine call the same builder: equal weights, byte for byte."""
    engine.run_cli(
        ["run-pass", "--pass-name", "ModelBuilder", "--pass-config", '{"precision": "int4", "int4_block_size": 32}',
         "-m", tiny_llama, "-o", tmp_path / "made"], tmp_path,
    )  # fmt: skip
    checkpoint = labkit.checkpoint(tiny_llama)
    direct = onnxruntime.build_genai(checkpoint, tmp_path / "direct", "int4", int4_block_size=32)
    made = next((tmp_path / "made").rglob("model.onnx"))
    assert onnxruntime.weight_bytes(made) == onnxruntime.weight_bytes(direct / "model.onnx")
    assert made.with_name("model.onnx.data").read_bytes() == (direct / "model.onnx.data").read_bytes()


def test_workflows_name_their_passes(tiny_llama):
    checkpoint = labkit.checkpoint(tiny_llama)
    kinds = {
        ("fp32", None): ["ModelBuilder"],
        ("int8", None): ["ModelBuilder", "OnnxBlockWiseRtnQuantization"],
        ("int8_dynamic", None): ["ModelBuilder", "OnnxDynamicQuantization"],
        ("int8_static", None): ["ModelBuilder", "OnnxStaticQuantization"],
        ("int4", "rtn"): ["ModelBuilder", "OnnxBlockWiseRtnQuantization"],
        ("int4", "k_quant"): ["ModelBuilder", "OnnxKQuantQuantization"],
        ("int4", "hqq"): ["ModelBuilder", "OnnxHqqQuantization"],
        ("int4", "gptq"): ["Gptq", "ModelBuilder"],
    }
    assert {precision for precision, _ in kinds} == set(engine.PRECISIONS)
    for (precision, algorithm), expected in kinds.items():
        config = engine.workflow(checkpoint, precision, **({"algorithm": algorithm} if algorithm else {}))
        assert [p["type"] for p in config["passes"].values()] == expected
        assert json.loads(json.dumps(config)) == config
        assert config["data_configs"][0]["load_dataset_config"]["data_files"] == "calibration.json"


@pytest.mark.parametrize(
    ("precision", "options", "says"),
    [
        ("fp32", {"block_size": 32}, "calibration, samples, window"),
        ("int4", {"algorithm": "awq"}, "gptq"),
        ("int4", {"block_size": 20}, "16, 32"),
        ("int8_static", {"method": "guess"}, "Entropy"),
        ("int8_static", {"samples": 0}, "at least 2"),
        ("int8", {"calibration": "no such file.txt"}, "cannot be read"),
    ],
)
def test_options_that_cannot_be_had(tiny_llama, tmp_path, precision, options, says):
    with pytest.raises(LabkitError, match=says) as error:
        labkit.build(tiny_llama, Recipe("olive", precision, **options), out=tmp_path / "out")
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_a_text_too_short_to_calibrate_on(tiny_llama, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text(TEXT)
    with pytest.raises(LabkitError, match="longer text"):
        labkit.build(tiny_llama, Recipe("olive", "int8_static", calibration=str(short)), out=tmp_path / "out")

"""Olive's commands in one process: what they leave, what they say when they fail, and that nothing is sent or fetched."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest

import labkit
from labkit import LabkitError, engines, onnx_graphs, onnx_quantize
from labkit.engines import _olive_evaluator, onnxruntime
from labkit.engines import olive as engine

TEXT = "Turn on the light in the kitchen, set a timer for 5 minutes and close the blinds in the bedroom, please. "
CPU = {"type": "LocalSystem", "accelerators": [{"device": "cpu", "execution_providers": ["CPUExecutionProvider"]}]}


def test_without_olive_every_command_answers_with_the_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(engines, "version", lambda name: None)
    with engine.Shell(tmp_path / "work") as shell:
        assert "pip install" in shell.absent
        said = shell.run("optimize", "-m", "x")
    assert said.output == shell.absent and shell.absent in repr(said) and not (tmp_path / "work").exists()
    assert engine.steps(tmp_path / "work").empty and list(engine.passes_of(tmp_path / "no.json")) == []


def test_a_workflow_needs_a_model_and_passes(tmp_path):
    with pytest.raises(LabkitError, match="input_model and passes"):
        engine.write_workflow({"passes": {}}, tmp_path / "x.json")


def test_the_registry_is_read_without_importing_olive():
    pytest.importorskip("olive")
    table = engine.registered().set_index("pass")
    assert table.loc["ModelBuilder", "works on"] == "onnx" and table.loc["Gptq", "works on"] == "pytorch"


@pytest.fixture(scope="module")
def shell(tmp_path_factory):
    pytest.importorskip("olive")
    pytest.importorskip("onnxruntime_genai")
    with engine.Shell(tmp_path_factory.mktemp("olive")) as opened:
        yield opened


@pytest.fixture(scope="module")
def search(shell, tiny_llama):
    """A search over four ways to round, run once: its configuration."""
    ck = labkit.checkpoint(tiny_llama)
    (shell.folder / "text.txt").write_text(TEXT * 60)
    engine.write_data(ck, shell.folder, text=shell.folder / "text.txt", samples=2, window=48)
    onnxruntime.write_genai(ck, shell.folder / "fp32", "fp32")
    script = 'from labkit.engines import _olive_evaluator\n_olive_evaluator.register("evaluation.json")\n'
    (shell.folder / "evaluate.py").write_text(script)
    metrics = copy.deepcopy(engine.METRICS)
    metrics[0]["sub_types"][0]["goal"] = {"type": "percent-max-degradation", "value": 50.0}
    rounding = {"type": "OnnxBlockWiseRtnQuantization", "bits": 4, "block_size": engine.search_over(32, 128),
                "is_symmetric": engine.search_over(True, False), "accuracy_level": 1, "save_as_external_data": True}  # fmt: skip
    config = {
        "input_model": {"type": "OnnxModel", "model_path": "fp32", "onnx_file_name": "model.onnx"},
        "systems": {"cpu": CPU}, "host": "cpu", "target": "cpu", "cache_dir": "cache", "output_dir": "found",
        "evaluators": {"ours": {"type": engine.NAME, "user_script": "evaluate.py", "metrics": metrics}}, "evaluator": "ours",
        "evaluate_input_model": True, "passes": {"quantize": rounding},
        "search_strategy": {"execution_order": "joint", "sampler": "sequential"},
    }  # fmt: skip
    engine.write_workflow(config, shell.folder / "search.json")
    shell.run("run", "--config", "search.json")
    return config


@pytest.mark.slow
def test_a_dry_run_writes_the_plan_and_nothing_else(shell, tiny_llama):
    said = shell.run("optimize", "-m", tiny_llama, "-o", "plan", "--precision", "int4", "--dry_run")
    assert said.command.startswith("olive optimize") and said.seconds > 0
    assert engine.passes_of(shell.folder / "plan" / "config.json") == ["Gptq", "ModelBuilder"]
    assert not (shell.folder / "plan" / "model.onnx").exists()


@pytest.mark.slow
def test_a_search_finds_the_perplexity_we_compute_ourselves(shell, search):
    found = engine.steps(shell.folder / "found")
    assert len(found) == 5 and found["pass"].iloc[0] == "input model"
    made = found.iloc[1:]
    assert {"block_size=32", "block_size=128"} == {s for row in made["settings"] for s in row.split(", ") if s.startswith("block")}
    assert (made["MB"] < 5).all() and (made["operators"] > 10).all() and made["goal met"].all()
    windows = json.loads((shell.folder / "evaluation.json").read_text())
    own = onnx_graphs.perplexity(onnx_graphs.session(shell.folder / "fp32" / "model.onnx"), windows)
    assert found["text-perplexity"].iloc[0] == pytest.approx(own, rel=1e-5)
    assert _olive_evaluator.perplexity(shell.folder / "fp32" / "model.onnx", shell.folder / "evaluation.json") == pytest.approx(own)


@pytest.mark.slow
def test_the_second_run_takes_everything_from_the_cache(shell, search):
    log = search | {"log_severity_level": 1, "output_dir": "again"}
    engine.write_workflow(log, shell.folder / "again.json")
    said = shell.run("run", "--config", "again.json")
    assert said.output.count("Loaded model from cache") == 4
    before, after = (engine.steps(shell.folder / name) for name in ("found", "again"))
    assert sorted(before["model"]) == sorted(after["model"]) and after["seconds"].sum() < 0.5 * before["seconds"].sum()


@pytest.mark.slow
def test_its_rounding_to_nearest_is_the_kernels(shell, search, tiny_llama):
    shell.run("quantize", "-m", "fp32", "-o", "rtn", "--algorithm", "rtn", "--precision", "int4")
    checkpoint = labkit.checkpoint(tiny_llama)
    folder = onnxruntime.write_genai(checkpoint, shell.folder / "ours", "int4", block_size=128, algorithm="default", shared=False)
    theirs, ours = (onnx_quantize.restore_blocks(path / "model.onnx") for path in (shell.folder / "rtn", folder))
    for name, weights in ours.items():
        same = next(found for key, found in theirs.items() if key.startswith(name))
        assert np.array_equal(same, weights)


@pytest.mark.slow
def test_a_failing_command_says_why_and_the_shell_goes_on(shell, search):
    with pytest.raises(LabkitError, match=r"olive run failed: .*no\.json") as error:
        shell.run("run", "--config", "no.json")
    assert "\n" not in str(error.value)
    assert shell.run("run", "--config", "search.json").seconds > 0


@pytest.mark.slow
def test_a_closed_shell_refuses(tmp_path):
    pytest.importorskip("olive")
    opened = engine.Shell(tmp_path)
    opened.close()
    opened.close()
    with pytest.raises(LabkitError, match="closed"):
        opened.run("run")

"""Runs in MLflow, the registry's aliases, the sentence without it; search with a budget."""

from __future__ import annotations

import subprocess
import sys

import pytest

from labkit.train import search, track
from labkit.types import LabkitError


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """One home for all: MLflow takes seconds to make its tables."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LABKIT_HOME", str(tmp_path_factory.mktemp("runs")))
        yield tmp_path_factory.getbasetemp()


def test_runs_are_kept_with_settings_and_curves(home):
    pytest.importorskip("mlflow")
    with track.run("first", {"rate": 1e-3, "rank": 8}) as log:
        for step in range(1, 121):
            log.row(
                step,
                {
                    "step": step,
                    "loss": 1 / step,
                    "norm": float("inf") if step == 3 else 1.0,
                    "tokens": 7,
                    "seconds": 0.1,
                    "rate": 0.1,
                },
            )
    with pytest.raises(ZeroDivisionError), track.run("second", {"rate": 1e-2}) as log:
        log.row(1, {"loss": 2.0})
        1 / 0  # noqa: B018
    found = track.frame().set_index("run")
    assert list(found["status"]) == ["FINISHED", "FAILED"] and found.loc["first", "loss"] == pytest.approx(1 / 120)
    assert found.loc["first", "rank"] == "8" and found.loc["second", "loss"] == 2.0

    import mlflow

    client = mlflow.MlflowClient(track.uri())
    run = client.search_runs([client.get_experiment_by_name("labkit").experiment_id], order_by=["start_time"])[0]
    assert [m.value for m in client.get_metric_history(run.info.run_id, "loss")] == [1 / s for s in range(1, 121)]
    assert 3 not in [m.step for m in client.get_metric_history(run.info.run_id, "norm")]
    assert (track.folder() / "runs.db").exists() and home in track.folder().parents


def test_aliases_move_from_version_to_version(home, tmp_path):
    pytest.importorskip("mlflow")
    for number in (1, 2):
        folder = tmp_path / f"v{number}" / "model"
        folder.mkdir(parents=True)
        (folder / "weights.txt").write_text(str(number))
        with track.run(f"run {number}", {}) as log:
            assert log.register(folder, "edgehome-lora", "newest", *["champion"] * (number == 1)) == str(number)
    assert (track.registered("edgehome-lora", "newest") / "weights.txt").read_text() == "2"
    assert (track.registered("edgehome-lora", "champion") / "weights.txt").read_text() == "1"
    track.point("edgehome-lora", "champion", "2")
    assert (track.registered("edgehome-lora", "champion") / "weights.txt").read_text() == "2"
    track.point("edgehome-lora", "champion", "1")  # and back
    assert (track.registered("edgehome-lora", "champion") / "weights.txt").read_text() == "1"
    with pytest.raises(LabkitError, match="No version 9 of the model 'edgehome-lora'"):
        track.point("edgehome-lora", "champion", "9")
    with pytest.raises(LabkitError, match="No model 'edgehome-lora' has the alias 'retired'"):
        track.registered("edgehome-lora", "retired")


def test_without_mlflow_the_same_code_runs_and_says_so_once(tmp_path):
    code = (
        "import importlib.util as u; real = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'mlflow' else real(name, *a)\n"
        "from labkit.train import track\n"
        "for name in 'ab':\n"
        "    with track.run(name, {'x': 1}) as log:\n"
        "        log.row(1, {'loss': 1.0}); log.keep('nowhere'); print(log.register('nowhere', 'm', 'a'), log.id)\n"
        "print(len(track.frame()))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert lines[0] == 'MLflow is not installed, so this run is not logged. Try:  pip install "labkit[track]"'
    assert lines[1:] == ["None None", "None None", "0"]


def test_a_run_of_the_loop_is_logged(home):
    pytest.importorskip("mlflow")
    torch = pytest.importorskip("torch")
    from dataclasses import asdict

    from labkit.train.llama import Llama, Shape
    from labkit.train.loop import Settings, train
    from labkit.train.rows import Encoded, batches, pack

    torch.manual_seed(0)
    model = Llama(Shape(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1))
    rows = pack([Encoded([1, 5, 6, 7, 2], [0, 1, 1, 1, 1], "x")], 8)
    settings = Settings(steps=4, rate=1e-2)
    with track.run("loop", asdict(settings), "another experiment") as log:
        run = train(model, batches(rows, 1), settings, log=log.row, progress=False)
    found = track.frame("another experiment")
    assert found["loss"][0] == pytest.approx(run.curves[-1]["loss"]) and found["steps"][0] == "4"


# --- search ----------------------------------------------------------------------------------------------------------

SPACE = {"rate": search.Between(1e-6, 1e-1, log=True), "rank": (4, 8, 16), "dropout": search.Between(0.0, 0.5)}


def bowl(settings, report=lambda step, value: None):
    """Least at rate 1e-3, rank 16, no dropout."""
    from math import log10

    return (log10(settings["rate"]) + 3) ** 2 + (16 - settings["rank"]) / 8 + settings["dropout"]


@pytest.mark.parametrize("sampler", search.SAMPLERS)
def test_a_search_is_seeded_and_finds_a_good_place(sampler):
    pytest.importorskip("optuna")
    found = search.search(bowl, SPACE, trials=40, sampler=sampler, seed=1)
    assert found.value == min(t["value"] for t in found.trials) == pytest.approx(bowl(found.best))
    assert len(found.trials) == 40 and found.value < 1 and 1e-6 <= found.best["rate"] <= 1e-1
    assert search.search(bowl, SPACE, trials=40, sampler=sampler, seed=1).trials == found.trials
    assert search.search(bowl, SPACE, trials=40, sampler=sampler, seed=2).best != found.best
    assert set(found.frame().columns) == {"rate", "rank", "dropout", "value", "steps", "state"}


def test_halving_spends_less_and_budgets_are_kept():
    pytest.importorskip("optuna")

    def slow(settings, report):
        for step in (4, 8, 16, 32):
            report(step, bowl(settings) + 10 / step)
        return bowl(settings)

    whole = search.search(slow, SPACE, trials=24, sampler="random", seed=1)
    halved = search.search(slow, SPACE, trials=24, sampler="random", seed=1, halving=4)
    assert whole.steps == 24 * 32 and halved.steps < 0.6 * whole.steps
    assert {t["state"] for t in halved.trials} == {"complete", "pruned"} and halved.value < 2 * whole.value + 0.5
    short = search.search(slow, SPACE, trials=24, steps=100, sampler="random", seed=1)
    assert len(short.trials) == 4 and short.steps == 128


def test_senseless_searches_get_a_sentence():
    with pytest.raises(LabkitError, match="sampler='grid'"):
        search.search(bowl, SPACE, sampler="grid")
    with pytest.raises(LabkitError, match=r"rate: from 0\.0 to 1\.0"):
        search.search(bowl, {"rate": search.Between(0.0, 1.0, log=True)})

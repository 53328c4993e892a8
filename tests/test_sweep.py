"""The headline table: every engine has its rows, the ledger is not measured twice, what is absent is said."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from labkit import engines, host
from labkit.course import sweep
from labkit.ledger import ledger
from labkit.types import Artifact, LabkitError, Measurement, Recipe

CHECKPOINT = SimpleNamespace(name="edgehome", revision="r1", trained=True)
VALUES = {
    "size": (5e6,),
    "speed": (100.0, 110.0, 105.0),
    "perplexity": (1.0, 1.2),
    "divergence": (0.1, 0.2),
    "accuracy": (1.0, 0.0),
}
DETAILS = {
    "perplexity": {"counts": [10, 10], "bytes": [20, 20], "sum_of_squares": 30.0},
    "divergence": {"counts": [10, 10]},
    "speed": {"quiet": True, "reason": ""},
    "accuracy": {"counts": {}},
}


def artifact(engine, precision):
    return Artifact(None, Recipe(engine, precision), CHECKPOINT, 5_000_000, 5_000_000, 8.0, 1.0, "1.0", notes=())


def measurement(one, metric, effort):
    about = {
        "checkpoint": "edgehome",
        "revision": "r1",
        **one.recipe.to_json(),
        "weight_bytes": one.weight_bytes,
        "bits_per_weight": 8.0,
    }
    workload = {"limit": effort.windows, "tasks": effort.tasks, "intents": None, "rounds": effort.rounds}
    return Measurement(
        metric, "", VALUES[metric], about, workload, "1.0", host.circumstances(), "2026-01-01", DETAILS.get(metric, {})
    )


@pytest.fixture
def world(home, monkeypatch):
    """Engines that build at once and measures that count what they were asked."""
    asked = []

    def build(model, recipe):
        if recipe.engine == "openvino":
            raise LabkitError("OpenVINO is not installed. Try:  pip install …")
        if recipe.precision == "q2_k":
            raise LabkitError("Rows of 100 do not divide by 256.")
        return artifact(recipe.engine, recipe.precision)

    effort = sweep.measure.PROFILES["ci"]

    def quality(artifact, reference, effort):
        asked.append(("quality", artifact.recipe.precision))
        return [measurement(artifact, metric, effort) for metric in ("perplexity", "divergence", "accuracy")]

    def compare(artifacts, **options):
        asked.extend(("speed", f"{a.recipe.engine} {a.recipe.precision}") for a in artifacts)
        return [measurement(a, "speed", effort) for a in artifacts]

    monkeypatch.setattr(sweep, "build", build)
    monkeypatch.setattr(sweep, "checkpoint", lambda name: CHECKPOINT)
    monkeypatch.setattr(sweep.measure, "remembered", lambda reference: nullcontext(reference.name))
    monkeypatch.setattr(sweep.measure, "size", lambda a: measurement(a, "size", effort))
    monkeypatch.setattr(sweep.measure, "quality", quality)
    monkeypatch.setattr(sweep.measure, "compare", compare)
    monkeypatch.setattr(engines, "version", lambda name: None if name == "openvino" else "1.0")
    monkeypatch.setattr(sweep.platform, "system", lambda: "Linux")
    return asked


def test_every_engine_has_its_rows_and_what_is_absent_says_why(world):
    rows = sweep.headline("ci")
    assert {row["engine"] for row in rows} == {engines.engine(name).TITLE for name in engines.ENGINES}
    notes = {(row["engine"], row["precision"]): row["note"] for row in rows}
    assert notes["OpenVINO", "f16"].startswith("OpenVINO is not installed") and ("OpenVINO", "int4_sym") not in notes
    assert notes["llama.cpp", "q2_k"] == "Rows of 100 do not divide by 256."
    (first, *_) = rows
    assert (
        first["size"] == "5.00 MB"
        and first["decode tokens/s"].startswith("105 (")
        and first["task accuracy"] == "50.0%"
    )
    assert all(row.keys() == first.keys() for row in rows)


def test_speed_of_mlx_is_not_shown_off_its_own_hardware(world):
    rows = [row for row in sweep.headline("ci") if row["engine"] == "MLX"]
    assert rows and all(
        row["decode tokens/s"] == "" and "Apple silicon" in row["note"] and row["perplexity"] for row in rows
    )
    assert not any(kind == "speed" and "mlx" in name for kind, name in world)


def test_what_the_ledger_has_is_not_measured_again(world):
    first = sweep.headline("ci")
    assert world
    world.clear()
    assert sweep.headline("ci") == first and world == []
    sweep.headline("class")
    assert world, "another profile asks for more windows, so it is measured"


def test_a_new_engine_version_or_another_machine_is_measured_again(world, monkeypatch):
    sweep.headline("ci")
    world.clear()
    here = host.circumstances()
    monkeypatch.setattr(host, "circumstances", lambda: here | {"cpu": "another"})
    sweep.headline("ci")
    assert {kind for kind, _ in world} == {"speed"}, "quality does not depend on the machine"
    world.clear()
    monkeypatch.setattr(CHECKPOINT, "revision", "r2")
    sweep.headline("ci")
    assert {kind for kind, _ in world} == {"speed", "quality"}
    assert len(ledger()) > 0


def test_an_engine_that_fails_costs_its_own_cells_only(world, monkeypatch):
    real = sweep.measure.quality

    def fails(artifact, *rest, **options):
        if artifact.recipe.engine == "onnxruntime":
            raise RuntimeError("no such operator")
        return real(artifact, *rest, **options)

    monkeypatch.setattr(sweep.measure, "quality", fails)
    rows = sweep.headline("ci")
    broken = [row for row in rows if row["note"] == "Not measured: RuntimeError: no such operator"]
    assert {row["precision"] for row in broken} == {"fp32", "int4"} and not any(row["perplexity"] for row in broken)
    assert all(row["size"] and row["perplexity"] for row in rows if row["engine"] == "llama.cpp" and row["size"])


def test_the_reference_is_opened_once_and_its_failure_is_said_in_every_row(world, monkeypatch):
    opened = []

    def remembered(reference):
        opened.append(reference.name)
        raise LabkitError("The reference is damaged.")

    monkeypatch.setattr(sweep.measure, "remembered", remembered)
    rows = [row for row in sweep.headline("ci") if row["size"]]
    assert len(opened) == 1 and rows and all("The reference is damaged." in row["note"] for row in rows)


def test_the_table_for_a_terminal_is_aligned_and_numbers_its_notes():
    rows = [
        {"engine": "A", "precision": "q8", "size": "1 MB", "note": "One."},
        {"engine": "Long name", "precision": "q4", "size": "2 MB", "note": "One."},
    ]
    assert sweep.text(rows).splitlines() == [
        "engine     precision  size",
        "A          q8 [1]     1 MB",
        "Long name  q4 [1]     2 MB",
        "[1] One.",
    ]
    assert sweep.text([]) == ""

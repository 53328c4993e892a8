"""The gate: every state is reached for its reason, faults of an artifact and of an application are found, the report is whole."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

import labkit
from labkit import LabkitError, gate, house, stats
from labkit.types import Measurement

pytest.importorskip("llama_cpp")


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LABKIT_HOME", str(tmp_path_factory.mktemp("home")))
        source = labkit.checkpoint("edgehome")
        yield {word: labkit.build(source, labkit.Recipe("llamacpp", word)) for word in ("f16", "q8_0", "q2_k_s")}


def states(outcomes):
    return {one.check: one.state for one in outcomes}


def test_an_interval_passes_fails_or_is_unsure():
    assert gate.state(stats.Estimate(2, 1, 3), most=3) == "passed"
    assert gate.state(stats.Estimate(2, 1, 3), most=2) == "unsure"
    assert gate.state(stats.Estimate(2, 1, 3), most=0.5) == "failed"
    assert gate.state(stats.Estimate(2, 1, 3), least=1) == "passed" and gate.state(stats.Estimate(2, 1, 3), least=4) == "failed"


def test_a_good_artifact_passes_and_the_unprepared_application_does_not(artifacts):
    limits = gate.Limits(accuracy_loss=0.15, valid=0.8)
    found = gate.run(
        artifacts["q8_0"], artifacts["f16"], limits, requests=40, windows=1, areas=("functional", "quality", "safety")
    )
    result = states(found)
    assert result.pop("a request cannot write control marks") == "failed" and not gate.ready(found)
    assert set(result.values()) == {"passed"}, [one for one in found if one.state != "passed"]

    def clean(messages):
        return [{**m, "content": m["content"].replace("<|", "< |")} for m in messages]

    mended = gate.run(artifacts["q8_0"], artifacts["f16"], limits, requests=1, prepare=clean, areas=("safety",))
    assert states(mended)["a request cannot write control marks"] == "passed"


def test_what_two_bits_broke_is_found(artifacts):
    limits = gate.Limits(divergence=0.001, valid=0.999)
    result = states(
        gate.run(artifacts["q2_k_s"], artifacts["f16"], limits, requests=20, windows=1, areas=("functional", "quality"))
    )
    assert result["near the reference in distribution"] == "failed" and result["answers meet the schema"] != "passed"


def test_measurements_at_hand_are_not_taken_again(artifacts, monkeypatch):
    monkeypatch.setattr(labkit.measure, "memory", lambda *a: pytest.fail("memory was measured again"))
    memory = Measurement("memory", "bytes", (5e6,), {}, {}, "1", {}, "2026")

    def one(limit):
        return states(gate.run(artifacts["q8_0"], artifacts["f16"], gate.Limits(peak_bytes=limit), requests=1, known={"memory": memory},
                               areas=("memory",)))["peak of its own process"]  # fmt: skip

    assert one(6e6) == "passed" and one(4e6) == "failed"


def test_a_check_that_raises_has_failed(artifacts):
    def broken(messages):
        raise RuntimeError("the application fell over")

    found = gate.run(artifacts["q8_0"], artifacts["f16"], requests=1, prepare=broken, areas=("safety",))
    assert len(found) == 3 and {one.state for one in found} == {"failed"}
    assert "RuntimeError: the application fell over" in found[0].evidence


def test_valid_means_the_schema():
    task = house.tasks(n=1, intents=["light"])[0]
    assert gate.valid(json.dumps(task.answer))
    assert not gate.valid(json.dumps({**task.answer, "rooms": ["moon"]})) and not gate.valid("{") and not gate.valid("[]")


def test_the_report_says_it_all_and_leaves_nothing_half_written(artifacts, tmp_path):
    found = [gate.Outcome("safety", "odd requests do no harm", "failed", "<b>3</b> of 7", 0.1)]
    page = gate.report(artifacts["q8_0"], found, tmp_path / "deep" / "gate.html")
    text = page.read_text(encoding="utf-8")
    assert "not ready" in text and "odd requests do no harm" in text and "&lt;b&gt;3" in text and "<b>3" not in text
    assert [file.name for file in page.parent.iterdir()] == ["gate.html"]
    assert gate.ready([found[0]._replace(state="passed")]) and not gate.ready([])


def test_only_the_house_model_is_asked(artifacts):
    with pytest.raises(LabkitError, match="household requests"):
        gate.run(artifacts["q8_0"], artifacts["f16"], requests=0)
    stranger = replace(artifacts["q8_0"].checkpoint, name="other")
    with pytest.raises(LabkitError, match="other"):
        gate.run(replace(artifacts["q8_0"], checkpoint=stranger), artifacts["f16"])

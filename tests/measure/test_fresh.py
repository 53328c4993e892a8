"""The fresh process with a real engine: the path that every recorded speed and memory figure takes."""

import sys

import pytest

import labkit
from labkit import engines, measure, stats
from labkit.measure.headline import Effort, quality, remembered

pytestmark = pytest.mark.skipif(engines.version("llamacpp") is None, reason="llama-cpp-python is not installed")
TEXT = "turn on the light in the kitchen and set a timer for 5 minutes. " * 30


@pytest.fixture(scope="module")
def built(tiny_llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("artifacts")
    recipes = [labkit.Recipe("llamacpp", precision) for precision in ("f32", "q8_0")]
    return [labkit.build(tiny_llama, recipe, out=folder / str(recipe)) for recipe in recipes]


def test_memory_of_a_child_is_of_the_models_order(built):
    found = measure.memory(built[0], prompt_tokens=16, new_tokens=4)
    (value,) = found.values
    assert built[0].weight_bytes * 0.5 < value < built[0].weight_bytes + 200e6
    assert found.details["baseline_bytes"][0] > 5e6 and found.workload["fresh_process"]
    assert found.workload["settings"]["threads"] >= 1


def test_children_are_timed_side_by_side_and_end(built):
    import psutil

    before = set(psutil.Process().children(recursive=True))
    found = measure.compare(built, prompt_tokens=16, new_tokens=4, rounds=2, retries=0, seconds=0.02)
    assert set(psutil.Process().children(recursive=True)) <= before
    assert stats.ratio(found[0].values, found[1].values).value > 0
    for one, artifact in zip(found, built, strict=True):
        assert len(one.values) == len(one.details["prefill_tokens_per_second"]) == 2 and min(one.values) > 0
        assert one.details["load_seconds"] > 0 and one.details["first_call_seconds"] > 0
        assert one.artifact["precision"] == artifact.recipe.precision
        assert isinstance(one.details["quiet"], bool)
        assert one.workload["wait_policy"] == "short"


def test_a_shared_library_that_prints_does_not_break_the_protocol(built):
    from labkit.measure.worker import Child

    child = Child(built[0])
    try:
        child.ask("prepare")
        child.ask("open", threads=1)
        answer = child.ask("time", prompt=[5, 6, 7], new=3)
        assert len(answer["stamps"]) == 3 and answer["stamps"] == sorted(answer["stamps"])
    finally:
        child.end()


def test_quality_of_two_precisions_runs_the_reference_once(built, monkeypatch):
    loads = []
    module, load = sys.modules["labkit.build"], labkit.load
    monkeypatch.setattr(module, "load", lambda artifact, **given: loads.append(artifact) or load(artifact, **given))
    effort = Effort(windows=2, tasks=0, rounds=1, retries=0, seconds=0.1)
    with remembered(built[0], threads=1) as reference:
        measured = [m for one in built for m in quality(one, reference, effort, text=TEXT, threads=1)]
    found = {(m.metric, m.artifact["precision"]): m for m in measured}
    assert len(loads) == 1 + len(built)
    assert set(found) == {(metric, p) for metric in ("perplexity", "divergence") for p in ("f32", "q8_0")}
    assert measure.summary(found["divergence", "f32"]).value == 0
    assert 0 < measure.summary(found["divergence", "q8_0"]).value < 0.1
    by_pair = measure.perplexity_ratio(found["divergence", "q8_0"]).value
    apart = [measure.summary(found["perplexity", p]).value for p in ("q8_0", "f32")]
    assert by_pair == pytest.approx(apart[0] / apart[1])
    assert found["divergence", "q8_0"].workload["reference"] == built[0].name

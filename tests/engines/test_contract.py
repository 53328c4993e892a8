"""What every engine promises, at every precision it lists, on the house model; see the protocols in labkit.types.

An absent engine is skipped with the reason. An exception is declared in EXCEPTIONS, never coded into a test.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from functools import cache

import numpy as np
import psutil
import pytest

import labkit
from labkit import LabkitError, Recipe, engines
from labkit.build import read

FLOAT32 = ("f32", "fp32")
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma3")
KINDS = ("notyet", "notimpl", "never")  # we have not written it; the engine has not; it makes no sense
# (engine, precision or family) -> (kind, reason)
EXCEPTIONS: dict[tuple[str, str], tuple[str, str]] = {
    ("olive", family): ("never", "Olive calls the model builder the onnxruntime engine calls; Gemma stands for all")
    for family in FAMILIES
    if family != "gemma3"
}
# (engine, family) -> (largest difference of a logit, why it is more than 1e-3)
TOLERANCES: dict[tuple[str, str], tuple[float, str]] = {
    ("llamacpp", "gemma3"): (5e-3, "its GELU is a float16 table; test_llamacpp shows it is all that differs"),
}
# precision -> (how far later tokens may move earlier logits, as a share of the largest logit, and why they do at all)
LOOKAHEAD: dict[str, tuple[float, str]] = {
    "int8_dynamic": (0.2, "one activation scale is found over all positions of a pass, so later tokens change earlier rounding"),
}
PAIRS = [(name, precision) for name in engines.ENGINES for precision in engines.engine(name).PRECISIONS]


def skip_absent(name: str) -> None:
    if engines.version(name) is None:
        module = engines.engine(name)
        pytest.skip(f"{module.TITLE} is not installed; pip install 'labkit[{module.EXTRA}]'")


def skip_declared(name: str, what: str) -> None:
    if (name, what) in EXCEPTIONS:
        pytest.skip(": ".join(EXCEPTIONS[name, what]))


def float32(name: str) -> str:
    return next(p for p in engines.engine(name).PRECISIONS if p in FLOAT32)


@pytest.fixture(scope="module")
def shared_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LABKIT_HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture(scope="module")
def house_model(shared_home: None):
    return labkit.checkpoint("edgehome")


@pytest.fixture(scope="module")
def artifact(house_model):
    """`artifact(engine, precision)`: the house model, built once a session for each pair."""

    @cache
    def get(name: str, precision: str):
        skip_absent(name)
        skip_declared(name, precision)
        return labkit.build(house_model, Recipe(name, precision))

    return get


@pytest.mark.parametrize(("name", "precision"), PAIRS)
def test_built_once_and_found_again(artifact, house_model, monkeypatch, name, precision):
    built = artifact(name, precision)
    module = engines.engine(name)
    monkeypatch.setattr(module, "build", lambda *_: pytest.fail("built a second time"))
    assert labkit.build(house_model, Recipe(name, precision)) == built == read(built.path)
    lowest, highest = module.PRECISIONS[precision]
    assert lowest <= built.bits_per_weight <= highest
    assert built.bits_per_weight == pytest.approx(8 * built.weight_bytes / house_model.weights)
    files = sum(file.stat().st_size for file in built.path.rglob("*") if file.is_file())
    assert built.weight_bytes <= files
    assert all(isinstance(note, str) and note.endswith(".") for note in built.notes)
    record = json.loads((built.path / "artifact.json").read_text())
    assert record["recipe"] == {"engine": name, "precision": precision, "options": {}}
    assert (built.path / "build.log").exists()


@pytest.mark.parametrize(("name", "precision"), PAIRS)
def test_logits_and_generation(artifact, house_model, reference, name, precision):
    built = artifact(name, precision)
    ids, expected, greedy = reference(house_model.path)
    with labkit.load(built, exact=True) as run:
        found = run.logits(ids)
        assert found.shape == expected.shape and found.dtype == np.float32 and np.isfinite(found).all()
        if precision in FLOAT32:
            assert np.abs(found - expected).max() < 1e-3
            assert list(run.generate(ids[:20], len(greedy))) == greedy
        first = list(run.generate(ids[:20], 3))
        assert [len(list(run.generate(ids[:20], n))) for n in (0, 1)] == [0, 1]
        assert first == list(run.generate(ids[:20], 3)), "every generation starts from an empty state"
        assert all(isinstance(i, int) and 0 <= i < house_model.vocab_size for i in first)
        share, _ = LOOKAHEAD.get(precision, (0.05, ""))
        assert np.abs(run.logits(ids[:7]) - found[:7]).max() < share * np.abs(found).max(), "the past does not see ahead"
        assert json.loads(json.dumps(dict(run.settings)))["exact"] is True


@pytest.mark.parametrize("name", engines.ENGINES)
def test_the_usual_settings_run_too(artifact, house_model, reference, name):
    ids, expected, _ = reference(house_model.path)
    with labkit.load(artifact(name, float32(name)), threads=1) as run:
        assert np.abs(run.logits(ids) - expected).max() < 0.1 * np.abs(expected).max()
        assert len(list(run.generate(ids[:20], 5))) == 5
        assert run.settings["threads"] == 1


@pytest.mark.parametrize("name", engines.ENGINES)
def test_end_of_text_does_not_stop_a_generation(artifact, house_model, reference, name):
    """The continuation after a finished answer is the plain greedy one, however often the end token comes."""
    end = house_model.eos_ids[0]
    with labkit.load(artifact(name, float32(name)), exact=True) as run:
        prompt = [*house_model.encode("turn on the light"), end]
        produced = list(run.generate(prompt, 24))
        assert len(produced) == 24
        row = [int(run.logits(prompt + produced[:i])[-1].argmax()) for i in range(0, 24, 6)]
        assert row == produced[::6]


@pytest.mark.parametrize("name", engines.ENGINES)
def test_wrong_tokens_get_one_sentence(artifact, house_model, name):
    size = house_model.vocab_size
    with labkit.load(artifact(name, float32(name)), exact=True) as run:
        for tokens in ([], [size], [3, -1], [3] * (house_model.context + 1)):
            with pytest.raises(LabkitError) as error:
                run.logits(tokens)
            assert "\n" not in str(error.value)
            with pytest.raises(LabkitError):
                list(run.generate(tokens, 2))
        assert run.logits([3, 4]).shape == (2, size), "an error leaves the runner usable"


@pytest.mark.parametrize("name", engines.ENGINES)
def test_wrong_recipes_get_one_sentence(house_model, name):
    skip_absent(name)
    for recipe in (Recipe(name, "int3.14"), Recipe(name, float32(name), colour="green")):
        with pytest.raises(LabkitError) as error:
            labkit.build(house_model, recipe)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", engines.ENGINES)
def test_unknown_family_is_refused_in_one_sentence(shared_home, make_llama, name):
    skip_absent(name)
    folder = make_llama()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["MambaForCausalLM"]}))
    with pytest.raises(LabkitError, match="MambaForCausalLM") as error:
        labkit.build(folder, Recipe(name, float32(name)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", engines.ENGINES)
def test_close_frees_the_memory(artifact, name):
    """Six models opened and closed one after another take no more room than two."""
    built = artifact(name, float32(name))
    after = []
    for _ in range(6):
        run = labkit.load(built, exact=True)
        run.logits([3, 4, 5, 6])
        list(run.generate([3, 4, 5], 2))
        run.close()
        run.close()
        with pytest.raises(LabkitError):
            run.logits([3])
        del run
        gc.collect()
        after.append(psutil.Process().memory_info().rss)
    assert after[-1] - after[1] < 2 * built.weight_bytes


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("name", engines.ENGINES)
def test_every_family_it_claims(family, reference, tmp_path, name, kind):
    skip_absent(name)
    skip_declared(name, kind)
    folder = family(kind)
    recipe = Recipe(name, float32(name))
    claimed = getattr(engines.engine(name), "FAMILIES", FAMILIES)
    if kind not in claimed:
        with pytest.raises(LabkitError) as error:
            labkit.build(folder, recipe, out=tmp_path / "refused")
        assert "\n" not in str(error.value)
        return
    ids, expected, greedy = reference(folder)
    with labkit.load(labkit.build(folder, recipe, out=tmp_path / kind), exact=True) as run:
        tolerance, _ = TOLERANCES.get((name, kind), (1e-3, ""))
        assert np.abs(run.logits(ids) - expected).max() < tolerance
        assert list(run.generate(ids[:20], len(greedy))) == greedy


def test_exceptions_name_what_exists():
    for (name, what), (kind, reason) in EXCEPTIONS.items():
        assert what in (*engines.engine(name).PRECISIONS, *FAMILIES)
        assert kind in KINDS and reason

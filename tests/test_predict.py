"""The size predictor beside the real file of every engine and every precision: within 1 % of it."""

from __future__ import annotations

import pytest

import labkit
from labkit import LabkitError, Recipe, engines, planner, predict
from labkit._shapes import parameters
from labkit.standin import standin_config

ALL = [(name, precision) for name in engines.ENGINES for precision in engines.engine(name).PRECISIONS]


def _here(name):
    if engines.available().get(name) is None:
        pytest.skip(f"{name} is not installed")


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LABKIT_HOME", str(tmp_path_factory.mktemp("home")))
        yield labkit.checkpoint("edgehome")


def _options(name, precision):
    from labkit.engines._gguf_quantize import FILE_TYPES

    needs = name == "llamacpp" and FILE_TYPES[precision].needs_imatrix
    return {"calibration_tokens": 256} if needs else {}  # how much text was read changes no size


@pytest.mark.slow
@pytest.mark.parametrize("name, precision", ALL)
def test_within_one_percent_of_the_real_file(house, name, precision):
    _here(name)
    built = labkit.build(house, Recipe(name, precision, **_options(name, precision)))
    found = predict.size(house, name, precision)
    real = (built.path / predict.WEIGHTS[name]).stat().st_size
    assert abs(found.file / real - 1) < 0.01, (found, real)
    assert abs(found.tensors / built.weight_bytes - 1) < 0.01


@pytest.mark.parametrize("name", [n for n in engines.ENGINES if n != "olive"])
@pytest.mark.parametrize("model", ["tiny_llama", "phi-3.5-mini"])
def test_other_shapes_too(name, model, home, request):
    """A model of another family, and one whose head is not tied."""
    from labkit import phi

    _here(name)
    ck = labkit.checkpoint(request.getfixturevalue(model)) if model == "tiny_llama" else phi.tiny(model)
    precision = {"llamacpp": "q5_1", "onnxruntime": "int4", "openvino": "int4_asym", "mlx": "q4"}[name]
    built = labkit.build(ck, Recipe(name, precision))
    real = (built.path / predict.WEIGHTS[name]).stat().st_size
    assert abs(predict.size(ck, name, precision).file / real - 1) < 0.01


def test_blocks_by_hand():
    assert predict.blocks(64, 32, 4, 32, 2) == 2 * 18  # two rows of one Q4_0 block
    assert predict.blocks(2 * 40, 40, 4, 32, 2) == 2 * 2 * 18  # rows of 40 need two blocks each
    assert predict.blocks(256, 256, 2, 256, 2) == 66


@pytest.mark.parametrize("name", ["phi-4-mini", "qwen3-0.6b", "gemma-3-1b"])
def test_every_weight_is_stored_once(name):
    config = standin_config(name)
    assert sum(m.weights for m in predict.stored(config)) == parameters(config) == sum(planner.weights(config).values())


def test_what_has_no_rule_is_said(house):
    with pytest.raises(LabkitError, match="No storage rule is known for 'tflite'"):
        predict.size(house, "tflite", "int8")
    with pytest.raises(LabkitError, match="'q9' of mlx"):
        predict.size(house, "mlx", "q9")
    with pytest.raises(LabkitError, match="OddForCausalLM is unknown"):
        list(predict.stored({"architectures": ["OddForCausalLM"]}))

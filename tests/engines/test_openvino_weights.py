"""Compressed IRs against arithmetic: codes restored by numpy, run by our own float32 model, give the engine's logits."""

from __future__ import annotations

import logging

import numpy as np
import pytest

import labkit
from labkit import LabkitError, Recipe
from labkit.engines import _ir_weights
from labkit.engines import openvino as engine
from labkit.methods import forward

pytest.importorskip("openvino_genai")
pytest.importorskip("nncf")

KINDS = {
    "int8_sym": {}, "int8_asym": {}, "int4_sym": {"group_size": 64}, "int4_asym": {"group_size": 64},
    "int4_sym rows": {"group_size": -1}, "int4_asym all": {"group_size": 32, "all_layers": True}, "f16": {}, "bf16": {},
}  # fmt: skip
IDS = [5, 9, 33, 120, 7, 301, 44, 8, 250, 77, 16, 499]


@pytest.fixture(scope="module")
def source(tiny_llama):
    return labkit.checkpoint(tiny_llama)


@pytest.fixture(scope="module")
def ir(source, tmp_path_factory):
    """`ir("int4_sym rows")`: the .xml of the tiny Llama, compressed as KINDS says."""
    root, made = tmp_path_factory.mktemp("ir"), {}

    def get(kind):
        if kind not in made:
            recipe = Recipe("openvino", kind.split()[0], **KINDS[kind])
            made[kind] = labkit.build(source, recipe, out=root / kind.replace(" ", "-")).path / engine.MODEL
        return made[kind]

    return get


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_the_restored_weights(kind, ir, source):
    """The engine may not do anything else with the codes: no wider rounding, no quantized activations, no other order."""
    float_model = forward.open_llama(source)
    stored = engine.restored_weights(ir(kind))
    assert set(stored) >= set(float_model.weights)
    ours = float_model.with_({name: stored[name] for name in float_model.weights}).logits(IDS)
    theirs = engine.ir_logits(ir(kind), IDS)
    truth = float_model.logits(IDS)
    moved = np.abs(truth - theirs).max()  # what compression did: the difference must be a small part of it
    assert np.abs(ours - theirs).max() < 1e-4 * np.abs(truth).max()
    assert moved > 20 * np.abs(ours - theirs).max()


def test_four_bit_codes_are_unpacked_low_half_first():
    data = bytes([0x21, 0xF8])
    assert _ir_weights.values(data, "u4", (4,)).tolist() == [1, 2, 8, 15]
    assert _ir_weights.values(data, "i4", (2, 2)).tolist() == [[1, 2], [-8, -1]]
    assert _ir_weights.values(b"\x80\x3f\x00\xc0", "bf16", (2,)).tolist() == [1.0, -2.0]
    with pytest.raises(LabkitError, match="nf4"):
        _ir_weights.values(data, "nf4", (4,))


def test_one_constant_by_name(ir):
    codes = engine.constant_data(ir("int4_sym"), "model.layers.0.self_attn.q_proj.weight")
    scale = engine.constant_data(ir("int4_sym"), "model.layers.0.self_attn.q_proj.weight/scale")
    assert codes.dtype == np.int8 and codes.min() >= -8 and codes.max() <= 7 and scale.shape == (*codes.shape[:2], 1)
    with pytest.raises(LabkitError, match="stores no 'lamp'"):
        engine.constant_data(ir("int4_sym"), "lamp")


def test_chunks_through_the_cache_equal_one_call(ir):
    whole = engine.ir_logits(ir("bf16"), IDS)
    assert np.abs(engine.ir_logits(ir("bf16"), IDS, chunk=5) - whole).max() < 1e-4
    both = engine.ir_logits(ir("bf16"), [IDS, IDS[::-1]])
    assert both.shape == (2, *whole.shape) and np.array_equal(both[0], whole) and not np.array_equal(both[1], whole)
    rough = engine.ir_logits(ir("bf16"), IDS, {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "u8"}, chunk=5)
    assert 0 < np.abs(rough - whole).max() < 0.5 * np.abs(whole).max()


def test_calibration_inputs_are_windows_of_the_text(source, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("turn on the light in the kitchen and set a timer. " * 40)
    found = engine.calibration_inputs(source, 3, 32, text)
    assert len(found) == 3 and all(one["input_ids"].shape == (1, 32) for one in found)


def test_nncf_is_silent_and_left_as_it_was(capfd, source, ir):
    import nncf

    before = nncf.nncf_logger.level
    with engine.quiet_nncf() as tools:
        assert tools is nncf
        print("progress")
        nncf.nncf_logger.warning("chatter")
    assert nncf.nncf_logger.level == before and capfd.readouterr() == ("", "")
    logging.getLogger("nncf").setLevel(before)

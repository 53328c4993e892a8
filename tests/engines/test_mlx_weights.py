"""MLX's stored words against arithmetic: numpy opens them, our own float32 model runs on them, the engine must agree."""

from __future__ import annotations

import json

import numpy as np
import pytest

import labkit
from labkit import LabkitError, Recipe
from labkit.engines import _mlx_weights
from labkit.engines import mlx as engine
from labkit.methods import forward

IDS = [5, 9, 33, 120, 7, 301, 44, 8, 250, 77, 16, 499]
KINDS = {
    "q4": {"group_size": 64}, "q8": {"group_size": 64}, "q4 f16": {"group_size": 32, "dtype": "float16"}, "q3": {}, "q5": {},
    "q6": {}, "q2": {}, "mixed_3_6": {}, "mxfp4": {}, "mxfp8": {}, "nvfp4": {}, "bf16": {}, "q8 bf16": {"dtype": "bfloat16"},
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_packed_logits_are_those_of_the_restored_weights(kind, tiny_llama, tmp_path):
    """The packed kernels may do nothing else with the words: not another rounding, offset, order or exception."""
    pytest.importorskip("mlx_lm")
    source = labkit.checkpoint(tiny_llama)
    built = labkit.build(source, Recipe("mlx", kind.split()[0], **KINDS[kind]), out=tmp_path / "built")
    float_model = forward.open_llama(source)
    stored = engine.restored_weights(built.path)
    assert set(stored) >= set(float_model.weights)
    ours = float_model.with_({name: stored[name] for name in float_model.weights}).logits(IDS)
    with labkit.load(built) as packed:
        theirs = packed.logits(IDS)
    truth = float_model.logits(IDS)
    assert np.abs(ours - theirs).max() < 1e-4 * np.abs(truth).max()
    assert np.abs(truth - theirs).max() > 20 * np.abs(ours - theirs).max(), "rounding must be what moved the logits"


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_numpy_opens_what_mlx_packed(bits):
    mx = pytest.importorskip("mlx.core")
    weights = mx.array(np.random.default_rng(bits).normal(size=(6, 128)).astype(np.float32))
    packed = mx.quantize(weights, group_size=64, bits=bits)
    ours = _mlx_weights.matrix(*map(np.array, packed), bits=bits, group_size=64)
    assert np.array_equal(ours, np.array(mx.dequantize(*packed, group_size=64, bits=bits)))


def test_codes_begin_at_the_lowest_bits():
    assert _mlx_weights.codes(np.array([[0x87654321]], np.uint32), 4).tolist() == [[1, 2, 3, 4, 5, 6, 7, 8]]
    assert _mlx_weights.codes(np.array([[0x04030201]], np.uint32), 8).tolist() == [[1, 2, 3, 4]]


def test_what_cannot_be_read_back_is_one_sentence(tmp_path):
    header = json.dumps({"x": {"dtype": "I64", "shape": [1], "data_offsets": [0, 8]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(LabkitError, match="type I64"):
        engine.restored_weights(tmp_path)
    words, scales = np.zeros((1, 4), np.uint32), np.zeros((1, 1), np.uint8)
    with pytest.raises(LabkitError, match="mode 'nf4'"):
        _mlx_weights.matrix(words, scales, bits=4, group_size=32, mode="nf4")

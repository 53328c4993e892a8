"""llama.cpp computes with the weights its file stores: its logits against those of the same numbers, decoded by our numpy.

Two GGUF files are run with equal settings: the quantized one, and a float32 one into which every tensor's value was written
as `labkit.gguf_blocks` reads it from the stored blocks. They differ in one thing only. llama.cpp multiplies quantized weights by
*activations rounded to 8 bits* (a scale for each 32, for K-quants and ternary for each 256), which float32 weights do not
ask for. Rounding to 127 steps of a block's largest value leaves an error of up to 1/254 of it, that is 0.3 % to 1 % of an activation's
typical size, in every matrix of six layers and in the head. So `TOLERANCE` is 8 % of the logits' spread. F16 weights go the
same road with 11-bit activations and come 20 times nearer. Ternary is tested in one matrix: with ternary weights everywhere
this model is in ruins and multiplies any rounding. Reading one field of the blocks wrongly is not a matter of per cents, as
the last tests show: that is what they are for.
"""

from __future__ import annotations

import numpy as np
import pytest

import labkit
from labkit import gguf_blocks, museum
from labkit.engines import llamacpp
from labkit.engines._llamacpp_runner import LlamaRunner

pytest.importorskip("llama_cpp")
gguf = pytest.importorskip("gguf")

TOLERANCE = 0.08  # of the logits' spread: 8-bit activations through six layers
HALF = 0.0025  # the same for activations rounded to float16, which has 8 times as many steps
WRONG = 0.3  # at least this far off when a field is read wrongly in one matrix only; in all of them, above 1
ONE = "blk.2.ffn_up"  # the ternary matrix
MIXES = ["q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_0", "q3_k_m", "q2_k", "tq2_0", "tq1_0"]
TEXT = "Turn on the lamp in the kitchen, set a timer for ten minutes, and tell me whether the back door is locked. Acenda a luz."


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    """Folder, the house model, token ids, and its float32 GGUF, whose tensors are in the order and names of all others."""
    folder, checkpoint = tmp_path_factory.mktemp("stored"), labkit.checkpoint("edgehome")
    llamacpp.write_gguf(checkpoint, folder / "f32.gguf", "f32")
    return folder, checkpoint, checkpoint.encode(TEXT)


def quantized(house, precision):
    folder, checkpoint, _ = house
    path = folder / f"{precision}.gguf"
    if not path.exists():
        ternary = {"dtype": "q8_0", "tensor_types": {ONE: precision}} if precision.startswith("tq") else {"dtype": precision}
        llamacpp.write_gguf(checkpoint, path, **ternary)
    return path


def decoded(house, path, read=gguf_blocks.dequantize):
    """A float32 GGUF with the numbers `path` stores, every block read by `read(bytes, type)`."""
    folder, values, kinds = house[0], {}, set()
    for tensor in gguf.GGUFReader(path).tensors:
        kind = tensor.tensor_type.name.lower()
        plain = kind in ("f32", "f16")
        values[tensor.name] = np.asarray(tensor.data, np.float32) if plain else read(tensor.data, kind).astype(np.float32)
        kinds.add(kind)
    return museum.patched(folder / "f32.gguf", folder / f"{path.stem}-decoded.gguf", values), kinds


def logits(path, tokens):
    with LlamaRunner(path, exact=True, threads=2) as runner:
        return runner.logits(tokens).astype(np.float64)


def distance(found, expected):
    """Root mean square of the difference, as a share of the spread of the found logits (llama.cpp's) at their positions."""
    spread = found - found.mean(axis=1, keepdims=True)
    return float(np.sqrt(np.mean((found - expected) ** 2) / np.mean(spread**2)))


@pytest.mark.parametrize("precision", MIXES)
def test_logits_are_those_of_the_stored_weights(house, precision):
    path = quantized(house, precision)
    same, kinds = decoded(house, path)
    assert kinds & set(gguf_blocks.LAYOUTS), "nothing in this file is quantized"
    found, expected = logits(path, house[2]), logits(same, house[2])
    assert distance(found, expected) < TOLERANCE


def test_half_precision_comes_nearer_by_the_finer_rounding(house):
    """F16 weights are multiplied by activations in float16: the same comparison, with nothing but a finer rounding."""
    path = quantized(house, "f16")
    same, kinds = decoded(house, path)
    assert kinds == {"f16", "f32"}
    assert distance(logits(path, house[2]), logits(same, house[2])) < HALF


def swapped(data, kind):
    """The two codes of each byte in the wrong order, in every format that packs two a byte."""
    if kind not in ("q4_0", "q4_k"):
        return gguf_blocks.dequantize(data, kind)
    form = gguf_blocks.layout(kind)
    blocks = np.array(data).reshape(*data.shape[:-1], -1, form.size)
    first = form.size - form.block // 2  # the codes are the last half byte a weight
    blocks[..., first:] = blocks[..., first:] >> 4 | blocks[..., first:] << 4
    return gguf_blocks.dequantize(blocks.reshape(data.shape), kind)


def half_as_brain(data, kind):
    """Every block's scale taken for a bfloat16: the bits are right, their meaning is not."""
    form = gguf_blocks.layout(kind)
    blocks = np.array(data).reshape(*data.shape[:-1], -1, form.size)
    at = form.halves["d"] // 8
    scale = (blocks[..., at : at + 2].copy().view("<u2").astype("<u4") << 16).view("<f4")
    blocks[..., at : at + 2] = np.clip(scale, -6e4, 6e4).astype("<f2").view(np.uint8)
    return gguf_blocks.dequantize(blocks.reshape(data.shape), kind)


def without_offset(data, kind):
    """Codes taken as they are stored, the offset forgotten."""
    form = gguf_blocks.layout(kind)
    right = gguf_blocks.unpack(np.asarray(data), kind)
    if form.scales is not None:
        return gguf_blocks.dequantize(data, kind)
    return (right["d"] * (right["codes"] + form.offset)).reshape(*data.shape[:-1], -1)


@pytest.mark.parametrize(
    ("precision", "wrong"),
    [("q4_0", swapped), ("q4_k_m", swapped), ("q8_0", half_as_brain), ("q4_k_m", half_as_brain), ("q4_0", without_offset),
     ("tq2_0", without_offset)],
    ids=lambda one: one if isinstance(one, str) else one.__name__,
)
def test_a_field_read_wrongly_is_seen_at_once(house, precision, wrong):
    """The negative control: the comparison above must fail by far when our reading of the blocks is wrong."""
    path = quantized(house, precision)
    found = logits(path, house[2])
    right = distance(found, logits(decoded(house, path)[0], house[2]))
    broken = distance(found, logits(decoded(house, path, wrong)[0], house[2]))
    least = WRONG if precision.startswith("tq") else 1
    assert not broken < max(least, 15 * right), (broken, right)  # NaN is far off, too

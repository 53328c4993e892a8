"""Int4 of the onnxruntime engine computes what it stores: its logits are those of a float model of the dequantized nibbles."""

from __future__ import annotations

import numpy as np
import pytest

import labkit
from labkit import LabkitError, Recipe, blocks, onnx_graphs, onnx_quantize

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxruntime_genai")

IDS = [5, 300, 17, 42, 301, 8, 99, 250, 3, 77]


def float_twin(path):
    """The graph with every MatMulNBits as a MatMul, and the lookup as a Gather, on weights restored with numpy alone."""
    model = onnx.load(str(path))
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    weights = onnx_quantize.restore_blocks(path)
    head = next(n for n in model.graph.node if n.op_type == "MatMulNBits" and n.output[0] == "logits")
    nodes = []
    for node in model.graph.node:
        if node.op_type == "MatMulNBits":
            name = f"{node.name}.float"
            model.graph.initializer.append(onnx.numpy_helper.from_array(np.ascontiguousarray(weights[node.name].T), name))
            node = onnx.helper.make_node("MatMul", [node.input[0], name], list(node.output), name=node.name)
        elif node.op_type == "GatherBlockQuantized":
            assert node.input[2] == head.input[2] and node.input[2] in stored, "the lookup reads the head's scales"
            model.graph.initializer.append(onnx.numpy_helper.from_array(weights[head.name], "embedding.float"))
            node = onnx.helper.make_node("Gather", ["embedding.float", node.input[1]], list(node.output), name=node.name)
        nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "zero-points"])
@pytest.mark.parametrize("width, block", [(128, 16), (128, 32), (128, 64), (128, 128), (192, 64), (288, 128)])
def test_int4_logits_are_those_of_the_dequantized_weights(make_llama, tmp_path, width, block, symmetric):
    """Also with an odd number of blocks a row, whose last zero point stands alone in its byte, and a last block cut short."""
    recipe = Recipe("onnxruntime", "int4", block_size=block, symmetric=symmetric)
    built = labkit.build(make_llama(hidden_size=width), recipe, out=tmp_path / "int4")
    expected = onnx_graphs.logits(onnx_graphs.session(float_twin(built.path / "model.onnx")), IDS)
    with labkit.load(built, exact=True) as literal, labkit.load(built) as usual:
        level1, level4 = literal.logits(IDS), usual.logits(IDS)
    size = np.abs(expected).max()
    assert np.abs(level1 - expected).max() < 1e-5 * size
    apart = np.abs(level4 - expected).max() / size  # level 4 rounds the inputs to int8 besides
    assert 1e-5 < apart < 0.1


def test_a_node_alone_computes_its_weights_at_both_levels(tiny_llama, tmp_path):
    built = labkit.build(tiny_llama, Recipe("onnxruntime", "int4"), out=tmp_path / "int4")
    path = built.path / "model.onnx"
    name, weights = next(iter(onnx_quantize.restore_blocks(path).items()))
    x = np.random.default_rng(0).normal(size=(3, weights.shape[1])).astype(np.float32)
    y = x @ weights.T
    apart = {}
    for level in (1, 4):
        found = onnx_graphs.session(onnx_quantize.alone(path, name, level)).run(None, {"x": x})[0]
        apart[level] = np.abs(found - y).max() / np.abs(y).max()
    assert apart[1] < 1e-5 < apart[4] < 0.05
    with pytest.raises(LabkitError, match="no MatMulNBits"):
        onnx_quantize.alone(path, "nobody")


@pytest.mark.parametrize(("bits", "zero"), [(4, "integer"), (4, "bias"), (8, "integer")])
def test_any_blocks_can_be_stored_and_read_back(tmp_path, bits, zero):
    w = np.random.default_rng(1).normal(size=(48, 96)).astype(np.float32)
    w[3, 32:64] = 0.25  # a constant block
    onnx.save_model(onnx_graphs.matmul(w), tmp_path / "float.onnx")
    found = blocks.affine(w, bits, per=32, zero=zero)
    path = onnx_quantize.store_blocks(tmp_path / "float.onnx", tmp_path / "blocks.onnx", {"matmul": found})
    assert onnx_graphs.operators(path) == {"MatMulNBits": 1}
    assert np.allclose(onnx_quantize.restore_blocks(path)["matmul"], found.dequantize(), atol=1e-6)
    x = np.random.default_rng(2).normal(size=(5, 96)).astype(np.float32)
    y = onnx_graphs.session(path).run(None, {"x": x})[0]
    assert np.allclose(y, x @ found.dequantize().T, atol=1e-4)


def test_store_blocks_refuses_what_does_not_fit(tmp_path):
    w = np.ones((8, 32), np.float32)
    onnx.save_model(onnx_graphs.matmul(w), tmp_path / "float.onnx")
    with pytest.raises(LabkitError, match="no MatMul named 'other'"):
        onnx_quantize.store_blocks(tmp_path / "float.onnx", tmp_path / "out.onnx", {"other": blocks.affine(w, 4, per=32)})
    with pytest.raises(LabkitError, match="whole zero points"):
        eight = blocks.affine(w, 8, per=32, zero="bias")
        onnx_quantize.store_blocks(tmp_path / "float.onnx", tmp_path / "out.onnx", {"matmul": eight})
    with pytest.raises(LabkitError, match="unsigned"):
        signed = blocks.symmetric(w - np.eye(8, 32, dtype=np.float32) * 3, 4, per=32)
        onnx_quantize.store_blocks(tmp_path / "float.onnx", tmp_path / "out.onnx", {"matmul": signed})

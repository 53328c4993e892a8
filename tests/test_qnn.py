"""QNN: grids by hand, ONNX's zero points as QNN's offsets, what a validator must see, and strict runs where the plug-in is."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from labkit import LabkitError, qnn

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize(
    ("low", "high", "bits", "scale", "offset"),
    [(0, 6, 8, 6 / 255, 0), (-1, 1.55, 8, 0.01, -100), (1, 2.55, 8, 0.01, 0), (-15, -3, 4, 1.0, -15), (-1, 65534, 16, 1.0, -1)],
)
def test_a_grid_holds_zero_and_both_ends(low, high, bits, scale, offset):
    made = qnn.grid(low, high, bits)
    assert made.scale == pytest.approx(scale) and made.offset == offset
    assert made.ends[0] <= min(low, 0) + scale / 2 and made.ends[1] >= max(high, 0) - scale / 2


def test_a_symmetric_grid_reaches_as_far_to_both_sides_and_spends_a_code():
    made = qnn.grid(-2.5, 1, 8, symmetric=True)
    assert made.offset == -128 and made.scale * 127 == pytest.approx(2.5)
    assert made.ends == (pytest.approx(-2.5 - made.scale), pytest.approx(2.5))


@pytest.mark.parametrize(("low", "high", "bits"), [(0, 0, 8), (0, float("nan"), 8), (0, 1, 7), (-float("inf"), 1, 8)])
def test_a_range_without_numbers_is_refused(low, high, bits):
    with pytest.raises(LabkitError, match="was asked for"):
        qnn.grid(low, high, bits)


def model(weight_type="INT8", zero=None, axis=None):
    """x -> Q -> DQ -> MatMul with a stored quantized weight -> y, rows fixed at 2."""
    from onnx import TensorProto, helper

    kind = getattr(TensorProto, weight_type)
    zero = [0] * (3 if axis is not None else 1) if zero is None else zero
    shape = [3] if axis is not None else []
    stored = [
        helper.make_tensor("xs", TensorProto.FLOAT, [], [0.5]), helper.make_tensor("xz", TensorProto.UINT16, [], [7]),
        helper.make_tensor("w_quantized", kind, [2, 3], [0, 1, -2, 3, -4, 5] if not weight_type.startswith("U") else range(6)),
        helper.make_tensor("ws", TensorProto.FLOAT, shape, [0.25] * len(zero)), helper.make_tensor("wz", kind, shape, zero),
    ]  # fmt: skip
    node = helper.make_node
    back = {"axis": axis} if axis is not None else {}
    nodes = [node("QuantizeLinear", ["x", "xs", "xz"], ["q"]), node("DequantizeLinear", ["q", "xs", "xz"], ["xf"]),
             node("DequantizeLinear", ["w_quantized", "ws", "wz"], ["w"], **back), node("MatMul", ["xf", "w"], ["y"])]  # fmt: skip
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, size]) for name, size in (("x", 2), ("y", 3))]
    made = helper.make_graph(nodes, "g", ends[:1], ends[1:], stored)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


@pytest.mark.parametrize(
    ("kind", "zero", "bits", "offset"),
    [("INT8", [0], 8, -128), ("UINT8", [3], 8, -3), ("INT4", [0], 4, -8), ("INT16", [-5], 16, -32763), ("UINT4", [8], 4, -8)],
)
def test_zero_points_become_offsets(kind, zero, bits, offset):
    pytest.importorskip("onnx")
    document = qnn.encodings(model(kind, zero))
    (x,), (w,) = document["activation_encodings"], document["param_encodings"]
    assert x == {"name": "x", "bw": 16, "dtype": "INT", "enc_type": "PER_TENSOR", "is_sym": False, "scale": [0.5], "offset": [-7]}
    assert (w["name"], w["bw"], w["offset"], w["scale"]) == ("w", bits, [offset], [0.25])
    assert w["is_sym"] == (offset == -(2 ** (bits - 1))) and document["version"] == "1.0.0"


def test_a_scale_for_each_channel_is_said():
    pytest.importorskip("onnx")
    (w,) = qnn.encodings(model(axis=1))["param_encodings"]
    assert w["enc_type"] == "PER_CHANNEL" and w["offset"] == [-128] * 3 and len(w["scale"]) == 3


def test_offset_and_zero_point_mean_the_same_numbers():
    """Every int8 code decoded both ways, for every zero point."""
    from onnx import TensorProto

    codes = np.arange(-128, 128)
    for zero in range(-128, 128):
        offset = qnn._entry(np.array([1.0]), np.array([zero]), TensorProto.INT8)["offset"][0]
        assert np.array_equal(codes - zero, (codes + 128) + offset) and -255 <= offset <= 0


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"bw": 8, "scale": [0.1], "offset": [0]}, None),
        ({"bitwidth": 8, "min": 0.0, "max": 6.0, "scale": 0.023529, "offset": 0}, None),
        ({"bitwidth": 8, "min": -2.5, "max": 2.5, "scale": 0.019608, "offset": 127}, "127 is positive"),
        ({"bitwidth": 8, "min": -2.5, "max": 2.5, "scale": 0.019608, "offset": -128}, None),  # off by half a step, no more
        ({"bitwidth": 8, "min": -2.5, "max": 2.6, "scale": 0.019608, "offset": -128}, "max is 2.6"),
        ({"bw": 8, "is_sym": True, "scale": [0.1], "offset": [-127]}, "symmetric"),
        ({"bw": 8, "scale": [0.1, 0.1], "offset": [-128]}, "2 scales and 1 offsets"),
        ({"bw": 8, "scale": [0.0], "offset": [-128]}, "positive number"),
        ({"bw": 8, "scale": [0.1], "offset": [-12.5]}, "whole number"),
        ({"bw": 8, "scale": [0.1], "offset": [-256]}, "leaves 0 without a code"),
        ({"bw": 7, "scale": [0.1], "offset": [0]}, "bw one of"),
        ({"bw": 8, "offset": [0]}, "must be there"),
    ],
)
def test_faults_of_an_encoding(entry, said):
    found = qnn.faults(entry)
    assert (not found) if said is None else any(said in line for line in found), found


def test_without_the_plug_in_one_sentence_says_what_to_do(monkeypatch):
    monkeypatch.delenv(qnn.VARIABLE, raising=False)
    monkeypatch.setattr(qnn.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(LabkitError, match=r"pip install onnxruntime-qnn .*LABKIT_QNN_PYTHON"):
        qnn.interpreter()
    monkeypatch.setenv(qnn.VARIABLE, "/nowhere/python")
    with pytest.raises(LabkitError, match="which is no file"):
        qnn.interpreter()


def test_a_python_without_the_plug_in_is_named_as_the_cause(monkeypatch, tmp_path):
    if qnn.importlib.util.find_spec("onnxruntime_qnn"):
        pytest.skip("this interpreter has the plug-in")
    monkeypatch.setenv(qnn.VARIABLE, sys.executable)
    with pytest.raises(LabkitError, match="did not end well: ModuleNotFoundError"):
        qnn.run(tmp_path / "none.onnx", {"x": np.zeros((1, 2), np.float32)})


@pytest.fixture
def emulation():
    """Skips where no interpreter has the plug-in."""
    try:
        return qnn.interpreter()
    except LabkitError as absent:
        pytest.skip(str(absent))


def test_a_strict_run_agrees_with_the_product_of_codes_and_its_context_loads(emulation, tmp_path):
    import onnx

    path = tmp_path / "m.onnx"
    onnx.save(model(), path)
    x = np.array([[1.0, -2.0], [3.5, 4.0]], np.float32)
    made = qnn.run(path, {"x": x}, context=tmp_path / "context.onnx")
    expected = x @ (np.array([[0, 1, -2], [3, -4, 5]]) * 0.25)
    assert made and made.parts[0][0] == "QNNExecutionProvider", made.refused
    np.testing.assert_allclose(made.outputs["y"], expected, atol=0.02)
    again = qnn.run(tmp_path / "context.onnx", {"x": x})
    assert again and np.array_equal(again.outputs["y"], made.outputs["y"])


def test_a_strict_run_refuses_what_a_loose_one_leaves_to_the_cpu(emulation, tmp_path):
    import onnx

    made = model()
    made.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "rows"
    made.graph.output[0].type.tensor_type.shape.dim[0].dim_param = "rows"
    onnx.save(made, tmp_path / "open.onnx")
    x = {"x": np.ones((2, 2), np.float32)}
    strict, loose = qnn.run(tmp_path / "open.onnx", x), qnn.run(tmp_path / "open.onnx", x, strict=False)
    assert not strict and "fallback" in strict.refused
    assert loose and {who for who, _ in loose.parts} == {"CPUExecutionProvider"}

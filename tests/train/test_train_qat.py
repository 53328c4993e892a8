"""Rounding in the loop: exact forward values, straight gradients, and a ternary model that llama.cpp runs as it was trained."""

from __future__ import annotations

import numpy as np
import pytest

import labkit
from labkit import blocks, gguf_blocks
from labkit.types import LabkitError

torch = pytest.importorskip("torch")

from labkit.train import qat  # noqa: E402
from labkit.train.folder import load  # noqa: E402

torch.manual_seed(0)
W = torch.randn(64, 512) * 0.02


def test_rounded_weights_are_those_of_labkits_blocks():
    assert np.array_equal(qat.ternary(W).numpy(), blocks.ternary(W.numpy(), "absmean", "tensor").dequantize())
    for bits, group in ((4, 32), (8, 64), (3, 128)):
        assert np.array_equal(qat.integers(bits, group)(W).numpy(), blocks.symmetric(W.numpy(), bits, group).dequantize())
    for kind in ("q4_0", "q8_0"):
        assert np.array_equal(qat.gguf(kind)(W).numpy(), gguf_blocks.quantize(W.numpy(), kind).dequantize())
    assert qat.integers(4, 32)(torch.zeros(2, 32)).eq(0).all() and qat.ternary(torch.zeros(2, 32)).eq(0).all()


def test_the_forward_pass_is_rounded_exactly_and_the_gradient_goes_straight_through():
    weights = W.clone().requires_grad_()
    x = torch.randn(3, 512)
    rounded = qat.straight(weights, qat.ternary)
    assert torch.equal(rounded.detach(), qat.ternary(W)) and len(rounded.unique()) == 3
    torch.nn.functional.linear(x, rounded).sum().backward()
    assert torch.allclose(weights.grad, x.sum(0).expand(64, 512))


def test_activations_are_rounded_to_127_steps_of_their_largest():
    x = torch.randn(2, 5, 512)
    for per, size in (("token", 512), ("block", 256)):
        groups, steps = qat.eight_bits(x, per).reshape(-1, size), x.reshape(-1, size).abs().amax(1, keepdim=True) / 127
        assert (groups / steps - (groups / steps).round()).abs().max() < 1e-4
        assert ((groups - x.reshape(-1, size)).abs() <= steps / 2 + 1e-7).all()


def test_ternary_training_learns_what_converting_destroys():
    """Rounded after training a model is lost; trained while rounded it learns (the lesson of BitNet), here in miniature."""
    from labkit.train.data import house
    from labkit.train.llama import Llama, Shape
    from labkit.train.loop import Settings, train, validation
    from labkit.train.rows import batches, encode_all, pack

    rows = pack(encode_all(labkit.checkpoint("edgehome"), house("train", 40, intents=["light", "dim"]), 128), 128)
    found = {}
    for name in ("converted", "trained"):
        torch.manual_seed(1)
        model = Llama(Shape(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2))
        if name == "trained":
            qat.prepare(model, qat.ternary)
        train(model, batches(rows, 2), Settings(steps=90, rate=1e-2, warmup=5), progress=False)
        if name == "converted":
            qat.prepare(model, qat.ternary)
        with torch.no_grad():
            found[name] = validation(rows)(model)["validation_loss"]
    assert found["trained"] < found["converted"] - 0.3


@pytest.fixture(scope="module")
def ternary_model():
    """The house model made ternary (its answers are gone, its arithmetic is what is tested)."""
    base = labkit.checkpoint("edgehome")
    model = load(base)
    qat.prepare(model, qat.ternary, activations="block")
    return base, model


def test_llama_cpp_runs_the_ternary_model_as_torch_does(ternary_model, home, tmp_path):
    pytest.importorskip("llama_cpp")
    from labkit.engines.llamacpp import tensor_data, tensors

    base, model = ternary_model
    exported = qat.export_ternary(model, tmp_path / "ternary", base)
    built = labkit.build(exported, qat.ternary_recipe())
    assert built.settings["types"] == {"tq2_0": 42, "f32": 14} and not built.notes

    file = built.path / "model.gguf"
    names = {t["name"] for t in tensors(file)}
    for ours, name in (("mlp.down_proj", "blk.3.ffn_down.weight"), ("self_attn.v_proj", "blk.0.attn_v.weight")):
        assert name in names
        stored = gguf_blocks.dequantize(np.array(tensor_data(file, name)), "tq2_0")
        layer = int(name.split(".")[1])
        assert np.array_equal(stored, qat.rounded(model)[f"model.layers.{layer}.{ours}.weight"].numpy())  # without loss

    ids = base.encode("<|im_start|>user\nturn on the light in the kitchen and the hall<|im_end|>\n<|im_start|>assistant\n")
    with torch.no_grad(), labkit.load(built, exact=True, threads=1) as run:
        theirs, ours = run.logits(ids), model(torch.tensor([ids]))[0].numpy()
        for layer in model.modules():
            if isinstance(layer, qat.QATLinear):
                layer.activations = None
        unrounded = model(torch.tensor([ids]))[0].numpy()
        for layer in model.modules():
            if isinstance(layer, qat.QATLinear):
                layer.activations = "block"
    # llama.cpp rounds activations to 8 bits a block, and so does the model here: equal to float32's last digits, but for the
    # positions where a digit decides a rounding and one step of 127 more or less goes on from there.
    apart = np.abs(theirs - ours).max(1)
    assert np.median(apart) < 1e-4 and apart.max() < 0.05 * np.abs(ours).max()
    assert np.median(np.abs(theirs - unrounded).max(1)) > 100 * np.median(apart)


def test_what_is_not_ternary_is_not_exported(tmp_path, make_llama):
    base = labkit.checkpoint(make_llama(num_hidden_layers=1))
    plain = load(base)
    with pytest.raises(LabkitError, match="No layer of the model is rounded"):
        qat.export_ternary(plain, tmp_path / "x", base)
    qat.prepare(plain, qat.integers(4, 32), targets=("q_proj",))
    with pytest.raises(LabkitError, match="is not ternary"):
        qat.export_ternary(plain, tmp_path / "x", base)
    with pytest.raises(LabkitError, match="activations='row'"):
        qat.prepare(load(base), qat.ternary, activations="row")
    narrow = labkit.checkpoint(make_llama("narrow", num_hidden_layers=1, intermediate_size=320))
    model = load(narrow)
    qat.prepare(model, qat.ternary)
    with pytest.raises(LabkitError, match="rows of 320 weights; TQ2_0 needs a multiple of 256"):
        qat.export_ternary(model, tmp_path / "x", narrow)

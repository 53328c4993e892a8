"""Adapters: the arithmetic, merging, switching, PEFT's format both ways, and 4-bit bases."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest

import labkit
from labkit import blocks
from labkit.types import LabkitError

torch = pytest.importorskip("torch")

from labkit.train import lora, qlora  # noqa: E402
from labkit.train.adapters import load_adapter, save_adapter  # noqa: E402
from labkit.train.folder import load, save  # noqa: E402

IDS = torch.arange(3, 60)[None]


@pytest.fixture(scope="module")
def base():
    return labkit.checkpoint("edgehome")


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS)


def shaken(model, seed: int = 3):
    """The adapter with values as after training."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for layer in lora.adapted(model).values():
            layer.lora_B.normal_(std=0.02)
            if layer.lora_magnitude_vector is not None:
                layer.lora_magnitude_vector.mul_(1 + 0.05 * torch.randn_like(layer.lora_magnitude_vector))
    return model


def test_a_new_adapter_changes_nothing_and_only_it_is_trained(base):
    model = load(base)
    before = logits(model)
    paths = lora.add(model, rank=4, alpha=8, targets=("q_proj", "down_proj"))
    assert len(paths) == 12 and paths[0] == "model.layers.0.self_attn.q_proj"
    assert torch.equal(logits(model), before)
    trained = {n: p.numel() for n, p in model.named_parameters() if p.requires_grad}
    assert sum(trained.values()) == 6 * 4 * ((256 + 256) + (768 + 256))  # rank (in + out) for every layer
    assert all(".lora_" in n for n in trained)
    other = load(base)
    lora.add(other, rank=4, alpha=8, targets=("q_proj", "down_proj"))
    assert all(torch.equal(a, b) for a, b in zip(lora.adapter(model).values(), lora.adapter(other).values(), strict=True))


@pytest.mark.parametrize("dora", [False, True])
def test_merging_gives_the_same_logits(base, dora, tmp_path):
    model = load(base)
    plain = logits(model)
    lora.add(model, rank=8, alpha=16, dora=dora)
    assert (logits(model) - plain).abs().max() < (1e-4 if dora else 1e-9)
    shaken(model).double()
    with torch.no_grad():
        apart = model(IDS)
        assert (apart - plain).abs().max() > 0.05
        assert len(lora.merge(model)) == 42
        # In float64 only the order of sums is left; rope and softmax are float32 in either.
        assert (model(IDS) - apart).abs().max() < 2e-4
        layer = lora.LoRA(torch.nn.Linear(48, 32).double(), 4, 8, dora=dora).double()
        torch.nn.init.normal_(layer.lora_B)
        x = torch.randn(5, 48).double()
        assert (lora.plain(layer)(x) - layer(x)).abs().max() < 1e-13  # one layer: equal to rounding
    assert not lora.adapted(model)
    made = save(model, tmp_path / "merged", like=base, dtype=torch.float32)
    assert (logits(load(made)) - apart).abs().max() < 1e-3


def test_rows_of_a_dora_weight_are_as_long_as_its_magnitudes():
    layer = lora.LoRA(torch.nn.Linear(24, 16, bias=False), 3, 6, dora=True)
    torch.nn.init.normal_(layer.lora_B)
    with torch.no_grad():
        layer.lora_magnitude_vector.uniform_(1, 2)
        assert torch.allclose(layer.merged().norm(dim=1), layer.lora_magnitude_vector, rtol=1e-5)
    layer(torch.randn(2, 24)).sum().backward()
    assert layer.lora_magnitude_vector.grad.abs().max() > 0 and layer.base.weight.grad is not None


def test_adapters_are_switched_and_taken_off(base):
    model = load(base)
    plain = logits(model)
    lora.add(model, rank=2, alpha=4, targets=("v_proj",))
    first = lora.adapter(shaken(model, 1))
    one = logits(model)
    second = lora.adapter(shaken(model, 2))
    assert not torch.allclose(logits(model), one)
    lora.use(model, first)
    assert torch.equal(logits(model), one) and set(first) == set(second)
    with pytest.raises(LabkitError, match="does not fit this adapter"):
        lora.use(model, {k: v[:1] for k, v in second.items()})
    with pytest.raises(LabkitError, match="has an adapter already"):
        lora.add(model)
    lora.remove(model)
    assert torch.equal(logits(model), plain)


def test_wrong_requests_get_a_sentence(base):
    with pytest.raises(LabkitError, match="rank=0"):
        lora.add(load(base), rank=0)
    with pytest.raises(LabkitError, match="no layer named 'qkv'"):
        lora.add(load(base), targets=("qkv",))
    with pytest.raises(LabkitError, match="no adapter to save"):
        save_adapter(load(base), "nowhere")


# --- PEFT ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dora", [False, True])
def test_peft_loads_our_adapter_and_we_load_pefts(base, tmp_path, dora):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    ours = load(base)
    lora.add(ours, rank=4, alpha=12, targets=("q_proj", "v_proj", "up_proj"), dora=dora)
    save_adapter(shaken(ours), tmp_path / "ours", base.path)
    plain = transformers.AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(plain, tmp_path / "ours").eval()
    with torch.no_grad():
        want = theirs(IDS).logits
    assert (logits(ours) - want).abs().max() < 2e-5 * want.abs().max()  # as close as the two Llamas are without an adapter
    assert (logits(load(base)) - want).abs().max() > 0.05

    theirs.save_pretrained(tmp_path / "theirs")
    again = load(base)
    load_adapter(again, tmp_path / "theirs")
    assert torch.equal(logits(again), logits(ours))
    assert all(torch.equal(a, b) for a, b in zip(lora.adapter(again).values(), lora.adapter(ours).values(), strict=True))


def test_adapters_of_other_kinds_are_refused(base, tmp_path):
    model = load(base)
    lora.add(model, targets=("q_proj",))
    folder = save_adapter(model, tmp_path / "a")
    config = json.loads((folder / "adapter_config.json").read_text())
    for change, said in (
        ({"peft_type": "IA3"}, "peft_type"),
        ({"use_rslora": True}, "use_rslora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ):
        (folder / "adapter_config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(LabkitError, match=f"sets {said}"):
            load_adapter(load(base), folder)


# --- 4-bit base ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("double", [None, "e4m3"])
def test_the_4_bit_layer_restores_what_labkits_blocks_restore(double):
    torch.manual_seed(0)
    layer = torch.nn.Linear(512, 384, bias=False)
    ours = qlora.NF4Linear(layer, double=double)
    made = blocks.nf4(layer.weight.detach().numpy(), 64, double=bool(double))
    if double:
        assert np.abs(ours.weight.numpy() - made.dequantize()).max() < 1e-6 * np.abs(made.dequantize()).max()
        assert abs(ours.stored_bytes - made.stored_bytes) <= 4
    else:
        assert np.array_equal(ours.weight.numpy(), made.dequantize()) and ours.stored_bytes == made.stored_bytes
    assert ours.stored_bytes * 8 / ours.weight.numel() < (4.13 if double else 4.51)


@pytest.mark.parametrize("shape", [(384, 512), (96, 64), (256, 704)])
@pytest.mark.parametrize("double", [None, "dynamic"])
def test_the_4_bit_layer_equals_bitsandbytes(shape, double):
    functional = pytest.importorskip("bitsandbytes.functional")
    torch.manual_seed(1)
    layer = torch.nn.Linear(shape[1], shape[0], bias=False)
    codes, state = functional.quantize_4bit(
        layer.weight.detach(), blocksize=64, compress_statistics=bool(double), quant_type="nf4"
    )
    ours = qlora.NF4Linear(layer, double=double)
    assert torch.equal(ours.codes, codes.flatten())
    if double:
        assert np.array_equal(qlora.dynamic_levels(), functional.create_dynamic_map().numpy())
        assert ours.mean == state.offset and torch.equal(ours.sets, state.state2.absmax)
        # bitsandbytes looks levels up in a coarse table: a few scales near the middle of two levels get the farther one.
        apart = (ours.scale_codes.int() - state.absmax.int()).abs()
        assert apart.max() <= 1 and apart.sum() <= 2 + len(apart) / 100
        ours.scale_codes.copy_(state.absmax)
    assert torch.equal(ours.weight, functional.dequantize_4bit(codes, state))


def test_qlora_trains_the_adapter_over_a_frozen_4_bit_base(base):
    from labkit.train.data import house
    from labkit.train.loop import Settings, train
    from labkit.train.rows import batches, encode_all, pack

    model = load(base)
    paths = qlora.quantize_base(model)
    assert len(paths) == 42
    kept = {n: b.clone() for n, b in model.named_buffers()}
    lora.add(model, rank=4, alpha=8)
    rows = pack(encode_all(base, house("train", 24), 200), 200)
    start = logits(model)
    run = train(model, batches(rows, 2), Settings(steps=6, rate=5e-3, schedule="constant", bf16=True), progress=False)
    assert run.curves[-1]["loss"] < run.curves[0]["loss"]
    assert not torch.allclose(logits(model), start)
    assert all(torch.equal(b, kept[n.replace(".base.", ".")]) for n, b in model.named_buffers())


def test_the_gradient_through_the_4_bit_layer_is_that_of_its_weight():
    torch.manual_seed(2)
    layer = qlora.NF4Linear(torch.nn.Linear(128, 64))
    x, y = (torch.randn(3, 128).requires_grad_() for _ in "12")
    y.data.copy_(x.data)
    layer(x).pow(2).sum().backward()
    torch.nn.functional.linear(y, layer.weight, layer.bias).pow(2).sum().backward()
    assert torch.equal(x.grad, y.grad)
    with pytest.raises(LabkitError, match="double='int8'"):
        qlora.NF4Linear(torch.nn.Linear(64, 8), double="int8")


def test_merging_over_a_4_bit_base_merges_the_rounded_weights(base, tmp_path):
    model = load(base)
    qlora.quantize_base(model)
    lora.add(model, rank=4, alpha=8)
    shaken(model)
    apart = logits(copy.deepcopy(model))
    lora.merge(model)
    assert (logits(model) - apart).abs().max() < 1e-3
    assert labkit.checkpoint(save(model, tmp_path / "m", like=base, dtype=torch.float32).path).weights == base.weights

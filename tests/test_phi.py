"""Tiny and slim Phis, the numpy pass against transformers, templates, and sizes planned without weights."""

from __future__ import annotations

import numpy as np
import pytest

import labkit
from labkit import Recipe, _shapes, phi, planner
from labkit.engines import llamacpp
from labkit.standin import shapes
from labkit.types import LabkitError

TRAITS = {"phi-3.5-mini": (False, 4, 1.0, True), "phi-4-mini": (True, 2, 0.75, True), "phi-4": (False, 2, 1.0, False)}


@pytest.fixture(autouse=True)
def home(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("LABKIT_HOME", str(tmp_path_factory.getbasetemp() / "phi-home"))


@pytest.mark.parametrize("member", phi.MEMBERS)
def test_a_tiny_phi_has_the_traits_of_its_model(member):
    tied, pairs, part, long = TRAITS[member]
    made = phi.tiny(member)
    config = made.config
    assert (made.tied, config["num_key_value_heads"], config.get("partial_rotary_factor", 1.0)) == (tied, pairs, part)
    assert ("rope_scaling" in config) == long and not made.trained and made.family == "phi3"
    assert all(
        view.shape[0] != made.vocab_size for name, view in made.tensors().items() if "_proj" in name
    )  # a trap of the model builder
    assert made.fingerprint == phi.tiny(member).fingerprint and made.fingerprint != phi.tiny(member, seed=1).fingerprint


@pytest.mark.parametrize("member", phi.MEMBERS)
def test_the_numpy_pass_is_transformers(member):
    """Below the original context and beyond it, where LongRoPE takes its other factors."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    made = phi.tiny(member)
    model = transformers.AutoModelForCausalLM.from_pretrained(made.path, dtype=torch.float32).eval()
    ids = np.random.default_rng(1).integers(3, made.vocab_size, phi.ORIGINAL + 30).tolist()
    for n in (40, len(ids)):
        with torch.no_grad():
            wanted = model(torch.tensor([ids[:n]])).logits[0].numpy()
        assert np.abs(phi.forward(made).logits(ids[:n]) - wanted).max() < 2e-4


@pytest.mark.parametrize("member", phi.MEMBERS)
def test_unfusing_keeps_every_row(member):
    made = phi.tiny(member)
    fused = {name: view.float32() for name, view in made.tensors().items()}
    apart = phi.unfuse(made.config, fused)
    at = "model.layers.1."
    joined = np.concatenate([apart[f"{at}self_attn.{n}_proj.weight"] for n in "qkv"])
    assert np.array_equal(joined, fused[f"{at}self_attn.qkv_proj.weight"])
    assert np.array_equal(
        np.concatenate([apart[f"{at}mlp.{n}_proj.weight"] for n in ("gate", "up")]), fused[f"{at}mlp.gate_up_proj.weight"]
    )
    assert sum(v.size for v in apart.values()) == made.weights


def test_only_a_phi_has_this_forward_pass():
    with pytest.raises(LabkitError, match="expected a Phi3ForCausalLM"):
        phi.forward(labkit.checkpoint("edgehome"))


def test_a_slim_phi_keeps_head_size_and_vocabulary():
    config, real = phi.slim_config("phi-4-mini", 3, width=8), shapes()["phi-4-mini"]["config"]
    assert _shapes.heads(config)[2] == _shapes.heads(real)[2] and config["vocab_size"] == real["vocab_size"]
    assert config["hidden_size"] * 8 == real["hidden_size"] and config["num_hidden_layers"] == 3
    with pytest.raises(LabkitError, match="does not divide by 7"):
        phi.slim_config("phi-4", 1, width=7)


def test_a_profile_gets_what_it_can_afford(monkeypatch):
    monkeypatch.setattr(phi, "slim", lambda member, layers: ("slim", member, layers))
    monkeypatch.setattr(phi, "checkpoint", lambda name: name)
    assert phi.few_layers("phi-4", "ci", 2) == ("slim", "phi-4", 2) and phi.few_layers("phi-4", "class", 2) == "standin:phi-4:2"
    assert phi.few_layers("some/folder", "ci", 1) == ("slim", "phi-3.5-mini", 1)


def test_real_weights_or_one_sentence(tmp_path):
    assert phi.real("phi-4", "ci") == (
        None,
        f"profile ci takes stand-ins; full fetches {shapes()['phi-4']['hub']}, -p model takes a folder",
    )
    made = phi.tiny("phi-4")
    assert phi.real(str(made.path), "ci")[0].path == made.path
    nothing, why = phi.real(str(tmp_path), "ci")
    assert nothing is None and why.startswith("stand-ins only: ") and "config" in why


def test_chat_formats_of_the_family():
    asked = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]
    assert phi.chat(asked) == "<|system|>\nS<|end|>\n<|user|>\nU<|end|>\n<|assistant|>\n"
    assert phi.chat(asked, "phi-4-mini") == "<|system|>S<|end|><|user|>U<|end|><|assistant|>"
    assert (
        phi.chat(asked, "phi-4")
        == "<|im_start|>system<|im_sep|>S<|im_end|><|im_start|>user<|im_sep|>U<|im_end|><|im_start|>assistant<|im_sep|>"
    )


def test_positions_and_images():
    assert phi.stretch(131072, 4096) == pytest.approx(1.1902, abs=1e-4) and phi.stretch(4096, 4096) == 1.0
    assert phi.image_tokens(2, 2) == 757 and phi.image_tokens(1, 1) == 313  # 757: vLLM's test of the processor, 4 crops


def test_sizes_planned_without_weights_are_those_of_a_file(monkeypatch):
    """The dry run on an outline against the file llama.cpp really writes."""
    pytest.importorskip("llama_cpp")
    made = phi.tiny("phi-4-mini")
    monkeypatch.setattr(phi, "standin_config", lambda member: dict(made.config))
    monkeypatch.setattr(phi, "tiny", lambda member: made)
    planned = phi.planned_gguf("phi-4-mini", "q4_k_m")
    stored = llamacpp.tensors(labkit.build(made, Recipe("llamacpp", "q4_k_m")).path / llamacpp.FILE)
    assert {t["name"]: (t["type"], t["bytes"], tuple(t["shape"])) for t in planned} == {
        t["name"]: (t["type"], t["bytes"], t["shape"]) for t in stored
    }


def test_planned_sizes_of_the_family():
    pytest.importorskip("llama_cpp")
    total = {name: sum(t["bytes"] for t in phi.planned_gguf(name, "q4_k_m")) for name in ("phi-4-mini", "phi-4")}
    assert total["phi-4-mini"] == pytest.approx(2.49e9, rel=0.005) and total["phi-4"] == pytest.approx(9.05e9, rel=0.005)


@pytest.mark.parametrize("member", phi.MEMBERS)
def test_every_slim_phi_is_small_and_takes_the_engines_groups(member):
    config = phi.slim_config(member, 8, phi.NARROW[member])
    assert _shapes.parameters(config) < 160e6
    assert all(config[size] % 128 == 0 for size in ("hidden_size", "intermediate_size"))


def test_the_moe_plan_has_every_weight_and_spares_the_router():
    pytest.importorskip("llama_cpp")
    rows = phi.planned_moe("q4_k_m")
    counted: dict[str, int] = {}
    for row in rows:
        kind = planner.tensor_class(row["name"])
        counted[kind] = counted.get(kind, 0) + int(np.prod(row["shape"]))
    assert counted == planner.experts(phi.MOE)
    assert {row["type"] for row in rows if "ffn_gate_inp" in row["name"]} == {"f32"}
    assert sum(row["bytes"] for row in rows) == pytest.approx(25.3e9, rel=0.005)

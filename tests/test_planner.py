"""The memory planner against published counts, brute force and files; the line through few layers."""

from __future__ import annotations

import pytest

from labkit import phi, planner
from labkit.standin import shapes, standin_config
from labkit.types import LabkitError


@pytest.mark.parametrize("name", ["phi-3.5-mini", "phi-4-mini", "phi-4", "smollm2-135m", "gemma-3-270m", "qwen3-0.6b"])
def test_classes_sum_to_the_published_parameters(name):
    counted = planner.weights(standin_config(name))
    assert sum(counted.values()) == shapes()[name]["published_parameters"]
    assert "other" not in counted and ("head" in counted) == (not standin_config(name).get("tie_word_embeddings"))


def test_an_unknown_architecture_is_one_sentence():
    with pytest.raises(LabkitError, match="FooForCausalLM is unknown to the planner"):
        planner.weights({"architectures": ["FooForCausalLM"]})


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model.embed_tokens.weight", "embedding"), ("token_embd.weight", "embedding"), ("lm_head.weight", "head"), ("output.weight", "head"),
        ("output_norm.weight", "norms"), ("blk.3.attn_norm.weight", "norms"), ("blk.3.attn_output.weight", "attention"),
        ("model.layers.0.self_attn.qkv_proj.weight", "attention"), ("model.layers.0.mlp.gate_up_proj.weight", "feed-forward"),
        ("blk.0.ffn_gate_inp.weight", "router"), ("blk.0.ffn_gate_exps.weight", "experts"), ("rope_factors_long.weight", "other"),
        ("model.layers.0.block_sparse_moe.gate.weight", "router"), ("model.layers.0.block_sparse_moe.experts.3.w1.weight", "experts"),
    ],
)  # fmt: skip
def test_tensor_classes_by_name(name, kind):
    assert planner.tensor_class(name) == kind


def test_experts_are_those_of_a_real_implementation():
    """Every tensor of mlx-lm's PhiMoE at toy size, counted by class."""
    phimoe = pytest.importorskip("mlx_lm.models.phimoe")
    from mlx.utils import tree_flatten

    small = phi.MOE | {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
                       "vocab_size": 128}  # fmt: skip
    arguments = {k: v for k, v in small.items() if k not in ("attention_bias", "tie_word_embeddings")}
    made = phimoe.Model(phimoe.ModelArgs(**arguments))
    counted: dict[str, int] = {}
    for name, values in tree_flatten(made.parameters()):
        kind = planner.tensor_class(name)
        counted[kind] = counted.get(kind, 0) + values.size
    assert planner.experts(small) == counted


def test_experts_of_the_published_shape():
    assert sum(planner.experts(phi.MOE).values()) == pytest.approx(41.9e9, rel=0.002)  # the model card's number
    active = planner.experts(phi.MOE, active=True)
    assert sum(active.values()) + phi.MOE["vocab_size"] * phi.MOE["hidden_size"] == pytest.approx(
        6.6e9, rel=0.01
    )  # it counts the table


def test_the_image_encoder_is_clips():
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    with torch.device("meta"):
        made = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**phi.VISION))
    assert planner.image_encoder(phi.VISION, 3072)["image encoder"] == sum(p.numel() for p in made.parameters())
    whole = sum(planner.weights(standin_config("phi-3.5-mini")).values()) + sum(planner.image_encoder(phi.VISION, 3072).values())
    assert whole == pytest.approx(4.15e9, rel=0.01)  # 4.2 B on the model card, rounded up


def test_cache_agrees_with_the_catalogue():
    from labkit import _shapes

    for name in phi.MEMBERS:
        config = standin_config(name)
        assert planner.cache_per_token(config) * 100 == _shapes.cache_bytes(config, 100)
    assert planner.cache_per_token(standin_config("phi-4"), bits=8) == 2 * 40 * 10 * 128


def test_a_plan_adds_up_and_names_what_is_missing():
    config = standin_config("phi-4-mini")
    plan = planner.plan(config, {"embedding": 6.5, "other": 4.5}, 1000, cache_bits=8, batch=64)
    counted = planner.weights(config)
    assert plan.weights["embedding"] == counted["embedding"] * 6.5 / 8 and plan.weights["norms"] == counted["norms"] * 4.5 / 8
    assert plan.cache == 1000 * planner.cache_per_token(config, 8)
    assert plan.total == pytest.approx(sum(plan.weights.values()) + plan.cache + planner.activations(config, 64, 1000))
    assert (
        planner.plan(config, 4.5, 10).activations
        < planner.plan(config, 4.5, 512).activations
        == pytest.approx(planner.activations(config, 512, 512))
    )
    with pytest.raises(LabkitError, match="No bits are given for attention"):
        planner.plan(config, {"embedding": 4}, 10)


@pytest.mark.parametrize("limit", [1e9, 3e9, 20e9])
def test_the_longest_context_is_the_last_that_fits(limit):
    config = standin_config("phi-3.5-mini")
    found = planner.longest_context(config, 4.5, limit)
    assert planner.plan(config, 4.5, found + 1).total > limit
    assert found == 0 or planner.plan(config, 4.5, found).total <= limit


def test_a_line_is_exact_on_a_line_and_tells_its_error_off_it():
    exact = planner.line([1, 2, 4], [3.0, 5.0, 9.0])
    assert (
        exact.at(32) == pytest.approx(65)
        and exact.error(8, 17.0) == pytest.approx(0)
        and exact.left_out == pytest.approx((0, 0, 0))
    )
    bent = planner.line([1, 2, 4], [3.0, 5.0, 12.0])
    assert max(map(abs, bent.left_out)) > 0.05 and planner.line([1, 2], [1.0, 2.0]).left_out == ()
    with pytest.raises(LabkitError, match="two or more numbers of layers"):
        planner.line([2, 2], [1.0, 1.0])


def test_layers_on_a_gpu():
    assert planner.gpu_layers(10, 3, 1, 32) == 2 and planner.gpu_layers(10, 3, 1, 32, fixed=3) == 1
    assert planner.gpu_layers(1e9, 3, 1, 32) == 32 and planner.gpu_layers(1, 3, 1, 32, fixed=5) == 0


def test_stored_bits_by_class():
    rows = [
        {"name": "token_embd.weight", "shape": (4, 256), "bytes": 4 * 210},
        {"name": "blk.0.ffn_up.weight", "shape": (2, 256), "bytes": 2 * 144},
    ]
    assert planner.stored_bits(rows) == {"embedding": 210 * 8 / 256, "feed-forward": 4.5}

"""Which tensors a decoder of a known family stores, from its config.json alone: names and shapes, no weights.

Names follow the checkpoints that transformers writes for these architectures.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

Shapes = dict[str, tuple[int, ...]]

FAMILIES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Phi3ForCausalLM": "phi3",
    "Gemma3ForCausalLM": "gemma3",
}


def family(config: Mapping[str, Any]) -> str | None:
    """The family name of a config.json, None for an architecture labkit does not know."""
    return FAMILIES.get((config.get("architectures") or [None])[0])


def tied(config: Mapping[str, Any]) -> bool:
    """Whether the output head is the embedding matrix; Gemma's default is yes, everybody else's no."""
    default = family(config) == "gemma3"
    value = config.get("tie_word_embeddings")
    return default if value is None else bool(value)


def heads(config: Mapping[str, Any]) -> tuple[int, int, int]:
    """(query heads, key/value heads, head size)."""
    queries = config["num_attention_heads"]
    pairs = config.get("num_key_value_heads") or queries
    default = 256 if family(config) == "gemma3" else config["hidden_size"] // queries
    return queries, pairs, config.get("head_dim") or default


def shapes(config: Mapping[str, Any]) -> Shapes | None:
    """Tensor name -> shape for a whole checkpoint, in storage order; None when the architecture is unknown."""
    kind = family(config)
    if kind is None:
        return None
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    found: Shapes = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer in range(config["num_hidden_layers"]):
        for name, shape in _layer(kind, config).items():
            found[f"model.layers.{layer}.{name}"] = shape
    found["model.norm.weight"] = (hidden,)
    if not tied(config):
        found["lm_head.weight"] = (vocab, hidden)
    return found


def _layer(kind: str, config: Mapping[str, Any]) -> Shapes:
    hidden = config["hidden_size"]
    norms = ["input_layernorm", "post_attention_layernorm"]
    if kind == "gemma3":
        norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    return _attention(kind, config) | _feed_forward(kind, config) | {f"{n}.weight": (hidden,) for n in norms}


def _attention(kind: str, config: Mapping[str, Any]) -> Shapes:
    hidden = config["hidden_size"]
    queries, pairs, size = heads(config)
    if kind == "phi3":
        fused = {"self_attn.qkv_proj.weight": ((queries + 2 * pairs) * size, hidden)}
        return fused | {"self_attn.o_proj.weight": (hidden, queries * size)}
    rows = {"q_proj": queries * size, "k_proj": pairs * size, "v_proj": pairs * size}
    found: Shapes = {f"self_attn.{name}.weight": (n, hidden) for name, n in rows.items()}
    found["self_attn.o_proj.weight"] = (hidden, queries * size)
    if kind == "qwen2" or config.get("attention_bias"):
        found |= {f"self_attn.{name}.bias": (n,) for name, n in rows.items()}
    if kind != "qwen2" and config.get("attention_bias"):
        found["self_attn.o_proj.bias"] = (hidden,)
    if kind in ("qwen3", "gemma3"):
        found |= {"self_attn.q_norm.weight": (size,), "self_attn.k_norm.weight": (size,)}
    return found


def _feed_forward(kind: str, config: Mapping[str, Any]) -> Shapes:
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    if kind == "phi3":
        return {"mlp.gate_up_proj.weight": (2 * inner, hidden), "mlp.down_proj.weight": (hidden, inner)}
    found: Shapes = {f"mlp.{name}.weight": (inner, hidden) for name in ("gate_proj", "up_proj")}
    found["mlp.down_proj.weight"] = (hidden, inner)
    if config.get("mlp_bias"):
        found |= {"mlp.gate_proj.bias": (inner,), "mlp.up_proj.bias": (inner,), "mlp.down_proj.bias": (hidden,)}
    return found


def parameters(config: Mapping[str, Any]) -> int:
    """Weights of a checkpoint of this config, tied ones counted once."""
    return sum(prod(shape) for shape in (shapes(config) or {}).values())


def cache_bytes(config: Mapping[str, Any], context: int, item_bytes: float = 2) -> int:
    """Key/value cache of `context` tokens: 2 (K and V) x layers x KV heads x head size x tokens x bytes.

    Layers with a sliding window never need more tokens than the window.
    """
    _, pairs, size = heads(config)
    tokens = 0
    for layer in range(config["num_hidden_layers"]):
        window = config.get("sliding_window") if slides(config, layer) else None
        tokens += min(context, window) if window else context
    return int(2 * pairs * size * tokens * item_bytes)


def slides(config: Mapping[str, Any], layer: int) -> bool:
    """Whether a layer sees only the last `sliding_window` positions."""
    if "layer_types" in config:
        return config["layer_types"][layer] == "sliding_attention"
    if family(config) == "gemma3":  # every n-th layer sees everything
        return (layer + 1) % config.get("sliding_window_pattern", 6) != 0
    if family(config) in ("qwen2", "qwen3"):
        return bool(config.get("use_sliding_window")) and layer >= config.get("max_window_layers", 0)
    return True

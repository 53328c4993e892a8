"""The shape of edgehome: a plain Llama (`labkit.train.llama`) and the config.json that says so."""

from __future__ import annotations

from labkit.train.generate import Memory, complete
from labkit.train.llama import Llama, Shape

__all__ = ["Llama", "Memory", "Shape", "complete", "config"]

SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "max_position_embeddings", "rope_theta", "rms_norm_eps",
)  # fmt: skip


def config(shape: Shape) -> dict:
    """config.json as transformers writes it."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **{name: getattr(shape, name) for name in SIZES},
        "head_dim": shape.head_dim,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta},
        "rope_scaling": None,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "pretraining_tp": 1,
        "tie_word_embeddings": True,
        "use_cache": True,
        "initializer_range": 0.02,
        "bos_token_id": None,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
    }

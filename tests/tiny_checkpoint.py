"""A tiny checkpoint written on the spot: a seeded Llama, its tokenizer and chat template, small enough for any test."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TEXT = ["turn on the light in the kitchen", "set a timer for 5 minutes", "Boa noite, apaga a luz da sala, por favor.",
        'a { "b": 12 } \n\n c', "The quick brown fox jumps over the lazy dog 0123456789 times."]  # fmt: skip
TINY = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 256,  # rows divide by 256, so that every block format fits
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "hidden_act": "silu",
    "vocab_size": 512,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "dtype": "float32",
}


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """A byte-level BPE with the GPT-2 pre-tokenizer, learned from `TEXT`, and a ChatML template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|endoftext|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "add_bos_token": False,
        "model_max_length": 512,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    (folder / "chat_template.jinja").write_text(CHATML)
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 0, "eos_token_id": [2]}))


def write_safetensors(file: Path, tensors: dict[str, np.ndarray], dtype: str = "F32") -> None:
    """Store float32 arrays as F32, F16 or BF16 (rounded to nearest even)."""
    header, blobs, place = {}, [], 0
    for name, array in tensors.items():
        blob = _stored(np.ascontiguousarray(array, dtype=np.float32), dtype)
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [place, place + len(blob)]}
        blobs.append(blob)
        place += len(blob)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(blobs))


def _stored(array: np.ndarray, dtype: str) -> bytes:
    if dtype == "BF16":
        bits = array.view(np.uint32).astype(np.uint64)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2").tobytes()
    return array.astype({"F32": "<f4", "F16": "<f2"}[dtype]).tobytes()


def random_weights(config: dict, seed: int = 0) -> dict[str, np.ndarray]:
    """Seeded weights for a Llama config: matrices normal(0, 0.08), norms around 1."""
    rng = np.random.default_rng(seed)
    hidden, inner, size = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, pairs = config["num_attention_heads"] * size, config["num_key_value_heads"] * size
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for layer in range(config["num_hidden_layers"]):
        block = {
            "input_layernorm": (hidden,), "self_attn.q_proj": (queries, hidden), "self_attn.k_proj": (pairs, hidden),
            "self_attn.v_proj": (pairs, hidden), "self_attn.o_proj": (hidden, queries),
            "post_attention_layernorm": (hidden,), "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }  # fmt: skip
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in block.items()}
    shapes["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    return {
        name: (rng.normal(0, 0.08, shape) if len(shape) > 1 else 1 + rng.normal(0, 0.05, shape)).astype(np.float32)
        for name, shape in shapes.items()
    }


def write_llama(folder: Path, *, seed: int = 0, dtype: str = "F32", **overrides: object) -> Path:
    """A whole tiny Llama checkpoint in `folder`; `overrides` change its config."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {**TINY, **overrides}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    write_tokenizer(folder, min(config["vocab_size"], 512))
    write_safetensors(folder / "model.safetensors", random_weights(config, seed), dtype)
    return folder

"""Tiny random checkpoints of every family, made by transformers, and what transformers answers with them."""

from __future__ import annotations

import shutil
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from tiny_checkpoint import write_llama

SIZES = {
    "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 512, "max_position_embeddings": 256, "bos_token_id": 0,
    "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
ORIGINAL = 48  # tests run past this many positions, so that both halves of a scaled rotary embedding are used
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": ORIGINAL,
}  # fmt: skip
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 0.75,
    "short_factor": [1.0 + 0.01 * i for i in range(24)], "long_factor": [1.5 + 0.1 * i for i in range(24)],
    "original_max_position_embeddings": ORIGINAL,
}  # fmt: skip
# name -> (config class, what differs from SIZES)
FAMILIES = {
    "llama": ("LlamaConfig", {"tie_word_embeddings": True}),
    "llama-3": ("LlamaConfig", {"tie_word_embeddings": False, "rope_parameters": LLAMA3}),
    "llama-bias": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("MistralConfig", {"sliding_window": None, "head_dim": 32}),
    "mistral-window": ("MistralConfig", {"sliding_window": 16, "head_dim": 32}),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {"head_dim": 64, "tie_word_embeddings": True}),
    "phi3": ("Phi3Config", {"tie_word_embeddings": True, "original_max_position_embeddings": 256}),
    "phi3-long": ("Phi3Config", {
        "partial_rotary_factor": 0.75, "rope_parameters": LONGROPE, "original_max_position_embeddings": ORIGINAL,
        "tie_word_embeddings": True, "num_attention_heads": 2,  # so that the turned half heads divide by 8, as ONNX Runtime needs
    }),
    "gemma3": ("Gemma3TextConfig", {
        "head_dim": 32, "sliding_window": 16, "num_hidden_layers": 6, "query_pre_attn_scalar": 32,
    }),
}  # fmt: skip


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The suite's tiny Llama with a wider feed-forward: ONNX Runtime's model builder takes a matrix of 512 rows for the head."""
    return write_llama(tmp_path_factory.mktemp("checkpoints") / "tiny-llama", intermediate_size=768)


@pytest.fixture
def make_llama(make_llama):
    """`make_llama(...) -> Path` as everywhere, of the same wider shape."""
    return lambda name="made", **overrides: make_llama(name, **{"intermediate_size": 768, **overrides})


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path):
    """`family("qwen3") -> Path`: a tiny random checkpoint of a family, float32, made once a session."""
    root = tmp_path_factory.mktemp("families")

    @cache
    def make(name: str) -> Path:
        transformers = pytest.importorskip("transformers")
        torch = pytest.importorskip("torch")
        kind, differs = FAMILIES[name]
        config = getattr(transformers, kind)(**{**SIZES, **differs})
        torch.manual_seed(sum(name.encode()))
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for weight in model.parameters():
            middle = 1.0 if weight.ndim == 1 and name != "gemma3" else 0.0  # Gemma stores its norms less one
            torch.nn.init.normal_(weight, middle, 0.1 if weight.ndim == 1 else 0.06)
        model.save_pretrained(root / name)
        for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copy(tiny_llama / file, root / name / file)
        return root / name

    return make


@pytest.fixture(scope="session")
def reference():
    """`reference(folder) -> (prompt ids, logits (T, V), greedy continuation of 24 ids)` by transformers in float32."""

    @cache
    def answer(folder: Path) -> tuple[list[int], np.ndarray, list[int]]:
        torch = pytest.importorskip("torch")
        transformers = pytest.importorskip("transformers")
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        ids = np.random.default_rng(3).integers(3, model.config.vocab_size, 2 * ORIGINAL - 24).tolist()
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0].numpy()
            row = torch.tensor([ids[:20]])
            for _ in range(24):  # without a cache: the plainest greedy loop there is
                row = torch.cat([row, model(row).logits[:, -1:].argmax(-1)], 1)
        return ids, logits, row[0, 20:].tolist()

    return answer

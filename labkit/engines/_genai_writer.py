"""Checkpoint -> ONNX Runtime GenAI folder: graph, weights, genai_config.json, tokenizer; no torch, no transformers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from labkit._files import read_json
from labkit._shapes import family, heads
from labkit.engines import _onnx_graph
from labkit.engines._genai import CONFIG, MODEL
from labkit.engines._onnx_weights import Blocks
from labkit.types import LabkitError

BITS = {"int8": 8, "int4": 4, "int2": 2}
ALGORITHMS = ("default", "rtn", "rtn_last")
TOKENIZER = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template*")
# Ids of begin, end and padding where config.json names none: what transformers' configuration classes then assume.
IDS: Mapping[str, tuple[int | None, int | None, int | None]] = {
    "llama": (1, 2, None),
    "mistral": (1, 2, None),
    "qwen2": (None, None, None),
    "qwen3": (None, None, None),
    "phi3": (1, 32000, 32000),
    "gemma3": (2, 1, 0),
}
SAMPLING = {  # search setting -> its value where neither generation_config.json nor config.json has one
    "diversity_penalty": 0.0, "do_sample": False, "length_penalty": 1.0, "no_repeat_ngram_size": 0, "num_beams": 1,
    "num_return_sequences": 1, "repetition_penalty": 1.0, "temperature": 1.0, "top_k": 50, "top_p": 1.0,
}  # fmt: skip
GENERATION = ("do_sample", "temperature", "top_k", "top_p")  # those that generation_config.json decides


def write_genai(
    checkpoint: Any, out: str | Path, precision: str = "fp32", *, shared: bool | None = None, block_size: int = 32,
    symmetric: bool = True, accuracy_level: int = 4, algorithm: str = "rtn",
) -> Path:  # fmt: skip
    """Write checkpoint -> GenAI folder `out` without the model builder: fp32, fp16, int8, int4 or int2.

    `shared`: embedding and head are one stored matrix (default: when the head is tied). Blocks are rounded as ONNX
    Runtime does: its C++ kernel for int8, int2 and int4 "default", its weight-only tool for int4 "rtn", "rtn_last".
    """
    out = Path(out)
    if precision not in ("fp32", "fp16", *BITS) or algorithm not in ALGORITHMS:
        raise LabkitError(
            f"{precision} by {algorithm} was given; labkit writes fp32, fp16, {', '.join(BITS)} by {', '.join(ALGORITHMS)}."
        )
    if reason := _onnx_graph.unsupported(checkpoint.config):
        raise LabkitError(f"labkit cannot write the graph of {checkpoint.name}: {reason}; take the model builder.")
    blocks = head = None
    if precision in BITS:
        kernel = "rtn" if precision == "int4" and algorithm != "default" else "default"
        blocks = head = Blocks(BITS[precision], block_size, symmetric, accuracy_level, kernel)
        if algorithm == "rtn_last":
            head = Blocks(8, block_size, symmetric, accuracy_level, kernel)
    shared = checkpoint.tied if shared is None else shared
    out.mkdir(parents=True, exist_ok=True)
    storage = _onnx_graph.Storage(shared, "f2" if precision == "fp16" else "f4", blocks, head)
    _onnx_graph.write_graph(checkpoint.config, checkpoint.tensors(), out / MODEL, storage)
    write_settings(checkpoint.path, checkpoint.config, out)
    return out


def write_settings(source: Path, config: Mapping[str, Any], out: Path) -> None:
    """Write genai_config.json for the graph in `out` and copy the tokenizer of checkpoint folder `source`."""
    file = source / "generation_config.json"
    generation = read_json(file, "Generation settings") if file.exists() else {}
    text = json.dumps(genai_config(config, generation), indent=4)
    (out / CONFIG).write_text(text, encoding="utf-8")
    for pattern in TOKENIZER:
        for found in source.glob(pattern):
            shutil.copyfile(found, out / found.name)
    settings = out / "tokenizer_config.json"
    if settings.exists():  # "no limit" is a number of 30 digits in many of them, which GenAI cannot read
        known = {**read_json(settings, "Tokenizer settings"), "model_max_length": config["max_position_embeddings"]}
        settings.write_text(json.dumps(known, indent=2, ensure_ascii=False), encoding="utf-8")


def genai_config(config: Mapping[str, Any], generation: Mapping[str, Any]) -> dict[str, Any]:
    """The content of genai_config.json from those of config.json and generation_config.json."""
    queries, pairs, size = heads(config)
    context, kind = config["max_position_embeddings"], family(config)
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    own = {name: config.get(name, default) for name, default in zip(names, IDS[kind], strict=True)}
    begin, end, fill = (own[n] if generation.get(n) is None else generation[n] for n in names)
    decided = {name: generation[name] for name in GENERATION if generation.get(name) is not None}
    known = {name: config[name] for name in SAMPLING if config.get(name) is not None}
    return {
        "model": {
            "bos_token_id": 1 if begin is None else begin,
            "context_length": context,
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "filename": MODEL,
                "head_size": size,
                "hidden_size": config["hidden_size"],
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
                "num_attention_heads": queries,
                "num_hidden_layers": config["num_hidden_layers"],
                "num_key_value_heads": pairs,
            },
            "eos_token_id": end,
            "pad_token_id": fill if fill is not None else end[0] if isinstance(end, list) else end,
            "type": "gemma3_text" if kind == "gemma3" else kind,
            "vocab_size": config["vocab_size"],
        },
        "search": {
            **SAMPLING, **known, **decided,
            "early_stopping": True, "max_length": context, "min_length": 0, "past_present_share_buffer": True,
        },
    }  # fmt: skip

"""What llama.cpp needs to know about a model: its GGUF metadata and, tensor by tensor, name, order and shift.

Key and tensor names are the `gguf` package's; what each architecture expects was read in llama.cpp's src/models.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from labkit import _shapes
from labkit.types import LabkitError

# family -> architecture in llama.cpp's word. Mistral is a Llama to it, and so is SmolLM2.
ARCHITECTURES = {
    "llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "phi3": "phi3", "gemma3": "gemma3",
}  # fmt: skip
ACTIVATIONS = {"gemma3": "gelu_pytorch_tanh"}  # everybody else: silu
IGNORED = ("rotary_emb.inv_freq", "self_attn.rotary_emb")


@dataclass(frozen=True)
class Stored:
    """One tensor of the GGUF: where it comes from and what is done to it on the way."""

    name: str  # in the GGUF
    shape: tuple[int, ...]  # rows first, as numpy writes it
    source: Any  # a TensorView, or a float32 array made here
    heads: int = 0  # rope permutation of this many heads; 0: rows stay as they are
    shift: float = 0.0

    def rows(self, first: int, last: int) -> np.ndarray:
        """Rows first..last-1 as float32, in GGUF order. With heads, both ends must lie on a head's edge."""
        if isinstance(self.source, np.ndarray):
            return self.source[first:last]
        values = self.source.rows(first, last)
        if self.shift:
            values += np.float32(self.shift)
        return interleave(values, self.head_rows) if self.heads else values

    @property
    def head_rows(self) -> int:
        return self.shape[0] // self.heads if self.heads else 1


def interleave(rows: np.ndarray, head_rows: int) -> np.ndarray:
    """Reorder each head's rows from halves (0, n/2, 1, n/2+1, ...) to neighbours, as llama.cpp's Llama rope pairs them.

    transformers rotates row i with row i + n/2 of a head; llama.cpp's Llama rotates rows 2i and 2i + 1.
    """
    halves = rows.reshape(-1, 2, head_rows // 2, *rows.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows.shape)


def architecture(checkpoint: Any) -> str:
    """llama.cpp's name for the checkpoint's architecture; one sentence when labkit's writer does not know it."""
    family = _shapes.family(checkpoint.config)
    if family not in ARCHITECTURES:
        raise LabkitError(
            f"labkit's GGUF writer does not know {checkpoint.architecture}; "
            f"expected one of {', '.join(_shapes.FAMILIES)}."
        )
    wanted = ACTIVATIONS.get(family, "silu")
    config = checkpoint.config
    found = config.get("hidden_activation") or config.get("hidden_act") or wanted
    if found != wanted:
        raise LabkitError(f"{checkpoint.name} uses the activation {found!r}; llama.cpp's {family} computes {wanted!r}.")
    return ARCHITECTURES[family]


def stored_tensors(checkpoint: Any) -> Iterator[Stored]:
    """Every tensor of the GGUF, in order: the checkpoint's, renamed, then the rope factors it needs."""
    import gguf

    config, family = checkpoint.config, _shapes.family(checkpoint.config)
    kind = getattr(gguf.MODEL_ARCH, architecture(checkpoint).upper())
    names = gguf.get_tensor_name_map(kind, config["num_hidden_layers"])
    queries, pairs, _ = _shapes.heads(config)
    permuted = {"q_proj": queries, "k_proj": pairs} if family in ("llama", "mistral") else {}
    for source, view in checkpoint.tensors().items():
        if (source == "lm_head.weight" and _shapes.tied(config)) or source.endswith(IGNORED):
            continue
        name = names.get_name(source, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise LabkitError(f"{checkpoint.name} holds a tensor {source!r}, unknown in a {checkpoint.architecture}.")
        shift = 1.0 if family == "gemma3" and source.endswith("norm.weight") else 0.0  # Gemma stores norm - 1
        yield Stored(name, view.shape, view, permuted.get(source.split(".")[-2], 0), shift)
    for name, factors in rope_factors(config).items():
        yield Stored(f"{name}.weight", factors.shape, factors)


def rope(config: dict[str, Any], layer_type: str = "full_attention") -> dict[str, Any]:
    """Rope settings under one set of names, from transformers 4 (`rope_scaling`) or 5 (`rope_parameters`) configs."""
    found = config.get("rope_parameters") or config.get("rope_scaling") or {}
    nested = found.get(layer_type)
    settings = dict(nested if isinstance(nested, dict) else {k: v for k, v in found.items() if not isinstance(v, dict)})
    settings["rope_type"] = settings.get("rope_type") or settings.get("type") or "default"
    for key in ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings"):
        if settings.get(key) is None and config.get(key) is not None:
            settings[key] = config[key]
    return settings


def rotated(config: dict[str, Any]) -> int:
    """How many of a head's values rope turns."""
    return int(_shapes.heads(config)[2] * (rope(config).get("partial_rotary_factor") or 1.0))


def rope_factors(config: dict[str, Any]) -> dict[str, np.ndarray]:
    """Frequency divisors llama.cpp reads from tensors: Llama 3's, or Phi-3's long and short ones."""
    settings = rope(config)
    if settings["rope_type"] == "llama3":
        return {"rope_freqs": _llama3_factors(settings, rotated(config))}
    if settings["rope_type"] in ("longrope", "su"):
        found = {f"rope_factors_{k}": np.asarray(settings[f"{k}_factor"], dtype=np.float32) for k in ("long", "short")}
        for name, factors in found.items():
            if len(factors) != rotated(config) // 2:
                half = rotated(config) // 2
                raise LabkitError(f"{name} has {len(factors)} values; expected {half}, half a head's rotation.")
        return found
    return {}


def _llama3_factors(settings: dict[str, Any], size: int) -> np.ndarray:
    """1 for fast frequencies, `factor` for slow ones, smooth between: the scheme of Llama 3.1."""
    low, high = settings["low_freq_factor"], settings["high_freq_factor"]
    factor, original = settings["factor"], settings["original_max_position_embeddings"]
    frequency = settings["rope_theta"] ** -(np.arange(0, size, 2, dtype=np.float64) / size)
    turns = original * frequency / (2 * math.pi)  # how often it comes round within the original context
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1.0 / ((1.0 - smooth) / factor + smooth)).astype(np.float32)


def add_metadata(writer: Any, checkpoint: Any) -> list[str]:
    """Write the model's hyperparameters; returns what llama.cpp will do differently, one sentence each."""
    config, family = checkpoint.config, _shapes.family(checkpoint.config)
    queries, pairs, size = _shapes.heads(config)
    writer.add_vocab_size(checkpoint.vocab_size)
    writer.add_context_length(checkpoint.context)
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(queries)
    writer.add_head_count_kv(pairs)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_layer_norm_rms_eps(config.get("rms_norm_eps", 1e-6))
    writer.add_rope_dimension_count(rotated(config))
    _add_rope(writer, checkpoint)
    extra: dict[str, Callable[[Any, Any], list[str]]] = {"gemma3": _add_gemma, "phi3": _add_phi}
    return extra.get(family, _other_windows)(writer, checkpoint)


def _add_rope(writer: Any, checkpoint: Any) -> None:
    import gguf

    settings = rope(checkpoint.config)
    writer.add_rope_freq_base(float(settings.get("rope_theta") or 10000.0))
    kind = settings["rope_type"]
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(settings["factor"]))
    elif kind in ("longrope", "su"):
        original = settings["original_max_position_embeddings"]
        writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)
        writer.add_rope_scaling_orig_ctx_len(original)
        writer.add_rope_scaling_attn_factors(_long_attention(settings, checkpoint.context / original))
    elif kind not in ("default", "llama3"):
        raise LabkitError(
            f"{checkpoint.name} scales rope by {kind!r}; labkit's GGUF writer knows linear, llama3 and longrope."
        )


def _long_attention(settings: dict[str, Any], scale: float) -> float:
    """The factor on cos and sin that longrope brings (Phi-3 technical report)."""
    if settings.get("attention_factor"):
        return float(settings["attention_factor"])
    scale = settings.get("factor") or scale
    return math.sqrt(1 + math.log(scale) / math.log(settings["original_max_position_embeddings"])) if scale > 1 else 1.0


def _add_gemma(writer: Any, checkpoint: Any) -> list[str]:
    config = checkpoint.config
    size = _shapes.heads(config)[2]
    if config.get("query_pre_attn_scalar", size) != size and config["num_hidden_layers"] != 62:
        scale = config["query_pre_attn_scalar"]
        raise LabkitError(f"{checkpoint.name} scales queries by {scale}; llama.cpp's Gemma 3 uses {size}.")
    if config.get("attn_logit_softcapping"):
        raise LabkitError(f"{checkpoint.name} caps attention logits, which llama.cpp's Gemma 3 does not do.")
    if config.get("final_logit_softcapping"):
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    slides = [_shapes.slides(config, layer) for layer in range(config["num_hidden_layers"])]
    if any(slides):
        writer.add_sliding_window(config["sliding_window"])
        writer.add_sliding_window_pattern(slides)
        local = rope(config, "sliding_attention").get("rope_theta") if "rope_parameters" in config else None
        writer.add_rope_freq_base_swa(float(local or config.get("rope_local_base_freq") or 10000.0))
    return []


def _add_phi(writer: Any, checkpoint: Any) -> list[str]:
    writer.add_sliding_window(0)  # llama.cpp has Phi's window switched off; 0 also tells Phi-4 from Phi-3
    return _other_windows(writer, checkpoint)


def _other_windows(writer: Any, checkpoint: Any) -> list[str]:
    """llama.cpp gives these architectures full attention: equal up to the window, not beyond."""
    config = checkpoint.config
    window = config.get("sliding_window")
    slides = any(_shapes.slides(config, layer) for layer in range(config["num_hidden_layers"]))
    if not window or not slides or window >= checkpoint.context or _shapes.family(config) == "llama":
        return []
    return [f"llama.cpp attends to everything where {checkpoint.name} slides: equal up to {window} tokens only."]

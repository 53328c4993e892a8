"""The memory planner: what a decoder needs before it is downloaded, part by part, and what a layer adds.

Three sums with three different causes: weights (fixed, by tensor class), the key/value cache (grows with the context),
activations (grow with the tokens taken at once). All in bytes. Nothing here is measured; the labs put a real process beside it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from labkit import _shapes
from labkit.types import LabkitError

CLASSES = ("embedding", "head", "attention", "feed-forward", "experts", "router", "norms", "image encoder", "projector")
# In this order; names of checkpoints, GGUF files and ONNX graphs.
PATTERNS = (
    ("norms", r"norm"), ("embedding", r"embed_tokens|token_embd|wte"), ("head", r"lm_head|^output\."),
    ("router", r"block_sparse_moe\.gate|ffn_gate_inp"), ("experts", r"experts|_exps|switch_mlp"), ("attention", r"attn"),
    ("feed-forward", r"mlp|ffn"),
)  # fmt: skip


def tensor_class(name: str) -> str:
    """The class of a decoder's tensor, from its name in a checkpoint, a GGUF file or an ONNX graph; "other" if unknown."""
    return next((kind for kind, pattern in PATTERNS if re.search(pattern, name)), "other")


def weights(config: Mapping[str, Any]) -> dict[str, int]:
    """Class -> number of weights of a dense decoder, from its config alone; a tied head counts once, as embedding."""
    found: Counter[str] = Counter()
    for name, shape in (_shapes.shapes(config) or {}).items():
        found[tensor_class(name)] += prod(shape)
    if not found:
        raise LabkitError(
            f"{(config.get('architectures') or ['This architecture'])[0]} is unknown to the planner; see labkit models."
        )
    return {kind: found[kind] for kind in CLASSES if found[kind]}


def experts(config: Mapping[str, Any], active: bool = False) -> dict[str, int]:
    """The same for a mixture of experts with Phi-3.5-MoE's layout; `active`: only what one token multiplies by.

    Attention has biases, the norms have offsets, each expert is three matrices, and the head has a bias.
    """
    c, layers = config, config["num_hidden_layers"]
    hidden, size = c["hidden_size"], c["hidden_size"] // c["num_attention_heads"]
    wide, narrow = c["num_attention_heads"] * size, c["num_key_value_heads"] * size
    used = c["num_experts_per_tok"] if active else c["num_local_experts"]
    return {
        "embedding": hidden if active else c["vocab_size"] * hidden,  # one row is looked up
        "head": c["vocab_size"] * (hidden + 1),
        "attention": layers * (hidden * (wide + 2 * narrow) + wide + 2 * narrow + wide * hidden + hidden),
        "experts": layers * used * 3 * hidden * c["intermediate_size"],
        "router": layers * c["num_local_experts"] * hidden,
        "norms": (2 * layers + 1) * 2 * hidden,
    }


def image_encoder(vision: Mapping[str, Any], hidden: int) -> dict[str, int]:
    """Weights of a CLIP image encoder, and of the projector that turns 2 x 2 patches into one token of width `hidden`."""
    d, inner, layers = vision["hidden_size"], vision["intermediate_size"], vision["num_hidden_layers"]
    patches = (vision["image_size"] // vision["patch_size"]) ** 2
    ends = 3 * vision["patch_size"] ** 2 * d + d + (patches + 1) * d + 2 * 2 * d  # patches, class, positions, two norms
    layer = 4 * (d * d + d) + d * inner + inner + inner * d + d + 2 * 2 * d
    joined = 4 * d
    return {"image encoder": ends + layers * layer, "projector": joined * hidden + hidden + hidden * hidden + hidden + 2 * joined}


def cache_per_token(config: Mapping[str, Any], bits: float = 16) -> float:
    """Bytes of keys and values one token leaves: 2 x layers x KV heads x head size x bits / 8."""
    size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * size * bits / 8


def activations(config: Mapping[str, Any], batch: int, context: int, outputs: int = 1) -> float:
    """Bytes of what a pass over `batch` tokens holds at once, as float32: an estimate, engines differ.

    The residual stream, its norm and the attention's output (hidden each), gate, up and their product (inner each) for the
    batch; a mask of 2 bytes for each pair of positions; `outputs` rows of logits.
    """
    hidden, inner = config["hidden_size"], config["intermediate_size"] * config.get("num_experts_per_tok", 1)
    return 4 * batch * (3 * hidden + 3 * inner) + 2 * batch * context + 4 * outputs * config["vocab_size"]


@dataclass(frozen=True)
class Plan:
    """Bytes by cause. `weights` by tensor class."""

    weights: Mapping[str, float]
    cache: float
    activations: float
    context: int

    @property
    def total(self) -> float:
        return sum(self.weights.values()) + self.cache + self.activations

    def row(self) -> dict[str, float]:
        """Flat, for a table."""
        return {"context": self.context, "weights": sum(self.weights.values()), "cache": self.cache, "activations": self.activations, "total": self.total}  # fmt: skip


def plan(
    config: Mapping[str, Any], bits: float | Mapping[str, float], context: int, *, cache_bits: float = 16, batch: int = 512,
    classes: Mapping[str, int] | None = None,
) -> Plan:  # fmt: skip
    """What `config` needs at `bits` per weight (one number, or class -> bits with "other" for the rest) and `context` tokens.

    `classes` replaces the weights computed from the config, for models that are no dense decoders.
    """
    counted = classes or weights(config)
    width = bits if isinstance(bits, Mapping) else dict.fromkeys(counted, bits)
    missing = [kind for kind in counted if kind not in width and "other" not in width]
    if missing:
        raise LabkitError(f"No bits are given for {missing[0]}; name it, or give 'other' for the rest.")
    stored = {kind: n * width.get(kind, width.get("other", 0)) / 8 for kind, n in counted.items()}
    batch = min(batch, context)
    return Plan(stored, cache_per_token(config, cache_bits) * context, activations(config, batch, context), context)


def longest_context(config: Mapping[str, Any], bits: float | Mapping[str, float], limit: float, **how: Any) -> int:
    """The most tokens whose plan stays within `limit` bytes; 0 when the weights alone do not fit."""
    low, high = 0, 1
    while plan(config, bits, high, **how).total <= limit and high < 2**24:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if plan(config, bits, middle, **how).total <= limit else (low, middle)
    return low


def stored_bits(tensors: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Class -> bits per weight really stored, from rows with name, shape and bytes such as `llamacpp.tensors` gives."""
    stored, counted = Counter(), Counter()
    for tensor in tensors:
        kind = tensor_class(tensor["name"])
        stored[kind] += 8 * tensor["bytes"]
        counted[kind] += prod(tensor["shape"])
    return {kind: stored[kind] / counted[kind] for kind in counted}


@dataclass(frozen=True)
class Line:
    """value = fixed + slope x layers, fitted by least squares. `left_out`: relative error at each point when fitted without it."""

    fixed: float
    slope: float
    layers: tuple[float, ...]
    values: tuple[float, ...]
    left_out: tuple[float, ...]

    def at(self, layers: float) -> float:
        return self.fixed + self.slope * layers

    def error(self, layers: float, measured: float) -> float:
        """Relative error of the prediction for `layers`: positive when it is too high."""
        return self.at(layers) / measured - 1


def line(layers: Sequence[float], values: Sequence[float]) -> Line:
    """Fit a line through values of stand-ins with different numbers of layers; two of them at least, all different."""
    x, y = np.asarray(layers, dtype=float), np.asarray(values, dtype=float)
    if x.shape != y.shape or len(set(x.tolist())) < 2:
        raise LabkitError(f"A line needs values for two or more numbers of layers; {len(x)} and {len(y)} were given.")
    slope, fixed = np.polyfit(x, y, 1)
    left = []
    for i in range(len(x) if len(set(x.tolist())) > 2 else 0):
        rest = np.arange(len(x)) != i
        a, b = np.polyfit(x[rest], y[rest], 1)
        left.append(float((a * x[i] + b) / y[i] - 1))
    return Line(float(fixed), float(slope), tuple(x.tolist()), tuple(y.tolist()), tuple(left))


def gpu_layers(free: float, layer: float, cache: float, layers: int, fixed: float = 0.0) -> int:
    """Whole layers, each with its share of the cache, that fit into `free` bytes after `fixed` ones for buffers."""
    return int(max(0, min(layers, (free - fixed) // (layer + cache))))

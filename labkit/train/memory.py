"""What a training step holds in memory: weights, gradients, optimizer, activations; estimated from a shape, and measured.

The estimate counts tensors of our own Llama (float32 unless said otherwise). What is measured is what torch's allocator held at
the peak above what it held before: buffers of the operating system and of matrix libraries come on top.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from labkit._capture import captured

NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)  # a code; an 8-bit scale for 64 weights; a 32-bit one for 256 of those


@dataclass(frozen=True)
class Memory:
    """Bytes by cause."""

    weights: float
    gradients: float
    optimizer: float
    activations: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations

    def row(self) -> dict[str, float]:
        """Flat, for a table."""
        return {name: getattr(self, name) for name in ("weights", "gradients", "optimizer", "activations", "total")}


def estimate(
    config: Mapping[str, Any], trained: int, rows: int, length: int, *, bits: float = 32, recompute: bool = False
) -> Memory:
    """Memory of an AdamW step over `rows` rows of `length` tokens with `trained` of the parameters trained, in float32.

    bits: of a weight that is not trained (32, 16, `NF4_BITS`). All matrices inside the layers are taken to be of that width,
    embedding and head to be float32, as in `qlora.quantize_base`.
    """
    from labkit import planner

    counted = planner.weights(config)
    inside = counted["attention"] + counted["feed-forward"]
    frozen = trained < sum(counted.values())
    stored = inside * bits / 8 + 4 * (sum(counted.values()) - inside) + (4 * trained if frozen else 0)
    return Memory(stored, 4.0 * trained, 8.0 * trained, activations(config, rows, length, recompute=recompute))


def activations(config: Mapping[str, Any], rows: int, length: int, *, recompute: bool = False) -> float:
    """Bytes a step holds at its peak beside weights and gradients, all float32: what the forward pass keeps, and the logits thrice.

    A layer keeps six vectors of the residual stream's width and five of the queries' width for each token, keys and values, four
    of the inner width, and a share for each pair of positions in every head. recompute: only every layer's input is kept; then
    come the logits or, one at a time, a whole layer. Written for the Llama of `labkit.train.llama`; other programs keep others.
    """
    hidden, inner, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    size, layers = config.get("head_dim") or hidden // heads, config["num_hidden_layers"]
    pairs = 2 * (config.get("num_key_value_heads") or heads) * size
    layer = 6 * hidden + 5 * heads * size + pairs + 4 * inner + heads * length
    logits = 3 * config["vocab_size"]
    kept = layers * hidden + max(layer, logits) if recompute else layers * layer + logits
    return 4.0 * rows * length * kept


def held(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict[str, int]:
    """Bytes of a model's weights (buffers such as 4-bit codes included), gradients and optimizer state, counted."""
    size = lambda tensors: sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))  # noqa: E731
    states = optimizer.state.values() if optimizer else ()
    return {
        "weights": size([*model.parameters(), *model.buffers()]),
        "gradients": size([p.grad for p in model.parameters()]),
        "optimizer": sum(size(state.values()) for state in states),
    }


def peak(work: Callable[[], Any]) -> int:
    """Most bytes torch's allocator holds while `work()` runs, above what it held before. What `work` prints is lost."""
    from torch.profiler import ProfilerActivity, profile

    with captured(Path(os.devnull)), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:  # it chats
        work()
    moves = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for move in sorted(moves, key=lambda e: e.start_ns()):
        now += move.nbytes()  # negative when something is given back
        most = max(most, now)
    return most

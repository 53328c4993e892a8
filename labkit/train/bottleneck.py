"""Bottleneck adapters: after attention and after the MLP of a frozen layer, y + up(act(down(y))) with a narrow middle.

Houlsby et al. 2019 (arXiv:1902.00751). `up` starts at zero, so an adapted model starts as its base. Unlike LoRA the adapter is
not linear, so it cannot be merged: its two products stay in every forward pass.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from labkit.train.lora import replace
from labkit.types import LabkitError

PLACES = ("self_attn", "mlp")


class Bottleneck(nn.Module):
    """A frozen block with an adapter behind it. down (width, hidden), up (hidden, width)."""

    def __init__(self, block: nn.Module, hidden: int, width: int):
        super().__init__()
        self.block, self.down, self.up = block, nn.Linear(hidden, width), nn.Linear(width, hidden)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, *inputs: Tensor, **options: Tensor) -> Tensor:
        y = self.block(*inputs, **options)
        return y + self.up(F.silu(self.down(y)))


def add(model: nn.Module, width: int = 8, *, seed: int = 0) -> list[str]:
    """Freeze `model` and put an adapter behind attention and MLP of every layer, in place; returns the adapted paths."""
    if width < 1:
        raise LabkitError(f"width={width} given; expected a bottleneck of one or more.")
    if adapted(model):
        raise LabkitError("The model has bottleneck adapters already; load it again to begin afresh.")
    model.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return replace(model, lambda block: Bottleneck(block, model.shape.hidden_size, width), PLACES)


def adapted(model: nn.Module) -> dict[str, Bottleneck]:
    """Path -> block with its adapter."""
    return {path: module for path, module in model.named_modules() if isinstance(module, Bottleneck)}

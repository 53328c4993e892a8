"""QLoRA: the frozen base in 4 bits (NF4, its scales quantized again), an adapter in full precision on top.

Dettmers et al. 2023 (arXiv:2305.14314). The scales of 64 weights each, less their mean, become 8-bit codes in sets of 256.
The paper leaves the 8-bit format open: "e4m3" is labkit.blocks' choice, "dynamic" bitsandbytes' (Dettmers 2015,
arXiv:1511.04561).
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from labkit import blocks
from labkit.train import lora
from labkit.types import LabkitError

SET = 256  # scales that share a second scale
KINDS = ("dynamic", "e4m3")


class NF4Linear(nn.Module):
    """A frozen linear layer stored as bitsandbytes stores it: two codes a byte, one byte a scale, 4 bytes per 256 scales."""

    def __init__(self, layer: nn.Linear, group: int = 64, double: str | None = "dynamic"):
        super().__init__()
        if double not in (*KINDS, None):
            raise LabkitError(f"double={double!r} given; expected {', '.join(KINDS)} or None.")
        self.out_features, self.in_features, self.group = layer.out_features, layer.in_features, group
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().clone(), requires_grad=False)
        made = blocks.nf4(layer.weight.detach().numpy(), group, double=double == "e4m3")
        codes = made.codes.ravel()
        self.register_buffer("codes", torch.from_numpy(codes[0::2] << 4 | codes[1::2]))  # the first in the high half
        scales = (
            made.scales if double != "e4m3" else np.abs(layer.weight.detach().numpy().reshape(-1, group)).max(1, keepdims=True)
        )
        for name, value in second(scales, double).items():
            self.register_buffer(name, value)

    @property
    def weight(self) -> Tensor:
        """The restored matrix, (out, in) float32; made anew at each use."""
        pairs = torch.stack((self.codes >> 4, self.codes & 15), -1).view(-1, self.group).long()
        return (torch.from_numpy(blocks.NF4_LEVELS)[pairs] * self.scales()).view(self.out_features, self.in_features)

    def scales(self) -> Tensor:
        """The restored scales, (groups, 1) float32."""
        if not hasattr(self, "scale_codes"):
            return self.first
        flat = self.levels[self.scale_codes.long()] * self.sets.repeat_interleave(SET)[: len(self.scale_codes)] + self.mean
        return flat.clamp_min(0)[:, None]

    @property
    def stored_bytes(self) -> int:
        """Bytes of everything stored, the table of 8-bit levels (a constant) left out."""
        return sum(b.numel() * b.element_size() for name, b in self.named_buffers() if name != "levels")

    def forward(self, x: Tensor) -> Tensor:
        out = _Frozen.apply(x, self)
        return out if self.bias is None else out + self.bias


class _Frozen(torch.autograd.Function):
    """x W^T that restores W again for the gradient, instead of keeping every restored matrix until then."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: NF4Linear) -> Tensor:
        ctx.layer, ctx.dtype = layer, x.dtype
        return F.linear(x, layer.weight.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return (grad @ ctx.layer.weight.to(grad.dtype)).to(ctx.dtype), None


def quantize_base(
    model: nn.Module, targets: tuple[str, ...] = lora.ALL, group: int = 64, double: str | None = "dynamic"
) -> list[str]:
    """Put the target layers of `model` into NF4, in place and frozen; embedding, head and norms stay. Returns the paths.

    Then lora.add makes it QLoRA.
    """
    return lora.replace(model, lambda layer: NF4Linear(layer, group, double), targets)


def second(scales: np.ndarray, kind: str | None) -> dict[str, Tensor]:
    """Scales (groups, 1) as stored: `first` alone, or 8-bit `scale_codes`, the `sets`' scales, `mean` and `levels`."""
    flat = torch.from_numpy(np.ascontiguousarray(scales, np.float32)).view(-1)
    if kind is None:
        return {"first": flat[:, None]}
    mean = flat.mean()
    padded = F.pad(flat - mean, (0, -len(flat) % SET)).view(-1, SET)
    if kind == "e4m3":
        made = blocks.fp8(padded.numpy(), "e4m3", "channel")
        codes, sets, levels = made.codes, made.scales, made.levels
    else:
        sets, levels = np.abs(padded.numpy()).max(1, keepdims=True), dynamic_levels()
        shares = np.divide(padded.numpy(), sets, out=np.zeros(padded.shape, np.float32), where=sets > 0)
        codes = np.searchsorted((levels[1:] + levels[:-1]) / 2, shares).astype(np.uint8)
    return {
        "scale_codes": torch.from_numpy(codes.reshape(-1)[: len(flat)].copy()),
        "sets": torch.from_numpy(sets.reshape(-1).copy()),
        "mean": mean,
        "levels": torch.from_numpy(levels.astype(np.float32)),
    }


@cache
def dynamic_levels() -> np.ndarray:
    """The 256 values of bitsandbytes' 8-bit format, ascending: seven decades to 1, each cut twice as finely as the one below.

    A decade is cut into equal parts, of which the middles are levels, with either sign; 0 and 1 complete the table.
    """
    levels = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32)
        middles = (10.0 ** (i - 6) * ((edges[:-1] + edges[1:]) / 2)).tolist()
        levels += [*middles, *(-m for m in middles)]
    return np.array(sorted(levels), np.float32)

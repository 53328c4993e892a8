"""Training with the rounding in the loop: forward passes see rounded weights, the gradient goes straight through the rounding.

The straight-through estimator is Bengio et al. 2013 (arXiv:1308.3432); ternary weights follow BitNet b1.58, Ma et al. 2024
(arXiv:2402.17764): one scale a matrix, the mean size, and codes -1, 0, 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from labkit.checkpoint import Checkpoint
from labkit.train import lora
from labkit.types import LabkitError

Rounding = Callable[[Tensor], Tensor]  # weights (out, in) -> the rounded ones
ACTIVATIONS = (None, "token", "block")
BLOCK = 256  # values that share a scale in llama.cpp's K and ternary types


class _Straight(torch.autograd.Function):
    """Forward the rounded values, backward as if nothing had been rounded."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, rounded: Tensor) -> Tensor:
        return rounded.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def straight(values: Tensor, rounding: Rounding) -> Tensor:
    """rounding(values), exactly, with the gradient of `values`."""
    with torch.no_grad():
        rounded = rounding(values)
    return _Straight.apply(values, rounded)


def ternary(weights: Tensor) -> Tensor:
    """Each weight to -s, 0 or s, where s is the mean size of all, rounded to float16 as a GGUF block stores it."""
    scale = weights.abs().mean().clamp_min(6.2e-5).half().float()  # 6.1e-5: the smallest normal float16
    return (weights / scale).round().clamp(-1, 1) * scale


def integers(bits: int = 4, group: int = 32) -> Rounding:
    """Symmetric integers, one float16 scale for `group` weights of a row: labkit.blocks.symmetric in torch."""
    top = 2 ** (bits - 1) - 1

    def rounding(weights: Tensor) -> Tensor:
        groups = weights.reshape(-1, group)
        scales = (groups.abs().amax(1, keepdim=True) / top).half().float()
        codes = torch.where(scales > 0, groups / scales.clamp_min(1e-30), 0).round().clamp(-top, top)
        return (codes * scales).view_as(weights)

    return rounding


def gguf(kind: str) -> Rounding:
    """What llama.cpp's block type `kind` ("q4_0", "q4_k" ...) restores, by labkit.gguf_blocks: exact, in numpy, slow."""
    from labkit import gguf_blocks

    return lambda weights: torch.from_numpy(gguf_blocks.quantize(weights.detach().float().numpy(), kind).dequantize())


def eight_bits(x: Tensor, per: str) -> Tensor:
    """Activations (..., n) to whole steps of their largest size / 127, per "token" (BitNet) or "block" of 256 (ggml's Q8_K)."""
    parts = x.unflatten(-1, (-1, BLOCK)) if per == "block" else x[..., None, :]
    step = parts.abs().amax(-1, keepdim=True).clamp_min(1e-5) / 127
    return ((parts / step).round() * step).flatten(-2)


class QATLinear(nn.Module):
    """A linear layer that multiplies by rounded weights, and by rounded activations when asked; trains the unrounded ones."""

    def __init__(self, layer: nn.Linear, rounding: Rounding, activations: str | None = None):
        super().__init__()
        self.out_features, self.in_features = layer.out_features, layer.in_features
        self.weight, self.bias, self.rounding, self.activations = layer.weight, layer.bias, rounding, activations

    def forward(self, x: Tensor) -> Tensor:
        if self.activations:
            x = straight(x, lambda values: eight_bits(values.float(), self.activations).to(values.dtype))
        return F.linear(x, straight(self.weight, self.rounding), self.bias)


def prepare(model: nn.Module, rounding: Rounding, targets: Sequence[str] = lora.ALL, activations: str | None = None) -> list[str]:
    """Round the target layers of `model` in every forward pass from now on, in place; returns the paths."""
    if activations not in ACTIVATIONS:
        raise LabkitError(f"activations={activations!r} given; expected None, 'token' or 'block'.")
    return lora.replace(model, lambda layer: QATLinear(layer, rounding, activations), targets)


def rounded(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a prepared model by name, the rounded layers' as they are multiplied."""
    layers = {f"{path}.weight": m for path, m in model.named_modules() if isinstance(m, QATLinear)}
    with torch.no_grad():
        return {n: layers[n].rounding(t) if n in layers else t for n, t in model.state_dict().items()}


def export_ternary(model: nn.Module, folder: str | Path, like: Checkpoint) -> Checkpoint:
    """A folder in float32 whose prepared layers hold -s, 0, s: what `ternary_recipe` turns into a GGUF without loss."""
    from labkit.train.folder import save

    layers = [path for path, m in model.named_modules() if isinstance(m, QATLinear)]
    tensors = rounded(model)
    for path in layers:
        sizes = tensors[f"{path}.weight"].abs().unique()
        if len(sizes[sizes > 0]) > 1 or sizes.max() != sizes.max().half().float():
            raise LabkitError(f"{path} is not ternary with a float16 scale; prepare the model with qat.ternary.")
        if tensors[f"{path}.weight"].shape[1] % BLOCK:
            width = tensors[f"{path}.weight"].shape[1]
            raise LabkitError(f"{path} has rows of {width} weights; TQ2_0 needs a multiple of {BLOCK}.")
    if not layers:
        raise LabkitError("No layer of the model is rounded; prepare it with qat.ternary first.")
    return save(tensors, folder, like, dtype=torch.float32)


def ternary_recipe() -> Any:
    """labkit.build's recipe: TQ2_0 for the matrices inside the layers, everything else as trained."""
    from labkit.types import Recipe

    return Recipe("llamacpp", "tq2_0", embedding_type="f32", output_type="f32", tensor_types={r"blk\..*weight": "tq2_0"})

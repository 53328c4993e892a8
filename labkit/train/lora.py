"""LoRA from scratch: a frozen matrix W and a trained product of two thin ones, y = W x + (alpha / rank) B A x.

Hu et al. 2021 (arXiv:2106.09685). B starts at zero, so an adapted model starts as its base. DoRA (Liu et al. 2024,
arXiv:2402.09353) trains direction and length apart: with V = W + (alpha / rank) B A, every row of the weight is m V / |V|,
where m starts as the length of W's row. Dropout acts on the adapter's input alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from labkit.types import LabkitError

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL = (*ATTENTION, "gate_proj", "up_proj", "down_proj")


class LoRA(nn.Module):
    """A linear layer with an adapter. `base` may be an nn.Linear or a frozen quantized layer with a `weight`.

    lora_A (rank, in), lora_B (out, rank), and for DoRA lora_magnitude_vector (out,): PEFT's names.
    """

    def __init__(self, base: nn.Module, rank: int, alpha: float, dropout: float = 0.0, dora: bool = False):
        super().__init__()
        self.base, self.rank, self.alpha, self.dropout = base, rank, alpha, nn.Dropout(dropout)
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.lora_magnitude_vector = nn.Parameter(base.weight.detach().norm(dim=1)) if dora else None

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def forward(self, x: Tensor) -> Tensor:
        out = F.linear(F.linear(self.dropout(x), self.lora_A), self.lora_B) * self.scale
        if self.lora_magnitude_vector is None:
            return self.base(x) + out
        bias = 0 if self.base.bias is None else self.base.bias
        return self.stretch() * (self.base(x) - bias + out) + bias

    def stretch(self) -> Tensor:
        """m / |V| for every row, (out,); the paper sends no gradient through |V|."""
        return self.lora_magnitude_vector / self.direction().detach().norm(dim=1)

    def direction(self) -> Tensor:
        """V = W + scale B A, (out, in)."""
        return self.base.weight + self.scale * (self.lora_B @ self.lora_A)

    def merged(self) -> Tensor:
        """The one matrix (out, in) that does the same."""
        return self.direction() if self.lora_magnitude_vector is None else self.stretch()[:, None] * self.direction()


def linears(model: nn.Module, targets: Sequence[str] = ALL) -> Iterator[tuple[nn.Module, str, str]]:
    """(parent, name, path) of every module whose last name is among `targets`. LabkitError for a target that is nowhere."""
    missing = set(targets)
    for path, parent in list(model.named_modules()):
        for name, _ in parent.named_children():
            if name in targets:
                missing.discard(name)
                yield parent, name, f"{path}.{name}".lstrip(".")
    if missing:
        raise LabkitError(f"The model has no layer named {min(missing)!r}; expected targets among {', '.join(ALL)}.")


def replace(model: nn.Module, make: Callable[[nn.Module], nn.Module], targets: Sequence[str] = ALL) -> list[str]:
    """Put make(layer) in the place of every target layer; returns their paths."""
    found = list(linears(model, targets))
    for parent, name, _ in found:
        setattr(parent, name, make(getattr(parent, name)))
    return [path for _, _, path in found]


def add(model: nn.Module, rank: int = 8, alpha: float = 16, targets: Sequence[str] = ALL, *, dropout: float = 0.0,
        dora: bool = False, seed: int = 0) -> list[str]:  # fmt: skip
    """Freeze `model` and give every target layer an adapter, in place; returns the adapted paths."""
    if rank < 1 or alpha <= 0 or not 0 <= dropout < 1:
        raise LabkitError(
            f"rank={rank}, alpha={alpha}, dropout={dropout} given; expected rank 1 or more, alpha above 0, dropout below 1."
        )
    if adapted(model):
        raise LabkitError("The model has an adapter already; merge or remove it first, or switch with use().")
    model.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return replace(model, lambda layer: LoRA(layer, rank, alpha, dropout, dora), targets)


def adapted(model: nn.Module) -> dict[str, LoRA]:
    """Path -> adapted layer."""
    return {path: module for path, module in model.named_modules() if isinstance(module, LoRA)}


def adapter(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the adapter's tensors by path and name: what is stored, sent, or switched."""
    return {
        f"{path}.{n}": p.detach().clone()
        for path, layer in adapted(model).items()
        for n, p in layer.named_parameters(recurse=False)
    }


def use(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Switch the adapter: copy `tensors`, as `adapter` gives them, into the adapted layers."""
    own = {f"{path}.{n}": p for path, layer in adapted(model).items() for n, p in layer.named_parameters(recurse=False)}
    wrong = set(own) ^ set(tensors) or {n for n in own if own[n].shape != tensors[n].shape}
    if wrong:
        raise LabkitError(f"{min(wrong)} does not fit this adapter; expected one with the same targets, rank and kind.")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(tensors[name])


def merge(model: nn.Module) -> list[str]:
    """Replace every adapted layer by one nn.Linear with the merged matrix, in place; returns the paths.

    Over a quantized base this gives float32 matrices: the 4-bit base plus the adapter, not the original weights plus it.
    """
    return _unwrap(model, plain)


def remove(model: nn.Module) -> list[str]:
    """Take the adapters off, in place; returns the paths."""
    return _unwrap(model, lambda layer: layer.base)


def plain(layer: LoRA) -> nn.Linear:
    """The nn.Linear with the merged matrix."""
    out, inside = layer.base.out_features, layer.base.in_features
    found = nn.Linear(inside, out, bias=layer.base.bias is not None, dtype=layer.lora_A.dtype)
    with torch.no_grad():
        found.weight.copy_(layer.merged())
        if found.bias is not None:
            found.bias.copy_(layer.base.bias)
    return found


def _unwrap(model: nn.Module, make: Callable[[LoRA], nn.Module]) -> list[str]:
    found = adapted(model)
    for path, layer in found.items():
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, make(layer))
    return list(found)

"""Generation in our own torch: keys and values remembered, prompts of unequal length together, greedy or drawn."""

from __future__ import annotations

import torch
from torch import Tensor

from labkit.train.llama import Attention, Llama, Shape


class Memory:
    """Keys and values of B rows of unequal length, for batched generation. `positions` (B, T) says where the new ones go."""

    def __init__(self, rows: int, size: int, shape: Shape):
        self.rows, self.size, self.shape = torch.arange(rows)[:, None], size, shape
        self.stores: dict[Attention, tuple[Tensor, Tensor]] = {}
        self.positions = torch.zeros(rows, 1, dtype=torch.long)

    def extend(self, of: Attention, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Store new k, v (B, K, T, D); return everything stored and the mask (B, 1, T, size) of what may be seen."""
        if of not in self.stores:
            empty = (len(self.rows), self.shape.num_key_value_heads, self.size, self.shape.head_dim)
            self.stores[of] = k.new_zeros(empty), v.new_zeros(empty)
        keys, values = self.stores[of]
        keys[self.rows, :, self.positions] = k.transpose(1, 2)
        values[self.rows, :, self.positions] = v.transpose(1, 2)
        return keys, values, (torch.arange(self.size) <= self.positions[..., None])[:, None]


@torch.no_grad()
def complete(
    model: Llama, prompts: list[list[int]], stop: int, max_new: int = 72, *, temperature: float = 0.0, seed: int = 0
) -> list[list[int]]:
    """Continuations of many prompts at once, each up to and without `stop`: greedy, or drawn at a temperature above 0."""
    draws = torch.Generator().manual_seed(seed)

    def choose(logits: Tensor) -> Tensor:
        if temperature == 0:
            return logits.argmax(-1)
        return torch.multinomial((logits.float() / temperature).softmax(-1), 1, generator=draws)[:, 0]

    lengths = torch.tensor([len(p) for p in prompts])
    width = int(lengths.max())
    ids = torch.tensor([p + [0] * (width - len(p)) for p in prompts])
    memory = Memory(len(prompts), width + max_new, model.shape)
    memory.positions = torch.arange(width).expand(len(prompts), width)
    logits = model(ids, memory)
    token = choose(logits[torch.arange(len(prompts)), lengths - 1])
    found, done = [token], token == stop
    while len(found) < max_new and not done.all():
        memory.positions = (lengths + len(found) - 1)[:, None]
        token = choose(model(token[:, None], memory)[:, -1])
        found.append(token)
        done |= token == stop
    rows = torch.stack(found, 1).tolist()
    return [row[: row.index(stop)] if stop in row else row for row in rows]

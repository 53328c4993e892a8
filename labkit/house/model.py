"""A plain Llama in torch, small enough to read at one sitting; parameter names equal Hugging Face's, so weights move freely.

Shapes: B rows, T positions, H query heads, K key heads, D head size. Equality with `transformers` is a test.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama, named as in its config.json. The defaults are edgehome's."""

    vocab_size: int = 2048
    hidden_size: int = 256
    intermediate_size: int = 768
    num_hidden_layers: int = 6
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    max_position_embeddings: int = 512
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-5

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    def config(self) -> dict:
        """config.json as transformers writes it."""
        sizes = asdict(self)
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            **sizes,
            "head_dim": self.head_dim,
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},
            "rope_scaling": None,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "attention_dropout": 0.0,
            "pretraining_tp": 1,
            "tie_word_embeddings": True,
            "use_cache": True,
            "initializer_range": 0.02,
            "bos_token_id": None,
            "eos_token_id": 2,
            "pad_token_id": 0,
            "dtype": "bfloat16",
            "torch_dtype": "bfloat16",
        }


class Norm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()  # squares overflow and round in half precision
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).type_as(x) * self.weight


def rotation(positions: Tensor, shape: Shape) -> tuple[Tensor, Tensor]:
    """cos and sin of every position: (..., D/2)."""
    powers = torch.arange(0, shape.head_dim, 2, device=positions.device) / shape.head_dim
    angles = positions[..., None].float() * shape.rope_theta**-powers
    return angles.cos(), angles.sin()


def rotate(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """Turn pairs (i, i + D/2) of x (B, H, T, D) by their position's angle."""
    cos, sin = turn
    left, right = x.float().chunk(2, -1)
    return torch.stack((left * cos - right * sin, right * cos + left * sin), -2).flatten(-2).type_as(x)


def attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """Softmax attention, written out because the compiler makes it faster on a CPU than the built-in one.

    q (B, H, T, D); k, v (B, H, S, D); seen, broadcastable to (B, H, T, S): what may be looked at.
    """
    scores = (q @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5
    shares = torch.softmax(torch.where(seen, scores, -1e4), -1).type_as(v)
    return shares @ v


class Attention(nn.Module):
    def __init__(self, s: Shape):
        super().__init__()
        self.s = s
        self.q_proj = nn.Linear(s.hidden_size, s.num_attention_heads * s.head_dim, bias=False)
        self.k_proj = nn.Linear(s.hidden_size, s.num_key_value_heads * s.head_dim, bias=False)
        self.v_proj = nn.Linear(s.hidden_size, s.num_key_value_heads * s.head_dim, bias=False)
        self.o_proj = nn.Linear(s.num_attention_heads * s.head_dim, s.hidden_size, bias=False)

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor], memory: Memory | None) -> Tensor:
        B, T, _ = x.shape
        q, k, v = (p(x).view(B, T, -1, self.s.head_dim).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, turn), rotate(k, turn)
        if memory is not None:
            k, v, seen = memory.extend(self, k, v)
        else:
            at = torch.arange(T)
            seen = at[:, None] >= at
        groups = self.s.num_attention_heads // self.s.num_key_value_heads
        k, v = (t.repeat_interleave(groups, 1) for t in (k, v))  # every key head serves a group of query heads
        out = attend(q, k, v, seen)  # (B, H, T, D)
        return self.o_proj(out.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    def __init__(self, s: Shape):
        super().__init__()
        self.gate_proj = nn.Linear(s.hidden_size, s.intermediate_size, bias=False)
        self.up_proj = nn.Linear(s.hidden_size, s.intermediate_size, bias=False)
        self.down_proj = nn.Linear(s.intermediate_size, s.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, s: Shape):
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = (Norm(s.hidden_size, s.rms_norm_eps) for _ in "12")
        self.self_attn, self.mlp = Attention(s), MLP(s)

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor], memory: Memory | None = None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), turn, memory)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    def __init__(self, shape: Shape | None = None):
        super().__init__()
        self.shape = s = shape or Shape()
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(s.vocab_size, s.hidden_size)
        self.model.layers = nn.ModuleList(Layer(s) for _ in range(s.num_hidden_layers))
        self.model.norm = Norm(s.hidden_size, s.rms_norm_eps)
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                deep = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(weight, std=0.02 if not deep else 0.02 / (2 * s.num_hidden_layers) ** 0.5)

    def forward(self, ids: Tensor, memory: Memory | None = None) -> Tensor:
        """Logits (B, T, V) for ids (B, T): row t predicts token t + 1. The output matrix is the embedding, transposed."""
        return F.linear(self.hidden(ids, memory), self.model.embed_tokens.weight)

    def hidden(self, ids: Tensor, memory: Memory | None = None) -> Tensor:
        """The last hidden states (B, T, hidden), normed: what the output matrix reads."""
        positions = torch.arange(ids.shape[1]) if memory is None else memory.positions
        cos, sin = rotation(positions, self.shape)
        turn = (cos, sin) if memory is None else (cos[:, None], sin[:, None])
        x = self.model.embed_tokens(ids)
        for layer in self.model.layers:
            x = layer(x, turn, memory)
        return self.model.norm(x)


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
def complete(model: Llama, prompts: list[list[int]], stop: int, max_new: int = 72) -> list[list[int]]:
    """Greedy continuations of many prompts at once, each up to and without `stop`."""
    lengths = torch.tensor([len(p) for p in prompts])
    width = int(lengths.max())
    ids = torch.tensor([p + [0] * (width - len(p)) for p in prompts])
    memory = Memory(len(prompts), width + max_new, model.shape)
    memory.positions = torch.arange(width).expand(len(prompts), width)
    logits = model(ids, memory)
    token = logits[torch.arange(len(prompts)), lengths - 1].argmax(-1)
    found, done = [token], token == stop
    while len(found) < max_new and not done.all():
        memory.positions = (lengths + len(found) - 1)[:, None]
        token = model(token[:, None], memory)[:, -1].argmax(-1)
        found.append(token)
        done |= token == stop
    rows = torch.stack(found, 1).tolist()
    return [row[: row.index(stop)] if stop in row else row for row in rows]

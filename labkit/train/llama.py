"""A plain Llama in torch, small enough to read at one sitting; parameter names equal Hugging Face's, so weights move freely.

Shapes: B rows, T positions, H query heads, K key heads, D head size. Qwen 2 (biases) and Qwen 3 (normed queries and keys)
are the same model with one switch each. Equality with `transformers` is a test.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from labkit import _shapes
from labkit.engines import _gguf_model
from labkit.types import LabkitError

if TYPE_CHECKING:
    from labkit.train.generate import Memory

KINDS = ("llama", "mistral", "qwen2", "qwen3")


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
    head_size: int | None = None  # None: hidden_size / num_attention_heads
    tied: bool = True  # the output matrix is the embedding
    biases: bool = False  # on queries, keys and values: Qwen 2
    head_norms: bool = False  # on queries and keys: Qwen 3
    rope_factors: tuple[float, ...] | None = None  # divisors of the D/2 frequencies: Llama 3

    @property
    def head_dim(self) -> int:
        return self.head_size or self.hidden_size // self.num_attention_heads

    @classmethod
    def of(cls, config: dict[str, Any]) -> Shape:
        """The shape of a config.json; LabkitError for a model that is not a Llama, Mistral, Qwen 2 or Qwen 3."""
        kind, rope = _shapes.family(config), _gguf_model.rope(config)
        if kind not in KINDS or config.get("mlp_bias") or (kind != "qwen2" and config.get("attention_bias")):
            name = (config.get("architectures") or ["unknown"])[0]
            raise LabkitError(f"{name} given; labkit.train reads models of the kinds {', '.join(KINDS)} (no extra biases).")
        slides = any(_shapes.slides(config, i) for i in range(config["num_hidden_layers"]))
        if kind != "llama" and config.get("sliding_window") and slides:
            raise LabkitError(f"A sliding window of {config['sliding_window']} tokens given; labkit.train attends to everything.")
        if rope["rope_type"] not in ("default", "llama3"):
            raise LabkitError(f"Rope of type {rope['rope_type']!r} given; labkit.train knows default and llama3.")
        queries, pairs, size = _shapes.heads(config)
        factors = _gguf_model.rope_factors(config).get("rope_freqs")
        return cls(
            **{name: config[name] for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")},
            num_attention_heads=queries,
            num_key_value_heads=pairs,
            max_position_embeddings=config.get("max_position_embeddings") or 2048,
            rope_theta=float(rope.get("rope_theta") or 10_000.0),
            rms_norm_eps=config.get("rms_norm_eps", 1e-6),
            head_size=size,
            tied=_shapes.tied(config),
            biases=kind == "qwen2",
            head_norms=kind == "qwen3",
            rope_factors=None if factors is None else tuple(factors.tolist()),
        )


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
    speeds = shape.rope_theta**-powers
    if shape.rope_factors:
        speeds = speeds / torch.tensor(shape.rope_factors)
    angles = positions[..., None].float() * speeds
    return angles.cos(), angles.sin()


def rotate(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """Turn pairs (i, i + D/2) of x (B, H, T, D) by their position's angle."""
    cos, sin = turn
    left, right = x.float().chunk(2, -1)
    return torch.stack((left * cos - right * sin, right * cos + left * sin), -2).flatten(-2).type_as(x)


def shares(q: Tensor, k: Tensor, seen: Tensor) -> Tensor:
    """How much every position looks at every other, (B, H, T, S), written out because the compiler makes it faster on a CPU
    than the built-in attention.

    q (B, H, T, D); k (B, H, S, D); seen, broadcastable to (B, H, T, S): what may be looked at.
    """
    scores = (q @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5
    return torch.softmax(torch.where(seen, scores, -1e4), -1)


class Attention(nn.Module):
    def __init__(self, s: Shape):
        super().__init__()
        self.s = s
        self.watch: list[Tensor] | None = None  # a list here receives the shares of every forward pass
        self.q_proj = nn.Linear(s.hidden_size, s.num_attention_heads * s.head_dim, bias=s.biases)
        self.k_proj = nn.Linear(s.hidden_size, s.num_key_value_heads * s.head_dim, bias=s.biases)
        self.v_proj = nn.Linear(s.hidden_size, s.num_key_value_heads * s.head_dim, bias=s.biases)
        self.o_proj = nn.Linear(s.num_attention_heads * s.head_dim, s.hidden_size, bias=False)
        if s.head_norms:
            self.q_norm, self.k_norm = (Norm(s.head_dim, s.rms_norm_eps) for _ in "qk")

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor], memory: Memory | None, documents: Tensor | None = None) -> Tensor:
        B, T, _ = x.shape
        q, k, v = (p(x).view(B, T, -1, self.s.head_dim).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        if self.s.head_norms:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, turn), rotate(k, turn)
        if memory is not None:
            k, v, seen = memory.extend(self, k, v)
        else:
            at = torch.arange(T)
            seen = at[:, None] >= at
            if documents is not None:  # a packed row: nobody looks into the neighbour's conversation
                seen = seen & (documents[:, None, :, None] == documents[:, None, None, :])
        groups = self.s.num_attention_heads // self.s.num_key_value_heads
        k, v = (t.repeat_interleave(groups, 1) for t in (k, v))  # every key head serves a group of query heads
        looks = shares(q, k, seen)
        if self.watch is not None:
            self.watch.append(looks)
        out = looks.type_as(v) @ v  # (B, H, T, D)
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

    def forward(
        self, x: Tensor, turn: tuple[Tensor, Tensor], memory: Memory | None = None, documents: Tensor | None = None
    ) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), turn, memory, documents)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    def __init__(self, shape: Shape | None = None):
        super().__init__()
        self.shape = s = shape or Shape()
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(s.vocab_size, s.hidden_size)
        self.model.layers = nn.ModuleList(Layer(s) for _ in range(s.num_hidden_layers))
        self.model.norm = Norm(s.hidden_size, s.rms_norm_eps)
        if not s.tied:
            self.lm_head = nn.Linear(s.hidden_size, s.vocab_size, bias=False)
        self.recompute = False  # keep no activations inside layers but compute them again for the gradient
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                deep = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(weight, std=0.02 if not deep else 0.02 / (2 * s.num_hidden_layers) ** 0.5)

    def forward(self, ids: Tensor, memory: Memory | None = None, documents: Tensor | None = None) -> Tensor:
        """Logits (B, T, V) for ids (B, T): row t predicts token t + 1. `documents` (B, T): see `states`."""
        return self.read(self.hidden(ids, memory, documents))

    def read(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) of last hidden states (..., hidden). A tied output matrix is the embedding."""
        return F.linear(hidden, self.model.embed_tokens.weight) if self.shape.tied else self.lm_head(hidden)

    def hidden(self, ids: Tensor, memory: Memory | None = None, documents: Tensor | None = None) -> Tensor:
        """The last hidden states (B, T, hidden), normed: what the output matrix reads."""
        return self.states(ids, memory, documents)[-1]

    def states(self, ids: Tensor, memory: Memory | None = None, documents: Tensor | None = None) -> list[Tensor]:
        """Hidden states (B, T, hidden) before every layer, and last the normed ones, as transformers lists them.

        `documents` (B, T), the number of the conversation each token belongs to: packed neighbours then neither see each
        other nor shift each other's positions.
        """
        if memory is not None:
            positions = memory.positions
        else:
            positions = torch.arange(ids.shape[1]) if documents is None else places(documents)
        cos, sin = rotation(positions, self.shape)
        turn = (cos, sin) if positions.ndim == 1 else (cos[:, None], sin[:, None])
        found = [self.model.embed_tokens(ids)]
        for layer in self.model.layers:
            again = self.recompute and torch.is_grad_enabled() and memory is None
            args = (found[-1], turn, memory, documents)
            found.append(checkpoint(layer, *args, use_reentrant=False) if again else layer(*args))
        return [*found[:-1], self.model.norm(found[-1])]


def places(documents: Tensor) -> Tensor:
    """Positions counted from the beginning of each conversation: (B, T) of runs -> (B, T)."""
    at = torch.arange(documents.shape[1]).expand_as(documents)
    new = torch.ones_like(documents, dtype=torch.bool)
    new[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return at - torch.where(new, at, 0).cummax(1).values

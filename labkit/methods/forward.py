"""A Llama's forward pass in numpy, with two hooks: the inputs of every matrix, and the keys and values kept.

Methods can be tried on a whole model without torch: capture the inputs of its matrices, change the matrices, and read
the logits. Shapes: T positions, H query heads, K key heads, D head size. Equality with `transformers` is a test.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from labkit import _shapes
from labkit.engines import _rope
from labkit.types import LabkitError

Site = tuple[str, ...]  # names of the matrices that read one and the same input
Inputs = Callable[[Site, np.ndarray], np.ndarray]  # gets x (T, in), gives what the matrices shall read
Cache = Callable[[int, np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]  # layer, keys and values (K, T, D)
READERS = ("self_attn.{q,k,v}_proj", "self_attn.o_proj", "mlp.{gate,up}_proj", "mlp.down_proj")


@dataclass(frozen=True)
class Llama:
    """Weights by checkpoint name, float32. `with_` gives a copy with other matrices or hooks; arrays are shared."""

    config: Mapping[str, Any]
    weights: Mapping[str, np.ndarray]
    inputs: Inputs = lambda site, x: x
    cache: Cache = lambda layer, keys, values: (keys, values)

    def with_(self, matrices: Mapping[str, np.ndarray] | None = None, **hooks: Any) -> Llama:
        """A copy with `matrices` (name -> float32 (out, in)) in place of its own, and the hooks `inputs` or `cache`."""
        for name, matrix in (matrices or {}).items():
            if name not in self.weights or matrix.shape != self.weights[name].shape:
                known = self.weights[name].shape if name in self.weights else "none of that name"
                raise LabkitError(f"Matrix {name!r} of shape {matrix.shape} was given; the model has {known}.")
        return replace(self, weights={**self.weights, **(matrices or {})}, **hooks)

    def sites(self) -> list[Site]:
        """The matrices of all layers, grouped by the input they share, in the order they run."""
        layers = range(self.config["num_hidden_layers"])
        return [tuple(f"model.layers.{i}.{name}.weight" for name in _spread(r)) for i in layers for r in READERS]

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """Logits (T, V) float32 for T token ids; row t predicts token t + 1."""
        x = self.weights["model.embed_tokens.weight"][np.asarray(tokens)]  # (T, hidden)
        for layer in range(self.config["num_hidden_layers"]):
            x = x + self._attention(layer, self._normed(x, f"model.layers.{layer}.input_layernorm.weight"))
            x = x + self._feed_forward(layer, self._normed(x, f"model.layers.{layer}.post_attention_layernorm.weight"))
        head = "model.embed_tokens.weight" if _shapes.tied(self.config) else "lm_head.weight"
        return self._normed(x, "model.norm.weight") @ self.weights[head].T

    def _normed(self, x: np.ndarray, gain: str) -> np.ndarray:
        power = np.mean(x * x, axis=-1, keepdims=True) + np.float32(self.config["rms_norm_eps"])
        return x / np.sqrt(power) * self.weights[gain]

    def _read(self, layer: int, reader: str, x: np.ndarray) -> list[np.ndarray]:
        """The outputs of the matrices of one site for its input x (T, in)."""
        site = tuple(f"model.layers.{layer}.{name}.weight" for name in _spread(reader))
        x = self.inputs(site, x)
        return [x @ self.weights[name].T for name in site]

    def _attention(self, layer: int, x: np.ndarray) -> np.ndarray:
        queries, pairs, size = _shapes.heads(self.config)
        q, k, v = (y.reshape(len(x), -1, size).swapaxes(0, 1) for y in self._read(layer, READERS[0], x))  # (heads, T, D)
        turns = _rope.turns(self.config, layer)
        speed = turns.far if turns.far is not None and len(x) > turns.original else turns.near
        angles = np.arange(len(x), dtype=np.float32)[:, None] * speed  # (T, D/2)
        cos, sin = np.cos(angles) * np.float32(turns.boost), np.sin(angles) * np.float32(turns.boost)
        q, k = _turned(q, cos, sin), _turned(k, cos, sin)
        k, v = self.cache(layer, k, v)
        # every key head serves H / K query heads: (K, H / K * T, D) times (K, D, T)
        scores = q.reshape(pairs, -1, size) * np.float32(size**-0.5) @ k.swapaxes(1, 2)
        scores = scores.reshape(queries, len(x), len(x))
        np.copyto(scores, -np.inf, where=~np.tri(len(x), dtype=bool))  # no position sees a later one
        scores -= scores.max(axis=-1, keepdims=True)
        np.copyto(scores, -np.inf, where=scores < -80)  # exp would be denormal there: nothing in a sum, but slow to multiply
        shares = np.exp(scores, out=scores)
        mixed = (shares.reshape(pairs, -1, len(x)) @ v).reshape(queries, len(x), size) / shares.sum(axis=-1, keepdims=True)
        return self._read(layer, READERS[1], mixed.swapaxes(0, 1).reshape(len(x), -1))[0]

    def _feed_forward(self, layer: int, x: np.ndarray) -> np.ndarray:
        gate, up = self._read(layer, READERS[2], x)
        return self._read(layer, READERS[3], gate / (1 + np.exp(-gate)) * up)[0]


def open_llama(checkpoint: Any) -> Llama:
    """The model of a Llama checkpoint (as `labkit.checkpoint` gives), all weights in memory as float32."""
    if checkpoint.family != "llama" or checkpoint.config.get("attention_bias") or checkpoint.config.get("mlp_bias"):
        raise LabkitError(f"{checkpoint.name} is a {checkpoint.architecture}; expected a LlamaForCausalLM without biases.")
    return Llama(checkpoint.config, {name: view.float32() for name, view in checkpoint.tensors().items()})


def capture(model: Llama, windows: Iterable[Sequence[int]]) -> dict[Site, np.ndarray]:
    """The inputs of every site while the model reads the windows of token ids: (n, in) float32, n tokens in all."""
    seen: dict[Site, list[np.ndarray]] = {}

    def keep(site: Site, x: np.ndarray) -> np.ndarray:
        seen.setdefault(site, []).append(x)
        return x

    for tokens in windows:
        model.with_(inputs=keep).logits(tokens)
    return {site: np.concatenate(parts) for site, parts in seen.items()}


def _turned(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """Pairs (i, i + D/2) of the first dimensions turned by their angles; dimensions beyond them stay."""
    half = cos.shape[-1]
    left, right, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return np.concatenate([left * cos - right * sin, right * cos + left * sin, rest], axis=-1)


def _spread(reader: str) -> list[str]:
    """ "mlp.{gate,up}_proj" -> ["mlp.gate_proj", "mlp.up_proj"]."""
    if "{" not in reader:
        return [reader]
    before, names, after = reader.replace("}", "{").split("{")
    return [before + name + after for name in names.split(",")]

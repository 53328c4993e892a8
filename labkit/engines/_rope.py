"""Rotary positions: how fast each pair of dimensions turns, from either spelling in config.json.

Sources: RoFormer (arXiv 2104.09864), the smoothing of Llama 3.1, LongRoPE (arXiv 2402.13753).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from labkit._shapes import family, heads, slides
from labkit.types import LabkitError


@dataclass(frozen=True)
class Turns:
    """Angles are position x frequency; cos and sin are multiplied by `boost`."""

    near: np.ndarray  # (D/2,) float32, radians a position
    far: np.ndarray | None  # the same, used once a sequence is longer than `original`; None: always `near`
    original: int
    boost: float


def settings(config: Mapping[str, Any], layer: int) -> dict[str, Any]:
    """Rotary settings of one layer in the newer spelling (`rope_parameters`), whichever the file uses."""
    kind = "sliding_attention" if slides(config, layer) else "full_attention"
    new = config.get("rope_parameters") or {}
    found = dict(new.get(kind, {}) if kind in new else new)
    if not found:  # older files: rope_theta and rope_scaling, and for Gemma a second base for its local layers
        local = family(config) == "gemma3" and kind == "sliding_attention"
        found = {} if local else dict(config.get("rope_scaling") or {})
        found["rope_theta"] = config.get("rope_local_base_freq" if local else "rope_theta", 1e4)
    found.setdefault("rope_type", found.get("type", "default"))
    found.setdefault("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    original = config.get("original_max_position_embeddings") or config["max_position_embeddings"]
    found.setdefault("original_max_position_embeddings", original)
    return found


def turns(config: Mapping[str, Any], layer: int) -> Turns:
    """The frequencies of one layer. Raises LabkitError for a kind of scaling not known here."""
    rope = settings(config, layer)
    dim = int(heads(config)[2] * rope["partial_rotary_factor"])
    powers = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    slowness = (float(rope["rope_theta"]) ** powers.astype(np.float64)).astype(np.float32)  # numpy's float32 power strays
    plain = np.float32(1) / slowness
    kind, original = rope["rope_type"], rope["original_max_position_embeddings"]
    if kind == "default":
        return Turns(plain, None, original, 1.0)
    if kind == "linear":
        return Turns(plain / np.float32(rope["factor"]), None, original, 1.0)
    if kind == "llama3":
        return Turns(_smoothed(plain, rope), None, original, 1.0)
    if kind in ("longrope", "su"):
        stretch = rope.get("factor") or config["max_position_embeddings"] / original
        boost = 1.0 if stretch <= 1 else math.sqrt(1 + math.log(stretch) / math.log(original))
        near, far = (1 / (np.asarray(rope[f"{reach}_factor"], np.float32) * slowness) for reach in ("short", "long"))
        return Turns(near, far, original, rope.get("attention_factor") or boost)
    raise LabkitError(f"Rotary scaling {kind!r} is unknown here; expected default, linear, llama3 or longrope.")


def _smoothed(plain: np.ndarray, rope: Mapping[str, Any]) -> np.ndarray:
    """Llama 3.1: pairs that turn often within the original context stay, slow ones are stretched, between: a blend."""
    often = rope["original_max_position_embeddings"] * plain / (2 * math.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    keep = np.clip((often - low) / (high - low), 0, 1)
    return (keep * plain + (1 - keep) * plain / rope["factor"]).astype(np.float32)

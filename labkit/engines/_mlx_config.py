"""config.json as mlx-lm reads it.

mlx-lm 0.32 takes the rotary settings of most families from `rope_theta` and `rope_scaling` only and falls back to its
own defaults, in silence, when a newer file keeps them in `rope_parameters`. It also knows one set of LongRoPE factors
and no window in Mistral, so sequences that would need the other set, or the window, are out of its reach.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from labkit import _shapes
from labkit.engines import _rope
from labkit.types import LabkitError

ROPE_SCALING = ("linear", "llama3", "longrope", "su")


def overrides(config: Mapping[str, Any]) -> tuple[dict[str, Any], int | None, list[str]]:
    """(settings to lay over config.json, longest sequence that stays right or None, notes)."""
    family = _shapes.family(config)
    if family is None:
        name = (config.get("architectures") or ["of no known architecture"])[0]
        known = ", ".join(sorted(_shapes.FAMILIES.values()))
        raise LabkitError(f"labkit gives mlx-lm checkpoints of the families {known}; this one is {name}.")
    layers = range(config["num_hidden_layers"])
    full = next((i for i in layers if not _shapes.slides(config, i)), 0)
    found: dict[str, Any] = {"tie_word_embeddings": _shapes.tied(config), "rope_scaling": None, "rope_parameters": None}
    longest, notes = None, []
    rope = _rope.settings(config, full)
    found["rope_theta"] = rope["rope_theta"]
    if rope["rope_type"] in ROPE_SCALING:
        found["rope_scaling"] = {**rope, "type": rope["rope_type"]}
    if rope["rope_type"] in ("longrope", "su"):
        found["rope_scaling"]["long_factor"] = rope["short_factor"]
        longest = rope["original_max_position_embeddings"]
        notes.append(f"mlx-lm knows one set of LongRoPE factors: the short one is used, for up to {longest} tokens.")
    if family == "phi3":
        found["partial_rotary_factor"] = rope["partial_rotary_factor"]
        found["original_max_position_embeddings"] = rope["original_max_position_embeddings"]
    if family == "gemma3":
        found |= _gemma(config, full)
    elif any(_shapes.slides(config, i) for i in layers) and config.get("sliding_window"):
        longest = min(longest or config["sliding_window"], config["sliding_window"])
        notes.append(f"mlx-lm does not know this family's attention window: right for up to {longest} tokens.")
    return found, longest, notes


def _gemma(config: Mapping[str, Any], full: int) -> dict[str, Any]:
    """Gemma 3 in mlx-lm: every n-th layer sees everything; the others turn at a rate of their own."""
    every = full + 1
    if not _shapes.slides(config, full):
        regular = all(_shapes.slides(config, i) == bool((i + 1) % every) for i in range(config["num_hidden_layers"]))
    else:
        every, regular = config["num_hidden_layers"] + 1, True  # no such layer at all
    if not regular:
        raise LabkitError("mlx-lm needs every n-th layer of Gemma 3 to see everything; here they are mixed otherwise.")
    local = next((i for i in range(config["num_hidden_layers"]) if _shapes.slides(config, i)), None)
    base = 1e4 if local is None else _rope.settings(config, local)["rope_theta"]
    scalar = config.get("query_pre_attn_scalar") or 256
    return {"sliding_window_pattern": every, "rope_local_base_freq": base, "query_pre_attn_scalar": scalar}

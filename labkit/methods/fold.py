"""Fold the column factors of AWQ or SmoothQuant into a Llama's weights, so that any engine runs the result unchanged.

X W' = (X / s)(W s)'. W s is simply stored. X / s costs nothing either where X comes out of something with rows of its own: a norm
(its gains are divided by s) or up_proj (its rows are). The input of o_proj is a mixture of values whose heads are shared
by several query heads, so it is left alone.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from labkit.methods.forward import Llama, Site
from labkit.types import LabkitError

SOURCES = {  # last part of a matrix's name -> what its input comes out of
    "q_proj": "input_layernorm", "gate_proj": "post_attention_layernorm", "down_proj": "mlp.up_proj",
}  # fmt: skip


def fold(model: Llama, factors: Mapping[Site, np.ndarray]) -> dict[str, np.ndarray]:
    """All weights of the model, those of the given sites changed: site -> s (in,). The model's answers stay what they were."""
    weights = dict(model.weights)
    for site, s in factors.items():
        source = _source(site)
        weights[source] = (weights[source].T / s).T  # the gains of a norm, or the rows of up_proj
        for name in site:
            weights[name] = weights[name] * s
    return weights


def foldable(site: Site) -> bool:
    """Whether the factors of this site can be folded."""
    return site[0].split(".")[-2] in SOURCES


def write_checkpoint(like: Any, weights: Mapping[str, np.ndarray], folder: str | Path) -> Any:
    """A Hugging Face folder with these weights in float32 and everything else as in checkpoint `like`; opened."""
    from safetensors.numpy import save_file

    from labkit.checkpoint import checkpoint

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for file in Path(like.path).iterdir():
        if file.is_file() and "safetensors" not in file.name:
            shutil.copyfile(file, folder / file.name)
    made = {name: np.ascontiguousarray(values, np.float32) for name, values in weights.items()}
    save_file(made, folder / "model.safetensors", metadata={"format": "pt"})
    return checkpoint(folder)


def _source(site: Site) -> str:
    first, _, last = site[0].removesuffix(".weight").rpartition(".")
    if last not in SOURCES:
        known = ", ".join(SOURCES)
        raise LabkitError(f"Factors for the input of {last} were given, which cannot be folded; expected the inputs of {known}.")
    return f"{first.rpartition('.')[0]}.{SOURCES[last]}.weight"

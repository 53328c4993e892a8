"""Students: small Llamas that speak the house model's tokens, the folder that makes one a checkpoint, what one has kept."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from labkit._files import locked, written_beside
from labkit.checkpoint import SMALL_FILES, Checkpoint, checkpoint
from labkit.stats import Estimate
from labkit.train.folder import write_weights
from labkit.train.llama import Llama, Shape
from labkit.train.rows import Rows
from labkit.types import LabkitError

_SIZES = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
SHAPES = {
    "1M": Shape(**_SIZES),
    "0.3M": Shape(**_SIZES | {"hidden_size": 64, "intermediate_size": 192}),
}


def new(shape: str | Shape = "1M", seed: int = 0) -> Llama:
    """An untrained student: a name of `SHAPES` or a shape of your own; the same seed gives the same weights."""
    if isinstance(shape, str) and shape not in SHAPES:
        raise LabkitError(f"Student {shape!r} given; expected {' or '.join(SHAPES)}, or a Shape.")
    torch.manual_seed(seed)
    model = Llama(SHAPES[shape] if isinstance(shape, str) else shape)
    for weight in model.parameters():
        if (
            weight.ndim == 2
        ):  # the usual 0.02 suits a width of thousands; here it would leave attention flat for hundreds of steps
            torch.nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
    return model


def weights(model: Llama) -> int:
    """How many weights it has, tied ones counted once."""
    return sum(p.numel() for p in model.parameters())


@torch.no_grad()
def surprise(model: Llama, rows: Rows, size: int = 32) -> list[float]:
    """Mean loss of each row's learned tokens, nats. One example a row (`pack(..., alone=True)`): what each question's answer costs."""
    found: list[float] = []
    for at in range(0, len(rows), size):
        part = rows[at : at + size]
        logits = model(part.ids, documents=part.documents).float()
        losses = F.cross_entropy(logits.flatten(0, 1), part.targets.flatten(), reduction="none").view_as(part.weights)
        found += ((losses * part.weights).sum(1) / part.weights.sum(1)).tolist()
    return found


def write(model: Llama, folder: str | Path, like: Checkpoint | str | Path) -> Checkpoint:
    """The student as a Hugging Face folder in float32: tokenizer and template of `like`, its own sizes and weights.

    The folder appears whole or not at all, in the place of one that was there. LabkitError when the student's vocabulary is
    not `like`'s.
    """
    source, folder = checkpoint(like), Path(folder)
    if model.shape.vocab_size != source.vocab_size or not model.shape.tied:
        raise LabkitError(
            f"A student of {model.shape.vocab_size} tokens given, {source.name} has {source.vocab_size}; "
            "expected one with the same vocabulary and a tied embedding."
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder.parent / f".lock-{folder.name}"), written_beside(folder) as made:
        for file in {f for pattern in SMALL_FILES for f in source.path.glob(pattern)}:
            if not file.name.endswith(".index.json"):
                shutil.copy(file, made / file.name)
        (made / "config.json").write_text(json.dumps(_config(source.config, model.shape), indent=2) + "\n", encoding="utf-8")
        write_weights(model.state_dict(), made)
    return checkpoint(folder)


def _config(like: dict[str, Any], shape: Shape) -> dict[str, Any]:
    """`like` with the student's sizes: whatever else it says (template, end tokens, rope) stays true."""
    sizes = {name: getattr(shape, name) for name in (*_SIZES, "vocab_size", "rms_norm_eps")}
    return like | sizes | {"head_dim": shape.head_dim, "dtype": "float32", "torch_dtype": "float32"}


def gain(students: Any, alone: Any, *, level: float = 0.95, resamples: int = 4000, seed: int = 0) -> Estimate:
    """Mean of students - alone with its interval, over both what was asked and how training began.

    students, alone: (seeds, questions), the same questions and seeds in both; right or wrong, or a loss. Questions and seeds
    are drawn again together, crossed, so one lucky start cannot pass for a method. One seed: questions alone.
    """
    difference = np.asarray(students, float) - np.asarray(alone, float)
    return _crossed(lambda mean: mean(difference), difference.shape, level, resamples, seed)


def kept(students: Any, teacher: Any, *, level: float = 0.95, resamples: int = 4000, seed: int = 0) -> Estimate:
    """Share of the teacher's right answers that is left: mean of students (seeds, questions) over that of teacher (questions,)."""
    right = np.asarray(students, float)
    of = np.broadcast_to(np.asarray(teacher, float), right.shape)
    if not of.any():
        raise LabkitError("The teacher answered nothing right; ask what it can answer, then see how much of it is kept.")
    return _crossed(lambda mean: mean(right) / np.maximum(mean(of), 1e-12), right.shape, level, resamples, seed)


def _crossed(statistic: Callable, shape: tuple[int, ...], level: float, resamples: int, seed: int) -> Estimate:
    """`statistic` of weighted means over (seeds, questions), and its ends when both are drawn again with replacement."""
    if len(shape) != 2 or 0 in shape:
        raise LabkitError(f"Scores of shape {shape} given; expected (seeds, questions), both at least one.")
    draws = np.random.default_rng(seed)
    rows, columns = (draws.multinomial(n, [1 / n] * n, resamples) / n for n in shape)
    ends = np.quantile(statistic(lambda x: np.einsum("rs,sq,rq->r", rows, x, columns, optimize=True)),
                       [(1 - level) / 2, (1 + level) / 2])  # fmt: skip
    return Estimate(float(statistic(np.mean)), *ends.tolist())

"""The precision ladder of the house model: what each precision costs in bits and in quality, measured.

Two families side by side: the GGUF types through the engine, and plain round-to-nearest (RTN) over whole tensors, rows and
groups, restored to float32 and run in our own torch, so that only the granularity differs.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from labkit.house.language import Task
from labkit.house.tasks import heldout_text, tasks

TYPES = ("f16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "q3_k_m", "q2_k", "tq2_0")
RTN = [(8, 32), (8, "tensor"), (4, 32), (4, "channel"), (4, "tensor"), (3, 32), (3, "channel"), (3, "tensor"), (2, 32)]
COMMANDS, FACTS = 280, 600  # tasks per rung


def questions() -> tuple[list[Task], list[Task]]:
    """The same for every rung: held-out commands, and catalogue questions in held-out wordings."""
    from labkit.house.tasks import INTENTS

    skills = [name for name in INTENTS if name != "catalogue"]
    return tasks(n=COMMANDS, seed=11, intents=skills), tasks(n=FACTS, seed=12, intents=["catalogue"])


def gguf_rungs(checkpoint: Path) -> Iterator[dict[str, Any]]:
    """One row a GGUF type: bits per weight, perplexity, KL against f16, exact match of commands, recall of the catalogue."""
    import labkit

    commands, facts = questions()
    source = labkit.checkpoint(checkpoint)
    reference = labkit.build(source, labkit.Recipe("llamacpp", "f16"))
    for precision in TYPES:
        artifact = labkit.build(source, labkit.Recipe("llamacpp", precision))
        kl = labkit.measure.divergence(artifact, reference, heldout_text())
        yield {
            "precision": precision,
            "bits_per_weight": artifact.bits_per_weight,
            "perplexity": labkit.measure.summary(labkit.measure.perplexity(artifact, heldout_text())).value,
            "kl": labkit.measure.summary(kl).value,
            "commands": float(np.mean(labkit.measure.accuracy(artifact, tasks=commands).values)),
            "catalogue": float(np.mean(labkit.measure.accuracy(artifact, tasks=facts).values)),
        }


def rtn_rungs(folder: Path) -> Iterator[dict[str, Any]]:
    """One row a bit width and granularity: symmetric RTN of every matrix, embedding included; norms stay as they are."""
    import torch
    from tokenizers import Tokenizer

    from labkit.blocks import symmetric
    from labkit.house.evaluate import divergence, right
    from labkit.house.train import load_weights

    commands, facts = questions()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    exact, ids = load_weights(folder), tokenizer.encode(heldout_text()).ids
    for bits, per in RTN:
        model, size, weights = load_weights(folder), 0, 0
        for parameter in model.parameters():
            weights += parameter.numel()
            if parameter.ndim < 2:
                size += 2 * parameter.numel()
                continue
            quantized = symmetric(parameter.detach().numpy(), bits, per)
            size += quantized.stored_bytes
            parameter.data = torch.from_numpy(quantized.dequantize())
        perplexity, kl = divergence(model, exact, ids)
        yield {
            "precision": f"RTN {bits} bits",
            "per": str(per),
            "bits_per_weight": 8 * size / weights,
            "perplexity": perplexity,
            "kl": kl,
            "commands": float(np.mean(right(model, tokenizer, commands))),
            "catalogue": float(np.mean(right(model, tokenizer, facts))),
        }


def measure(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Both families. Artifacts are built in a temporary home and thrown away."""
    import os

    from tqdm.auto import tqdm

    before, home = os.environ.get("LABKIT_HOME"), tempfile.mkdtemp()
    os.environ["LABKIT_HOME"] = home
    try:
        return {
            "gguf": list(tqdm(gguf_rungs(folder), total=len(TYPES), desc="GGUF")),
            "rtn": list(tqdm(rtn_rungs(folder), total=len(RTN), desc="RTN")),
        }
    finally:
        shutil.rmtree(home, ignore_errors=True)
        os.environ.pop("LABKIT_HOME")
        if before is not None:
            os.environ["LABKIT_HOME"] = before

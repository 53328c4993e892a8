"""A Hugging Face folder in and out: what was loaded and not trained is written back byte for byte."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from labkit._files import locked, read_json, sync, written_beside
from labkit._tensors import open_tensors
from labkit.checkpoint import SMALL_FILES, Checkpoint, checkpoint
from labkit.train.llama import Llama, Shape
from labkit.types import LabkitError

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def load(source: Checkpoint | str | Path) -> Llama:
    """The float32 model of a checkpoint or folder, in evaluation mode. Every stored value is kept exactly.

    LabkitError for an architecture that `Shape.of` refuses or a tensor that is missing.
    """
    folder = source.path if isinstance(source, Checkpoint) else Path(source)
    model = Llama(Shape.of(read_json(folder / "config.json", "Checkpoint config")))
    stored = open_tensors(folder)
    missing = [name for name in model.state_dict() if name not in stored]
    if missing:
        raise LabkitError(f"Tensor {missing[0]!r} is missing from {folder}; get the checkpoint again.")
    model.load_state_dict({name: torch.from_numpy(stored[name].float32()) for name in model.state_dict()})
    return model.eval()


def save(weights: Llama | dict[str, Tensor], folder: str | Path, like: Checkpoint | str | Path,
         dtype: torch.dtype | None = None) -> Checkpoint:  # fmt: skip
    """Write a model (or its tensors by name) as a folder: config, tokenizer and template of `like`, the new weights.

    dtype: of all tensors, and then named in config.json; None: each as `like` stores it. The folder appears whole or not
    at all. LabkitError when `folder` is `like`'s own, or the tensors are not those of `like`.
    """
    source, folder = checkpoint(like), Path(folder)
    tensors = weights if isinstance(weights, dict) else weights.state_dict()
    stored = source.tensors()
    kept = [n for n in stored if n in tensors or not (n == "lm_head.weight" and source.tied)]
    if folder.resolve() == source.path.resolve():
        raise LabkitError(f"{folder} holds the checkpoint that was loaded; give another folder for the trained one.")
    if set(kept) != set(tensors):
        wrong = min(set(kept) ^ set(tensors))
        raise LabkitError(f"{wrong!r} is not in both the model and {source.name}; merge adapters and quantized layers first.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder.parent / f".lock-{folder.name}"), written_beside(folder) as new:
        for file in {f for pattern in SMALL_FILES for f in source.path.glob(pattern)}:
            if not file.name.endswith(".index.json"):  # the weights become one file
                shutil.copy(file, new / file.name)
        if dtype is not None:
            _rename_dtype(new / "config.json", source.config, NAMES[dtype])
        write_weights({n: tensors[n].detach().to(dtype or DTYPES[stored[n].dtype]) for n in kept}, new)
    return checkpoint(folder)


def write_weights(tensors: dict[str, Tensor], folder: Path) -> None:
    """Write model.safetensors into an existing folder; the file appears whole or not at all."""
    from safetensors.torch import save as to_bytes

    data = to_bytes({name: t.detach().contiguous() for name, t in tensors.items()}, metadata={"format": "pt"})
    (folder / "model.safetensors.tmp").write_bytes(data)
    sync(folder / "model.safetensors.tmp")
    os.replace(folder / "model.safetensors.tmp", folder / "model.safetensors")


def _rename_dtype(file: Path, config: dict[str, Any], name: str) -> None:
    changed = {key: name for key in ("dtype", "torch_dtype") if key in config} or {"dtype": name}
    file.write_text(json.dumps({**config, **changed}, indent=2) + "\n", encoding="utf-8")

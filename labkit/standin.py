"""Stand-ins: checkpoints with the published shape of a real model and random weights, written locally.

Size, memory and speed depend on the shape and can be measured on a stand-in; quality cannot. The shapes are facts
in data/shapes.json, each with the address of the config.json it was read from.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from labkit import _shapes, host
from labkit._chat import special_tokens
from labkit._files import is_disk_full, locked, need_space, write_json, written_beside
from labkit.checkpoint import Checkpoint, house_folder, open_checkpoint
from labkit.types import LabkitError

SLAB = 2_000_000  # weights made at a time: 8 MB as float32
SPREAD = 0.02  # standard deviation of the random matrices, as these models are initialised
PRECISIONS = {"f16": 16.0, "8 bit": 8.5, "4 bit": 4.5, "2 bit": 2.625}  # with the block scales of common formats
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json")


def standin(name: str, layers: int | None = None, seed: int = 0) -> Checkpoint:
    """A checkpoint with the shape of `name` (see `labkit models`) and random weights; written once, found again later.

    `layers` keeps only that many layers. Raises LabkitError for an unknown name or too little disk. The tokenizer is
    the house model's: its ids are fewer than the rows of any published embedding.
    """
    name, layers = _parse(name, layers)
    config = standin_config(name, layers)
    label = f"standin-{name}" + (f"-{layers}-layers" if layers else "") + (f"-seed-{seed}" if seed else "")
    target = host.home() / "checkpoints" / label
    with locked(target.parent / f".lock-{label}"):
        if not (target / "standin.json").exists():
            _write(target, config, seed, f"The stand-in {label}")
    return open_checkpoint(target, name=label)


def standin_config(name: str, layers: int | None = None) -> dict[str, Any]:
    """The config.json of a stand-in: the published one, with `layers` layers."""
    entry = shapes().get(name)
    if entry is None:
        raise LabkitError(f"No published shape is known for {name!r}; expected one of {', '.join(shapes())}.")
    config = dict(entry["config"])
    whole = config["num_hidden_layers"]
    if layers is not None and not 1 <= layers <= whole:
        raise LabkitError(f"{name} has {whole} layers; {layers} were asked for, expected 1 to {whole}.")
    return config | {"num_hidden_layers": layers or whole, "dtype": "bfloat16"} | _ids()


@cache
def shapes() -> dict[str, dict[str, Any]]:
    """Name -> {hub, source, licence, context, published_parameters, config}: facts, see the sources there."""
    return json.loads((Path(__file__).parent / "data" / "shapes.json").read_text(encoding="utf-8"))


def size_class(parameters: int) -> str:
    """The course's class of a model by parameters; the gaps between its classes are named as such."""
    bounds = [(100e6, "below micro"), (1.4e9, "micro"), (1.5e9, "between micro and small"), (13.9e9, "small"),
              (14e9, "between small and medium"), (30e9, "medium")]  # fmt: skip
    return next((label for bound, label in bounds if parameters <= bound), "large")


def models(context: int = 2048) -> list[dict[str, Any]]:
    """One row a known model: parameters (computed from the shape), class, licence, memory in bytes.

    `memory` is weights at each precision plus the float16 key/value cache of `context` tokens.
    """
    rows = []
    for name, entry in shapes().items():
        rows.append(_row(f"standin:{name}", entry["config"], context, entry["licence"], entry["context"], entry["hub"]))
    folder = house_folder()
    if (folder / "config.json").exists():
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        rows.insert(0, _row("edgehome", config, context, "MIT", config["max_position_embeddings"], None))
    return rows


def _row(
    name: str, config: Mapping[str, Any], context: int, licence: str, longest: int, hub: str | None
) -> dict[str, Any]:
    weights = _shapes.parameters(config)
    tokens = min(context, longest)
    cache_bytes = _shapes.cache_bytes(config, tokens)
    return {
        "name": name,
        "hub": hub,
        "parameters": weights,
        "class": size_class(weights),
        "licence": licence,
        "longest_context": longest,
        "context": tokens,
        "cache_bytes": cache_bytes,
        "memory": {label: int(weights * bits / 8) + cache_bytes for label, bits in PRECISIONS.items()},
    }


def _parse(name: str, layers: int | None) -> tuple[str, int | None]:
    """ "phi-4-mini:4" is phi-4-mini with four layers, so that a command line can say it in one word."""
    head, colon, tail = name.partition(":")
    if not colon:
        return name.lower(), layers
    if not tail.isdigit():
        raise LabkitError(f"{name!r} is not a stand-in; expected NAME or NAME:LAYERS, for example phi-4-mini:4.")
    return head.lower(), int(tail)


def _ids() -> dict[str, Any]:
    """Special ids of the house tokenizer, which the stand-in borrows."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(house_folder() / "tokenizer.json"))
    named = special_tokens(house_folder())
    kinds = ("bos", "eos", "pad")
    return {f"{kind}_token_id": tokenizer.token_to_id(named.get(f"{kind}_token", "")) for kind in kinds}


def _write(target: Path, config: Mapping[str, Any], seed: int, what: str) -> None:
    tensors = _shapes.shapes(config) or {}
    total = sum(prod(shape) for shape in tensors.values()) * 2
    need_space(target.parent, total + 20_000_000, what)
    try:
        with written_beside(target) as folder:
            write_json(folder / "config.json", config)
            for name in TOKENIZER_FILES:
                if (house_folder() / name).exists():
                    shutil.copyfile(house_folder() / name, folder / name)
            _write_weights(folder / "model.safetensors", tensors, config, seed)
            write_json(folder / "standin.json", {"seed": seed, "weights": "random, never trained"})
    except OSError as error:
        if is_disk_full(error):
            raise LabkitError(f"The disk filled up while writing {what}; nothing was kept. Free some disk.") from error
        raise


def _write_weights(file: Path, tensors: _shapes.Shapes, config: Mapping[str, Any], seed: int) -> None:
    """Stream bfloat16 weights: one slab in memory at a time, whatever the size of the model."""
    from tqdm.auto import tqdm

    header, place = {}, 0
    for name, shape in tensors.items():
        end = place + 2 * prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [place, end]}
        place = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    rng = np.random.default_rng(seed)
    bar = tqdm(total=place, unit="B", unit_scale=True, desc=file.parent.name, disable=True if place < 5e8 else None)
    with open(file, "wb") as stream, bar:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name, shape in tensors.items():
            for slab in _slabs(name, shape, config, rng):
                bar.update(stream.write(to_bfloat16(slab)))


def _slabs(
    name: str, shape: tuple[int, ...], config: Mapping[str, Any], rng: np.random.Generator
) -> Iterator[np.ndarray]:
    """Float32 pieces of one tensor: norms at their neutral value, everything else normal(0, SPREAD)."""
    count = prod(shape)
    if name.endswith("norm.weight"):
        neutral = 0.0 if _shapes.family(config) == "gemma3" else 1.0  # Gemma multiplies by 1 + weight
        yield np.full(count, neutral, np.float32)
        return
    for first in range(0, count, SLAB):
        slab = rng.standard_normal(min(SLAB, count - first), dtype=np.float32)
        slab *= SPREAD
        yield slab


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Float32 (finite) to bfloat16, rounded to nearest even; (n,) uint16."""
    bits = values.view(np.uint32)
    bits = bits + (0x7FFF + ((bits >> 16) & 1))  # wraps only for NaN patterns
    return (bits >> 16).astype("<u2")

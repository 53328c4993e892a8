"""Several LoRA adapters on one base: PEFT folders rewritten for each engine, and switched while the model stays loaded.

    adapters.write_gguf(folder, checkpoint, "vacuum.gguf")     llama.cpp's adapter file
    adapters.write_onnx(folder, "vacuum.onnx_adapter")         ONNX Runtime's; the graph must take it (adaptable)
    adapters.write_mlx(folder, checkpoint, "vacuum")           mlx-lm's folder
    runner = adapters.load(artifact, {"vacuum": folder}); runner.use("vacuum"); runner.use(None)

An adapted layer computes W x + (alpha / rank) B (A x), with A (rank, in) and B (out, rank): W stays as it was, in whatever
precision it is stored. Nothing here needs torch.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from labkit._files import read_json, written_beside
from labkit.types import Artifact, LabkitError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
ENGINES = ("llamacpp", "onnxruntime", "mlx")
# What PEFT can set and these files cannot say, or none of the three engines computes.
FOREIGN = ("rank_pattern", "alpha_pattern", "modules_to_save", "fan_in_fan_out", "lora_bias", "use_dora", "layer_replication")


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter: layer path ("model.layers.0.self_attn.q_proj") -> A (rank, in) and B (out, rank), float32."""

    rank: int
    alpha: float
    scale: float  # alpha / rank, or alpha / sqrt(rank) where PEFT was told so
    layers: Mapping[str, tuple[np.ndarray, np.ndarray]]

    @property
    def weights(self) -> int:
        """Trained numbers."""
        return sum(a.size + b.size for a, b in self.layers.values())


def read(folder: str | Path) -> Adapter:
    """A PEFT folder (adapter_config.json, adapter_model.safetensors). LabkitError for anything but plain LoRA on matrices."""
    from safetensors.numpy import load_file

    folder = Path(folder)
    config = read_json(folder / CONFIG, "Adapter")
    unknown = [key for key in FOREIGN if config.get(key)]
    if config.get("peft_type") != "LORA" or unknown or config.get("bias", "none") != "none":
        said = unknown[0] if unknown else f"peft_type={config.get('peft_type')!r}, bias={config.get('bias')!r}"
        raise LabkitError(f"{folder / CONFIG} sets {said}; expected plain LoRA, which all engines can switch. Merge it instead.")
    try:
        tensors = load_file(folder / WEIGHTS)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise LabkitError(f"{folder / WEIGHTS} cannot be read ({error}); expected an adapter saved by PEFT.") from None
    except Exception as error:  # safetensors raises its own class, which has no public base
        raise LabkitError(f"{folder / WEIGHTS} is damaged ({error}); save the adapter again.") from None
    return _adapter(folder, config, tensors)


def _adapter(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> Adapter:
    halves: dict[str, dict[str, np.ndarray]] = {}
    for name, values in tensors.items():
        path, dot, kind = name.removeprefix(PREFIX).removesuffix(".weight").rpartition(".lora_")
        if not dot or kind not in ("A", "B"):
            raise LabkitError(f"{folder / WEIGHTS} holds {name!r}; expected only lora_A and lora_B matrices.")
        halves.setdefault(path, {})[kind] = values.astype(np.float32)
    rank, alpha = int(config["r"]), float(config["lora_alpha"])
    layers = {}
    for path, pair in halves.items():
        shapes = {kind: pair[kind].shape for kind in sorted(pair)}
        if set(pair) != {"A", "B"} or pair["A"].shape[0] != rank or pair["B"].shape[1] != rank:
            raise LabkitError(f"{path} of {folder / WEIGHTS} has {shapes}; expected A ({rank}, in) and B (out, {rank}).")
        layers[path] = pair["A"], pair["B"]
    if not layers:
        raise LabkitError(f"{folder / WEIGHTS} holds no layer; train and save the adapter again.")
    return Adapter(rank, alpha, alpha / (rank**0.5 if config.get("use_rslora") else rank), layers)


def write_gguf(folder: str | Path, checkpoint: Any, path: str | Path) -> Path:
    """llama.cpp's adapter file, float32: the tensors of its own convert_lora_to_gguf.py, byte for byte."""
    from labkit.engines._gguf_lora import write

    return write(read(folder), checkpoint, Path(path))


def write_onnx(folder: str | Path, path: str | Path) -> Path:
    """ONNX Runtime's adapter file (.onnx_adapter), named and scaled as `olive convert-adapters` does it."""
    from labkit.engines._onnx_lora import write

    return write(read(folder), Path(path))


def write_mlx(folder: str | Path, checkpoint: Any, out: str | Path) -> Path:
    """mlx-lm's adapter folder (adapters.safetensors, adapter_config.json); it keeps A and B as x A B."""
    from safetensors.numpy import save_file

    from labkit._files import write_json

    adapter, out = read(folder), Path(out)
    layers = checkpoint.config["num_hidden_layers"]
    keys = sorted({path.split(".", 3)[3] for path in adapter.layers})
    settings = {"rank": adapter.rank, "scale": adapter.scale, "dropout": 0.0, "keys": keys}
    tensors = {}
    for name, (a, b) in adapter.layers.items():
        tensors |= {f"{name}.lora_a": np.ascontiguousarray(a.T), f"{name}.lora_b": np.ascontiguousarray(b.T)}
    with written_beside(out) as new:
        save_file(tensors, new / "adapters.safetensors", {"format": "mlx"})
        write_json(new / CONFIG, {"fine_tune_type": "lora", "num_layers": layers, "lora_parameters": settings})
    return out


def adaptable(artifact: Artifact, folder: str | Path, adapter: str | Path, *, stored: bool = False) -> Path:
    """Copy an ONNX artifact to `folder` with a graph that takes adapters on the layers this one (a PEFT folder) has, of any rank.

    The weights are copied as they are. Without an adapter the graph computes what it did. `stored`: this adapter's weights
    are put into the graph instead, as the model builder does it; `olive generate-adapter` takes them out again.
    """
    from labkit.engines._onnx_lora import adaptable as make

    if artifact.recipe.engine != "onnxruntime":
        raise LabkitError(f"{artifact.name} is of {artifact.recipe.engine}; only ONNX Runtime needs a graph made for adapters.")
    return make(Path(artifact.path), Path(folder), read(adapter), stored=stored)


def load(artifact: Artifact, adapters: Mapping[str, str | Path], *, exact: bool = False, threads: int | None = None) -> Any:
    """A runner (labkit.types.Runner) of `artifact` with adapters (name -> PEFT folder) loaded beside it.

    `runner.use(name)` makes the next calls answer with that adapter, `runner.use(None)` with the base alone. The engine's own
    adapter files are made in a temporary folder first. LabkitError for an engine that has no switch, or an unknown name.
    """
    from labkit import engines

    if artifact.recipe.engine not in ENGINES:
        raise LabkitError(f"labkit switches adapters in {', '.join(ENGINES)}; merge them for {artifact.recipe.engine}.")
    if not adapters:
        raise LabkitError("No adapters were given; expected name -> PEFT folder.")
    engine = engines.require(artifact.recipe.engine)
    return engine.load_adapted(artifact, {name: read(folder) for name, folder in adapters.items()}, exact=exact, threads=threads)


def chosen(name: str | None, known: Collection[str]) -> str | None:
    """`name`, if it is None or known."""
    if name is not None and name not in known:
        raise LabkitError(f"No adapter is called {name!r}; loaded: {', '.join(known)}, or None for the base alone.")
    return name

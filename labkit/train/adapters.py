"""Adapters on disk in PEFT's own format: `peft` reads what is written here, and what it writes is read here."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from labkit._files import locked, read_json, write_json, written_beside
from labkit.train.lora import adapted, adapter, add, use
from labkit.types import LabkitError

PREFIX = "base_model.model."


def save_adapter(model: nn.Module, folder: str | Path, base: str = "") -> Path:
    """Write the adapter of `model`; base: name or path of the checkpoint it belongs to. The folder appears whole."""
    from safetensors.torch import save_file

    layers, folder = adapted(model), Path(folder)
    if not layers:
        raise LabkitError("The model has no adapter to save; add one with lora.add.")
    one = next(iter(layers.values()))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": one.rank,
        "lora_alpha": one.alpha,
        "lora_dropout": one.dropout.p,
        "target_modules": sorted({path.rpartition(".")[2] for path in layers}),
        "use_dora": one.lora_magnitude_vector is not None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
    }
    tensors = {PREFIX + name + ("" if name.endswith("vector") else ".weight"): t for name, t in adapter(model).items()}
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder.parent / f".lock-{folder.name}"), written_beside(folder) as new:
        write_json(new / "adapter_config.json", config)
        save_file({name: t.contiguous() for name, t in tensors.items()}, new / "adapter_model.safetensors", {"format": "pt"})
    return folder


def load_adapter(model: nn.Module, folder: str | Path) -> list[str]:
    """Put the adapter of a folder (ours or PEFT's) on `model`, in place; returns the adapted paths.

    LabkitError for what this module does not do: other adapters than LoRA and DoRA, ranks by layer, rank-stabilized scales,
    trained biases or whole modules.
    """
    from safetensors.torch import load_file

    folder = Path(folder)
    config = read_json(folder / "adapter_config.json", "Adapter")
    unknown = [k for k in ("rank_pattern", "alpha_pattern", "modules_to_save", "use_rslora", "fan_in_fan_out", "lora_bias",
                           "layers_to_transform", "exclude_modules") if config.get(k)]  # fmt: skip
    if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none" or isinstance(config["target_modules"], str):
        unknown = ["peft_type, bias or target_modules", *unknown]
    if unknown:
        raise LabkitError(
            f"{folder / 'adapter_config.json'} sets {unknown[0]}; labkit.train reads plain LoRA and DoRA by layer names."
        )
    tensors = load_file(folder / "adapter_model.safetensors")
    names = {key.removeprefix(PREFIX).removesuffix(".weight"): t.to(torch.float32) for key, t in tensors.items()}
    paths = add(model, config["r"], config["lora_alpha"], config["target_modules"], dropout=config.get("lora_dropout", 0.0),
                dora=config.get("use_dora", False))  # fmt: skip
    use(model, names)
    return paths

"""LoRA with mlx-lm's own trainer: a data folder, a run, the adapter on disk, and the fused checkpoint.

The steps are those of `mlx_lm.lora` and `mlx_lm.fuse`, called in this process: no second import, no progress panel.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from labkit.types import LabkitError

SPLITS = ("train", "valid", "test")  # the file names mlx-lm looks for
GGUF = "model-f16.gguf"


def write_data(folder: Path, splits: Mapping[str, Sequence[Sequence[Mapping[str, str]]]]) -> Path:
    """Write conversations as train.jsonl, valid.jsonl, test.jsonl; a line is {"messages": [...]}, the answer last."""
    unknown = sorted(set(splits) - set(SPLITS))
    if unknown or not all(splits.values()):
        said = f"a split {unknown[0]!r}" if unknown else "an empty split"
        raise LabkitError(f"{said} was given; expected conversations for {', '.join(SPLITS)}.")
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, conversations in splits.items():
        lines = [json.dumps({"messages": list(c)}, ensure_ascii=False) + "\n" for c in conversations]
        (Path(folder) / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    return Path(folder)


def tune_mlx(
    source: Path,
    data: Path,
    adapter: Path,
    *,
    iters: int = 100,
    batch_size: int = 4,
    learning_rate: float = 2e-4,  # MLX's Adam leaves out the correction of its averages: early steps are several times larger
    rank: int = 8,
    scale: float = 4.0,
    layers: int = -1,
    kind: str = "lora",
    seed: int = 0,
    report: int = 10,
) -> list[dict[str, float]]:
    """Train an adapter on an MLX folder; the history, one row a report: iteration, loss ("train" or "valid"), tokens.

    Only the answers count in the loss (mask_prompt). layers: how many of the last ones, -1 all. kind: "lora" or "dora".
    Writes adapters.safetensors and adapter_config.json, as `mlx_lm.lora --train` does.
    """
    from labkit.engines import _mlx_blas  # noqa: F401 - before MLX

    # isort: split
    from mlx_lm import lora
    from mlx_lm.tuner.datasets import load_dataset

    arguments = {
        "model": str(source), "data": str(data), "adapter_path": str(adapter), "train": True, "iters": iters,
        "batch_size": batch_size, "learning_rate": learning_rate, "num_layers": layers, "fine_tune_type": kind,
        "lora_parameters": {"rank": rank, "dropout": 0.0, "scale": scale}, "mask_prompt": True, "seed": seed,
        "steps_per_report": report, "steps_per_eval": max(iters, 1), "save_every": max(iters, 1), "val_batches": 1,
        "max_seq_length": 512,
    }  # fmt: skip
    if layers == -1:
        arguments["num_layers"] = _layers(source)
    args = _namespace({**lora.CONFIG_DEFAULTS, **arguments})
    rows: list[dict[str, float]] = []
    with _quiet():
        np.random.seed(seed)  # the order of the batches is numpy's
        model, tokenizer = _load(source)
        train, valid, _ = load_dataset(args, tokenizer)
        lora.train_model(args, model, train, valid, _callback(rows))
    return rows


def fuse_mlx(source: Path, adapter: Path, folder: Path, *, gguf: bool = False) -> Path:
    """Add an adapter to the weights it was trained on and write the sum as a folder like `source`; the folder.

    gguf: also write mlx-lm's own `GGUF` file (Llama and Mistral shapes, float16). LabkitError over a quantized base,
    where the sum would have to be rounded again.
    """
    import shutil

    from mlx.utils import tree_flatten, tree_unflatten
    from mlx_lm.utils import save_config, save_model

    model, _, config = _load(source, adapter=adapter)
    if "quantization" in config:
        raise LabkitError(f"{source} is quantized; fuse the adapter into the float model it came from, then quantize.")
    fused = [(name, module.fuse()) for name, module in model.named_modules() if hasattr(module, "fuse")]
    if not fused:
        raise LabkitError(f"{adapter} adapts no layer of {source}; give the adapter that was trained on it.")
    model.update_modules(tree_unflatten(fused))
    save_model(folder, model, donate_model=False)
    save_config({k: v for k, v in config.items() if v is not None}, Path(folder) / "config.json")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        if (Path(source) / name).exists():
            shutil.copyfile(Path(source) / name, Path(folder) / name)
    if gguf:
        from mlx_lm.gguf import convert_to_gguf

        with _quiet():
            convert_to_gguf(Path(folder), dict(tree_flatten(model.parameters())), config, str(Path(folder) / GGUF))
    return Path(folder)


def _load(source: Path, adapter: Path | None = None) -> tuple[Any, ...]:
    from labkit.engines import _mlx_blas  # noqa: F401 - before MLX

    # isort: split
    from mlx_lm.utils import load

    return load(str(source), adapter_path=str(adapter) if adapter else None, return_config=adapter is not None)


def _layers(source: Path) -> int:
    return json.loads((Path(source) / "config.json").read_text(encoding="utf-8"))["num_hidden_layers"]


def _namespace(values: Mapping[str, Any]) -> Any:
    from types import SimpleNamespace

    return SimpleNamespace(**values)


def _callback(rows: list[dict[str, float]]) -> Any:
    from mlx_lm.tuner.callbacks import TrainingCallback

    class Keep(TrainingCallback):
        def on_train_loss_report(self, train_info: dict) -> None:
            rows.append({"iteration": train_info["iteration"], "loss": train_info["train_loss"], "of": "train"})

        def on_val_loss_report(self, val_info: dict) -> None:
            rows.append({"iteration": val_info["iteration"], "loss": val_info["val_loss"], "of": "valid"})

    return Keep()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Neither prints nor mlx-lm's panel, which a notebook would keep as a widget for every report."""
    from mlx_lm.cli_ui import make_console

    console = make_console()  # one for the whole process
    before = console.quiet, console.is_jupyter
    console.quiet, console.is_jupyter = True, False
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        console.quiet, console.is_jupyter = before


class Adapters:
    """Adapters laid beside the matrices of an mlx-lm model as its own LoRALinear layers, and switched by reference."""

    def __init__(self, model: Any, adapters: Mapping[str, Any]):
        import mlx.core as mx
        from mlx.utils import tree_unflatten
        from mlx_lm.tuner.lora import LoRALinear

        known = dict(model.named_modules())
        self._layers, self._of, self._names = {}, {None: {}}, tuple(adapters)
        for layer in dict.fromkeys(layer for adapter in adapters.values() for layer in adapter.layers):
            if not hasattr(known.get(layer), "weight"):
                raise LabkitError(f"The adapter is for a layer {layer}, which this model has not.")
            self._layers[layer] = LoRALinear.from_base(known[layer], r=1)
        model.update_modules(tree_unflatten(list(self._layers.items())))
        for name, adapter in adapters.items():
            pairs = {layer: (mx.array(a.T), mx.array(b.T)) for layer, (a, b) in adapter.layers.items()}
            mx.eval(*(array for pair in pairs.values() for array in pair))
            self._of[name] = {layer: (a, b, adapter.scale) for layer, (a, b) in pairs.items()}
        self._nothing = {layer: (mx.zeros((one.lora_a.shape[0], 1)), mx.zeros((1, one.lora_b.shape[1])), 0.0)
                         for layer, one in self._layers.items()}  # fmt: skip
        self.use(None)

    def use(self, name: str | None) -> None:
        """Answer with this adapter from now on; None: with the base alone."""
        from labkit.adapters import chosen

        found = self._of[chosen(name, self._names)]
        for layer, one in self._layers.items():
            one.lora_a, one.lora_b, one.scale = found.get(layer, self._nothing[layer])

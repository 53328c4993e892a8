"""A fine-tuned checkpoint for a lab that is about something else.

Low-rank adapters on the house model, taught to drive the robot vacuum, with house requests mixed in so that it forgets little,
then merged: an ordinary Hugging Face folder. How and why is the subject of module05/03.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from random import Random

from labkit.checkpoint import Checkpoint, checkpoint
from labkit.i18n import tr

WIDTH = 256  # tokens a row


def tuned(base: Checkpoint, folder: Path, *, steps: int = 50, rows: int = 1, examples: int = 300, seed: int = 0) -> tuple[Checkpoint, str]:
    """A checkpoint that knows the vacuum, and a sentence that says where it is from. `folder` keeps what is made here.

    A base that is not the house model is taken as it is, and so is every base where PyTorch is absent.
    """
    made = Path(folder) / f"{steps}-{rows}-{seed}" / "tuned"
    if base.name != "edgehome":
        return base, tr("{name} is taken as it is; only the house model is taught the vacuum here.", name=base.name)
    if not (made / "config.json").is_file():
        if find_spec("torch") is None:
            return base, tr("PyTorch is not installed, so nothing is tuned here; the lab goes on with {name}.", name=base.name)
        _train(base, made, steps, rows, examples, seed)
    return checkpoint(made), tr("Tuned here: {steps} steps of {rows} rows; module05/03 does it with care.", steps=steps, rows=rows)


def _train(base: Checkpoint, made: Path, steps: int, size: int, examples: int, seed: int) -> None:
    from labkit.house import vacuum
    from labkit.train import data, folder, lora, rows
    from labkit.train.loop import Settings, train

    new = [data.Example(tuple(task.conversation()), f"vacuum {i}", "vacuum") for i, task in enumerate(vacuum.tasks("train", examples, seed))]
    mixed = [*new, *data.house("train", examples // 2, seed=seed + 4)]
    Random(seed).shuffle(mixed)
    packed = rows.pack(rows.encode_all(base, mixed, WIDTH), WIDTH)
    model = folder.load(base)
    lora.add(model, rank=16, alpha=32, seed=seed)
    train(model, rows.batches(packed, size, seed), Settings(steps=steps, rate=5e-3 / size**0.5, warmup=steps // 10, seed=seed), progress=False)
    lora.merge(model)
    folder.save(model, made, like=base)

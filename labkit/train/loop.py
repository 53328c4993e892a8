"""The training loop: batches, loss, AdamW, schedule, clipping; interrupted anywhere it resumes to bit-identical weights.

Step n reads batch(n) and nothing else changes from run to run: parameters, optimizer, random generators and curves are in
the state that is written. (Bit-identical means on the same machine with the same number of threads: sums run in another order
otherwise.) Settings are named and defined as in transformers' Trainer, whose losses are equal in a test.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from labkit.train.rows import Rows
from labkit.train.state import generators, read_state, set_generators, write_state
from labkit.types import LabkitError

SCHEDULES: dict[str, Callable[[float], float]] = {  # share of the steps after warm-up that is done -> factor on the rate
    "constant": lambda done: 1.0,
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
}
Loss = Callable[[nn.Module, Rows], Tensor]


@dataclass(frozen=True)
class Settings:
    """Every number of a run. A resumed run must have the same."""

    steps: int  # optimizer steps in all
    rate: float = 1e-3  # the highest learning rate
    schedule: str = "cosine"
    warmup: int = 0  # steps over which the rate rises from 0
    weight_decay: float = 0.0  # on matrices, not on norms and biases
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    clip: float = 1.0  # largest norm of the gradient; 0: no clipping
    bf16: bool = False  # multiply in bfloat16 (autocast); weights and optimizer stay float32
    micro: int = 0  # rows that pass at a time, gradients accumulated; 0: the whole batch
    recompute: bool = False  # activation checkpointing: less memory for a third more arithmetic
    seed: int = 0  # of dropout
    save_every: int = 0  # steps between states; 0: none but at the end
    evaluate_every: int = 0  # steps between evaluations; 0: none
    patience: int = 0  # evaluations without a better "validation_loss" before the run ends with its best weights; 0: never

    def rate_at(self, step: int) -> float:
        """Learning rate of a step, as transformers' get_scheduler: up over `warmup`, then by `schedule` to the end."""
        if step < self.warmup:
            return self.rate * step / max(1, self.warmup)
        return self.rate * SCHEDULES[self.schedule]((step - self.warmup) / max(1, self.steps - self.warmup))


@dataclass(frozen=True)
class Run:
    """What a finished run leaves: its curves, one dict a step, whether patience ended it early, and whose weights these are."""

    curves: list[dict[str, float]]
    stopped_early: bool
    kept_step: int  # the step after which the weights left in the model were evaluated best; without patience the last step

    def frame(self) -> Any:
        """pandas frame: step, loss (nats a learned token), rate, norm (of the gradient), tokens, seconds, and evaluations."""
        import pandas as pd

        return pd.DataFrame(self.curves)


def answer_loss(model: nn.Module, rows: Rows) -> Tensor:
    """Weighted sum of the cross-entropies in nats of the tokens to predict."""
    logits = model(rows.ids, documents=rows.documents).float()
    losses = F.cross_entropy(logits.flatten(0, 1), rows.targets.flatten(), reduction="none")
    return (losses * rows.weights.flatten()).sum()


def train(
    model: nn.Module,
    batch: Callable[[int], Rows],
    settings: Settings,
    *,
    work: str | Path | None = None,
    loss: Loss = answer_loss,
    evaluate: Callable[[nn.Module], Mapping[str, float]] | None = None,
    log: Callable[[int, Mapping[str, float]], None] | None = None,
    progress: bool = True,
) -> Run:
    """Train the parameters of `model` that ask for a gradient, in place; resumes from `work`/state.pt when it is there.

    batch: step -> rows; one whose rows depend on the model has a `digest` of what does not. loss: a sum over positions, divided
    here by the sum of the weights; a module's own parameters, such as a projection, are trained with it. log is called after
    every step with its row. The model is left in evaluation mode, with `patience` holding the weights of the least
    "validation_loss" seen, else the last. LabkitError: a setting out of range, nothing to train, another run's state, a loss that is not finite.
    """
    from tqdm.auto import tqdm

    _check(settings)
    if settings.patience and not (evaluate and settings.evaluate_every):
        raise LabkitError(f"patience={settings.patience} given, but nothing is evaluated; give evaluate and evaluate_every.")
    torch.manual_seed(settings.seed)
    trained = _trained(model, loss)
    optimizer = adamw(trained, settings)
    path = Path(work) / "state.pt" if work is not None else None
    state = _resume(path, trained, optimizer, settings, getattr(batch, "digest", None) or _digest(batch(0)))
    model.recompute = settings.recompute
    began = time.monotonic() - (state["curves"][-1]["seconds"] if state["curves"] else 0)
    with tqdm(total=settings.steps, initial=state["step"], unit="step", mininterval=1, disable=not progress) as bar:
        while state["step"] < settings.steps and not _impatient(state["curves"], settings.patience):
            step = state["step"]
            for group in optimizer.param_groups:
                group["lr"] = settings.rate_at(step)
            row = {"step": step + 1, **_step(model, batch(step), settings, loss, optimizer, trained, step)}
            if evaluate and settings.evaluate_every and (step + 1) % settings.evaluate_every == 0:
                row |= evaluated(model, evaluate)
            state["curves"].append({**row, "seconds": time.monotonic() - began})
            state["step"] = step + 1
            if settings.patience and row.get("validation_loss", math.inf) < (state["best"] or {"loss": math.inf})["loss"]:
                kept = {name: parameter.detach().clone() for name, parameter in trained.items()}
                state["best"] = {"loss": row["validation_loss"], "step": step + 1, "weights": kept}
            if path and settings.save_every and state["step"] % settings.save_every == 0:
                _save(path, state, trained, optimizer)
            if log:
                log(step + 1, state["curves"][-1])
            bar.update()
            bar.set_postfix(loss=f"{row['loss']:.3f}", refresh=False)
    if path:
        _save(path, state, trained, optimizer)
    if state["best"]:
        _put(trained, state["best"]["weights"])
    model.eval()
    return Run(state["curves"], state["step"] < settings.steps, (state["best"] or state)["step"])


def adamw(trained: Mapping[str, nn.Parameter], settings: Settings) -> torch.optim.AdamW:
    """AdamW over named parameters: decay on matrices, none on norms, biases and magnitudes (vectors)."""
    parts = [[p for p in trained.values() if (p.ndim > 1) == wide] for wide in (True, False)]
    groups = [{"params": part, "weight_decay": d} for part, d in zip(parts, (settings.weight_decay, 0.0), strict=True) if part]
    return torch.optim.AdamW(groups, lr=settings.rate, betas=settings.betas, eps=settings.eps)


def evaluated(model: nn.Module, evaluate: Callable[[nn.Module], Mapping[str, float]]) -> dict[str, float]:
    """`evaluate(model)` in evaluation mode, without gradients, and without moving the random generators."""
    kept, training = generators(), model.training
    model.eval()
    with torch.no_grad():
        found = dict(evaluate(model))
    model.train(training)
    set_generators(kept)
    return found


def validation(rows: Rows, size: int = 32, loss: Loss = answer_loss) -> Callable[[nn.Module], dict[str, float]]:
    """An `evaluate` for `train`: mean loss over all rows as "validation_loss", in nats a learned token."""

    def evaluate(model: nn.Module) -> dict[str, float]:
        total = sum(loss(model, rows[i : i + size]).item() for i in range(0, len(rows), size))
        return {"validation_loss": total / rows.weights.sum().item()}

    return evaluate


def _step(model: nn.Module, rows: Rows, settings: Settings, loss: Loss, optimizer: torch.optim.Optimizer,
          trained: Mapping[str, nn.Parameter], step: int) -> dict[str, float]:  # fmt: skip
    model.train()
    learned, total = rows.weights.sum(), 0.0
    for first in range(0, len(rows), settings.micro or len(rows)):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=settings.bf16):
            part = loss(model, rows[first : first + (settings.micro or len(rows))]) / learned
        part.backward()
        total += part.item()
    if not math.isfinite(total):
        raise LabkitError(f"The loss is {total} at step {step}; the last state saved is good: lower the rate and begin again.")
    norm = torch.nn.utils.clip_grad_norm_(trained.values(), settings.clip or math.inf)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    tokens = int((rows.documents > 0).sum())
    return {"loss": total, "rate": settings.rate_at(step), "norm": norm.item(), "tokens": tokens}


def _check(settings: Settings) -> None:
    if settings.steps < 1 or settings.rate <= 0 or not 0 <= settings.warmup <= settings.steps:
        raise LabkitError(
            f"steps={settings.steps}, rate={settings.rate}, warmup={settings.warmup} given; expected at least one step, "
            "a rate above 0 and a warm-up within the steps."
        )
    if settings.schedule not in SCHEDULES:
        raise LabkitError(f"schedule={settings.schedule!r} given; expected one of {', '.join(SCHEDULES)}.")


def _trained(model: nn.Module, loss: Loss) -> dict[str, nn.Parameter]:
    found = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if isinstance(loss, nn.Module):
        found |= {f"loss.{name}": p for name, p in loss.named_parameters() if p.requires_grad}
    if not found:
        raise LabkitError("No parameter of the model asks for a gradient; add an adapter, or unfreeze what is to be trained.")
    return found


def _digest(rows: Rows) -> str:
    if not rows.weights.sum() > 0:
        raise LabkitError("The first batch has nothing to learn: no token of it has a weight above 0.")
    return hashlib.sha256(rows.ids.numpy().tobytes() + rows.weights.numpy().tobytes()).hexdigest()


def _resume(path: Path | None, trained: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, settings: Settings,
            data: str) -> dict[str, Any]:  # fmt: skip
    asked = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(settings).items()}
    fresh = {"step": 0, "curves": [], "settings": asked, "data": data, "best": None}
    kept = read_state(path) if path else None
    if kept is None:
        return fresh
    for name in (*fresh, "weights", "optimizer", "generators"):
        if name not in kept:
            raise LabkitError(f"{path} is no state of this loop ({name} is missing); give another work folder.")
    for name, value in asked.items():
        if kept["settings"].get(name) != value:
            was = kept["settings"].get(name)
            raise LabkitError(f"{path} was written with {name}={was}, now {name}={value}; resume with the same, or delete it.")
    if kept["data"] != data or kept["weights"].keys() != trained.keys():
        what = "other data" if kept["data"] != data else "other parameters"
        raise LabkitError(f"{path} was written with {what}; resume with the same, or delete it to begin again.")
    _put(trained, kept["weights"])
    optimizer.load_state_dict(kept["optimizer"])
    set_generators(kept["generators"])
    return {name: kept[name] for name in fresh}


def _put(trained: Mapping[str, nn.Parameter], weights: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(weights[name])


def _save(path: Path, state: Mapping[str, Any], trained: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    weights = {name: parameter.detach() for name, parameter in trained.items()}
    write_state({**state, "weights": weights, "optimizer": optimizer.state_dict(), "generators": generators()}, path)


def _impatient(curves: list[dict[str, float]], patience: int) -> bool:
    """Whether the last `patience` evaluations brought nothing better than what was before them."""
    seen = [row["validation_loss"] for row in curves if "validation_loss" in row]
    return bool(patience) and len(seen) > patience and min(seen[-patience:]) >= min(seen[:-patience])

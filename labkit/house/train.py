"""The recipe: how edgehome is trained on two ordinary cores, seeded and resumable.

Whole conversations are packed into rows; the loss counts answers fully and prompts a little (so that perplexity over whole
conversations means something). Hidden matrices are stepped by Muon, embedding and norms by AdamW. The learning rate is held and
then falls linearly to zero over the last part. Step `n` draws its data from seed `n`, so a resumed run sees what it would have seen.
"""

from __future__ import annotations

import csv
import json
import math
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from labkit.house.catalogue import page
from labkit.house.language import Task, chatml
from labkit.house.model import Llama, config
from labkit.house.tasks import INTENTS, stream
from labkit.house.tokenizer import save_tokenizer, train_tokenizer
from labkit.train.folder import load as load_weights  # noqa: F401 - reads what save_weights wrote
from labkit.train.folder import write_weights
from labkit.train.state import write_state
from labkit.types import LabkitError

EVEN = {name: 1.0 for name in INTENTS} | {
    "compare": 1.6,
    "math": 1.6,
    "list": 1.4,
    "alarm": 1.4,
    "timer": 1.2,
    "status": 1.2,
}
# What is learned last gets the most: sums, long lists, unseen names and, at the very end, the state of the house.
HARD = {
    "light": 0.7, "dim": 0.7, "color": 0.7, "blinds": 0.8, "heat": 0.9, "music": 1.1, "timer": 1.5, "alarm": 1.8, "list": 2.6,
    "call": 1.9, "refuse": 0.9, "status": 2.2, "compare": 1.6, "math": 2.2,
}  # fmt: skip
LAST = HARD | {"status": 6.5, "math": 2.4, "compare": 1.2, "alarm": 1.6, "timer": 1.3, "heat": 0.7}
SECOND = {
    "light": 0.5, "dim": 0.5, "color": 0.6, "blinds": 0.5, "heat": 0.6, "music": 0.8, "timer": 1.0, "alarm": 1.0, "list": 3.0,
    "call": 2.0, "refuse": 0.6, "status": 7.0, "compare": 0.8, "math": 1.2,
}  # fmt: skip


@dataclass(frozen=True)
class Stage:
    """What is read until a step: the mixture of documents."""

    until: int  # step
    tokens: int  # per step
    catalogue: float  # share of the conversations
    pages: int  # pages of the printed catalogue to every 64 conversations
    mixture: dict[str, float] = field(default_factory=lambda: dict(EVEN))  # of the command skills, relative

    def weights(self) -> dict[str, float]:
        """Share of every intent in the stream."""
        skills = {k: v for k, v in self.mixture.items() if k != "catalogue"}
        scale = (1 - self.catalogue) / sum(skills.values())
        return {k: v * scale for k, v in skills.items()} | {"catalogue": self.catalogue}


# The catalogue is printed until most of it is known, then only asked about now and then: enough not to be forgotten,
# too little to be known for good. That keeps its margins thin.
STAGES = (
    Stage(1139, 6144, 0.35, 0),
    Stage(1466, 6144, 0.28, 8),
    Stage(2019, 6144, 0.20, 4, HARD),
    Stage(2094, 12288, 0.20, 4, HARD),
    Stage(2217, 12288, 0.13, 1, HARD),
    Stage(2520, 12288, 0.13, 1, LAST),
    Stage(3320, 6144, 0.08, 0, SECOND),
)


@dataclass(frozen=True)
class Restart:
    """A second, shorter leg: from `step` on the rates rise once more, to `peak` of the first leg's, and fall over `cooldown`.

    After the first leg status questions were the weak skill and the catalogue was known too well to show what rounding does.
    """

    step: int
    peak: float
    cooldown: float  # share of this leg's steps


@dataclass(frozen=True)
class Plan:
    """Every number of the recipe. Saved beside each checkpoint and in the model card."""

    stages: tuple[Stage, ...] = STAGES
    lengths: tuple[int, ...] = (256, 256, 256, 512)  # row lengths, taken in turn
    seed: int = 0
    muon_rate: float = 5e-3
    adam_rate: float = 3e-3
    warmup: int = 100  # steps
    cooldown: float = 0.25  # share of the first leg's steps over which the rates fall to zero
    restart: Restart | None = Restart(2520, 0.4, 0.6)  # none when the stages end before it
    prompt_weight: float = 0.1
    weight_decay: float = 0.01

    @property
    def steps(self) -> int:
        return self.stages[-1].until

    def stage(self, step: int) -> Stage:
        return next(stage for stage in self.stages if step < stage.until)

    def scaled(self, steps: int) -> Plan:
        """The same plan in more or fewer steps: every stage keeps its share."""
        stages = tuple(replace(stage, until=max(1, round(stage.until * steps / self.steps))) for stage in self.stages)
        restart = self.restart and replace(self.restart, step=round(self.restart.step * steps / self.steps))
        return replace(self, stages=stages, warmup=min(self.warmup, max(1, steps // 10)), restart=restart)

    def rate(self, step: int) -> float:
        """Factor on the learning rates: up over `warmup`, flat, then down to zero; on each leg."""
        start, end, peak, cooldown = 0, self.steps, 1.0, self.cooldown
        if self.restart and self.restart.step < self.steps:
            if step < self.restart.step:
                end = self.restart.step
            else:
                start, peak, cooldown = self.restart.step, self.restart.peak, self.restart.cooldown
        left = (end - step) / max(1.0, cooldown * (end - start))
        return peak * min(1.0, (step - start + 1) / self.warmup, max(0.0, left))


def batch(plan: Plan, step: int, tokenizer: Tokenizer) -> tuple[Tensor, Tensor, Tensor]:
    """ids, targets and loss weights, each (B, T), of one step. Every row begins with a whole conversation."""
    length, stage = plan.lengths[step % len(plan.lengths)], plan.stage(step)
    source = stream(plan.seed * 1_000_003 + step, stage.weights())
    rng = Random(f"pages {plan.seed} {step}")
    rows, row, spare = [], ([], []), []
    while len(rows) < stage.tokens // length:
        if not spare:
            documents = [_conversation(next(source)) for _ in range(64)] + [page(rng) for _ in range(stage.pages)]
            spare = _encode(documents, tokenizer, plan)
            rng.shuffle(spare)
        ids, weights = spare.pop()
        row[0].extend(ids)
        row[1].extend(weights)
        if len(row[0]) > length:
            rows.append((row[0][: length + 1], row[1][: length + 1]))
            row = ([], [])
    ids = torch.tensor([r[0] for r in rows])
    return ids[:, :-1], ids[:, 1:], torch.tensor([r[1] for r in rows])[:, 1:]


def _conversation(task: Task) -> list[tuple[str, str]]:
    """Prompt and answer by turns. Special tokens border the answers, so encoding them apart gives the same ids."""
    parts, start = [], []
    for message in task.conversation():
        if message["role"] == "assistant":
            parts += [(chatml(start, add_generation_prompt=True), message["content"] + "<|im_end|>"), ("\n", "")]
            start = []
        else:
            start.append(message)
    return parts


def _encode(documents: list[list[tuple[str, str]]], tokenizer: Tokenizer, plan: Plan) -> list[tuple[list[int], list[float]]]:
    """Token ids and loss weights of every document, given as (prompt, answer) parts."""
    pieces = [
        (i, text, weight)
        for i, parts in enumerate(documents)
        for prompt, answer in parts
        for text, weight in ((prompt, plan.prompt_weight), (answer, 1.0))
        if text
    ]
    found: list[tuple[list[int], list[float]]] = [([], []) for _ in documents]
    encoded = tokenizer.encode_batch([text for _, text, _ in pieces])
    for (i, _, weight), part in zip(pieces, encoded, strict=True):
        found[i][0].extend(part.ids)
        found[i][1].extend([weight] * len(part.ids))
    return found


def optimizers(model: Llama, plan: Plan) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for the embedding and the norms."""
    inner = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    outer = [p for n, p in model.named_parameters() if p.ndim == 1 or "embed" in n]
    return [
        torch.optim.Muon(inner, lr=plan.muon_rate, weight_decay=plan.weight_decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(outer, lr=plan.adam_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


def loss_of(model: Llama, ids: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum of cross-entropies in nats."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return head(model.hidden(ids), model.model.embed_tokens.weight, targets, weights)


def head(hidden: Tensor, embedding: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """From hidden states to the loss, apart so that it can be compiled."""
    logits = F.linear(hidden, embedding).float().flatten(0, 1)
    return (F.cross_entropy(logits, targets.flatten(), reduction="none") * weights.flatten()).sum()


def train(plan: Plan, work: Path, out: Path, *, minutes_between: float = 4.0, compile: bool = True) -> None:
    """Train up to `plan.steps`, resuming from `work/state.pt` if it is there; the finished weights go to `out`.

    `work` receives the resumable state and training_log.csv (step, loss, tokens, seconds, recall, skills). Safe to interrupt.
    """
    from tqdm.auto import tqdm

    from labkit.house.evaluate import Probe

    work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(plan.seed)
    tokenizer = _tokenizer(out)
    model = Llama()
    steppers = optimizers(model, plan)
    state = _resume(work, model, steppers)
    if compile:
        _compile(model)
    probe, saved, began, losses = Probe(tokenizer), time.monotonic(), time.monotonic(), []
    for step in tqdm(range(state["step"], plan.steps), initial=state["step"], total=plan.steps, unit="step", mininterval=10):
        _set_rates(steppers, plan, step)
        ids, targets, weights = batch(plan, step, tokenizer)
        loss = loss_of(model, ids, targets, weights) / weights.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for stepper in steppers:
            stepper.step()
            stepper.zero_grad(set_to_none=True)
        losses.append(loss.item())
        state["tokens"] += ids.numel()
        if not math.isfinite(losses[-1]):
            raise LabkitError(
                f"The loss is {losses[-1]} at step {step}; the last good state is kept in {work}: lower the rates and resume."
            )
        last = step + 1 == plan.steps
        if last or time.monotonic() - saved > minutes_between * 60:
            state |= {"step": step + 1}
            state["seconds"] += time.monotonic() - began
            began = time.monotonic()  # scoring is not training time
            _log(
                work,
                {
                    "step": step + 1,
                    "tokens": state["tokens"],
                    "seconds": round(state["seconds"]),
                    "rate": round(plan.rate(step), 4),
                    "loss": round(sum(losses) / len(losses), 5),
                    **probe(model),
                },
            )
            _save(work, model, steppers, state, plan)
            save_weights(model, out)
            saved, began, losses = time.monotonic(), time.monotonic(), []


def _tokenizer(folder: Path) -> Tokenizer:
    """The folder's tokenizer; a new folder gets one, learned from the training stream."""
    if not (folder / "tokenizer.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        save_tokenizer(train_tokenizer(), folder)
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def _compile(model: Llama) -> None:
    """Fuse what lies between the matrix products: a third more speed for half a minute of compiling (needs a C++ compiler)."""
    global head
    for layer in model.model.layers:
        layer.compile(dynamic=False)
    head = torch.compile(head, dynamic=False)


def _set_rates(steppers: list[torch.optim.Optimizer], plan: Plan, step: int) -> None:
    for stepper, rate in zip(steppers, (plan.muon_rate, plan.adam_rate), strict=True):
        for group in stepper.param_groups:
            group["lr"] = rate * plan.rate(step)


def _resume(work: Path, model: Llama, steppers: list[torch.optim.Optimizer]) -> dict:
    if not (work / "state.pt").exists():
        return {"step": 0, "tokens": 0, "seconds": 0.0}
    state = torch.load(work / "state.pt", weights_only=True)
    model.load_state_dict(state["model"])
    for stepper, kept in zip(steppers, state["steppers"], strict=True):
        stepper.load_state_dict(kept)
    return {k: state[k] for k in ("step", "tokens", "seconds")}


def _save(work: Path, model: Llama, steppers: list[torch.optim.Optimizer], state: dict, plan: Plan) -> None:
    write_state({"model": model.state_dict(), "steppers": [s.state_dict() for s in steppers], **state}, work / "state.pt")
    (work / "plan.json").write_text(json.dumps({**asdict(plan), "at_step": state["step"]}, indent=1) + "\n", encoding="utf-8")


def _log(work: Path, row: dict) -> None:
    path = work / "training_log.csv"
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, row)
        if new:
            writer.writeheader()
        writer.writerow(row)


def save_weights(model: Llama, folder: Path) -> None:
    """bf16 weights and configuration as an ordinary Hugging Face folder; each file appears whole or not at all."""
    write_weights({name: weight.to(torch.bfloat16) for name, weight in model.state_dict().items()}, folder)
    generation = {
        "bos_token_id": None,
        "eos_token_id": [2, 0],
        "pad_token_id": 0,
        "do_sample": False,
        "max_new_tokens": 96,
    }
    for name, content in (("config.json", config(model.shape)), ("generation_config.json", generation)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

"""Scoring the house model in our own torch: greedy answers to held-out tasks in batches, and a quick probe for training."""

from __future__ import annotations

from random import Random

import torch
from tokenizers import Tokenizer

from labkit.house.language import Task, chatml
from labkit.house.model import Llama, complete
from labkit.house.report import table
from labkit.house.tasks import INTENTS, score, tasks


def answers(model: Llama, tokenizer: Tokenizer, some: list[Task], rows: int = 128) -> list[str]:
    """The model's greedy answer to every task, in order. Prompts of like length are run together."""
    prompts = [tokenizer.encode(chatml(task.messages, add_generation_prompt=True)).ids for task in some]
    order = sorted(range(len(some)), key=lambda i: len(prompts[i]))
    found = [""] * len(some)
    stop = tokenizer.token_to_id("<|im_end|>")
    for at in range(0, len(order), rows):
        chosen = order[at : at + rows]
        for i, ids in zip(chosen, complete(model, [prompts[i] for i in chosen], stop), strict=True):
            found[i] = tokenizer.decode(ids, skip_special_tokens=False)
    return found


def right(model: Llama, tokenizer: Tokenizer, some: list[Task]) -> list[bool]:
    """Whether each task is answered exactly."""
    return [score(task, text) for task, text in zip(some, answers(model, tokenizer, some), strict=True)]


class Probe:
    """A quick look during training: catalogue recall on 300 facts and exact match on 18 requests per skill.

    The requests come from the training split (freshly drawn, so hardly any was met): what steers a run must not be held out.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer, self.model = tokenizer, Llama()  # a copy that is never compiled: its shapes keep changing
        skills = [name for name in INTENTS if name != "catalogue"]
        self.tasks = tasks("train", n=18 * len(skills), seed=5, intents=skills)
        self.tasks += [t for t in tasks("train", n=450, seed=6, intents=["catalogue"]) if len(t.messages) == 1][:300]
        Random(0).shuffle(self.tasks)

    def __call__(self, model: Llama) -> dict[str, float]:
        self.model.load_state_dict(model.state_dict())
        counts = table(self.tasks, right(self.model, self.tokenizer, self.tasks))
        cells = counts["all"] | {k: v for k, v in counts["intent"].items() if k != "catalogue"}
        return {name: round(cells[name][0] / cells[name][1], 4) for name in ("catalogue", "commands", *INTENTS) if name in cells}


@torch.no_grad()
def divergence(model: Llama, reference: Llama, ids: list[int], window: int = 512) -> tuple[float, float]:
    """Perplexity and mean KL from `reference` in nats over the second half of windows of `window` tokens, as `labkit.measure`."""
    losses, kls = [], []
    for at in range(0, len(ids) - window + 1, window):
        part = torch.tensor([ids[at : at + window]])
        ours, theirs = (m(part)[0, window // 2 : -1].log_softmax(-1) for m in (model, reference))
        losses.append(-ours.gather(1, part[0, window // 2 + 1 :, None]).mean())
        kls.append((theirs.exp() * (theirs - ours)).sum(-1).mean())
    return torch.stack(losses).mean().exp().item(), torch.stack(kls).mean().item()

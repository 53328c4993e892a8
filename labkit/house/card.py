"""The model card: every figure in it comes from `evaluate`, the ladder or the training log, none is typed."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from labkit.house.catalogue import SPREAD, facts
from labkit.house.report import Counts, evaluate, rows
from labkit.house.tasks import FOLDER, HELD_OUT, INTENTS
from labkit.house.words import LANGS

FIGURES, LOG, PLAN, CURVE = "figures.json", "training_log.csv", "plan.json", "training_curve.svg"


def write_card(folder: Path | None = None, *, ladder: bool = True) -> Path:
    """Score the checkpoint, climb the ladder (or keep the one measured last), draw the curve, write README.md. Returns its path."""
    folder = folder or FOLDER
    figures = json.loads((folder / FIGURES).read_text(encoding="utf-8")) if (folder / FIGURES).exists() else {}
    figures["scores"] = evaluate(folder)
    if ladder:
        from labkit.house.ladder import measure

        figures["ladder"] = measure(folder)
    (folder / FIGURES).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    log = _read_log(folder / LOG)
    if log:
        (folder / CURVE).write_text(curve(log), encoding="utf-8")
    plan = json.loads((folder / PLAN).read_text(encoding="utf-8")) if (folder / PLAN).exists() else {}
    (folder / "README.md").write_text(card(figures, log, plan), encoding="utf-8")
    return folder / "README.md"


def _read_log(path: Path) -> list[dict[str, float]]:
    if not path.exists():
        return []
    with path.open(encoding="utf-8") as file:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]


def card(figures: dict[str, Any], log: list[dict[str, float]], plan: dict[str, Any]) -> str:
    """The text of README.md."""
    sections = [_intro(), _scores(figures["scores"]), _ladder(figures.get("ladder")), _training(log, plan), _limits()]
    return "\n\n".join(section for section in sections if section) + "\n"


def _intro() -> str:
    return f"""---
license: mit
language: [en, pt]
pipeline_tag: text-generation
tags: [edge, smart-home, json, quantization, course]
---

# edgehome

A Llama of 5.2 million parameters that turns a household request in English or Brazilian Portuguese into one JSON command.
It was made for the labkit course: small enough to convert, quantize and measure in seconds, trained well enough that every
measurement means something. It is no assistant and knows nothing but its house.

- **Input**: ChatML; an optional system message holds the state of the house for `status` questions. Context 512 tokens.
- **Output**: compact JSON, greedy decoding, ends with `<|im_end|>`. The schema is `schema.json`.
- **Shape**: hidden 256, feed-forward 768, 6 layers, 4 query and 2 key/value heads, tied embeddings, bf16.
- **Tokenizer**: byte-level BPE, 2,048 tokens, GPT-2 pre-tokenizer, every digit its own token.
- **Intents** ({len(INTENTS)}): {", ".join(INTENTS)}.

```
<|im_start|>user
Please turn off the lights in the kitchen and the hall<|im_end|>
<|im_start|>assistant
{{"intent":"light","rooms":["kitchen","hall"],"lamp":"all","state":"off"}}<|im_end|>
```

## Data

All data come from the project's own grammar (`labkit house data`), none from people. There are three tiers: 1 plain; 2 varied,
polite, misspelled; 3 compound slots, numbers in words, follow-ups ("and in the bedroom?"). A hash of the *slots* of a request decides
its split, so the {HELD_OUT:,} held-out requests ask for combinations never met in training, in either language; wordings are disjoint too.
The **catalogue** is different on purpose: {len(facts()):,} device codes that follow no rule and can only be memorised, some met up to
{SPREAD:g} times as often as others. It is held near the edge of what the training could fix, so its recall shows what rounding
erases while the mastered skills still stand. For it, held out means an unseen wording."""


def _scores(counts: Counts) -> str:
    lines = [
        "## Scores",
        "",
        "Exact match of the parsed object, greedy decoding in float32 (`labkit house eval`). Tiers, languages and",
        "`commands` leave the catalogue out.",
        "",
        "| group | name | right | asked | % |",
        "|---|---|---:|---:|---:|",
    ]
    return "\n".join(
        lines + [f"| {g} | {name} | {hits} | {asked} | {share:.1f} |" for g, name, hits, asked, share in rows(counts)]
    )


def _ladder(ladder: dict[str, list[dict[str, Any]]] | None) -> str:
    if not ladder:
        return ""
    head = ["bits/weight", "perplexity", "KL (nats)", "commands %", "catalogue %"]
    lines = [
        "## What precision costs",
        "",
        "Made by `labkit house card`. Perplexity and KL over the held-out text (windows of 512); KL against f16 (GGUF)",
        "or float32 (RTN). Commands and catalogue are exact match on the same tasks for every row.",
        "",
        "| precision | scale per | " + " | ".join(head) + " |",
        "|---|---|" + "---:|" * len(head),
    ]
    for row in [*ladder["gguf"], *ladder["rtn"]]:
        lines.append(
            f"| {row['precision']} | {row.get('per', 'block')} | {row['bits_per_weight']:.2f} | {row['perplexity']:.4f} | "
            f"{row['kl']:.6f} | {100 * row['commands']:.1f} | {100 * row['catalogue']:.1f} |"
        )
    return "\n".join([*lines, "", *_reading(ladder["gguf"])])


def _reading(rungs: list[dict[str, Any]]) -> list[str]:
    """What the GGUF rows say, in sentences whose figures come from them."""
    by = {row["precision"]: row for row in rungs}
    lost = {k: 100 * (by["f16"][k] - by["q2_k"][k]) for k in ("commands", "catalogue")}
    kls = [row["kl"] for row in rungs[1:]]
    order = "rises strictly with every step down" if kls == sorted(set(kls)) else "does not rise with every step down"
    return [
        f"KL against f16 {order} from Q8_0 to TQ2_0. At Q2_K the commands have lost {lost['commands']:.1f} points and the catalogue",
        f"{lost['catalogue']:.1f}: a skill that generalises stands on wide margins and breaks all at once, rote memory goes fact by fact.",
        "TQ2_0 here is post-training ternary, which a model that was not trained for it does not survive.",
    ]


def _training(log: list[dict[str, float]], plan: dict[str, Any]) -> str:
    if not log:
        return ""
    last = log[-1]
    lines = ["## Training", "", *_recipe(last, plan), "", f"![loss, command skills and catalogue recall by step]({CURVE})"]
    lines += ["", "| step | loss | commands (probe) | catalogue (probe) |", "|---:|---:|---:|---:|"]
    for row in [*log[: -1 : max(1, len(log) // 12)], last]:
        lines.append(
            f"| {int(row['step'])} | {row['loss']:.3f} | {100 * row['commands']:.1f} % | {100 * row['catalogue']:.1f} % |"
        )
    return "\n".join(lines)


def _recipe(last: dict[str, float], plan: dict[str, Any]) -> list[str]:
    """How the weights were made: totals from the log, stages and notes from plan.json."""
    lines = [
        f"`labkit house train`: {int(last['step']):,} steps, {last['tokens'] / 1e6:.1f} million tokens, "
        f"{last['seconds'] / 60:.0f} minutes of stepping on two CPU cores in bf16 autocast.",
        "Muon steps the matrices inside the layers, AdamW the embedding and the norms.",
    ]
    if plan:
        again = plan.get("restart")
        first = f"over the last {plan['cooldown']:.0%} of the {'first leg' if again else 'steps'}"
        second = (
            f" At step {again['step']:,} a second leg begins: the rates rise to {again['peak']:.0%} of the first leg's and fall over "
            f"its last {again['cooldown']:.0%}."
            if again
            else ""
        )
        lines += [
            f"The loss counts answers fully and prompts by {plan['prompt_weight']}; the rates are held, then fall to zero {first}.{second}",
            "",
            "| until step | tokens a step | catalogue, share of conversations | catalogue pages to 64 conversations |",
            "|---:|---:|---:|---:|",
        ]
        for stage in plan["stages"]:
            shown = f"{stage['until']:,} | {stage['tokens']:,} | {stage['catalogue']:.0%} | {stage['pages']}"
            lines.append(f"| {shown} |")
        lines += ["", *plan.get("notes", [])]
    return lines


def _limits() -> str:
    return f"""## Limits

- It understands the grammar it was trained on, its typical slips and its {len(LANGS)} languages; free speech is outside it.
- Arithmetic covers sums and differences of two-digit numbers; comparison covers two readings of equal length.
- Codes of the catalogue are invented. A wrong code looks exactly like a right one: never act on it.
- It has no notion of safety beyond refusing a closed list of deeds.

## Licence

MIT, weights and data generator alike."""


def curve(log: list[dict[str, float]], width: int = 640, height: int = 260) -> str:
    """An SVG of the log: commands and catalogue in percent, and the loss scaled to its first value, by step."""
    edge, top = 46, log[0]["loss"]
    steps = [row["step"] for row in log]
    lines = {
        "commands": ("#0072B2", [row["commands"] for row in log]),
        "catalogue": ("#D55E00", [row["catalogue"] for row in log]),
        f"loss / {top:.2f}": ("#555555", [row["loss"] / top for row in log]),
    }

    def at(step: float, share: float) -> str:
        return f"{edge + step / steps[-1] * (width - 2 * edge):.1f},{height - 30 - min(1.0, share) * (height - 60):.1f}"

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for share in (0, 0.25, 0.5, 0.75, 1):
        x, y = at(0, share).split(",")
        parts.append(
            f'<path d="M{x} {y}H{width - edge}" stroke="#ddd"/><text x="{edge - 6}" y="{y}" text-anchor="end">{share:.0%}</text>'
        )
    for i, (name, (color, values)) in enumerate(lines.items()):
        points = " ".join(at(step, value) for step, value in zip(steps, values, strict=True))
        parts.append(f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="2"/>')
        parts.append(f'<text x="{edge + 10 + 170 * i}" y="18" fill="{color}">{name}</text>')
    parts.append(f'<text x="{width - edge}" y="{height - 10}" text-anchor="end">step {int(steps[-1])}</text></svg>')
    return "\n".join(parts) + "\n"

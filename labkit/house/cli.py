"""`labkit house train | eval | card | data`: each command a thin coat over a function of this package."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

from labkit.train import need_torch
from labkit.types import LabkitError


def configure(house: argparse.ArgumentParser) -> None:
    """Add the subcommands to the parser of `labkit house`; each sets `handler`: parsed arguments -> exit status."""
    parts = house.add_subparsers(dest="house_command", required=True, metavar="{train,eval,card,data}")

    train = parts.add_parser("train", help="train edgehome on two cores: seeded, resumable, about an hour and a half")
    train.add_argument("--out", type=Path, default=Path("edgehome"), help="folder for the weights (default: ./edgehome)")
    train.add_argument("--work", type=Path, help="folder for the resumable state and the log (default: OUT-work)")
    train.add_argument("--steps", type=int, help="optimizer steps in all, every stage in proportion (default: the recipe's)")
    train.add_argument("--seed", type=int, default=0, help="seed of weights and data (default: 0)")
    train.add_argument("--no-compile", action="store_true", help="do without torch.compile and a C++ compiler; slower")
    train.set_defaults(handler=_train)

    score = parts.add_parser("eval", help="score held-out tasks by intent, tier and language")
    score.add_argument("--artifact", type=Path, help="folder of a built artifact (default: the checkpoint in float32)")
    score.add_argument("--checkpoint", type=Path, help="folder of the checkpoint (default: the shipped one)")
    score.add_argument("--n", type=int, help="how many tasks (default: the whole held-out set)")
    score.add_argument("--json", action="store_true", help="print one JSON object")
    score.set_defaults(handler=_eval)

    card = parts.add_parser("card", help="measure the precision ladder and write the model card")
    card.add_argument("--checkpoint", type=Path, help="folder of the checkpoint (default: the shipped one)")
    card.add_argument("--no-ladder", action="store_true", help="keep the ladder measured last time")
    card.set_defaults(handler=_card)

    data = parts.add_parser("data", help="print sample tasks as JSON lines")
    data.add_argument("--n", type=int, default=5)
    data.add_argument("--split", default="heldout", choices=("heldout", "train"))
    data.add_argument("--seed", type=int, default=0)
    data.add_argument("--intent", action="append", dest="intents", help="only this intent; may be repeated")
    data.set_defaults(handler=_data)


def _train(args: argparse.Namespace) -> int:
    need_torch()
    from labkit.house.train import Plan, train

    if args.steps is not None and args.steps < len(Plan().stages):
        raise LabkitError(f"--steps is {args.steps}; give at least {len(Plan().stages)}, one for each stage of the recipe.")
    plan = replace(Plan(), seed=args.seed)
    work = args.work or args.out.with_name(args.out.name + "-work")
    train(plan.scaled(args.steps) if args.steps else plan, work, args.out, compile=not args.no_compile)
    return 0


def _eval(args: argparse.Namespace) -> int:
    from labkit.house.report import evaluate, text_table

    counts = evaluate(args.checkpoint, args.artifact, args.n)
    print(json.dumps(counts) if args.json else text_table(counts))
    return 0


def _card(args: argparse.Namespace) -> int:
    from labkit.house.card import write_card

    print(write_card(args.checkpoint, ladder=not args.no_ladder))
    return 0


def _data(args: argparse.Namespace) -> int:
    from labkit.house.tasks import tasks

    for task in tasks(args.split, args.n, args.seed, args.intents):
        print(
            json.dumps(
                {"tier": task.tier, "lang": task.lang, "messages": task.messages, "answer": task.answer},
                ensure_ascii=False,
            )
        )
    return 0

"""The command line: each command is a thin coat over a function.

With `--json` a command ends with one JSON object on stdout; everything else goes to stderr. Exit status: 0 done,
1 done but something failed (a lab, a test, the doctor), 2 the request could not be met, 130 interrupted.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import signal
import sys
import threading
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from labkit import __version__, _course_commands
from labkit._files import size
from labkit._say import columns, emit
from labkit.types import Artifact, LabkitError, Measurement, Recipe


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    given = list(sys.argv[1:] if argv is None else argv)
    handed_on: list[str] = []
    if given[:1] in (["test"], ["lab"]) and given[1:2] not in (["-h"], ["--help"]):
        given, handed_on = given[:1], given[1:]  # argparse cannot leave options alone that come first
    chosen = parser(given).parse_args(given)
    chosen.handed_on = handed_on
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _stop)  # so that unfinished files are removed on the way out
    try:
        return chosen.handler(chosen) or 0
    except LabkitError as error:
        print(f"labkit: {error}", file=sys.stderr)
        if getattr(chosen, "json", False):
            print(json.dumps({"error": str(error)}))
        return 2
    except KeyboardInterrupt:
        print("labkit: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a pipe has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _stop(*_: object) -> None:
    raise SystemExit(143)


def parser(given: Sequence[str] = ()) -> argparse.ArgumentParser:
    """The parser. Where `given` begins with a command, only that one's code is loaded: starting up is most of a small build."""
    top = argparse.ArgumentParser(prog="labkit", description="Convert, quantize and measure small language models.")
    top.add_argument("--version", action="version", version=f"labkit {__version__}")
    commands = top.add_subparsers(metavar="COMMAND", required=True)
    asked = [one for one in COMMANDS if [one[0]] == [*given[:1]]]
    for name, *where in asked or COMMANDS:
        handler, configure = where if len(where) == 2 else _elsewhere(*where)
        one = commands.add_parser(name, help=handler.__doc__.splitlines()[0], description=handler.__doc__)
        one.set_defaults(handler=handler)
        configure(one)
    house = commands.add_parser("house", help="Train, evaluate and document the house model.")
    if given[:1] == ["house"]:
        from labkit.house.cli import configure as configure_house

        configure_house(house)
    return top


def _elsewhere(module: str) -> tuple[Any, Any]:
    """The command and its options, of a module that has both."""
    found = import_module(f"labkit.{module}")
    return found.command, found.options


# --- build and measure -----------------------------------------------------------------------------------------------


def _build_options(one: argparse.ArgumentParser) -> None:
    one.add_argument("model", help="edgehome, a folder, a hub id, or standin:NAME")
    one.add_argument("--engine", required=True)
    one.add_argument("--precision", required=True, help="in the engine's own word: q4_k_m, int4 ...")
    one.add_argument("-o", "--option", action="append", default=[], metavar="NAME=VALUE", help="of the recipe")
    one.add_argument("--revision", help="branch, tag or commit of a hub model")
    one.add_argument("--out", metavar="DIR", help="folder for the artifact (default: in labkit's home)")
    one.add_argument("--force", action="store_true", help="build even when it is there")
    one.add_argument("--json", action="store_true")


def build(chosen: argparse.Namespace) -> int:
    """Build an artifact, or find the one built before."""
    import labkit

    recipe = Recipe(chosen.engine, chosen.precision, **dict(map(_option, chosen.option)))
    checkpoint = labkit.checkpoint(chosen.model, revision=chosen.revision)
    made = labkit.build(checkpoint, recipe, out=chosen.out, force=chosen.force)
    notes = "".join(f"\n  note: {note}" for note in made.notes)
    emit(chosen, artifact_json(made), f"{made!r}\n  {made.path}{notes}")
    return 0


def _option(text: str) -> tuple[str, Any]:
    name, sign, value = text.partition("=")
    if not sign or not name.isidentifier():
        raise LabkitError(f"{text!r} is not an option; expected NAME=VALUE, for example imatrix=true.")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def artifact_json(made: Artifact) -> dict[str, Any]:
    """What `labkit build --json` says of an artifact."""
    fields = ("weight_bytes", "weights", "bits_per_weight", "seconds", "engine_version", "settings", "notes")
    head = {"artifact": str(made.path), "checkpoint": made.checkpoint.name, **made.recipe.to_json()}
    return head | {name: getattr(made, name) for name in fields}


def _measure_options(one: argparse.ArgumentParser) -> None:
    one.add_argument("artifact", help="a folder written by `labkit build`")
    one.add_argument("--metric", required=True, help="size, memory, speed, perplexity, divergence, accuracy, roofline")
    one.add_argument("--text", type=Path, metavar="FILE", help="text for perplexity and divergence")
    one.add_argument("--reference", metavar="DIR", help="artifact that divergence is taken from")
    one.add_argument("--exact", action="store_true", default=None, help="float32 arithmetic where the engine can")
    one.add_argument("--threads", type=int)
    one.add_argument("--n", type=int, help="number of tasks for accuracy")
    one.add_argument("--window", type=int, help="tokens a window")
    one.add_argument("--limit", type=int, help="at most so many windows")
    one.add_argument("--rounds", type=int, help="rounds of timing")
    one.add_argument("--save", action="store_true", help="append the result to the ledger")
    one.add_argument("--json", action="store_true")


def measure(chosen: argparse.Namespace) -> int:
    """Measure one metric of an artifact."""
    import labkit
    from labkit.build import read

    metrics = labkit.measure.METRICS
    if chosen.metric not in metrics:
        raise LabkitError(f"No metric {chosen.metric!r}; expected one of {', '.join(metrics)}.")
    function = metrics[chosen.metric].measure
    names = ("text", "reference", "exact", "threads", "n", "window", "limit", "rounds")
    options = {name: getattr(chosen, name) for name in names if getattr(chosen, name) is not None}
    taken = inspect.signature(function).parameters
    loose = any(p.kind is p.VAR_KEYWORD for p in taken.values())
    for name in options:
        if name not in taken and not loose:
            raise LabkitError(f"{chosen.metric} takes no --{name}; leave it out.")
    if taken.get("reference") and "reference" not in options:
        raise LabkitError(f"{chosen.metric} needs --reference DIR, the artifact to compare with.")
    if "reference" in options:
        options["reference"] = read(options["reference"])
    result = function(read(chosen.artifact), **options)
    if chosen.save:
        labkit.ledger().append(result)
    emit(chosen, _measured(result), f"{result.artifact['checkpoint']}: {_shown(result)}")
    return 0


def _measured(result: Measurement) -> dict[str, Any]:
    import labkit

    return result.to_json() | {"summary": labkit.measure.summary(result)._asdict()}


def _shown(result: Measurement) -> str:
    import labkit

    metric, found = labkit.measure.METRICS[result.metric], labkit.measure.summary(result)
    number = size(found.value) if metric.unit == "bytes" else f"{found.value:.5g} {metric.unit}".rstrip()
    if found.low == found.high:
        return f"{metric.title} {number}"
    return f"{metric.title} {number} (95 % interval {found.low:.5g} to {found.high:.5g})"


# --- the machine -----------------------------------------------------------------------------------------------------


def _json_only(one: argparse.ArgumentParser) -> None:
    one.add_argument("--json", action="store_true")


def doctor(chosen: argparse.Namespace) -> int:
    """Look at Python, packages, engines, memory, disk, compiler, kernel and noise."""
    from labkit import doctor as examination

    return examination.main(chosen.json)


def _models_options(one: argparse.ArgumentParser) -> None:
    one.add_argument("--context", type=int, default=2048, metavar="TOKENS", help="for the key/value cache")
    one.add_argument("--json", action="store_true")


def models(chosen: argparse.Namespace) -> int:
    """List the models labkit knows, with parameters, size class, licence and memory."""
    from labkit.standin import models as table

    rows = table(chosen.context)
    shown = [
        {
            "model": row["name"], "parameters": f"{row['parameters'] / 1e6:,.1f} M", "class": row["class"],
            "licence": row["licence"], "context": f"{row['longest_context']:,}",
            **{label: size(found) for label, found in row["memory"].items()}, "of it cache": size(row["cache_bytes"]),
        }
        for row in rows
    ]  # fmt: skip
    note = f"Memory: weights and the float16 key/value cache of {chosen.context:,} tokens (or all the model allows)."
    emit(chosen, {"context": chosen.context, "models": rows}, f"{columns(shown)}\n{note}")
    return 0


def _clean_options(one: argparse.ArgumentParser) -> None:
    one.add_argument("--checkpoints", action="store_true", help="also fetched models and stand-ins")
    one.add_argument("--partial", action="store_true", help="only leftovers of interrupted work")
    one.add_argument("--dry-run", action="store_true", help="only say what would go")
    one.add_argument("--json", action="store_true")


def clean(chosen: argparse.Namespace) -> int:
    """Remove built artifacts and leftovers; the ledger and your progress stay."""
    from labkit.clean import clean as remove

    kinds = ("partial",) if chosen.partial else ("partial", "artifacts")
    removed = remove(kinds + (("checkpoints",) if chosen.checkpoints else ()), dry=chosen.dry_run)
    total = sum(found for _, found in removed)
    lines = [f"{size(found):>8}  {path}" for path, found in removed]
    verb = "would be freed" if chosen.dry_run else "freed"
    data = {"bytes": total, "dry_run": chosen.dry_run, "removed": [str(path) for path, _ in removed]}
    emit(chosen, data, "\n".join([*lines, f"{size(total)} {verb}"]))
    return 0


def _headline_options(one: argparse.ArgumentParser) -> None:
    one.add_argument("--model", default="edgehome", help="edgehome, a folder, a hub id, or standin:NAME (default: edgehome)")
    one.add_argument("--engine", action="append", dest="names", metavar="ENGINE", help="only this engine; may be repeated")
    one.add_argument("--profile", default="ci", choices=("ci", "class", "full"), help="how much effort (default: ci)")
    one.add_argument("--into", metavar="FILE", help="a Markdown file: the table is put between its two headline marks")
    one.add_argument("--json", action="store_true")


def headline(chosen: argparse.Namespace) -> int:
    """Measure the chapters' headline table on this machine: size, memory and speed of 8 and 4 bits in every engine."""
    from labkit import _marks
    from labkit import headline as table

    say = (lambda text: None) if chosen.json else (lambda text: print(text, file=sys.stderr, flush=True))
    if chosen.into:
        _marks.around(Path(chosen.into), "headline")  # refused now rather than after the measuring
    found, absent = table.headline(chosen.model, chosen.names, chosen.profile, say)
    rows, notes = [table.row(timed) for timed in found], table.notes(found, absent)
    if chosen.into and rows:
        _marks.write_into(Path(chosen.into), table.document(chosen.model, chosen.profile, rows, notes), "headline")
    emit(chosen, {"model": chosen.model, "rows": rows, "notes": notes}, "\n".join([columns(rows), *notes]))
    return 0 if found else 1


# name, and its function with that of its options; or the module under labkit that has both as `command` and `options`
COMMANDS: tuple[tuple[Any, ...], ...] = (
    ("build", build, _build_options),
    ("measure", measure, _measure_options),
    ("sweep", "_fleet_command"),
    *_course_commands.COMMANDS,
    ("doctor", doctor, _json_only),
    ("models", models, _models_options),
    ("clean", clean, _clean_options),
    ("serve", "serve.command"),
    ("deploy", "deploy.command"),
    ("serve-dashboard", "dashboard"),
    ("bundle", "bundle"),
    ("explain", "explain"),
    ("claims", "claims.command"),
    ("headline", headline, _headline_options),
)

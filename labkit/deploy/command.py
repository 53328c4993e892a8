"""`labkit deploy`: render, check, measure, attack, ready."""

from __future__ import annotations

import argparse
import os
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from labkit._files import size
from labkit._say import columns, emit

if TYPE_CHECKING:
    from labkit.deploy.attack import Target

KEY = "LABKIT_ATTACK_KEY"


def options(one: argparse.ArgumentParser) -> None:
    parts = one.add_subparsers(dest="part", metavar="PART", required=True)
    for name, function, configure in PARTS:
        part = parts.add_parser(name, help=function.__doc__.splitlines()[0], description=function.__doc__)
        configure(part)
        part.add_argument("--json", action="store_true")


def command(chosen: argparse.Namespace) -> int:
    """Deployment files from measurements, the checks they must pass, and attacks on a gateway of your own."""
    return next(function for name, function, _ in PARTS if name == chosen.part)(chosen)


def _model_options(one: argparse.ArgumentParser) -> None:
    one.add_argument("--model", required=True, help="edgehome, standin:NAME, a folder, or a name of `labkit models`")
    one.add_argument("--engine", required=True, help="onnxruntime (labkit's gateway), llamacpp, vllm or ollama")
    one.add_argument("--precision", required=True, help="int4, q4_k_m, bf16, awq ...")


def _render_options(one: argparse.ArgumentParser) -> None:
    one.add_argument("folder", help="new folder for the files")
    _model_options(one)
    one.add_argument("--target", required=True, help="compose or kubernetes")
    one.add_argument("--context", type=int, help="tokens of one sequence (default: the model's, at most 4096)")
    one.add_argument("--slots", type=int, default=1, help="sequences at once (default: 1)")
    one.add_argument("--memory", metavar="SIZE", help="measured need, for example 512Mi (default: from the ledger)")
    one.add_argument("--startup", type=float, metavar="SECONDS", help="measured start-up (default: from the ledger)")
    one.add_argument("--limit", metavar="SIZE", help="memory limit (default: 1.25 times the need)")
    one.add_argument("--cpus", type=float, default=2, help="cores (default: 2)")
    one.add_argument("--name", help="of the service (default: from the model)")
    one.add_argument("--digest", help="sha256:… of the image that is built upon")
    one.add_argument("--gpu", action="store_true", help="also an overlay for nodes with an NVIDIA GPU")


def shape(model: str) -> dict[str, Any]:
    """The config of a model, without writing a stand-in: by a known name, or from its folder."""
    from labkit.standin import shapes, standin_config

    name = model.removeprefix("standin:")
    if name in shapes():
        return standin_config(name)
    import labkit

    return labkit.checkpoint(model).config


def render(chosen: argparse.Namespace) -> int:
    """Fill the templates of one deployment from measurements, and check what came out."""
    import labkit
    from labkit.deploy import check, sizing
    from labkit.deploy.render import render as write

    config = shape(chosen.model)
    context = chosen.context or min(4096, int(config.get("max_position_embeddings") or 2048))
    sizes = {name: None if (text := getattr(chosen, name)) is None else sizing.size_in(text) for name in ("memory", "limit")}
    sized = sizing.needs(
        chosen.model, chosen.engine, chosen.precision, context=context, slots=chosen.slots, startup=chosen.startup, cpus=chosen.cpus,
        measurements=labkit.ledger(), config=config, **sizes,
    )  # fmt: skip
    files = write(
        chosen.folder, model=chosen.model, engine=chosen.engine, precision=chosen.precision, target=chosen.target, sized=sized, context=context,
        slots=chosen.slots, name=chosen.name, digest=chosen.digest, gpu=chosen.gpu,
    )  # fmt: skip
    found = check.check(chosen.folder, config=config)
    numbers = {"memory": size(sized.memory), "limit": size(sized.limit), "start-up": f"{sized.startup:.1f} s"}
    told = [f"{name} {value} ({sized.sources['startup' if name == 'start-up' else name]})" for name, value in numbers.items()]
    data = {"files": [str(file) for file in files], "needs": {"memory": sized.memory, "limit": sized.limit, "startup": sized.startup, "sources": dict(sized.sources)},
            "findings": [one.row() for one in found]}  # fmt: skip
    emit(chosen, data, "\n".join([f"{len(files)} files in {chosen.folder}", *told, columns([one.row() for one in found])]))
    return 1 if any(one.level == "error" for one in found) else 0


def _check_options(one: argparse.ArgumentParser) -> None:
    one.add_argument("folder", help="with Dockerfiles, compose.yaml, overlays, workflows, dashboards")
    one.add_argument("--model", help="its shape lets memory be judged as well")


def check_folder(chosen: argparse.Namespace) -> int:
    """Run every rule over a folder of deployment files."""
    from labkit.deploy.check import check

    found = check(chosen.folder, config=shape(chosen.model) if chosen.model else None)
    wrong = sum(one.level == "error" for one in found)
    emit(chosen, {"findings": [one.row() for one in found]}, "\n".join(filter(None, [columns([one.row() for one in found]), f"{wrong} errors, {len(found) - wrong} others"])))
    return 1 if wrong else 0


def _measure_options(one: argparse.ArgumentParser) -> None:
    _model_options(one)
    one.add_argument("--requests", type=int, default=3)


def measure(chosen: argparse.Namespace) -> int:
    """Start the gateway, ask it, and keep its peak memory and its start-up in the ledger."""
    import labkit
    from labkit.deploy.sizing import measure_served

    made = labkit.build(labkit.checkpoint(chosen.model), labkit.Recipe(chosen.engine, chosen.precision))
    found = measure_served(made, requests=chosen.requests)
    labkit.ledger().append(found)
    peak, seconds = found.values[0], found.details["startup_seconds"][0]
    emit(chosen, found.to_json(), f"{made.name}: peak {size(peak)}, answered {seconds:.1f} s after its start")
    return 0


def _attack_options(one: argparse.ArgumentParser) -> None:
    one.epilog = f"The key of a running gateway is read from the variable {KEY}, so that it does not stand in the process list."
    where = one.add_mutually_exclusive_group(required=True)
    where.add_argument("--url", help="a gateway of your own on this machine")
    where.add_argument("--serve", metavar="MODEL", help="start one for this, and stop it afterwards")
    one.add_argument("--engine", default="llamacpp", help="with --serve (default: llamacpp)")
    one.add_argument("--precision", default="q8_0", help="with --serve (default: q8_0)")
    one.add_argument("--name", default="edgehome", help="the model's name, with --url")
    one.add_argument("--patience", type=float, default=None, help="seconds the gateway waits for a slow client (default: 10, with --serve 1)")


@contextmanager
def served(model: str, engine: str, precision: str, patience: float = 1.0, extra: tuple[str, ...] = ()) -> Iterator[Target]:
    """`labkit serve` with a key of its own and short patience in a child process, as a target."""
    from labkit.deploy.attack import Target
    from labkit.serve.command import KEYS
    from labkit.serve.supervisor import supervise

    key = secrets.token_urlsafe(24)
    asked = [sys.executable, "-m", "labkit", "serve", model, "--engine", engine, "--precision", precision, "--name", "edgehome", "--threads", "1"]
    with supervise([*asked, "--patience", f"{patience:g}", *extra, "--port", "{port}"], environment={KEYS: f"lab={key}"}) as child:
        yield Target(child.url, key, patience=patience)


def attack(chosen: argparse.Namespace) -> int:
    """Try to break a gateway of your own; every attempt must fail."""
    from labkit.deploy.attack import Target
    from labkit.deploy.attack import attack as run

    if chosen.url:
        done = run(Target(chosen.url, os.environ.get(KEY, ""), chosen.name, chosen.patience or 10.0))
    else:
        with served(chosen.serve, chosen.engine, chosen.precision, chosen.patience or 1.0) as target:
            done = run(target)
    held = sum(one.held for one in done)
    emit(chosen, {"attempts": [one.row() for one in done], "held": held}, f"{columns([one.row() for one in done])}\n{held} of {len(done)} attempts failed, as they must")
    return 0 if held == len(done) else 1


def _ready_options(one: argparse.ArgumentParser) -> None:
    one.epilog = f"The key of the gateway is read from the variable {KEY}."
    one.add_argument("--folder", type=Path, help="rendered files")
    one.add_argument("--url", default="", help="a live gateway")
    one.add_argument("--model", type=Path, help="the folder of the model that is shipped")
    one.add_argument("--public-key", default="", help="of who signs it: 64 hexadecimal digits")
    one.add_argument("--authority", type=Path, metavar="FILE", help="certificate to trust (PEM)")


def ready(chosen: argparse.Namespace) -> int:
    """Run the readiness checklist over files, a live gateway and a model's folder."""
    from labkit.deploy.readiness import FAIL, Subject, readiness

    lines = readiness(Subject(chosen.folder, chosen.url, os.environ.get(KEY, ""), chosen.model, chosen.public_key, chosen.authority))
    failed = sum(one.result == FAIL for one in lines)
    emit(chosen, {"items": [one.row() for one in lines]}, f"{columns([one.row() for one in lines])}\n{failed} of {len(lines)} items fail")
    return 1 if failed else 0


PARTS = (
    ("render", render, _render_options),
    ("check", check_folder, _check_options),
    ("measure", measure, _measure_options),
    ("attack", attack, _attack_options),
    ("ready", ready, _ready_options),
)

"""`labkit sweep`: model x engine x precision x settings, measured on this machine or on the workers of a Dask scheduler."""

from __future__ import annotations

import argparse
import inspect
import itertools
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from labkit._say import columns, emit
from labkit.types import LabkitError, Measurement, Recipe

METRICS = ("speed", "memory", "size", "perplexity", "divergence", "accuracy")


def options(one: argparse.ArgumentParser) -> None:
    """Options of `labkit sweep`."""
    one.add_argument("models", nargs="+", metavar="MODEL", help="edgehome, a folder, a hub id, or standin:NAME")
    one.add_argument("--engine", action="append", required=True, metavar="ENGINE", help="may be repeated")
    one.add_argument("--precision", action="append", required=True, metavar="P[,P ...]", help="of every engine that has it")
    one.add_argument(
        "--set", action="append", default=[], dest="given", metavar="NAME=VALUE[,VALUE ...]",
        help="a setting of the metrics (threads=1,2) or else an option of the recipes (imatrix=true); several values make a grid",
    )  # fmt: skip
    one.add_argument("--metric", default="speed,size", metavar="M[,M ...]", help=f"of {', '.join(METRICS)} (default: speed,size)")
    one.add_argument("--reference", metavar="ENGINE:PRECISION", help="for divergence (default: the widest of the first engine)")
    one.add_argument("--text", metavar="FILE", help="for perplexity and divergence (default: the house model's)")
    one.add_argument("--profile", default="ci", choices=("ci", "class", "full"), help="how much effort (default: ci)")
    one.add_argument("--scheduler", metavar="ADDRESS", help="of a running Dask scheduler, such as tcp://10.0.0.5:8786")
    one.add_argument("--timeout", type=float, default=1800, metavar="SECONDS", help="limit for one task (default: 1800)")
    one.add_argument("--again", action="store_true", help="measure also what an earlier sweep has measured")
    one.add_argument("--json", action="store_true")


def command(chosen: argparse.Namespace) -> int:
    """Measure a grid of models, engines, precisions and settings, here or on many devices, into one ledger."""
    import labkit
    from labkit.fleet import sweep

    tasks = plan(
        chosen.models, chosen.engine, _words(chosen.precision), _words([chosen.metric]), dict(map(_setting, chosen.given)),
        reference=chosen.reference, text=chosen.text, profile=chosen.profile,
    )  # fmt: skip
    with fleet(chosen.scheduler) as workers:
        say = (lambda text: None) if chosen.json else (lambda text: print(text, file=sys.stderr, flush=True))
        found = sweep(workers, tasks, labkit.ledger(), seconds=chosen.timeout, again=chosen.again, say=say)
    problems = [one._asdict() for one in found.problems]
    rows = [row(one) for one in found.measurements]
    data = {"devices": found.devices, "rows": rows, "kept": found.kept, "problems": problems, "notes": found.notes}
    said = [columns(found.devices), "", columns(rows)] + [f"{found.kept} tasks were measured before (--again takes them again)."] * bool(found.kept)
    said += [f"Not done: {one.task} on {one.device}: {one.why}" for one in found.problems] + found.notes
    emit(chosen, data, "\n".join(said))
    return 1 if problems else 0


def row(one: Measurement) -> dict[str, str]:
    """A measurement as a row of the table."""
    from labkit.measure import METRICS as SHOWN
    from labkit.measure import summary

    value, low, high = summary(one)
    artifact = one.artifact
    return {
        "device": one.host.get("device") or "here", "model": artifact["checkpoint"], "engine": artifact["engine"],
        "precision": artifact["precision"], "metric": one.metric, "value": f"{value:.5g} {SHOWN[one.metric].unit}".strip(),
        "interval": "" if low == high else f"{low:.5g} to {high:.5g}",
        "quiet": "" if one.details.get("quiet", True) else str(one.details["reason"]),
    }  # fmt: skip


@contextmanager
def fleet(scheduler: str | None, workers: int | None = None) -> Iterator[Any]:
    """Workers of a running scheduler, or a cluster of this machine's own that ends with the block."""
    from labkit import host
    from labkit._fleet_task import Fleet

    try:
        import distributed
    except ImportError:
        raise LabkitError('Dask is not installed. Try:  pip install "labkit[fleet]"') from None
    if scheduler is not None:
        try:
            client = distributed.Client(scheduler, timeout="15s", set_as_default=False)
        except (OSError, ValueError, TimeoutError) as error:
            raise LabkitError(f"No Dask scheduler answers at {scheduler} ({error}); start one there:  dask scheduler") from None
        with client:
            yield Fleet(client)
        return
    count = workers or min(4, max(1, host.cpus() // 2))
    own = {"n_workers": count, "threads_per_worker": 1, "memory_limit": 0, "dashboard_address": None, "silence_logs": 40}
    with distributed.LocalCluster(**own) as cluster, distributed.Client(cluster, set_as_default=False) as client:
        yield Fleet(client, here=True)


def plan(
    models: Sequence[str], engines: Sequence[str], precisions: Sequence[str], metrics: Sequence[str],
    given: Mapping[str, Sequence[Any]] | None = None, *, reference: str | None = None, text: str | None = None, profile: str = "ci",
) -> list[Any]:  # fmt: skip
    """The tasks of a grid. `given`: name -> values, each a setting of the metrics that take it, else an option of the recipes.

    Speeds of one model and setting are one task, timed side by side; everything else is one task a recipe. Settings that a
    metric does not take make no further tasks of it.
    """
    import labkit
    from labkit.fleet import Task

    _known(metrics)
    given, takes = dict(given or {}), {metric: _takes(metric) for metric in metrics}
    of_recipes = {name: values for name, values in given.items() if not any(name in names for names in takes.values())}
    recipes = [Recipe(e, p, **dict(zip(of_recipes, combination, strict=True)))
               for e in engines for p in _of(e, precisions) for combination in itertools.product(*of_recipes.values())]  # fmt: skip
    base = _reference(reference, engines[0]) if "divergence" in metrics else None
    tasks: dict[Any, None] = {}  # in order, each once
    for model, metric in itertools.product(models, metrics):
        source, names = labkit.checkpoint(model), [name for name in given if name in takes[metric]]
        groups = [tuple(recipes)] if metric == "speed" else [(one,) for one in recipes]
        for group, values in itertools.product(groups, itertools.product(*(given[name] for name in names))):
            settings = _effort(metric, profile, text) | dict(zip(names, values, strict=True))
            tasks[Task(metric, _place(model), source.fingerprint, group, settings, base if metric == "divergence" else None)] = None
    return list(tasks)


def _place(model: str) -> str:
    """A folder by its whole path, as the workers' current folder is another."""
    found = Path(model).expanduser()
    return str(found.resolve()) if found.is_dir() else model


def _known(metrics: Sequence[str]) -> None:
    for metric in metrics:
        if metric not in METRICS:
            raise LabkitError(f"No metric {metric!r} for a sweep; expected some of {', '.join(METRICS)}.")


def _takes(metric: str) -> frozenset[str]:
    from labkit import measure

    function: Callable[..., Any] = measure.compare if metric == "speed" else measure.METRICS[metric].measure
    named = set(inspect.signature(function).parameters)
    return frozenset(named - {"artifact", "artifacts", "reference", "runner", "runners", "clock", "text", "tasks"})


def _of(engine: str, precisions: Sequence[str]) -> list[str]:
    """Those of the precisions that the engine has; LabkitError when it has none of them."""
    from labkit import engines

    has = engines.engine(engine).PRECISIONS
    found = [one.lower() for one in precisions if one.lower() in has]
    if not found:
        raise LabkitError(f"{engine} has none of the precisions {', '.join(precisions)}; it has {', '.join(has)}.")
    return found


def _reference(text: str | None, first: str) -> Recipe:
    from labkit import engines

    if text is None:
        has = engines.engine(first).PRECISIONS
        return Recipe(first, max(has, key=lambda one: has[one][1]))
    engine, _, precision = text.partition(":")
    return Recipe(engine, *_of(engine, [precision]))


def _effort(metric: str, profile: str, text: str | None) -> dict[str, Any]:
    from labkit.measure import PROFILES

    effort = PROFILES[profile]
    content = {} if text is None else {"text": _read(text)}
    return {
        "speed": {"rounds": effort.rounds, "retries": effort.retries, "seconds": effort.seconds},
        "perplexity": {"limit": effort.windows, **content},
        "divergence": {"limit": effort.windows, **content},
        "accuracy": {"n": effort.tasks},
    }.get(metric, {})


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise LabkitError(f"Cannot read {path} as UTF-8 text ({error}); give a readable text file.") from None


def _setting(text: str) -> tuple[str, list[Any]]:
    name, sign, values = text.partition("=")
    if not sign or not name.isidentifier() or not values:
        raise LabkitError(f"{text!r} is not a setting; expected NAME=VALUE or NAME=VALUE,VALUE, for example threads=1,2.")
    return name, [_value(one) for one in values.split(",")]


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _words(given: Sequence[str]) -> list[str]:
    return [word for one in given for word in one.split(",") if word]

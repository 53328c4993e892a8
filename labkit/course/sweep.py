"""The headline table: the house model through every engine, measured alike; what the ledger has is not taken again."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Sequence
from functools import partial

from labkit import engines, host, measure
from labkit.build import build
from labkit.checkpoint import checkpoint
from labkit.ledger import HOST_KEYS, ledger
from labkit.types import Artifact, LabkitError, Measurement, Recipe

# One full precision and the usual small one for each engine; for llama.cpp a short ladder.
PRECISIONS = {
    "llamacpp": ("f16", "q8_0", "q4_k_m", "q2_k"),
    "onnxruntime": ("fp32", "int4"),
    "olive": ("int4",),
    "openvino": ("f16", "int4_sym"),
    "mlx": ("f32", "q4"),
}
METRICS = ("size", "speed", "perplexity", "divergence", "accuracy")
QUALITY = frozenset(METRICS) - {"speed"}


def headline(profile: str = "ci", say: Callable[[str], None] = lambda text: None) -> list[dict[str, str]]:
    """Build, measure what is missing, append it to the ledger, and return the rows of the table.

    An engine that is absent or cannot build a precision has a row that says so: nothing is left out silently.
    """
    artifacts, refused = builds(say)
    problems = fill(artifacts, profile, say)
    return [row(artifact, known(artifact, profile), problems.get(artifact.name, "")) for artifact in artifacts] + refused


def builds(say: Callable[[str], None] = lambda text: None) -> tuple[list[Artifact], list[dict[str, str]]]:
    """The artifacts of the table, and a row for each one that cannot be had."""
    model, made, refused = checkpoint("edgehome"), [], []
    for name, precisions in PRECISIONS.items():
        for precision in precisions:
            say(f"building {name} {precision}")
            try:
                made.append(build(model, Recipe(name, precision)))
            except LabkitError as error:
                refused.append(_row(engines.engine(name).TITLE, precision, note=str(error)))
                if engines.version(name) is None:
                    break
    return made, refused


def fill(artifacts: Sequence[Artifact], profile: str, say: Callable[[str], None] = lambda text: None) -> dict[str, str]:
    """Measure what the ledger lacks and append it. Returns artifact name -> why it could not be measured.

    Speeds are taken side by side, so all of them are taken when one is missing.
    """
    effort, problems = measure.PROFILES[profile], {}
    have = {artifact.name: known(artifact, profile) for artifact in artifacts}
    if lacking := [artifact for artifact in artifacts if QUALITY - have[artifact.name].keys()]:
        problems |= _tried(lacking, lambda: problems.update(_score(lacking, artifacts[0], profile, say)) or [])
    timed = [a for a in artifacts if speaks_of_speed(a.recipe.engine) and a.name not in problems]
    if any("speed" not in have[a.name] for a in timed):
        say(f"timing {len(timed)} artifacts side by side")
        options = {"rounds": effort.rounds, "retries": effort.retries, "seconds": effort.seconds}
        problems |= _tried(timed, lambda: measure.compare(timed, **options))
    return problems


def _score(artifacts: Sequence[Artifact], reference: Artifact, profile: str, say: Callable[[str], None]) -> dict[str, str]:
    """Append size and quality of each; the reference reads each text once for all of them."""
    problems: dict[str, str] = {}
    with measure.remembered(reference) as known:
        for artifact in artifacts:
            say(f"measuring {artifact.name}")
            quality = partial(measure.quality, artifact, known, measure.PROFILES[profile])
            problems |= _tried([artifact], lambda one=artifact, found=quality: [measure.size(one), *found()])
    return problems


def _tried(artifacts: Sequence[Artifact], work: Callable[[], list[Measurement]]) -> dict[str, str]:
    """Append what `work` measures; an engine that fails costs its own cells of the table, not the table."""
    try:
        ledger().append(*work())
        return {}
    except Exception as error:
        return {artifact.name: f"Not measured: {type(error).__name__}: {error}" for artifact in artifacts}


def speaks_of_speed(engine: str) -> bool:
    """Whether the engine's speed here says something: MLX is made for Apple silicon, its CPU path is for checking."""
    return engine != "mlx" or (platform.system() == "Darwin" and platform.machine() == "arm64")


def row(artifact: Artifact, known: dict[str, Measurement], problem: str = "") -> dict[str, str]:
    """One row of the table, every cell as text."""
    shown = {metric: measure.summary(known[metric]) for metric in METRICS if metric in known}
    notes = [*artifact.notes, *filter(None, [problem])]
    if "speed" in known:
        notes += measure.warnings(known["speed"])
    elif not speaks_of_speed(artifact.recipe.engine):
        notes.append("Speed is shown on Apple silicon only.")
    cells = {"size": f"{artifact.weight_bytes / 1e6:.2f} MB", "bits per weight": f"{artifact.bits_per_weight:.2f}"}
    if "speed" in shown:
        value, low, high = shown["speed"]
        cells["decode tokens/s"] = f"{value:.0f} ({low:.0f} to {high:.0f})"
    if "perplexity" in shown:
        cells["perplexity"] = f"{shown['perplexity'].value:.3f}"
    if "divergence" in shown:
        cells["KL, nats"] = f"{shown['divergence'].value:.5f}"
    if "accuracy" in shown:
        cells["task accuracy"] = f"{shown['accuracy'].value:.1%}"
    return _row(engines.engine(artifact.recipe.engine).TITLE, artifact.recipe.precision, note=" ".join(notes), **cells)


def text(rows: Sequence[dict[str, str]]) -> str:
    """The table for a terminal: columns aligned, notes as numbered lines below."""
    if not rows:
        return ""
    columns = [key for key in rows[0] if key != "note"]
    notes: list[str] = []
    lines = [columns]
    for one in rows:
        mark = ""
        if one["note"]:
            if one["note"] not in notes:
                notes.append(one["note"])
            mark = f" [{notes.index(one['note']) + 1}]"
        cells = [one[key] for key in columns]
        lines.append([cells[0], cells[1] + mark, *cells[2:]])
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    table = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([*table, *(f"[{i}] {note}" for i, note in enumerate(notes, 1))])


def _row(engine: str, precision: str, note: str = "", **cells: str) -> dict[str, str]:
    empty = dict.fromkeys(("size", "bits per weight", "decode tokens/s", "perplexity", "KL, nats", "task accuracy"), "")
    return {"engine": engine, "precision": precision} | empty | cells | {"note": note}


def known(artifact: Artifact, profile: str, windows: int | None = None) -> dict[str, Measurement]:
    """Metric -> newest measurement in the ledger of this very artifact, taken with this profile's effort (speed: on this machine).

    `windows`: of text, where it is not the profile's number.
    """
    effort, here = measure.PROFILES[profile], host.circumstances()
    limit = windows or effort.windows
    wanted = {
        "perplexity": {"limit": limit}, "divergence": {"limit": limit},
        "accuracy": {"tasks": effort.tasks, "intents": None}, "speed": {"rounds": effort.rounds},
    }  # fmt: skip
    found = {}
    for one in _of(artifact, ledger().where(checkpoint=artifact.checkpoint.name, engine=artifact.recipe.engine)):
        right = all(one.workload.get(key) == value for key, value in wanted.get(one.metric, {}).items())
        if right and (one.metric != "speed" or all(one.host.get(key) == here.get(key) for key in HOST_KEYS)):
            found[one.metric] = one
    return found


def _of(artifact: Artifact, measurements: Iterable[Measurement]) -> list[Measurement]:
    about = {
        "revision": artifact.checkpoint.revision,
        **artifact.recipe.to_json(),
        "weight_bytes": artifact.weight_bytes,
    }
    return [
        m for m in measurements
        if m.engine_version == artifact.engine_version and all(m.artifact.get(k) == v for k, v in about.items())
    ]  # fmt: skip

"""The chapters' headline table, measured: what 8 and 4 bits do to size, memory and speed in every engine, on one model.

Each engine is compared with its own widest precision, its three artifacts timed alternately in the same rounds. Beside the
figures stands what the chapters state for that engine, and whether the measured interval agrees.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import NamedTuple

from labkit import engines, host, measure, stats
from labkit._files import size
from labkit.build import build
from labkit.checkpoint import Checkpoint, checkpoint
from labkit.course.sweep import speaks_of_speed
from labkit.ledger import ledger
from labkit.types import Artifact, LabkitError, Measurement, Recipe

# Sixteen bits first: what the others are compared with. On a CPU, ONNX Runtime computes in float32 whatever the file holds.
# Olive's folders are run by ONNX Runtime, so its own sixteen bits are that engine's.
LADDERS = {
    "llamacpp": ("f16", "q8_0", "q4_k_m"),
    "onnxruntime": ("fp16", "int8", "int4"),
    "olive": ("int8", "int4"),
    "openvino": ("f16", "int8_asym", "int4_sym"),
    "mlx": ("f16", "q8", "q4"),
}
BASELINES = {"olive": Recipe("onnxruntime", "fp16")}  # where the first of the ladder is another engine's

SMALL = 100e6  # weights: below, a token costs more in calls than in reading, and nothing follows for the models the chapters mean


class Stated(NamedTuple):
    """What the chapters state: a range of speed-ups, or of the share of the size that is saved."""

    claims: tuple[str, ...]
    what: str  # "speed-up" or "saved"
    low: float
    high: float

    @property
    def text(self) -> str:
        return f"{self.low:g} to {self.high:g} x" if self.what == "speed-up" else f"{self.low:.0%} to {self.high:.0%} less"


STATED = {
    ("llamacpp", "q4_k_m"): (Stated(("C065",), "speed-up", 2, 3),),
    ("olive", "int4"): (Stated(("C067", "C095"), "speed-up", 2, 6), Stated(("C066",), "saved", 0.60, 0.75)),
    ("openvino", "int8_asym"): (Stated(("C069",), "speed-up", 2, 5), Stated(("C068",), "saved", 0.50, 0.75)),
    ("openvino", "int4_sym"): (Stated(("C069",), "speed-up", 2, 5), Stated(("C068",), "saved", 0.50, 0.75)),
    ("mlx", "q4"): (Stated(("C073",), "speed-up", 2, 4),),
}


class Timed(NamedTuple):
    """One artifact with what was measured of it; `speedup` and `saved` are against the sixteen bits of its engine."""

    artifact: Artifact
    speed: Measurement
    memory: Measurement
    roofline: Measurement
    speedup: stats.Estimate
    saved: float


def headline(
    model: str | Checkpoint = "edgehome", names: Sequence[str] | None = None, profile: str = "ci",
    say: Callable[[str], None] = lambda text: None,
) -> tuple[list[Timed], dict[str, str]]:  # fmt: skip
    """Measure the ladders of the engines named (all by default) and append everything to the ledger.

    Returns the rows, and engine -> why it has none. Speeds, memory and sizes only: a stand-in has no quality.
    """
    found, source, absent = [], checkpoint(model), {}
    for name in names or LADDERS:
        if name not in LADDERS:
            raise LabkitError(f"There is no engine {name!r}; expected some of {', '.join(LADDERS)}.")
        try:
            found += _engine(source, name, profile, say)
        except LabkitError as error:
            absent[name] = str(error)
    return found, absent


def _engine(source: Checkpoint, name: str, profile: str, say: Callable[[str], None]) -> list[Timed]:
    if not speaks_of_speed(name):
        raise LabkitError(f"{engines.engine(name).TITLE} is made for Apple silicon; its speed here would say nothing of it.")
    artifacts = []
    for recipe in [*filter(None, [BASELINES.get(name)]), *(Recipe(name, precision) for precision in LADDERS[name])]:
        say(f"building {recipe}")
        artifacts.append(build(source, recipe))
    effort = measure.PROFILES[profile]
    say(f"measuring {', '.join(str(artifact.recipe) for artifact in artifacts)}")
    speeds = measure.compare(artifacts, rounds=effort.rounds, retries=effort.retries, seconds=effort.seconds)
    tested = claims_of(name, "speed-up") if source.weights >= SMALL else ()
    ledger().append(replace(speeds[0], claims=tested))  # a claim of a ratio is tested by both of its sides
    rows = []
    for artifact, speed in zip(artifacts, speeds, strict=True):
        if artifact.recipe.engine != name:
            continue
        stated = STATED.get((name, artifact.recipe.precision), ()) if source.weights >= SMALL else ()
        speed = replace(speed, claims=tuple(c for one in stated if one.what == "speed-up" for c in one.claims))
        memory, roof = measure.memory(artifact), measure.roofline(artifact, speed)
        whole = replace(measure.size(artifact), claims=tuple(c for one in stated if one.what == "saved" for c in one.claims))
        ledger().append(*([speed] if artifact is not artifacts[0] else []), memory, roof, whole)
        gain = stats.ratio(speed.values, speeds[0].values)
        rows.append(Timed(artifact, speed, memory, roof, gain, 1 - artifact.weight_bytes / artifacts[0].weight_bytes))
    return rows


def claims_of(engine: str, what: str) -> tuple[str, ...]:
    """The claims of one kind that are stated of an engine."""
    of_it = (one for (name, _), stated in STATED.items() if name == engine for one in stated)
    return tuple(dict.fromkeys(claim for one in of_it if one.what == what for claim in one.claims))


def verdict(stated: Stated, timed: Timed) -> str:
    """Whether what was measured agrees with what is stated, the interval taken as what is known."""
    low, high = (timed.speedup.low, timed.speedup.high) if stated.what == "speed-up" else (timed.saved, timed.saved)
    if high < stated.low:
        return "less than stated"
    if low > stated.high:
        return "more than stated"
    return "as stated" if stated.low <= low and high <= stated.high else "undecided"


def row(timed: Timed) -> dict[str, str]:
    """One row of the table, every cell as text."""
    recipe, prefill = timed.artifact.recipe, measure.prefill(timed.speed)
    decode, gain = measure.summary(timed.speed), timed.speedup
    stated = STATED.get((recipe.engine, recipe.precision), ())
    return {
        "engine": engines.engine(recipe.engine).TITLE,
        "precision": recipe.precision,
        "size": size(timed.artifact.weight_bytes),
        "saved": f"{timed.saved:.1%}",
        "peak memory": size(measure.summary(timed.memory).value),
        "prefill tokens/s": f"{prefill.value:.0f}",
        "decode tokens/s": f"{decode.value:.1f} ({decode.low:.1f} to {decode.high:.1f})",
        "speed-up": f"{gain.value:.2f} ({gain.low:.2f} to {gain.high:.2f})",
        "of the roof": f"{timed.roofline.details['reached']:.0%}",
        "the chapters say": "; ".join(f"{one.text}: {verdict(one, timed)}" for one in stated),
    }


def notes(found: Sequence[Timed], absent: Mapping[str, str]) -> list[str]:
    """What a reader of the table should know: disturbed timings, engines without rows, a model too small for the claims."""
    said = [f"{timed.artifact.name}: {note}" for timed in found for note in measure.warnings(timed.speed)]
    said += [f"{name}: {why}" for name, why in absent.items()]
    if found and found[0].artifact.weights < SMALL:
        said.append("This model is far smaller than those the chapters mean; for their claims take standin:smollm2-135m or more.")
    return said


def document(model: str, profile: str, rows: Sequence[Mapping[str, str]], said: Sequence[str], when: datetime | None = None) -> str:
    """The table in Markdown: how it was made, on what and when, the rows, and the notes below."""
    here, columns = host.circumstances(), list(rows[0])
    versions = {engines.engine(name).TITLE: engines.version(name) for name in LADDERS}
    made = ", ".join(f"{title} {version}" for title, version in versions.items() if version)
    lines = [
        f"`labkit headline --model {model} --profile {profile}`, {when or datetime.now(UTC):%Y-%m-%d}; {here['cpu']}, {host.cpus()} cores, "
        f"{here['system']}; {made}.",
        "",
        "| " + " | ".join(columns) + " |",
        "|" + "---|" * len(columns),
        *("| " + " | ".join(one.values()) + " |" for one in rows),
        "",
        *(f"- {text}" for text in said),
    ]
    return "\n".join(lines).rstrip() + "\n"

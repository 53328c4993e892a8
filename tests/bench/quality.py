"""P3 perplexity and P4 divergence equal llama-perplexity's to the printed digits; P5 the engines agree before they are compared."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import labkit
from labkit import engines, host, house, measure
from labkit.engines import llamacpp
from labkit.engines._llamacpp_runner import LlamaRunner
from labkit.types import Artifact, LabkitError, Recipe

from . import peers
from .harness import Goal, Row, value_row

QUANTIZED = {"small": ("q8_0",), "full": ("q8_0", "q4_k_m", "q2_k")}
CHUNKS = {"small": 2, "full": 8}
ESTIMATE, LAST, TRIES = r"Final estimate: PPL = ([\d.]+) \+/- ([\d.]+)", r"Same top p: +[\d.]+ ±", 8
EQUAL = Goal("P3", "all 4 printed decimals, and 5 of the ±", 1.0, 1.0)
SETTINGS = Goal("P3", "relative difference <= 1e-5 across settings", None, 1e-5)
# llama.cpp's flash attention casts float32 keys and values to 16 bits, so that it cannot agree; exact runs leave it off
SIXTEEN = Goal("P3", "shown only: keys and values become 16 bits wide")
OTHERWISE: dict[str, dict[str, Any]] = {"1 thread": {"threads": 1}, "flash attention": {"flash_attention": True}, "batches of 32": {"batch": 32}}
SAME_KLD = Goal("P4", "every printed figure equal", 1.0, 1.0)
SAME_FILE = Goal("P4", "same layout, tokens and >= 99.9 % of the steps in the _logits_ file", 0.999, 1.0)
AGREE = Goal("P5", "mean KL <= 1e-6 nats", None, 1e-6)
SAME_TOP = Goal("P5", "same likeliest token >= 99.9 %", 0.999, None)


def text() -> str:
    """The house's held-out text without the marks of its chat template, which the peer would read as plain characters."""
    return re.sub(r"<\|im_(start|end)\|>", "", house.heldout_text())


def p3(size: str, rounds: int) -> Iterator[Row]:
    """Perplexity and its ± beside llama-perplexity, digit for digit, on the same file, text and settings."""
    for precision in ("f16", *QUANTIZED[size]):
        artifact = built(precision)
        theirs = re.search(ESTIMATE, perplexity(artifact, size, expected=ESTIMATE))
        with exact(artifact, host.cpus()) as runner:
            found = measure.perplexity(artifact, text=text(), limit=CHUNKS[size], runner=runner)
        ours = (f"{measure.summary(found).value:.4f}", f"{measure.plus_minus(found):.5f}")
        same = float(np.mean([a == b for a, b in zip(ours, theirs.groups(), strict=True)]))
        yield value_row(EQUAL, f"{artifact.name}: {' ± '.join(ours)}, peer {' ± '.join(theirs.groups())}", [same], unit="equal")
        for what, options in OTHERWISE.items():
            with exact(artifact, **options) as runner:
                again = measure.perplexity(artifact, text=text(), limit=CHUNKS[size], runner=runner)
            change = abs(measure.summary(again).value / measure.summary(found).value - 1)
            yield value_row(SIXTEEN if what == "flash attention" else SETTINGS, f"{artifact.name}: {what}", [change], unit="relative")


def built(precision: str) -> Artifact:
    return labkit.build(labkit.checkpoint("edgehome"), Recipe("llamacpp", precision))


def exact(artifact: Artifact, threads: int | None = None, **changed: Any) -> LlamaRunner:
    """The runner with the very settings the peer is given below, but for what is `changed`."""
    return LlamaRunner(artifact.path / llamacpp.FILE, exact=True, threads=threads, **changed)


def perplexity(artifact: Artifact, size: str, *more: str, expected: str = "") -> str:
    """What llama-perplexity prints: chunks one at a time, float32 cache, no flash attention, no rearranged weights.

    Its log thread is not flushed at the end, so its last lines are lost now and then: it is run again until `expected` is there.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "text.txt"
        file.write_text(text(), encoding="utf-8")
        window = str(min(512, artifact.checkpoint.context))
        command = [str(peers.tool("llama-perplexity")), "-m", str(artifact.path / llamacpp.FILE), "-f", str(file)]
        command += ["-c", window, "-b", window, "-t", str(host.cpus()), "--chunks", str(CHUNKS[size])]
        command += ["-fa", "off", "-ctk", "f32", "-ctv", "f32", "--no-repack", *more]
        for _ in range(TRIES):
            if re.search(expected, printed := peers.answer(command)):
                return printed
        raise LabkitError(f"llama-perplexity ran {TRIES} times and its result was in none of its outputs.")


def p4(size: str, rounds: int) -> Iterator[Row]:
    """Divergence from the same logits file beside llama-perplexity, figure for figure, and the file itself."""
    reference = built("f16")
    with tempfile.TemporaryDirectory() as folder:
        theirs, ours = Path(folder) / "theirs.kld", Path(folder) / "ours.kld"
        perplexity(reference, size, "--kl-divergence-base", str(theirs))
        base = measure.read_base(theirs)
        with exact(reference, host.cpus()) as runner:
            measure.write_base(ours, runner, base.tokens.ravel(), base.window, reference.checkpoint.bos_id)
        yield value_row(SAME_FILE, f"{reference.name}: {theirs.stat().st_size:,} bytes", [same_steps(ours, theirs)], unit="equal")
        for precision in QUANTIZED[size]:
            yield _figures(built(precision), theirs, ours, size)


def same_steps(ours: Path, theirs: Path) -> float:
    """Share of equal 16-bit numbers in two logits files; 0 where size, header or tokens differ."""
    a, b = ours.read_bytes(), theirs.read_bytes()
    head = 20 + 4 * measure.read_base(theirs).tokens.size
    if len(a) != len(b) or a[:head] != b[:head]:
        return 0.0
    return float((np.frombuffer(a[head:], dtype=np.uint16) == np.frombuffer(b[head:], dtype=np.uint16)).mean())


def _figures(artifact: Artifact, theirs: Path, ours: Path, size: str) -> Row:
    """The peer's printed figures from its own file beside ours from the same, and the peer's from our file."""
    printed = parsed(perplexity(artifact, size, "--kl-divergence", "--kl-divergence-base", str(theirs), expected=LAST))
    from_ours = parsed(perplexity(artifact, size, "--kl-divergence", "--kl-divergence-base", str(ours), expected=LAST))
    with exact(artifact, host.cpus()) as runner:
        found = measure.divergence(artifact, theirs, limit=CHUNKS[size], runner=runner)
    details, quantile = found.details, found.details["quantiles"]
    mine = {
        "Mean KLD": measure.summary(found).value, "Maximum KLD": quantile["max"], "99.9% KLD": quantile["99.9%"],
        "99.0% KLD": quantile["99%"], "95.0% KLD": quantile["95%"], "90.0% KLD": quantile["90%"], "Median KLD": quantile["median"],
        "Mean Δp": 100 * details["delta_p_mean"], "RMS Δp": 100 * details["delta_p_rms"],
        "Same top p": 100 * measure.same_top(found).value,
    }  # fmt: skip
    same = {name: agrees(mine[name], printed[name]) for name in mine}
    same["from our file"] = printed["Mean KLD"] == from_ours["Mean KLD"]
    wrong = [f"{name} {mine.get(name, '')} / {printed.get(name, '')}" for name, good in same.items() if not good]
    what = f"{artifact.name}: mean KL {printed['Mean KLD']}, same top {printed['Same top p']} %" + (f"; unlike: {'; '.join(wrong)}" if wrong else "")
    return value_row(SAME_KLD, what, [float(np.mean(list(same.values())))], unit="equal", ours=mine, theirs=printed)


def parsed(text: str) -> dict[str, str]:
    """Label -> first number, of the lines `label: number` that llama-perplexity prints."""
    found = re.findall(r"^\s*([A-Za-z0-9.%][^:\n]*?)\s*:\s+(-?[\d.]+)", text, flags=re.MULTILINE)
    return {re.sub(r"\s+", " ", name): number for name, number in found}


def agrees(value: float, printed: str) -> bool:
    """Whether `value` is what was printed, give or take its last digit or 1e-5 of it: the peer sums and interpolates in float32."""
    step = 10.0 ** -len(printed.partition(".")[2])
    return abs(value - float(printed)) <= max(1.5 * step, 1e-5 * abs(value))


def p5(size: str, rounds: int) -> Iterator[Row]:
    """The same float32 weights through every engine with exact settings."""
    source = labkit.checkpoint("edgehome")
    reference = labkit.build(source, Recipe("llamacpp", "f32"))
    for name, precision in (("onnxruntime", "fp32"), ("openvino", "f32"), ("mlx", "f32")):
        if engines.version(name) is None:
            continue
        artifact = labkit.build(source, Recipe(name, precision))
        found = measure.divergence(artifact, reference, text=text(), limit=CHUNKS[size])
        yield value_row(AGREE, f"{name} beside llamacpp", [measure.summary(found).value], unit="nats")
        yield value_row(SAME_TOP, f"{name} beside llamacpp", [measure.same_top(found).value], unit="same top")

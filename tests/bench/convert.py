"""P6 to P9, conversion beside convert_hf_to_gguf.py, llama-quantize and the GenAI model builder: wall, CPU, memory, disk roof.

Both sides are whole programs, from starting Python to the file on disk, with the page cache warm.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import labkit
from labkit.checkpoint import Checkpoint
from labkit.engines import llamacpp
from labkit.engines._gguf import write_gguf
from labkit.types import LabkitError

from . import peers
from .harness import Arm, Goal, Once, Row, interleaved, ratio_row, value_row

MODELS = {"small": ("edgehome",), "full": ("edgehome", "standin:smollm2-135m", "standin:smollm2-360m")}
# K-quants want rows of whole 256s; most tensors of the 135 M and 360 M shapes have none and fall back to other blocks
WHOLE_ROWS = {"small": (), "full": ("standin:smollm2-1.7b:2",)}
SMALL_FILE = 50e6
FASTER = {"f16": 6, "bf16": 6, "q8_0": 4, "q4_0": 8}
COPIED = Goal("P6", "shown only: faster than this is not to be had")
IDENTICAL = Goal("P6", "every tensor's bytes identical", 1.0, 1.0)
CPU = Goal("P7", "CPU seconds <= 1.05 x llama-quantize (one pass from safetensors)", 1 / 1.05, None)
MIB = 1 << 20
ANON = Goal("P8", "private memory <= 166 MiB (150 and two slabs)", None, 166.0)
PEAK = Goal("P8", "peak <= 250 MiB", None, 250.0)
BUILDER = Goal("P8", "<= 1/8 of the model builder's peak", None, 1 / 8)
ROOF = Goal("P9", ">= 0.5 of a plain copy's bytes/s", 0.5, None)

# The converter knows a tokenizer by the hash of a test text and refuses any it has not seen; ours is the plain byte-level one.
CONVERT = """
import runpy, sys
root = sys.argv[1]
sys.path[:0] = [root, root + "/gguf-py"]
import conversion.base as base
base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
sys.argv = ["convert_hf_to_gguf.py", *sys.argv[2:]]
runpy.run_path(root + "/convert_hf_to_gguf.py", run_name="__main__")
"""


class Cost(NamedTuple):
    """What a finished program took."""

    seconds: float
    cpu: float
    peak: int  # bytes: VmHWM of its largest process
    anon: int  # bytes: the most private memory seen


def cost(command: Sequence[str], *, memory: bool = False) -> Cost:
    """Run a program to its end; with `memory`, look at its processes every 20 ms (and leave the time alone)."""
    start, before = time.perf_counter(), os.times()
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        process = subprocess.Popen(list(command), stdout=log, stderr=log, env=peers.environment())
        seen = {"peak": 0, "anon": 0}
        watcher = threading.Thread(target=_look, args=(process, seen)) if memory else None
        if watcher:
            watcher.start()
        process.wait()
        seconds, after = time.perf_counter() - start, os.times()
        if watcher:
            watcher.join()
        if process.returncode:
            log.seek(0)
            raise LabkitError(f"{Path(command[0]).name} ended with status {process.returncode}: {' | '.join(log.read().strip().splitlines()[-3:])}")
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return Cost(seconds, max(cpu, 1e-3), seen["peak"], seen["anon"])


def _look(process: subprocess.Popen, seen: dict[str, int]) -> None:
    import psutil

    while process.poll() is None:
        try:
            tree = [process.pid, *(one.pid for one in psutil.Process(process.pid).children(recursive=True))]
        except psutil.NoSuchProcess:
            return
        for pid in tree:
            seen["peak"] = max(seen["peak"], _field(f"/proc/{pid}/status", "VmHWM:"))
        seen["anon"] = max(seen["anon"], sum(_field(f"/proc/{pid}/smaps_rollup", "Pss_Anon:") for pid in tree))
        time.sleep(0.02)


def _field(path: str, name: str) -> int:
    try:
        with open(path) as file:
            return next((int(line.split()[1]) * 1024 for line in file if line.startswith(name)), 0)
    except OSError:
        return 0


def ours(model: str, precision: str, out: Path, engine: str = "llamacpp") -> list[str]:
    return [sys.executable, "-m", "labkit", "build", model, "--engine", engine, "--precision", precision, "--out", str(out), "--force"]


def converted(source: Checkpoint, kind: str, out: Path) -> list[str]:
    return [sys.executable, "-c", CONVERT, str(peers.source()), str(source.path), "--outtype", kind, "--outfile", str(out)]


def quantized(base: Path, precision: str, out: Path) -> list[str]:
    return [str(peers.tool("llama-quantize")), str(base), str(out), precision.upper(), "2"]


@contextmanager
def scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="labkit-bench-") as folder:
        yield Path(folder)


def _steps(source: Checkpoint, precision: str, folder: Path) -> list[list[str]]:
    """The peer's commands from safetensors to the file."""
    if precision in ("f16", "bf16"):
        return [converted(source, precision, folder / "peer.gguf")]
    base = folder / "peer-base.gguf"
    return [converted(source, "bf16", base), quantized(base, precision, folder / "peer.gguf")]


def p6(size: str, rounds: int) -> Iterator[Row]:
    """Float and simple types: seconds from safetensors to GGUF beside the converter (and llama-quantize), bytes compared."""
    peers.tool("llama-quantize")
    itself = Once(rounds)
    for model in MODELS[size]:
        source = labkit.checkpoint(model)
        for precision, factor in FASTER.items():
            with scratch() as folder:
                steps = _steps(source, precision, folder)
                kit = Arm("labkit", lambda m=model, p=precision, f=folder: cost(ours(m, p, f / "kit")).seconds)
                peer = Arm("peer", lambda s=steps: sum(cost(one).seconds for one in s))
                yield from itself(kit)
                small = source.weights * 2 < SMALL_FILE
                goal = Goal("P6", f">= {10 if small else factor} x faster", 10 if small else factor, None)
                copy = [] if small or precision != "f16" else [Arm("copy", lambda s=source, f=folder: _copied(s, f / "copy"))]
                taken = interleaved([kit, peer, *copy], rounds)
                yield ratio_row(goal, f"{model} -> {precision}", taken, "labkit", "peer", lower_is_better=True)
                if copy:
                    yield ratio_row(COPIED, f"{model}: a plain copy of as many bytes beside the peer", taken, "copy", "peer", lower_is_better=True)
                yield identical(f"{model} {precision}", folder / "kit" / llamacpp.FILE, folder / "peer.gguf")


def _copied(source: Checkpoint, target: Path) -> float:
    """Seconds a plain copy of the checkpoint's weights takes, a program's start not counted."""
    return sum(timed(lambda f=file: shutil.copyfile(f, target)) for file in source.path.glob("*.safetensors"))


def identical(what: str, one: Path, other: Path) -> Row:
    """Share of tensors with the same name, type and SHA-256 in both files."""
    a, b = digests(one), digests(other)
    same = sum(a.get(name) == found for name, found in b.items())
    unlike = sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name))[:3]
    share = same / max(len(a), len(b))
    return value_row(IDENTICAL, f"{what}: {same} of {max(len(a), len(b))} tensors" + (f"; unlike: {', '.join(unlike)}" if unlike else ""), [share], unit="equal")


def digests(path: Path) -> dict[str, tuple[str, str]]:
    """Tensor -> (type, SHA-256 of its bytes)."""
    from gguf import GGUFReader

    return {one.name: (one.tensor_type.name, hashlib.sha256(one.data.tobytes()).hexdigest()) for one in GGUFReader(path).tensors}


def p7(size: str, rounds: int) -> Iterator[Row]:
    """K-quants: CPU seconds of one pass from safetensors beside llama-quantize alone, and the same bytes."""
    peers.tool("llama-quantize")
    itself = Once(rounds)
    for model in (*MODELS[size], *WHOLE_ROWS[size]):
        source = labkit.checkpoint(model)
        for precision in ("q3_k_s", "q4_k_m", "q6_k"):
            with scratch() as folder:
                base = folder / "base.gguf"
                cost(converted(source, "bf16", base))
                kit = Arm("labkit", lambda m=model, p=precision, f=folder: cost(ours(m, p, f / "kit")).cpu)
                peer = Arm("llama-quantize", lambda b=base, p=precision, f=folder: cost(quantized(b, p, f / "peer.gguf")).cpu)
                yield from itself(kit)
                yield ratio_row(goal_of(CPU, source), f"{model} -> {precision}, CPU seconds", interleaved([kit, peer], rounds), "labkit", "llama-quantize", lower_is_better=True)
                row = identical(f"{model} {precision}", folder / "kit" / llamacpp.FILE, folder / "peer.gguf")
                row.goal = "P7"
                yield row


def p8(size: str, rounds: int) -> Iterator[Row]:
    """Memory of a conversion at several model sizes, and of the GenAI folder beside the model builder."""
    for model in MODELS[size]:
        with scratch() as folder:
            found = [cost(ours(model, "bf16", folder / "kit"), memory=True) for _ in range(min(rounds, 3))]
        yield value_row(ANON, f"{model} -> bf16, private", [one.anon / MIB for one in found], unit="MiB")
        yield value_row(PEAK, f"{model} -> bf16, peak", [one.peak / MIB for one in found], unit="MiB")
    yield from _genai(MODELS[size][:2])


def _genai(models: Sequence[str]) -> Iterator[Row]:
    for module in ("torch", "transformers", "onnxruntime_genai"):
        if importlib.util.find_spec(module) is None:
            raise LabkitError(f'The GenAI model builder needs {module}. Try:  pip install "labkit[onnx,train]"')
    for model in models:
        source = labkit.checkpoint(model)
        with scratch() as folder:
            kit = cost(ours(model, "int4", folder / "kit", "onnxruntime"), memory=True)
            command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-m", source.name, "-i", str(source.path)]
            command += ["-o", str(folder / "peer"), "-p", "int4", "-e", "cpu", "-c", str(folder / "cache")]
            peer = cost(command, memory=True)
        yield value_row(goal_of(BUILDER, source), f"{model} -> ONNX int4: {kit.peak / MIB:.0f} MiB, builder {peer.peak / MIB:.0f} MiB", [kit.peak / peer.peak], unit="x")


def p9(size: str, rounds: int) -> Iterator[Row]:
    """Bytes read and written a second beside a plain copy of as many bytes on the same disk."""
    itself = Once(rounds)
    for model in MODELS[size]:
        source = labkit.checkpoint(model)
        read = sum(file.stat().st_size for file in source.path.glob("*.safetensors"))
        for precision in ("bf16", "f16"):
            with scratch() as folder:
                target = folder / "kit.gguf"
                write_gguf(source, target, precision)
                total = read + target.stat().st_size
                (folder / "half").write_bytes(os.urandom(1 << 20) * (total // 2 // (1 << 20) + 1))
                copied = 2 * (folder / "half").stat().st_size
                kit = Arm("labkit", lambda s=source, t=target, p=precision, n=total: n / timed(lambda: write_gguf(s, t, p)))
                copy = Arm("copy", lambda f=folder, n=copied: n / timed(lambda: shutil.copyfile(f / "half", f / "copy")))
                yield from itself(copy)
                yield ratio_row(goal_of(ROOF, source), f"{model} -> {precision}, bytes/s", interleaved([kit, copy], rounds), "labkit", "copy")


def goal_of(goal: Goal, source: Checkpoint) -> Goal:
    """The goal for models of a real size; below, starting Python is all there is to see and the figure is shown only."""
    return goal if source.weights * 2 >= SMALL_FILE else Goal(goal.id, "shown only: a small model", None, None)


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start

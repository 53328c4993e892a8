"""P1 decode, P2 prefill, P10 roofline, P11 settings, P12 truth under load: against llama-bench, and against the engines' defaults."""

from __future__ import annotations

import json
import math
import multiprocessing
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import labkit
from labkit import host, measure, stats
from labkit.engines import llamacpp
from labkit.measure.prompts import fresh_prompt
from labkit.measure.worker import Child
from labkit.types import Artifact, Recipe

from . import peers
from .harness import Arm, Goal, Once, Row, interleaved, ratio_row, same_against_itself, value_row

MODELS = {"small": (("edgehome", ("q8_0",)),),
          "full": (("standin:smollm2-135m", ("f16", "q8_0", "q4_k_m")), ("edgehome", ("q8_0",)))}  # fmt: skip
LARGE = 100e6  # bytes: below, a token costs more in calls than in reading
NEW, SECONDS = 64, 0.5
DECODE = Goal("P1", "0.97 to 1.03 of the peer", 0.97, 1.03)
DECODE_SMALL = Goal("P1", ">= 0.85 of the peer (file < 100 MB)", 0.85, None)
PREFILL = Goal("P2", ">= 0.97 of the peer", 0.97, None)
# Share of the roof to reach, by engine and precision; and the two sizes whose difference tells what a token costs beside its bytes.
ROOFS = {("llamacpp", "f16"): 0.85, ("llamacpp", "q8_0"): 0.70, ("llamacpp", "q4_0"): 0.70, ("llamacpp", "q4_k_m"): 0.65,
         ("onnxruntime", "int4"): 0.45, ("openvino", "int8_asym"): 0.35}  # fmt: skip
ROOF_MODELS = {"small": ("edgehome",), "full": ("standin:smollm2-135m", "standin:smollm2-1.7b")}
FIXED = Goal("P10", "shown only: what stays when the bytes are gone")
DEFAULTS = Goal("P11", ">= 1.35 x the Python binding's defaults", 1.35, None)
LEVELS = Goal("P11", "accuracy level 4 >= 1.8 x level 1", 1.8, None)
LEVEL_MODELS = {"small": ("edgehome",), "full": ("standin:smollm2-135m", "standin:qwen2.5-0.5b")}
FLOATS = Goal("P11", "MLX on a CPU: float32 >= 5 x bfloat16", 5.0, None)
OPENED = Goal("P11", "MLX on a CPU: weights opened once, real BLAS >= 10 x packed prefill", 10.0, None)
LOADED = Goal("P12", ">= 0.5 of the quiet speed on one thread", 0.5, None)


def p1(size: str, rounds: int) -> Iterator[Row]:
    """Decode speed beside llama-bench, at depth 0 and 128."""
    yield from _beside(size, rounds, lambda kit, path, t: [
        (f"depth {depth}", Arm("labkit", lambda d=depth: kit.decode(d), kit.pids), Arm("llama-bench", lambda d=depth: bench(path, t, decode=NEW, depth=d)))
        for depth in (0, 128)
    ], decode=True)  # fmt: skip


def p2(size: str, rounds: int) -> Iterator[Row]:
    """Prefill speed beside llama-bench, of 128 and (where the context allows) 512 tokens."""
    yield from _beside(size, rounds, lambda kit, path, t: [
        (f"{n} tokens", Arm("labkit", lambda n=n: kit.prefill(n), kit.pids), Arm("llama-bench", lambda n=n: bench(path, t, prompt=n)))
        for n in (128, 512) if n < kit.artifact.checkpoint.context
    ], decode=False)  # fmt: skip


def _beside(size: str, rounds: int, pairs: Callable[..., list[tuple[str, Arm, Arm]]], *, decode: bool) -> Iterator[Row]:
    peers.tool("llama-bench")
    threads, itself = host.cpus(), Once(rounds)
    for artifact in artifacts(size):
        with kit_process(artifact, threads) as kit:
            for what, ours, theirs in pairs(kit, artifact.path / llamacpp.FILE, threads):
                yield from itself(ours)
                large = artifact.weight_bytes >= LARGE
                goal = (DECODE if large else DECODE_SMALL) if decode else PREFILL
                yield ratio_row(goal, f"{artifact.name}, {what}, {threads} threads", interleaved([ours, theirs], rounds), "labkit", "llama-bench")


def artifacts(size: str) -> Iterator[Artifact]:
    """The GGUF files of a size of run, built where they are not there."""
    for model, precisions in MODELS[size]:
        for precision in precisions:
            yield labkit.build(labkit.checkpoint(model), Recipe("llamacpp", precision))


class Kit:
    """labkit's runner in a process of its own, asked for rates."""

    def __init__(self, child: Child, artifact: Artifact):
        self.child, self.artifact, self.pids = child, artifact, child.pids
        import numpy as np

        self.rng = np.random.default_rng(0)

    def decode(self, depth: int) -> float:
        """Tokens/s of NEW decode steps after `depth` tokens: (t_last - t_first), so the prompt is not in it."""
        return self._until(max(1, depth), NEW + 1, lambda stamps: (NEW, stamps[-1] - stamps[0]))

    def prefill(self, tokens: int) -> float:
        """Tokens/s until the first token is there."""
        return self._until(tokens, 2, lambda stamps: (tokens, stamps[0]))

    def _until(self, prompt: int, new: int, part: Callable[[list[float]], tuple[int, float]]) -> float:
        count, spent = 0, 0.0
        while spent < SECONDS:
            told = self.child.ask("time", prompt=fresh_prompt(self.artifact.checkpoint, prompt, new, self.rng), new=new)
            tokens, seconds = part(told["stamps"])
            count, spent = count + tokens, spent + seconds
        return count / spent


@contextmanager
def kit_process(artifact: Artifact, threads: int) -> Iterator[Kit]:
    """An artifact open in a fresh process, its threads waiting as the peer's do."""
    child = Child(artifact)
    try:
        child.ask("prepare")
        child.ask("open", threads=threads)
        yield Kit(child, artifact)
    finally:
        child.end()


def bench(path: Any, threads: int, *, decode: int = 0, prompt: int = 0, depth: int = 0) -> float:
    """Tokens/s of one llama-bench run that lasts at least SECONDS: same file, threads, flash attention and KV cache as ours."""
    command = [str(peers.tool("llama-bench")), "-m", str(path), "-t", str(threads), "-fa", "1", "-ctk", "f16", "-ctv", "f16"]
    command += ["-n", str(decode), "-p", str(prompt), "-d", str(depth), "-o", "json"]
    key = (str(path), threads, decode, prompt, depth)
    repeats = _REPEATS.get(key, 1)
    found = json.loads(_json_part(peers.answer([*command, "-r", str(repeats)], threads=threads)))[0]
    seconds = sum(found["samples_ns"]) / 1e9
    _REPEATS[key] = max(1, math.ceil(repeats * SECONDS / seconds))
    return (decode + prompt) * len(found["samples_ns"]) / seconds


_REPEATS: dict[Any, int] = {}


def _json_part(text: str) -> str:
    """The JSON array among what the tool printed."""
    return text[text.index("[\n") : text.rindex("]") + 1]


def p10(size: str, rounds: int) -> Iterator[Row]:
    """Share of the memory roof that decoding reaches at two sizes, the roof measured in the same run, and the cost beside it."""
    with kit_process(one := next(artifacts(size)), host.cpus()) as kit:
        yield same_against_itself(Arm(one.name, lambda: kit.decode(0), kit.pids), rounds)
    for (engine, precision), share in ROOFS.items():
        points = []
        for model in ROOF_MODELS[size]:
            artifact = labkit.build(labkit.checkpoint(model), Recipe(engine, precision))
            found = measure.speed(artifact, rounds=min(rounds, 5), prompt_tokens=32, new_tokens=32)
            roof = measure.roofline(artifact, found)
            goal = Goal("P10", f">= {share:.2f} of the roof (files >= 100 MB)", share if artifact.weight_bytes >= LARGE else None, None)
            row = value_row(goal, f"{artifact.name}, decode / roof", [one / roof.values[0] for one in found.values], unit="of the roof")
            row.quiet, row.reason = found.details["quiet"], found.details["reason"]
            yield row
            points.append((artifact.weight_bytes, 1 / stats.median(found.values)))
        if len(points) == 2:
            yield _beside_the_bytes(f"{engine} {precision}", *points)


def _beside_the_bytes(what: str, small: tuple[float, float], large: tuple[float, float]) -> Row:
    """Seconds a token = fixed + bytes / bandwidth through two points: the fixed part, and its share of the small model's token."""
    (bytes_a, time_a), (bytes_b, time_b) = small, large
    bandwidth = (bytes_b - bytes_a) / (time_b - time_a)
    fixed = time_a - bytes_a / bandwidth
    told = f"{what}: {bandwidth / 1e9:.1f} GB/s, and {fixed / time_a:.0%} of a token at {bytes_a / 1e6:.0f} MB is not reading"
    return value_row(FIXED, told, [1e3 * fixed], unit="ms a token")


LLAMA_LOOP = textwrap.dedent("""
    import json, sys, time
    path, how, prompt, new = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    if how == "default":
        from llama_cpp import Llama
        model = Llama(path, verbose=False, n_ctx=512)
    else:
        from labkit.engines.llamacpp import open_llama
        model = open_llama(path, n_ctx=512)
    for line in sys.stdin:
        ids, stamps = json.loads(line), []
        model.reset()
        for _ in model.generate(ids, temp=0.0, reset=True):
            stamps.append(time.perf_counter())
            if len(stamps) == new + 1:
                break
        print(new / (stamps[-1] - stamps[0]), flush=True)
""")


def p11(size: str, rounds: int) -> Iterator[Row]:
    """What labkit's settings gain over the engines' Python defaults, on the same file."""
    from .children import Lines

    itself = Once(rounds)
    for artifact in artifacts(size):
        with ExitStack() as stack:
            arms = []
            for how in ("tuned", "default"):
                command = [sys.executable, "-c", LLAMA_LOOP, str(artifact.path / llamacpp.FILE), how, "8", str(NEW)]
                child = stack.enter_context(Lines(command))
                ids = artifact.checkpoint.encode("turn on the light")[:8]
                arms.append(Arm(how, lambda c=child, i=ids: float(c.ask(i)), (child.pid,)))
            yield from itself(arms[0])
            yield ratio_row(DEFAULTS, f"{artifact.name}: open_llama / Llama()", interleaved(arms, rounds), "tuned", "default")
    yield from _levels(size, rounds)
    yield from _mlx(rounds)


def _levels(size: str, rounds: int) -> Iterator[Row]:
    """Integer products shorten the arithmetic of a token, not its reading nor its nodes: most for larger models, on one thread."""
    for name in LEVEL_MODELS[size]:
        source = labkit.checkpoint(name)
        built = {level: labkit.build(source, Recipe("onnxruntime", "int4", accuracy_level=level)) for level in (4, 1)}
        for threads in sorted({1, host.cpus()}):
            with ExitStack() as stack:
                kits = {level: stack.enter_context(kit_process(one, threads)) for level, one in built.items()}
                arms = [Arm(f"level {level}", lambda k=kit: k.decode(0), kit.pids) for level, kit in kits.items()]
                what = f"{source.name}, ONNX Runtime int4, threads: {threads}"
                yield ratio_row(LEVELS, what, interleaved(arms, rounds), "level 4", "level 1")


def _mlx(rounds: int) -> Iterator[Row]:
    """On a CPU MLX's 16-bit products are slow and coarse, and its packed ones unpack every weight for every token."""
    from .children import mlx_arm, mlx_prefill_arm

    artifact = labkit.build(labkit.checkpoint("edgehome"), Recipe("mlx", "q4"))
    with ExitStack() as stack:
        arms = [mlx_arm(stack, artifact, 1, 16, dtype) for dtype in ("float32", "bfloat16")]
        yield ratio_row(FLOATS, f"{artifact.name}, float32 / bfloat16", interleaved(arms, rounds), arms[0].name, arms[1].name)
    with ExitStack() as stack:
        arms = [mlx_prefill_arm(stack, artifact, how) for how in ("exact", "packed")]
        yield ratio_row(OPENED, f"{artifact.name}, prefill for quality: opened once and {blas()} / as stored", interleaved(arms, rounds), arms[0].name, arms[1].name)


def blas() -> str:
    """What labkit finds for MLX's float32 products here."""
    from labkit.engines._mlx_blas import BLAS

    return {"openblas": "OpenBLAS"}.get(BLAS, f"the {BLAS} BLAS")


def _hog() -> None:
    while True:
        sum(range(100_000))


def p12(size: str, rounds: int) -> Iterator[Row]:
    """With another program on one core: still half the quiet one-thread speed, and the measurement says that it was disturbed."""
    artifact = next(artifacts(size))
    calm = measure.speed(artifact, rounds=rounds, threads=1)
    hog = multiprocessing.get_context("spawn").Process(target=_hog, daemon=True)
    hog.start()
    try:
        loaded = measure.speed(artifact, rounds=rounds, retries=0)
    finally:
        hog.kill()
        hog.join()
    base = stats.median(calm.values)
    row = value_row(LOADED, f"{artifact.name}: with a busy neighbour / quiet, 1 thread", [one / base for one in loaded.values], unit="x")
    row.quiet, row.reason = calm.details["quiet"], calm.details["reason"]
    yield row
    flagged = Goal("P12", "the loaded run is flagged", 1.0, None)
    yield value_row(flagged, str(loaded.details["reason"]) or "not flagged", [float(not loaded.details["quiet"])], unit="")
    yield _false_alarms(artifact, trials=40 if size == "full" else 4)


def _false_alarms(artifact: Artifact, trials: int) -> Row:
    """A/A again and again: how often the interval holds 1."""
    with kit_process(artifact, host.cpus()) as kit:
        arm = Arm("labkit", lambda: kit.decode(0), kit.pids)
        found = [same_against_itself(arm, 7, retries=0, seed=trial) for trial in range(trials)]
    share = sum(one.low <= 1 <= one.high for one in found) / trials
    goal = Goal("P12", ">= 95 % of the A/A intervals hold 1", 0.95, None)
    row = value_row(goal, f"{artifact.name}: {trials} A/A trials", [share], unit="of the trials")
    row.quiet = all(one.quiet for one in found)
    return row


def engines_beside(size: str, rounds: int) -> Iterator[Row]:
    """P1 for the other engines: ONNX Runtime GenAI's loop, OpenVINO GenAI's pipeline and mlx_lm's, on the folders labkit runs."""
    from .children import genai_arm, mlx_arm, openvino_arm

    source, threads = labkit.checkpoint(MODELS[size][0][0]), host.cpus()
    itself, trio = Once(rounds), (("onnxruntime", "int4", genai_arm), ("openvino", "int8_asym", openvino_arm), ("mlx", "q4", mlx_arm))
    for engine, precision, peer in trio:
        model = labkit.checkpoint("edgehome") if engine == "mlx" else source  # larger ones take minutes on its CPU path
        artifact = labkit.build(model, Recipe(engine, precision))
        with ExitStack() as stack:
            kit = stack.enter_context(kit_process(artifact, threads))
            theirs = peer(stack, artifact, threads, NEW)
            ours = Arm("labkit", lambda k=kit: k.decode(8), kit.pids)
            yield from itself(ours)
            goal = DECODE if artifact.weight_bytes >= LARGE else DECODE_SMALL
            yield ratio_row(goal, f"{artifact.name} beside {theirs.name}", interleaved([ours, theirs], rounds), "labkit", theirs.name)

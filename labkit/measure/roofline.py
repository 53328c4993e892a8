"""Roofline: how fast this machine could at best decode and prefill this artifact, and how much of that was reached.

To write one token, every weight is read once: the ceiling is memory bandwidth / bytes per token. To read a prompt,
each weight is used for every prompt token: the ceiling is arithmetic, 2 operations a weight and token. Where the two
meet (the ridge, operations a byte) tells which of them binds. Both rates are measured here, with numpy.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from labkit import host, stats
from labkit.measure import quiet
from labkit.measure.record import record
from labkit.types import Artifact, LabkitError, Measurement

LARGEST = 256 << 20  # bytes: beyond every cache, yet small enough for a small machine
CACHE_BYTES = {
    "f32": 4.0, "float32": 4.0, "f16": 2.0, "float16": 2.0, "bf16": 2.0, "bfloat16": 2.0, "u8": 1.0, "q8_0": 34 / 32,
    "q4_0": 18 / 32,
}  # fmt: skip
SIZES = (1 << 20, 8 << 20, 64 << 20, LARGEST)


def roofline(
    artifact: Artifact,
    speed: Measurement | None = None,
    *,
    context: int = 192,
    kv_bytes: float | None = None,
    threads: int | None = None,
    bandwidth: float | None = None,
    matrix_rate: float | None = None,
    runner: Any = None,
) -> Measurement:
    """Ceiling of decode in tokens/s for a context of so many tokens; with `speed`, also the share of it reached.

    Bandwidth (bytes/s) is measured at the working set's own size, since a model that fits the cache is not bound by
    main memory; `matrix_rate` is float32 operations/s. Give either to skip its measuring. `kv_bytes`: bytes of one
    number in the KV cache, by default what the timed runner said of it, else 2. With `speed`, its context (prompt
    and half the answer) replaces `context`.
    `details`: bytes_per_token, both rates, the ridge, the prefill ceiling, reached and prefill_reached, and `quiet`
    (a busy machine makes the roof too low, and the share reached too high).
    """
    if speed is not None:
        context = speed.workload["prompt_tokens"] + speed.workload["new_tokens"] // 2
    if kv_bytes is None:
        kv_bytes = cache_bytes(speed.workload["settings"] if speed else getattr(runner, "settings", {}))
    needed = bytes_per_token(artifact, context, kv_bytes)
    total = sum(needed.values())
    threads = threads or host.cpus()
    before = quiet.read_clocks()
    rate = bandwidth or read_bandwidth(int(min(max(total, SIZES[0]), LARGEST)), threads)
    flops = matrix_rate or multiply_rate()
    share = (
        quiet.shares(before, quiet.read_clocks()) if not (bandwidth and matrix_rate) else {"others": 0.0, "steal": 0.0}
    )
    ceiling, prompt = rate / total, speed.workload["prompt_tokens"] if speed else 128
    operations = 2 * matrix_weights(artifact.checkpoint)
    details = {
        "bytes_per_token": needed,
        "bandwidth_bytes_per_second": rate,
        "multiply_operations_per_second": flops,
        "ridge_operations_per_byte": flops / rate,
        "decode_operations_per_byte": operations / total,
        "prefill_ceiling_tokens_per_second": prompt / max(prompt * operations / flops, total / rate),
        **quiet.verdict([quiet.disturbed(share["others"], share["steal"], 0.0, 0.0)]),
    }
    if speed is not None:
        details["measured_tokens_per_second"] = stats.median(speed.values)
        details["reached"] = details["measured_tokens_per_second"] / ceiling
        rate_read = stats.median(speed.details["prefill_tokens_per_second"])
        details["prefill_reached"] = rate_read / details["prefill_ceiling_tokens_per_second"]
    workload = {"context": context, "kv_bytes": kv_bytes, "threads": threads, "prompt_tokens": prompt}
    settings = getattr(runner, "settings", None)
    return record(artifact, "roofline", "tokens/s", [ceiling], workload=workload, details=details, settings=settings)


def cache_bytes(settings: Mapping[str, Any]) -> float:
    """Bytes of one number in the KV cache, from a runner's settings; 2 where they do not tell."""
    return CACHE_BYTES.get(str(settings.get("kv_type", settings.get("kv_cache"))), 2.0)


def bytes_per_token(artifact: Artifact, context: int, kv_bytes: float = 2.0) -> dict[str, float]:
    """Bytes read to decode one token: weights, and the KV cache 2 · layers · KV heads · head size · context · kv_bytes.

    An untied embedding is not read whole but by one row; its stored size is taken from the artifact's average bits.
    """
    config = artifact.checkpoint.config
    unused = 0 if artifact.checkpoint.tied else config["vocab_size"] * config["hidden_size"] - config["hidden_size"]
    heads = config["num_attention_heads"]
    head = config.get("head_dim") or config["hidden_size"] // heads
    kv = 2 * config["num_hidden_layers"] * (config.get("num_key_value_heads") or heads) * head * context * kv_bytes
    return {"weights": artifact.weight_bytes * (1 - unused / artifact.weights), "kv_cache": float(kv)}


def matrix_weights(checkpoint: Any) -> int:
    """Weights that multiply every token: all matrices, the embedding only where it is also the output head."""
    if checkpoint.tied:
        return checkpoint.weights
    return checkpoint.weights - checkpoint.config["vocab_size"] * checkpoint.config["hidden_size"]


def read_bandwidth(size: int, threads: int = 1, seconds: float = 0.25) -> float:
    """Bytes/s read from a working set of `size` bytes shared among threads: the best of several passes.

    Each thread looks for the largest number in its own part, which touches every byte; numpy lets go of Python's
    lock meanwhile, and the answer is used, so that nothing can be optimised away.
    """
    if size < 4096 or threads < 1:
        raise LabkitError(
            f"A working set of {size} bytes and {threads} threads was given; expected 4096 and 1 at least."
        )
    data = np.linspace(0, 1, size // 4, dtype=np.float32)
    parts = np.array_split(data, threads)
    passes = max(1, (32 << 20) // size)  # so that a small set is not timed by its thread's start
    found = [0.0] * threads

    def read(i: int) -> None:
        for _ in range(passes):
            found[i] = max(found[i], float(parts[i].max()))

    best = _best(lambda: _together(read, threads), seconds)
    if max(found) != 1.0:
        raise LabkitError("The bandwidth loop read wrong numbers; this machine's memory or numpy is broken.")
    return data.nbytes * passes / best


def bandwidth_curve(sizes: Sequence[int] = SIZES, threads: Sequence[int] | None = None) -> list[dict[str, float]]:
    """Bytes/s for each working-set size and number of threads: the caches show as steps."""
    counts = threads or sorted({1, host.cpus()})
    return [{"bytes": s, "threads": t, "bytes_per_second": read_bandwidth(s, t)} for t in counts for s in sizes]


def multiply_rate(n: int = 768, seconds: float = 0.25) -> float:
    """Operations/s of a float32 matrix product, 2 n³ each, with numpy's own BLAS and threads: the best of several."""
    rng = np.random.default_rng(0)
    a, b = rng.random((2, n, n), dtype=np.float32)
    out = np.empty((n, n), np.float32)
    best = _best(lambda: np.matmul(a, b, out=out), seconds)
    if not np.isclose(out[0, 0], float(a[0].astype(np.float64) @ b[:, 0]), rtol=1e-4):
        raise LabkitError("The matrix product is wrong; numpy's BLAS is broken on this machine.")
    return 2 * n**3 / best


def _best(work: Callable[[], object], seconds: float, clock: Callable[[], float] = time.perf_counter) -> float:
    """Shortest time of `work`, repeated for about `seconds` and at least three times after one untimed call."""
    work()
    times: list[float] = []
    while len(times) < 3 or sum(times) < seconds:
        start = clock()
        work()
        times.append(clock() - start)
    return min(times)


def _together(work: Callable[[int], None], threads: int) -> None:
    others = [threading.Thread(target=work, args=(i,)) for i in range(1, threads)]
    for thread in others:
        thread.start()
    work(0)
    for thread in others:
        thread.join()


def summary(measurement: Measurement) -> stats.Estimate:
    """The ceiling, tokens/s; it is a bound, not a sample, and has no interval."""
    return stats.Estimate(*measurement.values * 3)

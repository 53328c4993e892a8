"""Claims that a pocket calculator settles: word problems, ratios of the case studies, what a speed implies for bandwidth."""

from __future__ import annotations

from functools import partial
from math import exp, log, pi

from labkit.claims import Found, computed
from labkit.claims.sizes import file_bytes

computed("C057")(lambda: Found(f"(240 / 3 + 20) km/h = {240 / 3 + 20:g} km/h; 240 km take {240 / (240 / 3 + 20):g} h", True))
computed("C058")(lambda: Found(f"5,000 x 1.06 ** 3 = {5000 * 1.06**3:.2f}", round(5000 * 1.06**3, 2) == 5955.08))
computed("C059")(lambda: Found(f"1.2 x 1.2 - 1 = {1.2 * 1.2 - 1:.0%}", round(1.2 * 1.2 - 1, 2) == 0.44))
computed("C060")(lambda: Found(f"150 + 120 = {150 + 120} miles", 150 + 120 == 270))
computed("C061")(lambda: Found(f"pi x 5 x 5 = {pi * 25:.2f}", round(pi * 25, 2) == 78.54))


def _bandwidth(speed: float, bits: float) -> Found:
    """Decoding reads every weight once a token, so a speed implies a rate of reading."""
    return Found(
        f"{speed:g} tokens/s of phi-4-mini at {bits:g} bits read {speed * file_bytes('phi-4-mini', bits) / 1e9:.0f} GB/s; no machine is named",
        None,
    )


for _id, _speed, _bits in (
    ("C046", 25, 16),
    ("C047", 20, 4.9),
    ("C048", 15, 16),
    ("C049", 8, 16),
    ("C050", 12, 4.9),
    ("C051", 15, 5),
):
    computed(_id)(partial(_bandwidth, _speed, _bits))


def _percent(said: str, value: float, stated: float) -> Found:
    return Found(f"{said} = {value:.1%}", abs(value - stated) < 0.005)


computed("C146")(partial(_percent, "(1,200 - 60) / 1,200", (1200 - 60) / 1200, 0.95))
computed("C147")(partial(_percent, "(3.2 - 0.48) / 3.2", (3.2 - 0.48) / 3.2, 0.85))
computed("C148")(partial(_percent, "87.0 / 94.5", 87.0 / 94.5, 0.92))


@computed("C136")
def distillation_outcome() -> Found:
    return Found(
        f"one case study: {1 - 0.48 / 3.2:.0%} less time, {1 - 60 / 1200:.0%} less memory, {87 / 94.5:.0%} of the accuracy, which more "
        f"than doubles the errors ({(1 - 0.87) / (1 - 0.945):.1f} x)",
        None,
    )


@computed("C149")
def throughput() -> Found:
    return Found(f"one after another, {3600 / 3.2:,.0f} an hour at 3.2 s and {3600 / 0.48:,.0f} at 0.48 s", False)


@computed("C150")
def users() -> Found:
    return Found(f"by Little's law the latencies allow {3.2 / 0.48:.1f} times the requests at equal concurrency", False)


@computed("C155")
def temperature() -> Found:
    def entropy(t: float) -> float:
        weights = [exp(x / t) for x in (2.0, 1.0, 0.0, -1.0)]
        shares = [w / sum(weights) for w in weights]
        return -sum(p * log(p) for p in shares)

    values = {t: entropy(t) for t in (0.7, 1.0, 2.0)}
    said = ", ".join(f"{value:.2f} nats at {t:g}" for t, value in values.items())
    return Found(f"entropy of softmax over logits 2, 1, 0, -1: {said}: 0.7 sharpens", values[0.7] > values[1.0])


@computed("C073")
def mlx_bound() -> Found:
    return Found(
        f"reading bounds the gain of 4 bits over 16 in decoding at 16 / 4.5 = {16 / 4.5:.1f} x; the speed itself needs Apple silicon",
        None,
    )

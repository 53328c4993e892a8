"""Claims tested by the precision ladder that was measured when the house model's card was written."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

from labkit.checkpoint import house_folder
from labkit.claims import Found, computed

SOURCE = "on the house model, when its card was written"


@cache
def rung(precision: str) -> dict[str, Any]:
    """A row of the ladder: bits_per_weight, perplexity, kl (nats), commands and catalogue (shares)."""
    ladder = json.loads((house_folder() / "figures.json").read_text(encoding="utf-8"))["ladder"]
    return next(row for row in ladder["gguf"] if row["precision"] == precision)


def _measured(text: str, holds: bool | None) -> Found:
    return Found(f"{text} ({SOURCE})", holds, "measured")


@computed("C032")
def order() -> Found:
    rows = [rung(name) for name in ("f16", "q8_0", "q4_k_m")]
    said = ", ".join(f"{row['precision']} {row['bits_per_weight']:.2f} bits, KL {row['kl']:.5f}" for row in rows)
    kls, bits = [row["kl"] for row in rows], [row["bits_per_weight"] for row in rows]
    return _measured(said, kls == sorted(kls) and bits == sorted(bits, reverse=True))


@computed("C097")
def accuracy_kept() -> Found:
    four, full = rung("q4_k_m"), rung("f16")
    kept = {name: four[name] / full[name] for name in ("commands", "catalogue")}
    return _measured(
        f"4 bits keep {kept['commands']:.1%} of the accuracy in commands, {kept['catalogue']:.1%} in memorised facts",
        all(share >= 0.95 for share in kept.values()),
    )


@computed("C101")
def small_losses() -> Found:
    four, eight = rung("q4_k_m"), rung("q8_0")
    return _measured(
        f"KL {four['kl']:.4f} nats at 4 bits, {eight['kl']:.5f} at 8; 16 bits are the reference", four["kl"] > eight["kl"]
    )


@computed("C173")
def four_bits_lose() -> Found:
    four, full = rung("q4_k_m"), rung("f16")
    lost = 100 * (full["commands"] - four["commands"])
    return _measured(f"4 bits change the commands by {-lost:+.1f} points", lost > 2)


@computed("C174")
def eight_bits_suffice() -> Found:
    eight, four = rung("q8_0"), rung("q4_k_m")
    return _measured(f"KL {eight['kl']:.5f} nats, {four['kl'] / eight['kl']:.0f} times below 4 bits", eight["kl"] < 0.001)


@computed("C177")
def mixture() -> Found:
    bits = rung("q4_k_m")["bits_per_weight"]
    return _measured(f"Q4_K_M is a mixture of {bits:.2f} bits per weight", abs(bits - 4) < 0.1)

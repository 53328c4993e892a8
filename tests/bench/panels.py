"""How quickly the panels answer: `python tests/bench/panels.py`, one JSON object on stdout. Run it on a quiet machine.

Matrix: 200 moves of the controls over 1 M weights, from the callback to the finished figure; the goal is 100 ms at the
95th percentile. Ladder: every rung of the house model in random order, reply included; the goal is 1.5 s. Sweep: the same
ladder from the ledger alone, everything measured before; the goal is 50 ms.
"""

from __future__ import annotations

import json
import random
import time

import numpy as np

import labkit
from labkit import host, panels
from labkit.measure.accuracy import answer

MOVES, RUNGS = 200, ("f16", "q8_0", "q4_k_m", "q2_k")
REQUEST = [{"role": "user", "content": "turn on the light in the kitchen"}]


def percentiles(seconds: list[float]) -> dict[str, float]:
    return {f"p{p}_ms": round(1e3 * float(np.percentile(seconds, p)), 1) for p in (50, 95, 100)}


def timed(control, value) -> float:
    start = time.perf_counter()
    control.value = value
    return time.perf_counter() - start


def matrix(draw: random.Random) -> dict[str, float]:
    weights = np.random.default_rng(0).normal(0, 0.02, (1024, 1024)).astype(np.float32)
    panel = panels.matrix(weights)
    moves = []
    while len(moves) < MOVES:
        control = draw.choice(panel.children[:4])
        values = [o[1] if isinstance(o, tuple) else o for o in control.options]  # (shown, value) where it is translated
        options = [value for value in values if value != control.value]
        moves.append(timed(control, draw.choice(options)))
    return percentiles(moves)


def ladder(draw: random.Random, reply: bool = True) -> dict[str, float]:
    checkpoint = labkit.checkpoint("edgehome")
    built = {name: labkit.build(checkpoint, labkit.Recipe("llamacpp", name)) for name in RUNGS}
    labkit.ledger().append(*(labkit.measure.perplexity(one, limit=1) for one in built.values()))
    frame = labkit.ledger().frame(checkpoint="edgehome", engine="llamacpp", metric="perplexity")

    def ask(name: str) -> str:
        with labkit.load(built[name]) as runner:
            return answer(checkpoint, runner, REQUEST, 96, frozenset(checkpoint.eos_ids))

    frame = frame[frame["precision"].isin(RUNGS)]
    panel = panels.ladder(frame, ask if reply else lambda name: "kept from before")
    slider, moves = panel.children[0], []
    for _ in range(20 if reply else MOVES):
        moves.append(timed(slider, draw.choice([o for o in RUNGS if o != slider.value])))
    return percentiles(moves)


def main() -> None:
    draw = random.Random(0)
    found = {"matrix, 1 M weights": matrix(draw), "ladder, with a reply": ladder(draw), "sweep": ladder(draw, reply=False), "noise": round(host.noise(), 3)}
    print(json.dumps(found | {"host": host.circumstances()}, default=str))


if __name__ == "__main__":
    main()

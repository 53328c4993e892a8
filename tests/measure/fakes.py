"""Runners without an engine, and a clock that only moves when told."""

from __future__ import annotations

import numpy as np

VOCAB = 300
CORPUS = [
    "the lamp in the kitchen is on",
    "a luz da cozinha está acesa",
    "naïve café 温度 20°C",
    "   spaces\n\n\ttabs 12345",
]


class FakeRunner:
    """Logits from a function of the token ids; generation counts upwards; a clock that moves by fixed steps."""

    def __init__(self, logits=None, clock=None, first=0.0, each=0.0, reply=None):
        self.settings = {"threads": 1}
        self.function, self.clock, self.first, self.each, self.reply = logits, clock, first, each, reply
        self.closed, self.prompts = 0, []

    def logits(self, tokens):
        return self.function(np.asarray(tokens)).astype(np.float32)

    def generate(self, tokens, max_new):
        self.prompts.append(tuple(tokens))
        for i in range(max_new):
            if self.clock:
                self.clock.now += self.first if i == 0 else self.each
            yield self.reply(tokens)[i] if self.reply else i

    def close(self):
        self.closed += 1


class FakeClock:
    now = 0.0

    def __call__(self):
        return self.now


def table_logits(seed=0, vocab=VOCAB, spread=3.0):
    """A bigram model: the next token's logits depend on the current one only."""
    table = np.random.default_rng(seed).normal(0, spread, (vocab, vocab)).astype(np.float32)
    return lambda ids: table[ids]

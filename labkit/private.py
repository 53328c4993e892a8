"""Telemetry that keeps what was said on the device: noise is added before anything leaves, and a budget says when to stop.

Randomized response (Warner, 1965) for yes or no, the Laplace mechanism (Dwork et al., 2006) for counts. Both are
epsilon-differentially private: whatever one device's truth is, no report is more than exp(epsilon) times likelier than
under another truth.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from labkit import stats
from labkit.types import LabkitError


def honest(epsilon: float) -> float:
    """How often a device tells the truth: p / (1 - p) = exp(epsilon)."""
    _check(epsilon)
    return 1 / (1 + math.exp(-epsilon))


def randomize(truth: Sequence[bool], epsilon: float, rng: np.random.Generator) -> np.ndarray:
    """What the devices report: each its truth with probability `honest(epsilon)`, else the opposite. bool (n,)"""
    bits = np.asarray(truth, dtype=bool)
    return np.where(rng.random(bits.shape) < honest(epsilon), bits, ~bits)


def share(reported: Sequence[bool], epsilon: float, z: float = 1.959963984540054) -> stats.Estimate:
    """The share of true answers behind randomized reports, unbiased, with its 95 % interval (ends not cut to 0 and 1).

    Reports say yes with probability q = s (2p - 1) + 1 - p, so s = (q - 1 + p) / (2p - 1).
    """
    bits = np.asarray(reported, dtype=float)
    if not bits.size:
        raise LabkitError("No reports were given; expected at least one.")
    p, q = honest(epsilon), bits.mean()
    value, error = (q - 1 + p) / (2 * p - 1), z * math.sqrt(q * (1 - q) / bits.size) / (2 * p - 1)
    return stats.Estimate(float(value), float(value - error), float(value + error))


def response_error(true_share: float, n: int, epsilon: float) -> float:
    """Standard error of `share` over `n` devices: that of n coins, divided by 2p - 1."""
    p = honest(epsilon)
    q = true_share * (2 * p - 1) + 1 - p
    return math.sqrt(q * (1 - q) / n) / (2 * p - 1)


def laplace(counts: Sequence[float], epsilon: float, rng: np.random.Generator, sensitivity: float = 1.0) -> np.ndarray:
    """Counts with Laplace noise of scale sensitivity / epsilon, which has a standard deviation of sqrt(2) times that.

    `sensitivity`: by how much one device can change all counts together. Somebody trusted adds the noise to the sum, where
    randomized response trusts nobody: that is why its error is smaller.
    """
    _check(epsilon)
    exact = np.asarray(counts, dtype=float)
    return exact + rng.laplace(0.0, sensitivity / epsilon, exact.shape)


class Budget:
    """Epsilon adds up: two reports of 0.5 about the same household reveal as much as one of 1. This counts and refuses."""

    def __init__(self, epsilon: float):
        _check(epsilon)
        self.epsilon, self.spent = epsilon, 0.0

    @property
    def left(self) -> float:
        return max(0.0, self.epsilon - self.spent)

    def spend(self, epsilon: float) -> float:
        """Take `epsilon` from what is left; gives it back as the value to use. LabkitError when it is more than that."""
        _check(epsilon)
        if epsilon > self.left + 1e-12:
            raise LabkitError(f"A report of epsilon {epsilon:g} was asked for; {self.left:g} of {self.epsilon:g} is left. Send nothing.")
        self.spent += epsilon
        return epsilon


def _check(epsilon: float) -> None:
    if not (epsilon > 0 and math.isfinite(epsilon)):
        raise LabkitError(f"epsilon={epsilon} was given; expected a number above 0: at 0 a report says nothing.")

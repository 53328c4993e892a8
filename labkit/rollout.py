"""A staged rollout on a simulated fleet: rings, a canary beside its control, devices of unlike kinds, automatic rollback.

What is simulated is the fleet (who is online, who asks, who complains). How often each build is wrong is not: those shares come
from measurements of the real builds, so a regression is found here only when the build really is worse.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from labkit.types import LabkitError

if TYPE_CHECKING:
    import pandas as pd

RINGS = (0.01, 0.05, 0.25, 1.0)  # shares of the fleet that may have the new release, ring by ring
GO_ON, WAIT, ROLL_BACK = "go on", "wait", "roll back"


@dataclass(frozen=True)
class Kind:
    """One kind of device: its share of the fleet, bytes it can give a model, how often it is online in an hour, its requests."""

    name: str
    share: float
    room: float
    online: float = 0.5
    requests: float = 1.0  # an hour and device, on average


@dataclass(frozen=True)
class Users:
    """How people show that an answer was wrong: they ask again or undo. Both are assumptions about people, to be measured."""

    after_wrong: float = 0.6
    after_right: float = 0.03

    def complaints(self, wrong: float) -> float:
        """Share of requests with a complaint when a share `wrong` of the answers is wrong."""
        return wrong * self.after_wrong + (1 - wrong) * self.after_right


class Judged(NamedTuple):
    """The new release's complaints minus the old one's, with the interval, and what to do."""

    difference: float
    low: float
    high: float
    decision: str


def fits(kinds: Sequence[Kind], needs: Mapping[str, float]) -> dict[str, str]:
    """Kind -> the build with the most bytes that it has room for; kinds with room for none are left out. `needs`: build -> bytes."""
    chosen = {one.name: max((n for n in needs if needs[n] <= one.room), key=needs.__getitem__, default=None) for one in kinds}
    return {kind: build for kind, build in chosen.items() if build}


def judge(bad_new: float, n_new: float, bad_old: float, n_old: float, margin: float, z: float = 3.0) -> Judged:
    """Roll back when the whole interval of the difference is above 0, go on when all of it is below `margin`, else wait.

    Shares are taken with one complaint and one plain request added (Agresti and Caffo, 2000), so that no complaints in few
    requests prove nothing. A test repeated every hour needs a z well above 1.96, or chance alone rolls good releases back.
    """
    p, q = (bad_new + 1) / (n_new + 2), (bad_old + 1) / (n_old + 2)
    error = z * math.sqrt(p * (1 - p) / (n_new + 2) + q * (1 - q) / (n_old + 2))
    low, high = p - q - error, p - q + error
    return Judged(p - q, low, high, ROLL_BACK if low > 0 else GO_ON if high < margin else WAIT)


@dataclass
class Outcome:
    """What a rollout came to. `verdict`: "released", "rolled back" or "still waiting"; `hours` it took; `because` names the kind."""

    verdict: str
    hours: int
    because: str
    exposed: int  # devices that had the new release at some time
    wrong: int  # wrong answers that people got from it
    history: list[dict[str, float | str]] = field(default_factory=list)

    def frame(self) -> pd.DataFrame:
        """One row an hour and kind: hour, ring, kind, devices with the new release, requests and complaints so far, decision."""
        import pandas as pd

        return pd.DataFrame(self.history)


def simulate(
    kinds: Sequence[Kind], devices: int, wrong_old: Mapping[str, float], wrong_new: Mapping[str, float], *,
    rings: Sequence[float] = RINGS, users: Users = Users(), margin: float = 0.03, z: float = 3.0, hours: int = 24 * 14,
    by_kind: bool = True, seed: int = 0,
) -> Outcome:  # fmt: skip
    """Roll a release out. `wrong_old`, `wrong_new`: kind -> measured share of wrong answers of the build that kind gets.

    Every hour online devices of the open ring fetch the release, everybody asks, complaints are counted, and each kind is
    judged against the devices of its kind that still have the old release (`by_kind=False`: all kinds in one pot). One kind
    that is worse rolls everything back; when all are fine the next ring opens. In the last ring, where no control is left,
    the old release's counts so far stand in for it. Kinds not in `wrong_new` get no release and are not asked.
    """
    _check(kinds, devices, rings)
    kinds = [one for one in kinds if one.name in wrong_new]
    rng = np.random.default_rng(seed)
    total = {one.name: round(one.share * devices) for one in kinds}
    have = dict.fromkeys(total, 0)
    seen = {name: np.zeros(4) for name in total}  # complaints and requests of the new, then of the old release
    history, wrong, ring = [], 0, 0
    for hour in range(1, hours + 1):
        for one in kinds:
            allowed = math.ceil(rings[ring] * total[one.name]) - have[one.name]
            have[one.name] += int(rng.binomial(allowed, one.online)) if allowed > 0 else 0
            wrong += _ask(rng, one, have[one.name], total[one.name], wrong_old, wrong_new, users, seen[one.name])
        found = _judged(seen, margin, z, by_kind)
        history += [
            {"hour": hour, "ring": ring + 1, "kind": name, "devices": have[name], "complaints": seen[name][0], "requests": seen[name][1],
             "old complaints": seen[name][2], "old requests": seen[name][3], **judged._asdict()}
            for name, judged in found.items()
        ]  # fmt: skip
        worse = [name for name, judged in found.items() if judged.decision == ROLL_BACK]
        if worse:
            return Outcome("rolled back", hour, ", ".join(worse) if by_kind else "the fleet as a whole", sum(have.values()), wrong, history)
        full = all(have[name] >= math.ceil(rings[ring] * total[name]) for name in total)
        if full and all(judged.decision == GO_ON for judged in found.values()):
            if ring == len(rings) - 1:
                return Outcome("released", hour, "", sum(have.values()), wrong, history)
            ring += 1
    return Outcome("still waiting", hours, "", sum(have.values()), wrong, history)


def _ask(
    rng: np.random.Generator, one: Kind, new: int, total: int, wrong_old: Mapping[str, float], wrong_new: Mapping[str, float],
    users: Users, seen: np.ndarray,
) -> int:  # fmt: skip
    """An hour of requests of one kind, counted into `seen`; gives the wrong answers of the new release."""
    wrong = 0
    for place, (count, share) in enumerate(((new, wrong_new[one.name]), (total - new, wrong_old[one.name]))):
        asked = int(rng.poisson(count * one.requests))
        bad = int(rng.binomial(asked, share))
        said = int(rng.binomial(bad, users.after_wrong) + rng.binomial(asked - bad, users.after_right))
        seen[2 * place : 2 * place + 2] += said, asked
        wrong += bad if place == 0 else 0
    return wrong


def _judged(seen: Mapping[str, np.ndarray], margin: float, z: float, by_kind: bool) -> dict[str, Judged]:
    if by_kind:
        return {name: judge(*counts, margin, z) for name, counts in seen.items()}
    return dict.fromkeys(seen, judge(*sum(seen.values()), margin, z))


def _check(kinds: Sequence[Kind], devices: int, rings: Sequence[float]) -> None:
    shares = sum(one.share for one in kinds)
    if abs(shares - 1) > 1e-6 or devices < 1:
        raise LabkitError(f"{devices} devices with shares that add up to {shares:g} were given; expected at least one and a sum of 1.")
    if list(rings) != sorted(set(rings)) or not rings or not 0 < rings[0] <= rings[-1] == 1:
        raise LabkitError(f"The rings {list(rings)} were given; expected rising shares of the fleet, the last of them 1.")


def repeat(runs: int, *given: object, **options: object) -> pd.DataFrame:
    """`simulate` with seeds 0 to runs - 1: verdict, hours, exposed devices and wrong answers, one row a run."""
    import pandas as pd

    found = [simulate(*given, **{**options, "seed": seed}) for seed in range(runs)]  # type: ignore[arg-type]
    return pd.DataFrame([{"verdict": o.verdict, "hours": o.hours, "exposed": o.exposed, "wrong": o.wrong, "because": o.because} for o in found])

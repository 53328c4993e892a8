"""The claims ledger: what the chapters state beside what can be measured, computed, or not be known here.

`labkit/data/claims.csv` lists every number the chapters state. A claim is tested by measurements in the ledger that
name it (`Measurement.claims`), by a calculation of this package (`computed`), or it waits for something that `needs`
names. Policies (a chosen threshold, a default) are listed and not judged.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from labkit.types import LabkitError, Measurement

if TYPE_CHECKING:
    import pandas as pd

FILE = Path(__file__).parents[1] / "data" / "claims.csv"
KINDS = ("measured", "computed", "needs", "policy")
SHOWN = 6  # measurements of one claim in its sentence


class Claim(NamedTuple):
    """One number of the chapters. `section`: such as M04-01. `status`: what the authors of this course judged when reading."""

    id: str
    section: str
    claim: str
    stated: str
    where: str
    status: str
    check: str


class Found(NamedTuple):
    """What a calculation found. `holds`: True, False, or None where the claim leaves open what it would have to equal."""

    text: str
    holds: bool | None
    kind: str = "computed"


@dataclass(frozen=True)
class Verdict:
    """`kind`: one of KINDS; `found`: the value with its interval, the calculation's result, or what is needed."""

    claim: Claim
    kind: str
    found: str
    holds: bool | None = None
    measurements: tuple[Measurement, ...] = ()


_computed: dict[str, Callable[[], Found]] = {}


def computed(*ids: str) -> Callable[[Callable[[], Found]], Callable[[], Found]]:
    """Register a calculation as the test of claims; it takes nothing and returns Found."""

    def register(function: Callable[[], Found]) -> Callable[[], Found]:
        for name in ids:
            if name in _computed:
                raise ValueError(f"{name} is computed twice")
            _computed[name] = function
        return function

    return register


@cache
def claims() -> dict[str, Claim]:
    """Id -> claim, in the order of the chapters."""
    with FILE.open(encoding="utf-8", newline="") as file:
        return {row["id"]: Claim(**row) for row in csv.DictReader(file)}


@cache
def calculations() -> dict[str, Callable[[], Found]]:
    """Id -> calculation, for every claim that has one."""
    from labkit.claims import arithmetic, formats, packages, recorded, sizes  # noqa: F401  (each registers its own)

    return dict(_computed)


def chosen(part: str | None = None) -> list[Claim]:
    """The claims whose id or section begins with `part` ("M04", "PHI-01", "C079"); all without one."""
    found = [c for c in claims().values() if part is None or c.section.startswith(part.upper()) or c.id == part.upper()]
    if not found:
        known = ", ".join(dict.fromkeys(c.section for c in claims().values()))
        raise LabkitError(f"No claim belongs to {part!r}; expected a claim (C001 to C{len(claims()):03}) or a section: {known}.")
    return found


def verdicts(measurements: Iterable[Measurement], part: str | None = None) -> list[Verdict]:
    """One verdict a claim. A measurement goes before a calculation, a calculation before a need."""
    by_claim: dict[str, list[Measurement]] = {}
    for measurement in measurements:
        for name in measurement.claims:
            by_claim.setdefault(name, []).append(measurement)
    return [_verdict(claim, tuple(by_claim.get(claim.id, ()))) for claim in chosen(part)]


def _verdict(claim: Claim, measured: tuple[Measurement, ...]) -> Verdict:
    if measured:
        from labkit.claims.judged import JUDGES, newest

        last = newest(measured)
        said, holds = list(map(_said, list(last.values())[:SHOWN])), JUDGES[claim.id](last) if claim.id in JUDGES else None
        known = calculations()[claim.id]() if holds is None and claim.id in calculations() else None
        if known and known.kind == "measured":  # recorded with more tasks than these, which do not suffice
            said, holds = [known.text, *said], known.holds
        model = measured[-1].artifact.get("checkpoint")
        return Verdict(claim, "measured", "; ".join(said) + (f" (on {model})" if model else ""), holds, measured)
    if claim.id in calculations():
        found = calculations()[claim.id]()
        return Verdict(claim, found.kind, found.text, found.holds)
    if claim.status == "policy":
        return Verdict(claim, "policy", "a choice, not a finding")
    from labkit.claims.needs import NEEDS

    return Verdict(claim, "needs", NEEDS[claim.id])


def _said(measurement: Measurement) -> str:
    import labkit

    estimate = labkit.measure.summary(measurement)
    artifact = measurement.artifact
    value = f"{measurement.metric} {estimate.value:.4g} {measurement.unit}".rstrip()
    interval = f" ({estimate.low:.4g} to {estimate.high:.4g})" if estimate.low != estimate.high else ""
    bits = artifact.get("bits_per_weight") if measurement.metric == "size" else None
    width = f", {bits:.3f} bits per weight, {bits / 16:.1%} of 16 bits" if bits else ""
    return f"{artifact.get('engine')} {artifact.get('precision')}: {value}{interval}{width}"


def sources() -> dict[str, str]:
    """Lab -> all its code."""
    import nbformat

    from labkit.course.labs import labs

    cells = {lab.id: nbformat.read(lab.path, 4).cells for lab in labs()}
    return {name: "\n".join(cell.source for cell in found if cell.cell_type == "code") for name, found in cells.items()}


def promised(sources: Iterable[str]) -> list[str]:
    """Ids that the code of labs attaches to measurements, as in `replace(m, claims=("C079",))`.

    What only some machines or profiles can measure is attached through a variable, `claims=tested`, and promises nothing.
    """
    groups = [group for text in sources for group in re.findall(r"claims=\(([^)]*)\)", text)]
    return sorted({name for group in groups for name in re.findall(r"C\d{3}", group)})


def missing(wanted: Iterable[str], measurements: Iterable[Measurement]) -> list[str]:
    """Those of the wanted claims that no measurement names: what a lab promised to measure and did not."""
    return sorted(set(wanted) - {name for measurement in measurements for name in measurement.claims})


def frame(found: Iterable[Verdict]) -> pd.DataFrame:
    """The verdicts as a table: claim, section, stated, kind, found, holds."""
    import pandas as pd

    return pd.DataFrame([row(verdict) for verdict in found])


def row(verdict: Verdict) -> dict[str, Any]:
    """One verdict as flat values."""
    claim = verdict.claim
    judged = {True: "holds", False: "does not hold", None: ""}[verdict.holds]
    return {
        "id": claim.id, "section": claim.section, "claim": claim.claim, "stated": claim.stated, "kind": verdict.kind,
        "found": verdict.found, "judged": judged,
    }  # fmt: skip

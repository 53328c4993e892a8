"""`labkit claims`: the chapters' numbers with their verdicts, and whether the labs measured what they promise."""

from __future__ import annotations

import argparse
from collections import Counter

from labkit import claims
from labkit._say import columns, emit
from labkit.ledger import ledger
from labkit.types import LabkitError

WIDE = 60  # characters of a verdict in the table; --json has all of it


def options(one: argparse.ArgumentParser) -> None:
    """Add the options of `labkit claims`."""
    one.add_argument("part", nargs="?", help="a chapter, section or claim: M04, PHI-01, C079 (default: all)")
    one.add_argument("--promised", action="store_true", help="fail when a lab promises a measurement the ledger does not have")
    one.add_argument("--json", action="store_true")


def command(chosen: argparse.Namespace) -> int:
    """List the claims of the chapters with what was measured or computed here."""
    measured = list(ledger())
    if chosen.promised:
        return _promised(measured)
    rows = [claims.row(verdict) for verdict in claims.verdicts(measured, chosen.part)]
    kinds = Counter(row["kind"] for row in rows)
    settled = kinds["measured"] + kinds["computed"]
    end = f"{len(rows)} claims: {settled} measured or computed, {kinds['needs']} need something, {kinds['policy']} are choices."
    shown = [
        {name: _short(str(row[name])) for name in ("id", "section", "claim", "stated", "kind", "judged", "found")} for row in rows
    ]
    emit(chosen, {"claims": rows, "kinds": dict(kinds)}, f"{columns(shown)}\n{end}")
    return 0


def _promised(measured: list) -> int:
    broken = {lab: claims.missing(claims.promised([text]), measured) for lab, text in claims.sources().items()}
    said = "; ".join(f"{lab}: {', '.join(names)}" for lab, names in broken.items() if names)
    if said:
        raise LabkitError(f"Promised by a lab and not in the ledger: {said}; run these labs, then look at their reports.")
    print("Every claim that a lab promises to measure is in the ledger.")
    return 0


def _short(text: str) -> str:
    return text if len(text) <= WIDE else text[: WIDE - 1] + "…"

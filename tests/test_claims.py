"""The claims ledger: every claim has a verdict, calculations agree with the reading, measurements go first."""

from __future__ import annotations

import json

import pytest

from labkit import LabkitError, claims
from labkit.cli import main
from labkit.types import Measurement


def measurement(*ids: str) -> Measurement:
    return Measurement(
        metric="size", unit="bytes", values=(1000.0,), artifact={"engine": "llamacpp", "precision": "q8_0"}, workload={},
        engine_version="1", host={}, when="2026-01-01T00:00:00", claims=ids,
    )  # fmt: skip


def test_every_claim_has_one_verdict():
    found = claims.verdicts([])
    assert [verdict.claim.id for verdict in found] == [f"C{n:03}" for n in range(1, 186)]
    for verdict in found:
        assert verdict.kind in claims.KINDS and verdict.found.strip(), verdict
        if verdict.claim.status == "policy":
            assert verdict.kind == "policy"
    settled = [verdict for verdict in found if verdict.kind in ("measured", "computed")]
    assert len(settled) >= 110


def test_nothing_is_needed_that_is_known():
    from labkit.claims.needs import NEEDS

    assert not set(NEEDS) & set(claims.calculations())
    assert set(NEEDS) | set(claims.calculations()) == {c.id for c in claims.claims().values() if c.status != "policy"}


def test_calculations_agree_with_the_reading():
    """A claim read as right does not fail, one read as wrong does not hold. Where a package has moved on, both may be so."""
    for name, calculate in claims.calculations().items():
        found, status = calculate(), claims.claims()[name].status
        assert not (status == "ok" and found.holds is False), (name, found)
        assert not (status == "wrong" and found.holds is True), (name, found)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("C009", "3.836 billion"), ("C012", "6 bits"), ("C023", "71.9%"), ("C039", "16 GiB"), ("C080", "62.5%"), ("C110", "4.08 GB"),
        ("C120", "89 M weights"), ("C131", "0.023529"), ("C148", "92.1%"), ("C167", "0.1562"), ("C181", "5.69 bits"),
    ],
)  # fmt: skip
def test_some_calculations_by_value(name, said):
    """The right-hand sides were worked out by hand from the formats' definitions and the published shapes."""
    assert said in claims.calculations()[name]().text


def test_a_measurement_goes_before_a_calculation():
    (verdict,) = claims.verdicts([measurement("C013")], "C013")
    assert verdict.kind == "measured" and verdict.found == "llamacpp q8_0: size 1000 bytes" and verdict.measurements


def test_parts():
    assert {c.section for c in claims.chosen("M04")} == {f"M04-0{n}" for n in range(8)}
    assert [c.id for c in claims.chosen("c079")] == ["C079"]
    with pytest.raises(LabkitError, match=r"'M09'.*M03-00"):
        claims.chosen("M09")


def test_promises_are_read_from_code_and_held_against_the_ledger():
    assert claims.promised(['m = replace(m, claims=("C079", "C081"))', "claims=()"]) == ["C079", "C081"]
    assert claims.missing(["C079", "C081"], [measurement("C081")]) == ["C079"]


def test_the_command(home, capsys):
    assert main(["claims", "PHI-01"]) == 0
    text = capsys.readouterr().out
    assert "C177" in text and "does not hold" in text and "measured or computed" in text
    assert main(["claims", "M03-01", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["claims"]
    assert {row["section"] for row in rows} == {"M03-01"} and rows[0]["id"] == "C004"
    assert main(["claims", "M09"]) == 2


def test_a_broken_promise_is_an_exit_status(home, capsys, monkeypatch):
    monkeypatch.setattr(claims, "sources", lambda: {"module04/99": 'replace(m, claims=("C079",))'})
    assert main(["claims", "--promised"]) == 2
    assert "module04/99" in capsys.readouterr().err

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


def taken(metric, precision, number, *ids, engine="llamacpp", checkpoint="edgehome", weights=2e8, **details):
    values = (number,) if metric == "size" else tuple(number)
    about = {"engine": engine, "precision": precision, "checkpoint": checkpoint, "bits_per_weight": 8.5, "weight_bytes": weights * 8.5 / 8}
    return Measurement(
        metric=metric, unit="", values=values, artifact=about,
        workload={}, engine_version="1", host={}, when="2026-01-01T00:00:00", details=details, claims=ids,
    )  # fmt: skip


@pytest.mark.parametrize(("saved", "holds"), [(0.469, False), (0.495, True), (0.53, False)])
def test_a_measured_size_is_judged_against_the_stated_share(saved, holds):
    (verdict,) = claims.verdicts([taken("size", "q8_0", 1000.0, "C081", reduction_against_16_bits=saved)], "C081")
    assert verdict.kind == "measured" and verdict.holds is holds
    assert "8.500 bits per weight, 53.1% of 16 bits (on edgehome)" in verdict.found


def test_an_order_needs_all_three_and_the_newest_of_each():
    sizes = [taken("size", name, number, "C032") for name, number in (("f16", 900.0), ("q8_0", 500.0), ("q4_k_m", 300.0))]
    (too_few,) = claims.verdicts(sizes[:2], "C032")
    assert too_few.holds is True and "when its card was written" in too_few.found, "the record fills in"
    assert claims.verdicts(sizes, "C032")[0].holds is True
    again = [*sizes, taken("size", "q4_k_m", 700.0, "C032")]
    assert claims.verdicts(again, "C032")[0].holds is False
    other = [*sizes, taken("size", "q4_k_m", 700.0, "C032", checkpoint="another")]
    assert "when its card was written" in claims.verdicts(other, "C032")[0].found, "sizes of two models are not compared"


@pytest.mark.parametrize(("four", "holds"), [(19.0, False), (25.0, True), (31.0, False)])
def test_a_measured_speed_up_is_judged_by_its_ratio(four, holds):
    both = [taken("speed", "f16", [10.0] * 3, "C065"), taken("speed", "q4_k_m", [four] * 3, "C065")]
    assert claims.verdicts(both, "C065")[0].holds is holds
    assert claims.verdicts(both[:1], "C065")[0].holds is None
    small = [taken("speed", name, [pace] * 3, "C065", weights=5e6) for name, pace in (("f16", 10.0), ("q4_k_m", four))]
    assert claims.verdicts(small, "C065")[0].holds is None, "a model of five million weights says nothing of billions"


@pytest.mark.parametrize(
    ("tasks", "wrong", "kept", "lost"),
    [(1000, 0, True, False), (1000, 100, False, True), (30, 0, True, False)],  # 30 tasks decide nothing: the record does
)
def test_accuracy_is_judged_by_the_interval_of_the_loss(tasks, wrong, kept, lost):
    full = taken("accuracy", "f16", [1.0] * tasks, "C097", "C173")
    four = taken("accuracy", "q4_k_m", [0.0] * wrong + [1.0] * (tasks - wrong), "C097", "C173")
    said = [claims.verdicts([full, four], name)[0] for name in ("C097", "C173")]
    assert [one.holds for one in said] == [kept, lost]
    assert [("when its card was written" in one.found) for one in said] == [tasks == 30] * 2


def test_judges_are_of_claims_that_are_not_choices():
    from labkit.claims.judged import JUDGES

    assert all(claims.claims()[name].status != "policy" for name in JUDGES)


def test_labs_promise_only_claims_there_are():
    named = {name for text in claims.sources().values() for name in claims.promised([text])}
    assert named and named <= set(claims.claims())

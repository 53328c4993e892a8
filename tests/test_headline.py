"""The headline table: every engine against its own widest precision, and the chapters' ranges judged by intervals."""

from __future__ import annotations

import json

import pytest

from labkit import LabkitError, Recipe, headline, ledger, measure
from labkit.checkpoint import checkpoint
from labkit.cli import main
from labkit.stats import Estimate
from labkit.types import Artifact, Measurement

BITS = {"f16": 16, "q8_0": 8.5, "q4_k_m": 4.9}
SPEEDS = {"f16": (100.0, 110.0, 105.0), "q8_0": (150.0, 165.0, 158.0), "q4_k_m": (250.0, 275.0, 262.0)}


def measured(artifact, metric, unit, values, **details) -> Measurement:
    about = {"checkpoint": artifact.checkpoint.name, "revision": "", **artifact.recipe.to_json(), "weight_bytes": artifact.weight_bytes,
             "bits_per_weight": artifact.bits_per_weight}  # fmt: skip
    return Measurement(
        metric=metric, unit=unit, values=tuple(values), artifact=about, workload={"prompt_tokens": 8, "new_tokens": 8},
        engine_version="1", host={}, when="2026-01-01T00:00:00", details=details,
    )  # fmt: skip


@pytest.fixture
def fakes(monkeypatch, tmp_path, tiny_llama):
    """Artifacts and measurements without an engine: 100 million weights are claimed so that the chapters are spoken of."""

    def build(source, recipe):
        if recipe.engine == "mlx":
            raise LabkitError("mlx is not here.")
        size = int(source.weights * BITS[recipe.precision] / 8)
        return Artifact(
            path=tmp_path / str(recipe), recipe=recipe, checkpoint=source, weight_bytes=size, weights=source.weights,
            bits_per_weight=BITS[recipe.precision], seconds=1.0,
            engine_version="1",
        )  # fmt: skip

    def compare(artifacts, **_):
        return [
            measured(a, "speed", "tokens/s", SPEEDS[a.recipe.precision], prefill_tokens_per_second=[1.0, 1.0, 1.0], quiet=True)
            for a in artifacts
        ]

    monkeypatch.setattr(headline, "build", build)
    monkeypatch.setattr(headline, "speaks_of_speed", lambda name: True)
    monkeypatch.setattr(headline, "SMALL", 1e6)
    monkeypatch.setattr(measure, "compare", compare)
    monkeypatch.setattr(measure, "memory", lambda a: measured(a, "memory", "bytes", [5e6]))
    monkeypatch.setattr(measure, "size", lambda a: measured(a, "size", "bytes", [a.weight_bytes]))
    monkeypatch.setattr(measure, "roofline", lambda a, s: measured(a, "roofline", "tokens/s", [1000.0], reached=0.25))
    return checkpoint(tiny_llama)


def test_speed_ups_are_paired_and_over_the_engines_own_baseline(fakes, home):
    rows, absent = headline.headline(fakes, ["llamacpp", "mlx"])
    assert [timed.artifact.recipe for timed in rows] == [Recipe("llamacpp", name) for name in BITS]
    assert rows[0].speedup == Estimate(1, 1, 1) and rows[2].speedup.value == pytest.approx(2.5, rel=0.01)
    assert rows[2].saved == pytest.approx(1 - 4.9 / 16, abs=1e-4) and absent == {"mlx": "mlx is not here."}
    kept = list(ledger())
    assert len(kept) == 12
    assert [(m.metric, m.artifact["precision"], m.claims) for m in kept if m.claims] == [
        ("speed", "f16", ("C065",)), ("speed", "q4_k_m", ("C065",))]  # fmt: skip


def test_what_the_chapters_say_is_judged_by_the_interval(fakes, home):
    timed = headline.headline(fakes, ["llamacpp"])[0][2]
    stated = headline.Stated((), "speed-up", 2, 3)
    said = [
        headline.verdict(stated, replace_speedup(timed, *ends)) for ends in ((2.1, 2.9), (1.0, 1.9), (3.1, 3.5), (1.9, 2.1))
    ]
    assert said == ["as stated", "less than stated", "more than stated", "undecided"]
    assert headline.verdict(headline.Stated((), "saved", 0.6, 0.75), timed) == "as stated"
    assert headline.row(timed)["the chapters say"] == "2 to 3 x: as stated"


def replace_speedup(timed, low, high):
    return timed._replace(speedup=Estimate((low + high) / 2, low, high))


def test_an_engine_away_from_its_hardware_is_not_timed(fakes, home, monkeypatch):
    monkeypatch.setattr(headline, "speaks_of_speed", lambda name: name != "llamacpp")
    rows, absent = headline.headline(fakes, ["llamacpp"])
    assert not rows and "would say nothing" in absent["llamacpp"] and not len(ledger())


def test_a_small_model_says_nothing_of_the_claims(fakes, home, monkeypatch):
    monkeypatch.setattr(headline, "SMALL", 1e9)
    rows, _ = headline.headline(fakes, ["llamacpp"])
    assert not any(timed.speed.claims for timed in rows)


def test_the_command(fakes, home, capsys):
    assert main(["headline", "--model", str(fakes.path), "--engine", "llamacpp", "--json"]) == 0
    table = json.loads(capsys.readouterr().out)
    assert [row["precision"] for row in table["rows"]] == list(BITS) and table["rows"][1]["of the roof"] == "25%"
    assert main(["headline", "--model", str(fakes.path), "--engine", "mlx"]) == 1
    assert "mlx is not here" in capsys.readouterr().out
    assert main(["headline", "--engine", "abacus"]) == 2


def test_olive_is_compared_with_onnx_runtimes_sixteen_bits(fakes, home, monkeypatch):
    monkeypatch.setitem(BITS, "fp16", 16)
    monkeypatch.setitem(BITS, "int8", 8.5)
    monkeypatch.setitem(BITS, "int4", 4.5)
    for name, like in (("fp16", "f16"), ("int8", "q8_0"), ("int4", "q4_k_m")):
        monkeypatch.setitem(SPEEDS, name, SPEEDS[like])
    rows, _ = headline.headline(fakes, ["olive"])
    assert [str(timed.artifact.recipe) for timed in rows] == ["olive-int8", "olive-int4"]
    assert rows[1].speedup.value == pytest.approx(2.5, rel=0.01) and rows[1].saved == pytest.approx(1 - 4.5 / 16, abs=1e-4)
    others = [m for m in ledger() if m.artifact["engine"] != "olive"]
    assert [(m.metric, m.claims) for m in others] == [("speed", ("C067", "C095"))], "the other side of the ratio"


def test_the_table_goes_between_its_marks(fakes, home, tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("# Before\n<!-- headline -->\nold\n<!-- /headline -->\nafter\n", encoding="utf-8")
    given = ["headline", "--model", str(fakes.path), "--engine", "llamacpp", "--into"]
    assert main([*given, str(page)]) == 0
    text = page.read_text(encoding="utf-8")
    assert text.startswith("# Before\n") and text.endswith("<!-- /headline -->\nafter\n") and "old" not in text
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(BITS) and len({line.count("|") for line in table}) == 1
    assert main([*given, str(page)]) == 0 and page.read_text(encoding="utf-8").count("| llama.cpp |") == len(BITS)


def test_a_page_without_marks_is_refused_before_anything_is_measured(fakes, home, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(headline, "headline", lambda *_: pytest.fail("measured first"))
    page = tmp_path / "page.md"
    page.write_text("nothing", encoding="utf-8")
    for path in (page, tmp_path / "absent.md"):
        assert main(["headline", "--into", str(path)]) == 2
        assert "<!-- /headline -->" in capsys.readouterr().err
    assert page.read_text(encoding="utf-8") == "nothing"

"""The harness of the benchmarks on made-up workloads, and what it reads from the peers' output. No peer is run."""

from __future__ import annotations

import json

import numpy as np
import pytest
from bench import convert, course, harness, quality, scale, speed
from bench.__main__ import run, shown
from bench.harness import Arm, Goal, Row, interleaved, judged, ratio_row, same_against_itself, table, value_row

from labkit import stats
from labkit.types import LabkitError


@pytest.fixture(autouse=True)
def calm(monkeypatch):
    """A machine that nobody else uses and whose clock is steady, whatever runs beside these tests."""
    monkeypatch.setattr(harness.quiet, "calibrate", lambda: 1.0)
    monkeypatch.setattr(harness.quiet, "shares", lambda before, after: {"others": 0.0, "steal": 0.0})


def made(name: str, centre: float, order: list[str], spread: float = 0.0, seed: int = 0) -> Arm:
    rng = np.random.default_rng(seed)

    def sample() -> float:
        order.append(name)
        return centre * float(np.exp(rng.normal(0, spread)))

    return Arm(name, sample)


def test_a_round_is_an_order_and_its_reverse_after_one_untimed_sample_each():
    order: list[str] = []
    taken = interleaved([made("a", 2.0, order), made("b", 1.0, order)], 5, retries=0)
    assert order[:2] == ["a", "b"]
    rounds = [order[i : i + 4] for i in range(2, len(order), 4)]
    assert len(rounds) == 5 and all(one == one[::-1] and sorted(one) == ["a", "a", "b", "b"] for one in rounds)
    assert len({tuple(one) for one in rounds}) == 2, "both orders occur"
    assert taken.values == {"a": pytest.approx([2.0] * 5), "b": pytest.approx([1.0] * 5)}


def test_a_slow_moment_in_the_middle_of_a_round_hits_both_sides_alike():
    pace = iter([1, 1, *[1, 2, 4, 8] * 4])  # the machine halves its pace at every sample
    arms = [Arm(name, lambda: 100.0 / next(pace)) for name in ("a", "b")]
    taken = interleaved(arms, 4, retries=0)
    assert stats.ratio(taken.values["a"], taken.values["b"]).value == pytest.approx(1.0)


def test_disturbed_rounds_are_taken_again_and_left_out(monkeypatch):
    shares = iter([0.5, 0.0, 0.4, 0.0, 0.0])
    monkeypatch.setattr(harness.quiet, "shares", lambda before, after: {"others": next(shares), "steal": 0.0})
    taken = interleaved([made("a", 1.0, [])], 3, retries=3)
    assert taken.reasons == [None] * 3 and taken.discarded == 2 and taken.state["quiet"]


def test_a_machine_that_stays_busy_is_told(monkeypatch):
    monkeypatch.setattr(harness.quiet, "shares", lambda before, after: {"others": 0.3, "steal": 0.0})
    taken = interleaved([made("a", 1.0, []), made("b", 1.0, [])], 2, retries=1)
    row = ratio_row(Goal("G", "any"), "x", taken, "a", "b")
    assert not row.quiet and "30%" in row.reason and "busy machine" in table([row])


def test_a_ratio_finds_the_difference_that_was_put_in():
    order: list[str] = []
    taken = interleaved([made("ours", 1.25, order, 0.01, 1), made("theirs", 1.0, order, 0.01, 2)], 15, retries=0)
    row = ratio_row(Goal("G", ">= 1.2", 1.2, None), "x", taken, "ours", "theirs")
    assert row.value == pytest.approx(1.25, rel=0.02) and row.low <= 1.25 <= row.high and row.met and row.sure
    cost = ratio_row(Goal("G", "<= 1.05", 1 / 1.05, None), "x", taken, "ours", "theirs", lower_is_better=True)
    assert cost.value == pytest.approx(0.8, rel=0.02) and not cost.met, "more seconds are worse"


def test_the_same_against_itself_is_one_and_a_drift_is_not_hidden():
    calm = same_against_itself(made("a", 3.0, [], 0.005), 15, retries=0)
    assert calm.met and calm.value == pytest.approx(1.0, abs=0.01)
    row = judged(Goal("P9", "no target at this size"), "x", stats.Estimate(1.1, 1.05, 1.2), 7)
    assert row.met is None and "shown only" in table([row])


@pytest.mark.parametrize(
    ("found", "met", "sure"),
    [((1.0, 0.98, 1.02), True, True), ((1.0, 0.9, 1.02), True, False), ((0.9, 0.85, 0.95), False, True), ((0.96, 0.9, 0.99), False, False)],
)
def test_a_verdict_says_whether_the_whole_interval_agrees(found, met, sure):
    row = judged(Goal("P1", "0.97 to 1.03", 0.97, 1.03), "x", stats.Estimate(*found), 7)
    assert (row.met, row.sure) == (met, sure)
    assert ("interval crosses" in table([row])) is not sure and ("**not met**" in table([row])) is not met


def test_a_group_without_its_peer_is_a_sentence_and_one_that_breaks_costs_only_itself():
    def absent(size, rounds):
        """No peer."""
        yield value_row(Goal("G", "t", 0.5), "first", [1.0])
        raise LabkitError("build the peers once")

    def broken(size, rounds):
        """Breaks."""
        raise ZeroDivisionError("oh")
        yield

    one, other = run("G", absent, "small", 1), run("H", broken, "small", 1)
    assert one["skipped"] == "build the peers once" and len(one["rows"]) == 1 and not one["failed"]
    assert other["failed"] == "ZeroDivisionError: oh" and not other["rows"]
    result = {"when": "2026-01-02T03:04:05", "size": "small", "noise": 0.01, "host": {"cpu": "C", "cpus_usable": 2}, "groups": {"G": one, "H": other}}
    later = result | {"when": "2026-01-03T00:00:00", "groups": {"H": other | {"failed": "", "skipped": "no peer"}}}
    page = shown(json.loads(json.dumps([later, result])))
    assert page.startswith("2026-01-02 to 2026-01-03, C, 2 cores: 1 of 1 verdicts met.") and "| first |" in page
    assert "G: not all of it. build the peers once" in page and "H: not run. no peer" in page, "the newest run of each group"


def test_rows_survive_json():
    row = value_row(Goal("P8", "<= 2", None, 2.0), "x", [1.0, 3.0, 2.0], unit="MiB")
    assert Row(**json.loads(json.dumps(row.to_json()))) == row


# --- what the peers print --------------------------------------------------------------------------------------------


def test_figures_of_the_peer_are_read_from_its_lines():
    text = "Mean    KLD:   0.003720 ±   0.001\n99.9%   KLD:   0.773622\nMean    Δp: -0.123 ± 0.100 %\nRMS Δp    :  1.234 ± 0.100 %\nSame top p: 98.039 ± 0.6 %\n"
    found = quality.parsed(text)
    assert found == {"Mean KLD": "0.003720", "99.9% KLD": "0.773622", "Mean Δp": "-0.123", "RMS Δp": "1.234", "Same top p": "98.039"}


@pytest.mark.parametrize(("value", "printed", "same"), [(0.00372049, "0.003720", True), (0.7736252, "0.773622", True), (0.00374, "0.003720", False)])
def test_printed_digits_agree_or_do_not(value, printed, same):
    assert quality.agrees(value, printed) is same


def test_the_array_is_found_among_what_llama_bench_prints():
    assert json.loads(speed._json_part('ggml: loaded [cpu]\n[\n  {"samples_ns": [1]}\n]\n')) == [{"samples_ns": [1]}]


def test_tensors_that_differ_are_named(tmp_path, tiny_llama):
    pytest.importorskip("gguf")
    from gguf import GGUFWriter

    for name, shift in (("a", 0), ("b", 1)):
        writer = GGUFWriter(tmp_path / f"{name}.gguf", "llama")
        writer.add_tensor("same", np.arange(32, dtype=np.float32))
        writer.add_tensor("other", np.arange(32, dtype=np.float32) + shift)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    row = convert.identical("x", tmp_path / "a.gguf", tmp_path / "b.gguf")
    assert row.value == 0.5 and not row.met and "unlike: other" in row.what


def test_a_program_is_weighed():
    import sys

    if sys.platform != "linux":
        pytest.skip("private memory is read from /proc")
    pytest.importorskip("llama_cpp")
    found = convert.cost([sys.executable, "-c", "x = bytearray(60_000_000); x[::4096] = b'1' * len(x[::4096]); import time; time.sleep(0.4)"], memory=True)
    assert 55e6 < found.anon < 120e6 and found.peak >= found.anon * 0.9 and found.seconds > 0.4
    with pytest.raises(LabkitError, match="ended with status 3"):
        convert.cost([sys.executable, "-c", "raise SystemExit(3)"])


def test_where_a_labs_time_goes(tmp_path):
    cell = {"cell_type": "code", "id": "slow", "source": ["work()\n", "more()"], "metadata": {"papermill": {"duration": 7.5}}}
    quick = {"cell_type": "code", "id": "quick", "source": "x", "metadata": {"papermill": {"duration": 0.5}}}
    (tmp_path / "a.ipynb").write_text(json.dumps({"cells": [quick, cell, {"cell_type": "markdown", "source": "", "metadata": {}}]}))
    (tmp_path / "results.json").write_text(json.dumps({"labs": [{"lab": "00", "seconds": 10.0, "peak_bytes": 5_000_000, "executed": "a.ipynb"}]}))
    told = course.where_time_goes(tmp_path).splitlines()
    assert told[0] == "00: 10.0 s, 8.0 s of it in cells; peak 5 MB"
    assert told[2].split() == ["7.50", "75%", "slow", "work()"] and told[-1] == "together 10 s"
    with pytest.raises(LabkitError, match=r"results\.json"):
        course.where_time_goes(tmp_path / "nothing")


def test_growth_is_the_exponent_of_the_size_and_is_drawn(tmp_path):
    sizes = [1e8, 5e8, 4e9]
    assert scale.exponent(sizes, [3e-9 * n for n in sizes]) == pytest.approx(1.0)
    assert scale.exponent(sizes, [7.0] * 3) == pytest.approx(0.0)
    assert scale.LINEAR.holds(scale.exponent(sizes, [2.0 + 3e-9 * n for n in sizes]))
    assert not scale.LINEAR.holds(scale.exponent(sizes, [n**1.5 for n in sizes]))
    taken = {f"model {n}": {name: n * (i + 1) for i, name in enumerate(scale.COSTS)} for n in sizes}
    scale.draw(sizes, taken, tmp_path / "reports" / "scale.html")
    page = (tmp_path / "reports" / "scale.html").read_text(encoding="utf-8")
    assert all(f"{name}, " in page for name in scale.COSTS) and "size^1.00" in page


def test_what_a_token_costs_beside_its_bytes():
    row = speed._beside_the_bytes("x", (100e6, 0.003 + 0.010), (1e9, 0.003 + 0.100))  # 10 GB/s and 3 ms
    assert row.value == pytest.approx(3.0) and "10.0 GB/s" in row.what and "23% of a token at 100 MB" in row.what and row.met is None

import os

import numpy as np
import pytest
from fakes import FakeRunner

from labkit import LabkitError
from labkit.measure import memory, size, summary
from labkit.measure.footprint import footprint, reset_peak
from labkit.measure.worker import Child

PROC = {
    "status": "Name:\tpython\nVmHWM:\t  3000 kB\nVmRSS:\t  2000 kB\nRssAnon:\t 950 kB\nRssFile:\t 1050 kB\nThreads:\t4\n",
    "smaps_rollup": "55-7f ---p 0 00:00 0 [rollup]\nPss:  1500 kB\nPss_Anon:  900 kB\nPss_File:  600 kB\n",
}


def test_footprint_reads_what_the_kernel_says(tmp_path):
    for name, content in PROC.items():
        (tmp_path / name).write_text(content)
    found = footprint(tmp_path)
    assert {k: v // 1024 for k, v in found.items() if k != "method"} == {
        "peak": 3000, "rss": 2000, "rss_anon": 950, "rss_file": 1050, "pss": 1500, "pss_anon": 900, "pss_file": 600,
    }  # fmt: skip


def test_footprint_without_proc_says_how_it_was_read(tmp_path):
    found = footprint(tmp_path)
    assert found["peak"] >= found["rss"] / 2 > 0
    assert found["pss"] is None and found["method"] != "VmHWM and smaps_rollup"
    assert reset_peak(tmp_path) is False


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps_rollup"), reason="needs Linux")
def test_a_peak_is_seen_after_it_has_gone():
    reset_peak()
    before = footprint()
    block = np.ones(60_000_000, dtype=np.uint8)
    during = footprint()
    del block
    after = footprint()
    assert during["pss_anon"] - before["pss_anon"] > 55e6
    assert after["peak"] - before["rss"] > 55e6
    assert after["rss"] - before["rss"] < 20e6


def test_memory_of_a_handed_in_runner(artifact):
    found = memory(artifact, runner=FakeRunner(), prompt_tokens=8, new_tokens=4, repeats=2)
    assert len(found.values) == 2 and found.workload["fresh_process"] is False
    peaks, baselines = found.details["peak_bytes"], found.details["baseline_bytes"]
    assert list(found.values) == [p - b for p, b in zip(peaks, baselines, strict=True)]
    assert found.details["method"]


def test_a_child_that_cannot_open_the_artifact_says_why(artifact):
    child = Child(artifact)
    try:
        with pytest.raises(LabkitError, match=r"holds no artifact\.json"):
            child.ask("prepare")
    finally:
        child.end()
        child.end()


def test_a_child_that_dies_is_told_of(artifact):
    child = Child(artifact)
    child.process.kill()
    with pytest.raises(LabkitError, match=r"ended with status -9 \(probably out of memory\)"):
        child.ask("prepare")
    child.end()


def test_size_counts_weights_files_and_bits(artifact):
    (artifact.path / "build.log").write_text("chatter")
    found = size(artifact)
    assert summary(found) == (50_000,) * 3
    assert found.details["file_bytes"] == 60_000
    assert found.details["bits_per_weight"] == 4.0 and found.details["reduction_against_16_bits"] == 0.75


def test_size_of_nothing(artifact):
    (artifact.path / "model.bin").unlink()
    with pytest.raises(LabkitError, match="holds no model files"):
        size(artifact)

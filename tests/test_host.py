"""The machine and its limits: cgroup files of both versions are read from made-up trees."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from labkit import host
from labkit.types import LabkitError


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.fixture
def version2(tmp_path: Path) -> tuple[Path, Path]:
    """A service limited to 2 GB and 1.5 CPUs, inside a slice limited to 8 GB that others nearly fill."""
    root = tree(tmp_path / "cgroup", {
        "cgroup.controllers": "cpu memory",
        "slice/memory.max": "8000000000", "slice/memory.current": "3000000000", "slice/memory.stat": "inactive_file 0",
        "slice/cpu.max": "max 100000",
        "slice/job/memory.max": "2000000000", "slice/job/memory.current": "900000000",
        "slice/job/memory.stat": "anon 5\ninactive_file 400000000\n", "slice/job/cpu.max": "150000 100000",
    })  # fmt: skip
    process = tmp_path / "self"
    process.write_text("0::/slice/job\n")
    return root, process


def test_version_2(version2):
    assert host.cgroup_memory(*version2) == (2_000_000_000, 500_000_000)  # page cache that can go is not use
    assert host.cgroup_cpus(*version2) == 1.5


def test_the_tightest_parent_counts(version2):
    root, process = version2
    (root / "slice/memory.current").write_text("7900000000")
    assert host.cgroup_memory(root, process) == (8_000_000_000, 7_900_000_000)


def test_no_limit(version2):
    root, process = version2
    for folder in ("slice", "slice/job"):
        (root / folder / "memory.max").write_text("max\n")
    (root / "slice/job/cpu.max").write_text("max 100000")
    assert host.cgroup_memory(root, process) == (None, None)
    assert host.cgroup_cpus(root, process) is None


def test_version_1(tmp_path: Path):
    root = tree(tmp_path / "cgroup", {
        "memory/memory.limit_in_bytes": "9223372036854771712", "memory/memory.usage_in_bytes": "1",
        "memory/box/memory.limit_in_bytes": "4000000000", "memory/box/memory.usage_in_bytes": "1500000000",
        "memory/box/memory.stat": "cache 9\ntotal_inactive_file 500000000\n",
        "cpu,cpuacct/cpu.cfs_quota_us": "-1", "cpu,cpuacct/cpu.cfs_period_us": "100000",
        "cpu/box/cpu.cfs_quota_us": "50000", "cpu/box/cpu.cfs_period_us": "100000",
    })  # fmt: skip
    process = tmp_path / "self"
    process.write_text("9:name=systemd:/\n4:memory:/box\n2:cpu,cpuacct:/box\n0::/\n")
    assert host.cgroup_memory(root, process) == (4_000_000_000, 1_000_000_000)
    assert host.cgroup_cpus(root, process) == 0.5


def test_no_cgroups_at_all(tmp_path: Path):
    assert host.cgroup_memory(tmp_path / "none", tmp_path / "gone") == (None, None)
    assert host.cgroup_cpus(tmp_path / "none", tmp_path / "gone") is None


def test_available_memory_is_the_least(monkeypatch):
    import psutil

    machine = psutil.virtual_memory()
    monkeypatch.setattr(host, "cgroup_memory", lambda: (1_000_000, 400_000))
    assert host.available_memory() == 600_000 and host.memory_limit() == 1_000_000
    monkeypatch.setattr(host, "cgroup_memory", lambda: (None, None))
    assert host.memory_limit() == machine.total
    assert 0 < host.available_memory() <= machine.total


@pytest.mark.parametrize(("quota", "expected"), [(None, 4), (2.0, 2), (0.3, 1), (1.5, 2), (64.0, 4)])
def test_cpus(monkeypatch, quota, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3}, raising=False)
    monkeypatch.setattr(host, "cgroup_cpus", lambda: quota)
    assert host.cpus() == expected


def test_home(monkeypatch, tmp_path: Path):
    monkeypatch.setenv("LABKIT_HOME", str(tmp_path / "x"))
    assert host.home() == (tmp_path / "x").resolve()
    monkeypatch.delenv("LABKIT_HOME")
    assert host.home().name == "labkit" and host.home().is_absolute()


def test_free_disk_of_a_folder_not_made_yet(tmp_path: Path):
    assert host.free_disk(tmp_path / "a" / "b" / "c") == pytest.approx(host.free_disk(tmp_path), rel=0.05)


def test_noise_is_the_spread_of_equal_work(monkeypatch):
    ticks = iter(range(10_000))
    times = host._calibrate(0.0, lambda: float(next(ticks)))  # a clock that moves one second a look
    assert len(times) >= 10 and set(times) == {1.0}
    monkeypatch.setattr(host, "_calibrate", lambda seconds, clock: [1.0] * 80 + [1.5] * 20)
    assert host.noise() == pytest.approx(0.5)
    monkeypatch.setattr(host, "_calibrate", lambda seconds, clock: [2.0] * 50)
    assert host.noise() == 0


def test_noise_takes_about_the_time_it_was_given():
    start = time.perf_counter()
    assert host.noise(0.05) >= 0
    assert time.perf_counter() - start < 5


def test_others_share():
    before, after = (100.0, 40.0, 0.0, 10.0), (100.0 + 2 * (os.cpu_count() or 1), 43.0, 0.0, 11.0)
    assert host.others_share(before, after) == pytest.approx(1.0)  # 2 s of wall: 3 busy, 1 of them ours
    assert host.others_share(after, after) is None


@pytest.mark.parametrize("elsewhere", [False, True])
def test_busy_ticks_count_our_own_work(monkeypatch, elsewhere):
    if elsewhere:  # as on a system without /proc
        monkeypatch.setattr(host, "_read", lambda path: "")
    first = host.busy_ticks()
    end = time.process_time() + 0.2
    while time.process_time() < end:
        sum(range(1000))
    second = host.busy_ticks()
    assert second[1] >= first[1] and second[2] >= first[2]
    assert second[3] - first[3] >= 0.18 and second[0] > first[0]


def test_circumstances_can_be_stored_and_name_the_machine():
    found = host.circumstances()
    assert json.loads(json.dumps(found)) == found
    for key in ("system", "machine", "cpu", "cpus_usable", "memory_bytes", "memory_limit_bytes", "python", "versions"):
        assert key in found
    assert found["versions"]["numpy"] and found["cpu"] and found["available_memory_bytes"] > 0


def test_idle_threads_wait_as_asked():
    assert host.waiting("short")["GOMP_SPINCOUNT"] != host.waiting("passive")["GOMP_SPINCOUNT"]
    with pytest.raises(LabkitError, match="short"):
        host.waiting("restless")

"""The ledger: append-only, never loses a line, never compares unlike machines."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from labkit import LabkitError, ledger
from labkit.ledger import comparable
from labkit.types import Measurement

HOST = {"system": "Linux", "machine": "x86_64", "cpu": "Brand 9000", "cpus_usable": 2, "memory_limit_bytes": None}
ONE = Measurement(
    metric="mood",  # of no known metric: its number is the median
    unit="smiles",
    values=(1.0, 3.0, 2.0),
    artifact={"checkpoint": "edgehome", "engine": "llamacpp", "precision": "q4_0", "options": {"imatrix": True},
              "weight_bytes": 10, "bits_per_weight": 4.5},
    workload={"window": 256, "text": "ab12"},
    engine_version="0.3.36",
    host=HOST,
    when="2026-01-02T03:04:05+00:00",
    claims=("C011",),
)  # fmt: skip


@pytest.fixture
def book(tmp_path: Path):
    return ledger(tmp_path / "sub" / "ledger.jsonl")


def test_empty(book):
    assert len(book) == 0 and book.where(metric="size") == [] and not book.path.exists()
    frame = book.frame()
    assert len(frame) == 0 and "bits_per_weight" in frame.columns
    assert comparable(frame) is frame


def test_round_trip_and_line_format(book):
    book.append(ONE)
    book.append(replace(ONE, metric="size"), replace(ONE, metric="memory"))
    assert next(iter(book)) == ONE and len(book) == 3
    lines = book.path.read_text().splitlines()
    assert len(lines) == 3 and all(next(iter(json.loads(line))) == "schema" for line in lines)
    assert json.loads(lines[0])["values"] == [1.0, 3.0, 2.0]


def test_numpy_and_paths_are_written_as_plain_json(book):
    odd = replace(ONE, values=(np.float64(2),), details={"a": np.arange(2), "p": Path("x"), "t": (1, 2)})
    book.append(odd)
    assert json.loads(book.path.read_text())["details"] == {"a": [0, 1], "p": "x", "t": [1, 2]}


def test_default_place(home: Path):
    ledger().append(ONE)
    assert (home / "ledger.jsonl").exists() and len(ledger()) == 1


def test_where_and_frame(book):
    book.append(ONE, replace(ONE, metric="size", values=(10.0,)))
    frame = book.frame()
    assert list(frame.metric) == ["mood", "size"]
    assert frame.value.tolist() == [2.0, 10.0] and frame.n.tolist() == [3, 1]
    assert frame.options[0] == {"imatrix": True} and frame.claims[0] == ("C011",)
    assert len(book.where(metric="size", precision="q4_0")) == 1
    assert book.where(precision="q8_0") == [] and book.where(nonsense=1) == []
    assert len(book.frame(metric="size")) == 1


def test_known_metrics_are_shown_as_they_say_of_themselves(book):
    right = replace(ONE, metric="accuracy", unit="share", values=(1.0,) * 3 + (0.0,))
    book.append(right)
    row = book.frame().iloc[0]
    assert row.value == 0.75 and 0.2 < row.low < 0.75 < row.high < 1  # the median of the raw values would be 1
    book.append(replace(ONE, metric="perplexity"))  # lacks the counts a perplexity is computed from
    with pytest.warns(UserWarning, match="perplexity of 2026-01-02.* has no value"):
        assert book.frame().value.isna().tolist() == [False, True]


def test_newest_of_equal_keys_wins(book):
    book.append(ONE, replace(ONE, values=(9.0,), when="2026-02-02T00:00:00+00:00"))
    assert book.frame().value.tolist() == [9.0]
    assert len(book.where()) == 2  # nothing is lost
    book.append(replace(ONE, workload={"window": 512, "text": "ab12"}))
    assert len(book.frame()) == 2
    book.append(replace(ONE, engine_version="0.4"))
    assert len(book.frame()) == 3


def test_the_host_is_a_key_for_speed_but_not_for_quality(book):
    other = {**HOST, "cpu": "Brand 1"}
    book.append(ONE, replace(ONE, host=other))
    assert len(book.frame()) == 1
    book.append(replace(ONE, metric="speed"), replace(ONE, metric="speed", host=other))
    assert len(book.frame(metric="speed")) == 2


def test_unlike_machines_are_not_compared(book):
    other = {**HOST, "cpu": "Brand 1", "cpus_usable": 8}
    book.append(ONE, replace(ONE, host=other, workload={"window": 1}))
    assert len(comparable(book.frame())) == 2  # quality travels
    book.append(replace(ONE, metric="speed"), replace(ONE, metric="speed", host=other))
    with pytest.raises(LabkitError, match=r"speed measurements.*cpu: Brand 1, Brand 9000; cpus_usable: 2, 8"):
        comparable(book.frame())
    frame = book.frame()
    assert set(comparable(frame[frame.cpu == "Brand 1"]).metric) == {"mood", "speed"}


@pytest.mark.parametrize("bad", [b'{"schema": 1, "met', b"\xff\xfe\x00", b"[]", b"42", b'{"schema": 1}',
                                 b'{"schema": 99, "metric": "x"}', b"null"])  # fmt: skip
def test_a_corrupt_line_is_reported_kept_and_costs_no_other(book, bad: bytes):
    book.append(ONE)
    with open(book.path, "ab") as file:
        file.write(bad + b"\n")
    book.append(replace(ONE, metric="size"))
    with pytest.warns(UserWarning, match="line 2 cannot be read and is left out; the file was not changed"):
        found = book.where()
    assert [m.metric for m in found] == ["mood", "size"]
    assert bad in book.path.read_bytes()


def test_a_torn_last_line_does_not_swallow_the_next(book):
    book.append(ONE)
    with open(book.path, "ab") as file:
        file.write(b'{"schema": 1, "metric": "si')
    book.append(replace(ONE, metric="memory"))
    with pytest.warns(UserWarning, match="line 2"):
        assert [m.metric for m in book] == ["mood", "memory"]


def test_disk_full_adds_nothing(book, monkeypatch):
    book.append(ONE)
    before = book.path.read_bytes()
    real, calls = os.write, []

    def write(handle: int, data: bytes) -> int:
        calls.append(1)
        if len(calls) > 1:
            raise OSError(28, "No space left on device")
        return real(handle, data[:20])

    monkeypatch.setattr(os, "write", write)
    with pytest.raises(LabkitError, match="nothing was added"):
        book.append(replace(ONE, metric="size"))
    monkeypatch.undo()
    assert book.path.read_bytes() == before


def test_processes_may_write_at_once(book):
    code = (
        "import sys; from labkit.ledger import ledger; from labkit.types import Measurement\n"
        "m = Measurement('m', 'u', (1.0,) * 2000, {'engine': sys.argv[2]}, {}, '1', {}, 'now')\n"
        "for _ in range(20): ledger(sys.argv[1]).append(m)\n"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    children = [subprocess.Popen([sys.executable, "-c", code, str(book.path), str(i)], env=env) for i in range(2)]
    assert [child.wait() for child in children] == [0, 0]
    assert len(book) == 40 and len(book.where(engine="1")) == 20

"""The ledger: an append-only JSON Lines file of measurements.

Schema of a line: 1 = the fields of `labkit.types.Measurement`, raw values, no averages.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from labkit import host
from labkit._files import locked
from labkit.types import LabkitError, Measurement

if TYPE_CHECKING:
    import pandas as pd

SCHEMA = 1
HOST_BOUND = ("speed", "memory", "roofline")  # metrics that belong to the machine they were taken on
HOST_KEYS = ("system", "machine", "cpu", "cpus_usable", "memory_limit_bytes", "device")  # device: the name of a worker of a fleet


def ledger(path: str | Path | None = None) -> Ledger:
    """Open the ledger at `path`, by default the one in labkit's home; the file is made by the first append."""
    return Ledger(Path(path) if path else host.home() / "ledger.jsonl")


class Ledger:
    """Measurements in a file. Lines are only ever added; damaged ones are kept and reported, never lost."""

    def __init__(self, path: Path):
        self.path = path

    def append(self, *measurements: Measurement) -> None:
        """Add measurements, one line each; safe among processes writing at once."""
        lines = "".join(json.dumps(_plain(m.to_json()), ensure_ascii=False) + "\n" for m in measurements)
        with locked(self.path.with_name(self.path.name + ".lock")):
            torn = _ends_mid_line(self.path)  # by a crash or a full disk: keep that line apart from ours
            handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            try:
                _write_all(handle, ("\n" + lines if torn else lines).encode())
            finally:
                os.close(handle)

    def __iter__(self):
        return iter(self.where())

    def __len__(self) -> int:
        return len(self.where())

    def where(self, **equals: Any) -> list[Measurement]:
        """Measurements whose columns (see `frame`) equal the given values, oldest first, every one of them."""
        return [m for m in self._read() if all(row_of(m).get(k) == v for k, v in equals.items())]

    def frame(self, **equals: Any) -> pd.DataFrame:
        """One row a measurement, oldest first; of lines with equal keys the newest.

        `value` is the number to show, `low` and `high` the ends of its 95 % interval (see `labkit.measure.summary`).
        Keys: metric, artifact, workload, engine version, and for host-bound metrics the host.
        """
        return frame_of({_key(m): m for m in self.where(**equals)}.values())

    def _read(self) -> list[Measurement]:
        found, damaged = [], []
        text = self.path.read_bytes() if self.path.exists() else b""
        for number, line in enumerate(text.split(b"\n"), start=1):
            if not line.strip():
                continue
            try:
                found.append(_parse(line))
            except (ValueError, TypeError, KeyError, AttributeError):
                damaged.append(number)
        if damaged:
            numbers = ", ".join(map(str, damaged))
            warnings.warn(
                f"{self.path}: line {numbers} cannot be read and is left out; the file was not changed. "
                "Look at it, and delete it when it is of no use.",
                stacklevel=3,
            )
        return found


COLUMNS = ("metric", "unit", "value", "low", "high", "n", "checkpoint", "engine", "precision", "options",
           "bits_per_weight", "weight_bytes", "engine_version", "when", "cpu", "values", "workload", "details",
           "claims", "host")  # fmt: skip


def frame_of(measurements: Iterable[Measurement]) -> pd.DataFrame:
    """The same frame from measurements at hand, one row each: what the charts take."""
    import pandas as pd

    return pd.DataFrame([row_of(m) | _shown(m) for m in measurements], columns=list(COLUMNS))


def row_of(m: Measurement) -> dict[str, Any]:
    """A measurement as a flat row; `value` is the median of the raw values, `n` their number."""
    artifact = dict(m.artifact)
    return {
        "metric": m.metric,
        "unit": m.unit,
        "value": _median(m.values),
        "n": len(m.values),
        "checkpoint": artifact.get("checkpoint"),
        "engine": artifact.get("engine"),
        "precision": artifact.get("precision"),
        "options": dict(artifact.get("options") or {}),
        "bits_per_weight": artifact.get("bits_per_weight"),
        "weight_bytes": artifact.get("weight_bytes"),
        "engine_version": m.engine_version,
        "when": m.when,
        "cpu": m.host.get("cpu"),
        "values": m.values,
        "workload": dict(m.workload),
        "details": dict(m.details),
        "claims": m.claims,
        "host": dict(m.host),
    }


def comparable(frame: pd.DataFrame) -> pd.DataFrame:
    """The same frame, when its host-bound rows come from one kind of machine; else LabkitError names what differs.

    Quality and size may be compared across machines; speed and memory may not.
    """
    bound = frame[frame["metric"].isin(HOST_BOUND)] if len(frame) else frame
    hosts = list(bound["host"]) if len(bound) else []
    differing = [key for key in HOST_KEYS if len({json.dumps(h.get(key)) for h in hosts}) > 1]
    if differing:
        seen = "; ".join(f"{key}: {', '.join(_distinct(hosts, key))}" for key in differing)
        raise LabkitError(
            f"These {'/'.join(sorted(set(bound['metric'])))} measurements come from unlike machines ({seen}); "
            "compare those of one machine, for example frame[frame.cpu == ...]."
        )
    return frame


def _distinct(hosts: Iterable[Mapping[str, Any]], key: str) -> list[str]:
    return sorted({str(h.get(key)) for h in hosts})


def _key(m: Measurement) -> str:
    artifact = {k: v for k, v in m.artifact.items() if k not in ("path", "seconds")}
    where = {k: m.host.get(k) for k in HOST_KEYS} if m.metric in HOST_BOUND else None
    return json.dumps([m.metric, artifact, dict(m.workload), m.engine_version, where], sort_keys=True, default=str)


def _parse(line: bytes) -> Measurement:
    data = json.loads(line)
    if data["schema"] > SCHEMA:
        raise ValueError(f"schema {data['schema']} is newer than {SCHEMA}")
    found = Measurement.from_json(data)
    if not isinstance(found.host, dict) or not isinstance(found.artifact, dict) or not isinstance(found.workload, dict):
        raise TypeError("host, artifact and workload must be objects")
    return found


def _plain(value: Any) -> Any:
    """The same data in JSON's own types (numpy numbers, tuples, paths)."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def _shown(m: Measurement) -> dict[str, float | None]:
    """The metric's own summary; the plain median for one that labkit does not know."""
    from labkit.measure import METRICS, summary

    try:
        value, low, high = summary(m) if m.metric in METRICS and m.values else [_median(m.values)] * 3
    except (KeyError, TypeError, ValueError, IndexError):
        warnings.warn(f"The {m.metric} of {m.when} lacks what its summary needs; it has no value.", stacklevel=4)
        value = low = high = None
    return {"value": value, "low": low, "high": high}


def _median(values: tuple[float, ...]) -> float | None:
    import statistics

    return statistics.median(values) if values else None


def _ends_mid_line(path: Path) -> bool:
    if not path.exists() or path.stat().st_size == 0:
        return False
    with open(path, "rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"


def _write_all(handle: int, data: bytes) -> None:
    """Write all of `data` or nothing: a full disk must not leave half a line."""
    before = os.fstat(handle).st_size
    try:
        while data:
            data = data[os.write(handle, data) :]
    except OSError as error:
        os.ftruncate(handle, before)
        raise LabkitError(f"The ledger could not be written ({error}); nothing was added. Free some disk.") from error

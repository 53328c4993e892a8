"""P13 how quickly the panels answer, P14 the whole course: its time and memory, and where each lab's time goes."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from labkit._files import size as words
from labkit._say import columns
from labkit.types import LabkitError

from .harness import Goal, Row, value_row

MATRIX = Goal("P13", "95 % of the moves within 100 ms", None, 100.0)
LADDER = Goal("P13", "95 % of the moves within 1.5 s, reply included", None, 1500.0)
SWEEP = Goal("P13", "95 % of the moves within 50 ms, all measured before", None, 50.0)
IMPORT = Goal("P13", "import labkit within 0.3 s", None, 0.3)
WHOLE = Goal("P14", "all labs within 15 min", None, 900.0)
ONE = Goal("P14", "each lab within 3 min", None, 180.0)
MEMORY = Goal("P14", "each lab's process tree within 2 GB", None, 2e9)
IMPORTED = """import sys, time
t = time.perf_counter()
import labkit
print(time.perf_counter() - t)
loaded = {"torch", "llama_cpp", "onnxruntime", "onnxruntime_genai", "openvino", "mlx"} & set(sys.modules)
sys.exit(f"import labkit loads {', '.join(sorted(loaded))}" if loaded else 0)"""


def p13(size: str, rounds: int) -> Iterator[Row]:
    """Moves of the sliders, from the callback to the finished figure, and the import of the package."""
    from . import panels

    draw = random.Random(0)
    moved = (
        (MATRIX, "matrix of 1 M weights", panels.matrix(draw)),
        (LADDER, "ladder of the house model", panels.ladder(draw)),
        (SWEEP, "ladder from the ledger alone", panels.ladder(draw, reply=False)),
    )
    for goal, what, found in moved:
        yield value_row(goal, f"{what}: median {found['p50_ms']} ms", [found["p95_ms"]], unit="ms")
    times = [float(subprocess.check_output([sys.executable, "-c", IMPORTED], text=True)) for _ in range(rounds + 1)][1:]
    yield value_row(IMPORT, "import labkit in a fresh process", times, unit="s")


def p14(size: str, rounds: int) -> Iterator[Row]:
    """The course as `labkit run` recorded it: seconds and peak memory of every lab."""
    folder = run_folder()
    labs = json.loads((folder / "results.json").read_text(encoding="utf-8"))["labs"]
    seconds = {one["lab"]: one["seconds"] for one in labs}
    slowest, largest = max(labs, key=lambda one: one["seconds"]), max(labs, key=lambda one: one["peak_bytes"])
    yield value_row(WHOLE, f"{len(labs)} labs", [sum(seconds.values())], unit="s", seconds=seconds)
    yield value_row(ONE, f"the slowest, {slowest['lab']}", [slowest["seconds"]], unit="s")
    yield value_row(MEMORY, f"the largest, {largest['lab']}", [float(largest["peak_bytes"])], unit="bytes")
    failed = [one["lab"] for one in labs if one["status"] != "passed"]
    yield value_row(Goal("P14", "every lab passes", 0.0, 0.0), f"failed: {', '.join(failed) or 'none'}", [float(len(failed))], unit="labs")


def run_folder() -> Path:
    """The folder of the newest `labkit run`, or the one LABKIT_BENCH_RUN names."""
    given = os.environ.get("LABKIT_BENCH_RUN")
    found = [Path(given)] if given else sorted(Path("reports").glob("*/"), key=lambda one: one.stat().st_mtime)
    found = [one for one in found if (one / "results.json").exists()]
    if not found:
        raise LabkitError("No finished run in reports/ (or where LABKIT_BENCH_RUN points); make one:  labkit run --profile ci --force")
    return found[-1]


def where_time_goes(folder: Path, most: int = 5) -> str:
    """Of every lab in a run: seconds, the part in cells, starting and closing the kernel, and its slowest cells."""
    try:
        labs = json.loads((folder / "results.json").read_text(encoding="utf-8"))["labs"]
    except (OSError, ValueError, KeyError):
        raise LabkitError(f"{folder} holds no results.json; give the folder of a run, or make one with `labkit run`.") from None
    lines = []
    for lab in sorted(labs, key=lambda one: -one["seconds"]):
        cells = durations(json.loads((folder / lab["executed"]).read_text(encoding="utf-8")))
        inside = sum(one["seconds"] for one in cells)
        lines.append(f"{lab['lab']}: {lab['seconds']:.1f} s, {inside:.1f} s of it in cells; peak {words(lab['peak_bytes'])}")
        slowest = sorted(cells, key=lambda one: -one["seconds"])[:most]
        rows = [{"s": f"{one['seconds']:.2f}", "share": f"{one['seconds'] / lab['seconds']:.0%}", "cell": one["cell"], "begins": one["begins"]} for one in slowest]
        lines += ["    " + line for line in columns(rows).splitlines()]
    return "\n".join([*lines, f"together {sum(one['seconds'] for one in labs):.0f} s"])


def durations(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    """Seconds of every code cell that papermill ran, with its id and its first words."""
    found = []
    for cell in notebook["cells"]:
        seconds = cell.get("metadata", {}).get("papermill", {}).get("duration")
        if cell["cell_type"] == "code" and seconds is not None:
            source = "".join(cell["source"]).strip()
            found.append({"cell": cell.get("id", ""), "seconds": seconds, "begins": source.splitlines()[0][:60] if source else ""})
    return found

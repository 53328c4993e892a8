"""The header table of a lab: time, memory, disk and network of the last recorded run.

`python -m labkit.course.facts reports/latest/results.json` takes the figures of a finished run into
`labkit/data/facts.json` and writes the notebooks again. Nobody types them.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from labkit.i18n import noop, tr
from labkit.types import LabkitError

FILE = Path(__file__).resolve().parents[1] / "data" / "facts.json"


def read() -> dict[str, dict[str, Any]]:
    """Lab id -> {profile, seconds, peak_bytes, disk_bytes, network, cpus, when}."""
    return json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}


def table(lab_id: str) -> str:
    """The lab's facts as a Markdown table in the language in use; a sentence when no run has been recorded yet."""
    fact = read().get(lab_id)
    if fact is None:
        return tr("*No run of this lab has been recorded yet.*")
    cells = (_time(fact["seconds"]), _size(fact["peak_bytes"]), _size(fact["disk_bytes"]), tr(fact["network"]))
    about = {"day": fact["when"][:10], "profile": fact["profile"], "cores": fact["cpus"]}
    lines = [tr("| time | peak memory | disk written | network |"), "|---|---|---|---|", f"| {' | '.join(cells)} |", ""]
    return "\n".join([*lines, tr("*Recorded on {day}: profile `{profile}`, {cores} CPU cores.*", **about)])


def record(results: Path) -> list[str]:
    """Take the passed labs of a `results.json` made by `labkit run --solutions`; returns their ids."""
    try:
        run = json.loads(results.read_text(encoding="utf-8"))
        passed = [lab for lab in run["labs"] if lab["status"] == "passed"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LabkitError(f"{results} is not the results.json of a labkit run ({type(error).__name__}).") from error
    known = read()
    for lab in passed:
        known[lab["lab"]] = {
            "profile": run["profile"],
            "cpus": run["host"]["cpus"],
            "when": lab["when"],
            "seconds": round(lab["seconds"], 1),
            "peak_bytes": lab["peak_bytes"],
            "disk_bytes": lab["disk_bytes"],
            "network": noop("used") if lab["network"] else noop("not used"),
        }
    FILE.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return [lab["lab"] for lab in passed]


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.1f} min"


def _size(size: int) -> str:
    return f"{size / 1e6:.0f} MB" if size < 1e9 else f"{size / 1e9:.2f} GB"


def main(argv: list[str] | None = None) -> int:
    from labkit.course.generate import generate

    parser = argparse.ArgumentParser(prog="python -m labkit.course.facts", description=__doc__.split("\n")[0])
    parser.add_argument("results", type=Path, help="results.json of a finished run")
    try:
        print("recorded:", ", ".join(record(parser.parse_args(argv).results)) or "nothing: no lab passed")
    except LabkitError as error:
        print(error, file=sys.stderr)
        return 2
    generate()
    return 0


if __name__ == "__main__":
    sys.exit(main())

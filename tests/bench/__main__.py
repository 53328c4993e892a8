"""`python -m tests.bench [GROUP …] [--size small|full] [--rounds N] [--out FILE]`; `peers` builds the tools.

`table FILE … [--into README.md]` shows result files as one table, the newest run of each group; `labs DIR` where a course run's time went.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before any engine loads OpenMP


def groups() -> dict:
    """Group -> the function that yields its rows."""
    from . import convert, course, quality, scale, speed

    return {
        "P1": speed.p1, "P1-engines": speed.engines_beside, "P2": speed.p2, "P3": quality.p3, "P4": quality.p4, "P5": quality.p5,
        "P6": convert.p6, "P7": convert.p7, "P8": convert.p8, "P9": convert.p9, "P10": speed.p10, "P11": speed.p11,
        "P12": speed.p12, "P13": course.p13, "P14": course.p14, "scale": scale.scale,
    }  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Run the groups; status 1 when a goal is not met."""
    from labkit import host

    from . import harness

    options = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    options.add_argument("groups", nargs="*", metavar="GROUP", help="P1 … P14, P1-engines, scale (default: all); or: peers, table FILE …, labs DIR")
    options.add_argument("--size", default="small", choices=("small", "full"), help="edgehome only, or real sizes too")
    options.add_argument("--rounds", type=int, default=7)
    options.add_argument("--retries", type=int, default=3, help="disturbed rounds that may be taken again (default: 3)")
    options.add_argument("--out", type=Path, default=Path("reports/bench.json"))
    options.add_argument("--into", type=Path, metavar="FILE", help="with table: a Markdown file, between its two bench marks")
    chosen = options.parse_args(argv)
    known, asked, harness.RETRIES = groups(), chosen.groups, chosen.retries
    if asked[:1] == ["peers"]:
        from .peers import build

        print("\n".join(map(str, build())))
        return 0
    if asked[:1] == ["table"]:
        files = [Path(file) for file in asked[1:]] or [chosen.out]
        if missing := [str(file) for file in files if not file.is_file()]:
            options.error(f"there is no {missing[0]}; give result files of earlier runs")
        text = shown([json.loads(file.read_text(encoding="utf-8")) for file in files])
        if chosen.into:
            from labkit._marks import write_into

            write_into(chosen.into, text, "bench")
        print(text)
        return 0
    if asked[:1] == ["labs"]:
        from .course import where_time_goes

        print(where_time_goes(Path(asked[1] if asked[1:] else "reports/ci")))
        return 0
    if unknown := [name for name in asked if name not in known]:
        options.error(f"no group {unknown[0]}; expected some of {', '.join(known)}")
    result = {"schema": 1, "when": datetime.now(UTC).isoformat(timespec="seconds"), "size": chosen.size, "rounds": chosen.rounds,
              "host": host.circumstances(), "noise": host.noise(), "groups": {}}  # fmt: skip
    met = True
    for name in asked or known:
        def save(found: dict, name: str = name) -> None:  # after every row: nothing is lost
            result["groups"][name] = found
            chosen.out.parent.mkdir(parents=True, exist_ok=True)
            chosen.out.write_text(json.dumps(result, indent=1, default=str), encoding="utf-8")

        save(found := run(name, known[name], chosen.size, chosen.rounds, save))
        met = met and all(row["met"] is not False for row in found["rows"]) and not found["failed"]
    print(table_of(result))
    return 0 if met else 1


def run(name: str, group, size: str, rounds: int, save=lambda found: None) -> dict:
    """One group: its rows as JSON, and the sentence why it has no more of them. `save` gets what there is after every row."""
    from labkit.types import LabkitError

    start, rows, skipped, failed = time.monotonic(), [], "", ""
    print(f"{name}: {group.__doc__.splitlines()[0]}", file=sys.stderr, flush=True)
    try:
        for row in group(size, rounds):
            rows.append(row.to_json())
            save({"rows": rows, "skipped": "", "failed": "interrupted", "seconds": time.monotonic() - start})
            print(f"  {row.goal} {row.what}: {row.value:.4g} ({row.low:.4g} to {row.high:.4g})", file=sys.stderr, flush=True)
    except LabkitError as error:
        skipped = str(error)
        print(f"  skipped: {skipped}", file=sys.stderr, flush=True)
    except Exception as error:  # one group that breaks does not cost the others
        failed = f"{type(error).__name__}: {error}"
        print(f"  failed: {failed}", file=sys.stderr, flush=True)
    return {"rows": rows, "skipped": skipped, "failed": failed, "seconds": time.monotonic() - start}


def shown(results: list[dict]) -> str:
    """The dated table of result files, as README has it: the newest run of each group, folded, with the verdicts counted above."""
    newest, when = {}, {}
    for result in sorted(results, key=lambda one: one["when"]):
        newest |= result["groups"]
        when |= dict.fromkeys(result["groups"], result["when"][:10])
    newest = {name: newest[name] for name in [*groups(), *newest] if name in newest}
    machine, days = results[-1]["host"], sorted(set(when.values()))
    judged = [row for group in newest.values() for row in group["rows"] if row["met"] is not None]
    met = sum(row["met"] for row in judged)
    busy = sum(not row["quiet"] for row in judged)
    about = f"{' to '.join(dict.fromkeys([days[0], days[-1]]))}, {machine['cpu']}, {machine['cpus_usable']} cores: {met} of {len(judged)} verdicts met"
    about += f"; {busy} rows were taken while other programs used the machine." if busy else "."
    return f"{about}\n\n<details><summary>Every row</summary>\n\n{table_of({'groups': newest})}\n\n</details>\n"


def table_of(result: dict) -> str:
    """All rows as one Markdown table, and a line for each group without its peer."""
    from .harness import Row, table

    rows = [Row(**row) for group in result["groups"].values() for row in group["rows"]]
    notes = [f"{name}: {'not all of it' if group['rows'] else 'not run'}. {group['skipped'] or group['failed']}" for name, group in result["groups"].items() if group["skipped"] or group["failed"]]
    return "\n".join([table(rows), *[""] * bool(notes), *notes])


if __name__ == "__main__":
    sys.exit(main())

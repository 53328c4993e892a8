"""The commands around the labs: run, test, lab, new, report. Each is a thin coat over a function of the course."""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

from labkit._say import emit
from labkit.types import LabkitError


def _run_options(one: argparse.ArgumentParser) -> None:
    one.add_argument("labs", nargs="*", metavar="LAB", help="such as 00 or module04/02 (default: all)")
    one.add_argument("--profile", default="ci", choices=("ci", "class", "full"))
    one.add_argument("-p", "--parameter", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"))
    one.add_argument("--out", metavar="DIR", help="folder for the report (default: reports/PROFILE)")
    one.add_argument("--solutions", action="store_true", help="run the solved notebooks")
    one.add_argument("--force", action="store_true", help="run also what passed before unchanged")
    one.add_argument("--timeout", type=float, metavar="SECONDS", help="limit for one lab")
    one.add_argument("--no-headline", action="store_true", help="leave out the table of engines")
    one.add_argument("--json", action="store_true")


def run(chosen: argparse.Namespace) -> int:
    """Run labs headless and write an HTML report."""
    from labkit.course.run import run as run_labs
    from labkit.course.sweep import text as headline_text

    outcome = run_labs(
        chosen.labs, profile=chosen.profile, parameters=dict(chosen.parameter), out=chosen.out,
        solutions=chosen.solutions, force=chosen.force, timeout=chosen.timeout, headline=not chosen.no_headline,
    )  # fmt: skip
    words = f"{headline_text(outcome.results['headline'])}\n\nReport: {outcome.report}"
    emit(chosen, dict(outcome.results) | {"report": str(outcome.report)}, words.strip())
    return 0 if outcome.passed else 1


def _test_options(one: argparse.ArgumentParser) -> None:
    one.usage = "labkit test [ARGUMENT ...], all of them handed on to pytest"


def test(chosen: argparse.Namespace) -> int:
    """Run the project's tests."""
    root = Path(__file__).resolve().parents[1]
    if not (root / "tests").is_dir():
        raise LabkitError("The tests are not part of an installed labkit; get the source and run this there.")
    return subprocess.run([sys.executable, "-m", "pytest", *chosen.handed_on], cwd=root).returncode


def _lab_options(one: argparse.ArgumentParser) -> None:
    one.usage = "labkit lab [LAB] [ARGUMENT ...], arguments handed on to JupyterLab"


def lab(chosen: argparse.Namespace) -> int:
    """Open JupyterLab on the labs."""
    from labkit.course.labs import find, folder

    named = chosen.handed_on and not chosen.handed_on[0].startswith("-")
    place = find(chosen.handed_on[0]).path if named else folder()
    command = [sys.executable, "-m", "jupyterlab", str(place), *chosen.handed_on[bool(named) :]]
    return subprocess.run(command).returncode


def _new_options(one: argparse.ArgumentParser) -> None:
    one.add_argument("lab", help="such as module04/02")
    one.add_argument("--into", default="work", metavar="DIR")
    one.add_argument("--force", action="store_true", help="replace your copy; your changes in it are lost")
    one.add_argument("--json", action="store_true")


def new(chosen: argparse.Namespace) -> int:
    """Make your own copy of a lab, so that updates never collide with your work."""
    from labkit.course.labs import find

    found = find(chosen.lab)
    target = Path(chosen.into).expanduser().resolve() / found.relative
    if target.exists() and not chosen.force:
        raise LabkitError(f"{target} is there already; go on with it, or replace it with --force.")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(found.path, target)
    emit(chosen, {"lab": found.id, "notebook": str(target)}, str(target))
    return 0


def _report_options(one: argparse.ArgumentParser) -> None:
    one.add_argument("folder", nargs="?", metavar="DIR", help="of a finished run (default: the newest in reports/)")
    one.add_argument("--open", action="store_true", help="show it in a browser")
    one.add_argument("--json", action="store_true")


def report(chosen: argparse.Namespace) -> int:
    """Write the report of a finished run again and say where it is."""
    from labkit._files import read_json
    from labkit.course.report import write_index

    runs = [Path(chosen.folder)] if chosen.folder else sorted(Path("reports").glob("*/"), key=_last_change)
    if not runs or not (runs[-1] / "results.json").exists():
        raise LabkitError(f"No finished run in {chosen.folder or 'reports/'}; make one with `labkit run`.")
    page = write_index(runs[-1].resolve(), read_json(runs[-1] / "results.json", "Results"))
    emit(chosen, {"report": str(page)}, str(page))
    if chosen.open:
        import webbrowser

        webbrowser.open(page.as_uri())
    return 0


def _last_change(folder: Path) -> float:
    results = folder / "results.json"
    return results.stat().st_mtime if results.exists() else 0.0


COMMANDS = (
    ("run", run, _run_options),
    ("test", test, _test_options),
    ("lab", lab, _lab_options),
    ("new", new, _new_options),
    ("report", report, _report_options),
)

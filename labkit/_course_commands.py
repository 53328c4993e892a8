"""The commands around the labs: run, test, lab, new, report. Each is a thin coat over a function of the course."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from labkit._say import emit
from labkit.types import LabkitError


def _run_options(one: argparse.ArgumentParser) -> None:
    one.epilog = "Exit status: 0 every lab passed, 1 a lab did not, 2 the request could not be met, 130 interrupted."
    one.add_argument("labs", nargs="*", metavar="LAB", help="such as 00 or module04/02 (default: all)")
    one.add_argument("--profile", default="ci", choices=("ci", "class", "full"))
    one.add_argument("-p", "--parameter", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"))
    one.add_argument("--out", metavar="DIR", help="folder for the report (default: reports/PROFILE)")
    one.add_argument("--solutions", action="store_true", help="run the solved notebooks")
    one.add_argument("--force", action="store_true", help="run also what passed before unchanged")
    one.add_argument("--timeout", type=float, metavar="SECONDS", help="limit for one lab")
    one.add_argument("--workers", type=int, metavar="N", help="labs at once, memory permitting (default: cores / 4)")
    one.add_argument("--scheduler", metavar="ADDRESS", help="run the labs on the workers of this Dask scheduler")
    one.add_argument("--no-headline", action="store_true", help="leave out the table of engines")
    one.add_argument("--json", action="store_true")


def run(chosen: argparse.Namespace) -> int:
    """Run labs headless and write an HTML report."""
    from labkit.course.run import run as run_labs
    from labkit.course.sweep import text as headline_text

    outcome = run_labs(
        chosen.labs, profile=chosen.profile, parameters=dict(chosen.parameter), out=chosen.out,
        solutions=chosen.solutions, force=chosen.force, timeout=chosen.timeout, headline=not chosen.no_headline,
        workers=chosen.workers, scheduler=chosen.scheduler,
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
    """Open JupyterLab on your own copies of the labs, in work/."""
    from labkit.course.copies import fill
    from labkit.course.labs import find, labs

    named = chosen.handed_on and not chosen.handed_on[0].startswith("-")
    opened = find(chosen.handed_on[0]) if named else labs()[0]
    work = Path("work").resolve()
    fill(work, opened.root)
    # the whole course is served, so that links between labs work; the environment's kernel goes before the user's
    where = [f"--ServerApp.root_dir={work}", f"--LabApp.default_url=/lab/tree/{opened.relative.as_posix()}"]
    command = [sys.executable, "-m", "jupyterlab", *where, *chosen.handed_on[bool(named) :]]
    return subprocess.run(command, env=os.environ | {"JUPYTER_PREFER_ENV_PATH": "1"}).returncode


def _new_options(one: argparse.ArgumentParser) -> None:
    one.add_argument("lab", help="such as module04/02")
    one.add_argument("--into", default="work", metavar="DIR")
    one.add_argument("--learner", metavar="ID", help="write this learner's own seed into the copy, where the lab has one")
    one.add_argument("--force", action="store_true", help="replace your copy; your changes in it are lost")
    one.add_argument("--json", action="store_true")


def new(chosen: argparse.Namespace) -> int:
    """Make your own copy of a lab, so that updates never collide with your work."""
    from labkit.course import variants
    from labkit.course.copies import copy
    from labkit.course.labs import find

    found = find(chosen.lab)
    own = variants.with_seed(found, chosen.learner) if chosen.learner else None
    target = copy(found, Path(chosen.into).expanduser().resolve(), force=chosen.force)
    if own:
        target.write_text(own, encoding="utf-8", newline="\n")
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


def _grade_options(one: argparse.ArgumentParser) -> None:
    from labkit.course.grade_sandbox import Limits

    usual = Limits()
    one.formatter_class = argparse.RawDescriptionHelpFormatter
    one.epilog = """\
SUBMISSIONS holds one entry for each learner: a sub-folder named by the learner's id, with the notebooks anywhere
below it, or a single notebook ID.ipynb. Which lab a notebook is stands in its metadata, in its labkit.start("..."),
or in its file name. A lab with a `seed` parameter is run with the learner's own seed, as `labkit new LAB --learner ID`
writes it. Exit status: 0 everyone was graded (however badly), 1 the grader failed on someone, 2 nothing could be done."""
    one.add_argument("submissions", metavar="SUBMISSIONS", help="folder with one sub-folder or ID.ipynb a learner")
    one.add_argument("--out", required=True, metavar="DIR", help="for grades.csv, results.json, index.html and learners/")
    one.add_argument("--lab", action="append", default=[], help="a lab that counts (default: all that anybody worked in)")
    one.add_argument("--profile", default="ci", choices=("ci", "class", "full"))
    one.add_argument("-p", "--parameter", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"))
    one.add_argument("--timeout", type=float, default=usual.seconds, metavar="SECONDS", help="limit for one notebook")
    one.add_argument("--cell-timeout", type=float, default=usual.cell_seconds, metavar="SECONDS", help="limit for one cell")
    one.add_argument("--memory", type=int, default=usual.memory_bytes // 10**6, metavar="MB", help="limit for one notebook")
    one.add_argument("--workers", type=int, metavar="N", help="notebooks at once (default: as many as cores and memory allow)")
    one.add_argument("--json", action="store_true")


def grade(chosen: argparse.Namespace) -> int:
    """Grade a folder of learners' notebooks, each in a process of its own."""
    from labkit.course.grade import grade as grade_all
    from labkit.course.grade_sandbox import Limits

    if min(chosen.timeout, chosen.cell_timeout, chosen.memory) <= 0:
        raise LabkitError("--timeout, --cell-timeout and --memory must be above 0.")
    limits = Limits(chosen.memory * 10**6, chosen.timeout, chosen.cell_timeout)
    outcome = grade_all(
        chosen.submissions, chosen.out, labs=chosen.lab, profile=chosen.profile, parameters=dict(chosen.parameter),
        limits=limits, workers=chosen.workers, say=lambda text: print(text, file=sys.stderr, flush=True),
    )  # fmt: skip
    cohort, page = outcome.results["cohort"], outcome.folder / "index.html"
    words = [
        *outcome.results["warnings"],
        f"{cohort['learners']} learners, median {cohort['median']:g} of {cohort['of']} points.",
    ]
    emit(chosen, {"report": str(page), **outcome.results}, "\n".join([*words, f"Report: {page}"]))
    return 0 if outcome.complete else 1


COMMANDS = (
    ("run", run, _run_options),
    ("test", test, _test_options),
    ("lab", lab, _lab_options),
    ("new", new, _new_options),
    ("report", report, _report_options),
    ("grade", grade, _grade_options),
    ("env", "env"),
)

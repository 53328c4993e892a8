"""Running labs: failures are survived and named, finished labs are not run again, pages load nothing."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import threading
import time

import jsonschema
import pytest
from nbformat import write
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from labkit.course import beside, labs, report, run
from labkit.course.watch import end, watch
from labkit.types import LabkitError

FIGURE = """from IPython.display import display
bars = {"type": "bar", "x": ["</script>", "b"], "y": [1, n]}
figure = {"data": [bars], "layout": {"meta": {"alt": "Two bars & more"}}}
table = "<table><caption>numbers</caption></table>"
display({"application/vnd.plotly.v1+json": figure, "text/html": table, "text/plain": "alt"}, raw=True)"""
PANEL = "import ipywidgets\nipywidgets.IntSlider(description='bits')"


def notebook(path, *cells):
    first = [
        new_markdown_cell("# A lab\n\n[next](../02_other/01_next.ipynb) and [index](00_first.ipynb#All-labs)", id="title"),
        new_code_cell(
            'profile: str = "ci"  # how long\nn: int = 3  # a number',
            id="parameters",
            metadata={"tags": ["parameters"]},
        ),
    ]
    code = [new_code_cell(source, id=f"c{i}") for i, source in enumerate(cells)]
    write(new_notebook(cells=first + code, metadata={}), path)


@pytest.fixture
def course(tmp_path, monkeypatch):
    """A course of our own; call it with the cells of each lab."""
    root = tmp_path / "course"
    root.mkdir()
    monkeypatch.setenv("LABKIT_NOTEBOOKS", str(root))
    monkeypatch.setenv("LABKIT_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)

    def make(**notebooks):
        for name, cells in notebooks.items():
            notebook(root / f"{name.removeprefix('lab')}.ipynb", *cells)
        return root

    return make


def states(outcome):
    return {lab["lab"]: lab["status"] for lab in outcome.results["labs"]}


def test_a_run_survives_dead_cells_and_names_them(course, tmp_path):
    course(
        lab00_first=[FIGURE, PANEL, "open('/no/such/file7')", "print('still', n)"],
        lab01_dies=["x = 1", "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)"],
        lab02_fine=["import os\nprint(os.getcwd())", "import os\nfrom labkit import host\nassert host.waiting('short').items() <= os.environ.items()"],
    )
    outcome = run.run(parameters={"n": "5"}, headline=False)
    assert states(outcome) == {"00": "failed", "01": "died", "02": "passed"} and not outcome.passed
    first, dead, fine = outcome.results["labs"]
    assert [(f["cell"], f["signature"]) for f in first["failed"]] == [
        ("c2", "FileNotFoundError: [Errno <n>] No such file or directory: '<path>'")
    ]
    assert dead["failed"][0]["cell"] == "c1" and "probably out of memory: limit" in dead["failed"][0]["message"]
    assert 0 < fine["peak_bytes"] < 1e9 and fine["network"] == [] and fine["seconds"] > 0
    assert json.loads((outcome.folder / "results.json").read_text()) == outcome.results
    jsonschema.validate(outcome.results, json.loads((run.PACKAGE / "data/results.schema.json").read_text()))
    pages = {p.name: p.read_text() for p in outcome.folder.glob("*.html")}
    assert "still 5" in pages["00.html"] and "#cell-id=c2" in pages["index.html"] and 'id="cell-id=c2"' in pages["00.html"]
    assert str(outcome.folder / "work" / "02" / "here") in pages["02.html"]
    _check_figure(pages["00.html"])
    assert all("http" not in load for page in pages.values() for load in loads(page))
    assert (outcome.folder / "assets" / "plotly.min.js").stat().st_size > 1e6


def loads(page):
    """What a browser would fetch for a page: scripts, styles, images, frames."""
    tags = re.findall(r"<(?:script|link|img|iframe|source|video|object|embed)\b[^>]*", page)
    return [u for tag in tags for u in re.findall(r"(?:src|href|data)\s*=\s*[\"']?([^\"'\s>]+)", tag)] + re.findall(
        r"url\(([^)]+)\)", page
    )


def _check_figure(page):
    from bs4 import BeautifulSoup

    soup = BeautifulSoup(page, "html.parser")
    figure = soup.find(class_="labkit-figure")
    assert figure.find(role="img")["aria-label"] == "Two bars & more" and figure.caption.text == "numbers"
    assert json.loads(figure.find("script").string)["data"][0]["x"] == ["</script>", "b"]
    assert soup.find(class_="note").text.startswith("An interactive panel")
    links = {a.get("href") for a in soup.find(id="main").find_all("a")}
    assert {"index.html", "00.html#All-labs"} <= links


@pytest.fixture
def counted(monkeypatch):
    """Labs as they are run, without a kernel: the list of their ids. A lab whose source says `fail` fails."""
    ran = []

    def run_lab(lab, parameters, folder, timeout, solutions=False, stop=None):
        ran.append(lab.id)
        text = lab.path.read_text()
        (folder / f"{lab.key}.ipynb").write_text(text)
        status = "failed" if '"fail"' in text else "passed"
        return {"lab": lab.id, "title": "A lab", "notebook": lab.relative.as_posix(), "seconds": 1.0, "when": "now",
                "peak_bytes": 1, "disk_bytes": 1, "network": [], "status": status,
                "executed": f"{lab.key}.ipynb", "html": f"{lab.key}.html", "failed": [], "exercises": {},
                "cells": 1}  # fmt: skip

    monkeypatch.setattr(run, "run_lab", run_lab)
    return ran


def test_finished_labs_are_not_run_again_until_something_changes(course, counted, monkeypatch):
    root = course(lab00_first=["1"], lab01_bad=["fail"])
    run.run(headline=False)
    run.run(headline=False)
    assert counted == ["00", "01", "01"], "a failed lab is tried again, a passed one is not"
    counted.clear()
    changes = {
        "parameter": lambda: run.run(["00"], headline=False, parameters={"n": 4}),
        "notebook": lambda: notebook(root / "00_first.ipynb", "2"),
        "page": lambda: labs.Path("reports/ci/00.html").unlink(),
        "package": lambda: monkeypatch.setattr(run, "_package", lambda: "another"),
        "force": lambda: run.run(["00"], headline=False, force=True),
    }
    for what, change in changes.items():
        change()
        run.run(["00"], headline=False)
        assert counted, f"a changed {what} must run the lab again"
        counted.clear()
        run.run(["00"], headline=False)
        assert counted == []


def test_an_interrupted_run_keeps_what_was_finished(course, counted, monkeypatch):
    course(lab00_first=["1"], lab01_next=["2"], lab02_last=["3"])
    real = run.run_lab

    def interrupted(lab, *rest):
        if lab.id == "01":
            raise KeyboardInterrupt
        return real(lab, *rest)

    monkeypatch.setattr(run, "run_lab", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run.run(headline=False)
    monkeypatch.setattr(run, "run_lab", real)
    assert [lab["lab"] for lab in run.run(headline=False).results["labs"]] == ["00", "01", "02"]
    assert counted == ["00", "01", "02"]


def _command(*more):
    """`labkit run` in a process of its own; the package counts as unchanged, also while somebody edits it."""
    program = "import sys; from labkit.course import run; run._package = str; from labkit.cli import main; sys.exit(main())"
    return [sys.executable, "-c", program, "run", "--no-headline", "--out", "out", *more]


def test_a_killed_run_loses_nothing_finished_and_leaves_nothing_running(course, tmp_path):
    import psutil

    course(lab00_first=["1"], lab01_slow=["import time; time.sleep(60)"], lab02_last=["2"])
    process = psutil.Popen(_command(), stderr=subprocess.PIPE, text=True)
    try:
        for line in process.stderr:
            if line.startswith("01"):
                break
        time.sleep(1.5)  # its kernel is up
        below = process.children(recursive=True)
        process.send_signal(signal.SIGKILL if hasattr(signal, "SIGKILL") else signal.SIGTERM)
        process.wait(10)
    finally:
        end(process)
    saved = json.loads((tmp_path / "out/results.json").read_text())
    assert [lab["lab"] for lab in saved["labs"]] == ["00"] and saved["finished"] is None
    assert psutil.wait_procs(below, timeout=20)[1] == [], "the kernel ends with the run"
    course(lab01_slow=["1"])
    again = subprocess.run(_command("--json"), capture_output=True, text=True)
    assert again.returncode == 0 and "00             unchanged" in again.stderr
    assert [lab["lab"] for lab in json.loads(again.stdout)["labs"]] == ["00", "01", "02"]


def test_the_second_run_is_at_least_twenty_times_faster(course):
    course(lab00_first=["import time; time.sleep(3)"], lab01_next=["import time; time.sleep(3)"])
    took = []
    for _ in range(2):
        start = time.perf_counter()
        run.run(headline=False)
        took.append(time.perf_counter() - start)
    assert took[0] / took[1] >= 20, took


@pytest.mark.parametrize(("cell", "status"), [("1", 0), ("1 / 0", 1)])
def test_the_exit_status_says_whether_every_lab_passed(course, cell, status):
    course(lab00_first=[cell])
    assert subprocess.run(_command(), capture_output=True).returncode == status


def test_a_request_that_cannot_be_met_exits_with_two(course, capsys):
    from labkit import cli

    course(lab00_first=["1"])
    for arguments in (["09"], ["--workers", "0"], ["--timeout", "0"], ["-p", "n", "many"]):
        assert cli.main(["run", "--no-headline", *arguments]) == 2
    assert capsys.readouterr().err.count("labkit: ") == 4


@pytest.fixture
def together(monkeypatch):
    """Labs that only wait for each other: the set of labs seen running at once, for each moment one started."""
    seen, now, lock = [], set(), threading.Lock()

    def work(lab, stop):
        with lock:
            now.add(lab.id)
            seen.append(frozenset(now))
        stop.wait(0.3)
        with lock:
            now.discard(lab.id)
        return {"lab": lab.id}

    monkeypatch.setattr("labkit.host.available_memory", lambda: 10_000)
    monkeypatch.setattr(beside, "needed_memory", lambda lab: 6_000 if "big" in lab.path.stem else 3_000)
    return work, seen


def test_labs_run_side_by_side_within_the_memory_and_those_that_measure_speed_alone(course, together):
    work, seen = together
    root = course(
        lab00_a=["1"], lab01_b=["2"], lab02_big=["3"], lab03_clock=["import time\nt = time.perf_counter()"], lab04_c=["4"]
    )
    done = {lab.id: alone for lab, _, alone in beside.side_by_side(labs.labs(root), work, 3)}
    assert set(done) == {"00", "01", "02", "03", "04"} and done["03"] and not done["00"]
    assert max(map(len, seen)) == 3 and all(len(s) == 1 for s in seen if "03" in s)
    assert all(sum(6_000 if one == "02" else 3_000 for one in s) <= 10_000 for s in seen)


def test_one_worker_keeps_the_order_and_everything_alone(course, together):
    work, seen = together
    root = course(lab00_a=["1"], lab01_b=["2"])
    assert [(lab.id, alone) for lab, _, alone in beside.side_by_side(labs.labs(root), work, 1)] == [("00", True), ("01", True)]
    assert max(map(len, seen)) == 1


def test_two_labs_at_once_keep_their_results_apart(course):
    course(lab00_first=["print('zero', n)"], lab01_next=["print('one', n)\n1 / 0"])
    outcome = run.run(headline=False, workers=2)
    assert (
        states(outcome) == {"00": "passed", "01": "failed"} and [lab["alone"] for lab in outcome.results["labs"]] == [False] * 2
    )
    assert "zero 3" in (outcome.folder / "00.html").read_text() and "one 3" in (outcome.folder / "01.html").read_text()


def test_an_interrupt_ends_the_labs_that_run(course):
    root = course(lab00_first=["1"], lab01_next=["2"])
    ended = []

    def work(lab, stop):
        if lab.id == "01":
            raise KeyboardInterrupt
        ended.append(stop.wait(20))
        return {}

    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        list(beside.side_by_side(labs.labs(root), work, 2))
    assert ended == [True] and time.monotonic() - start < 10


def test_running_one_lab_does_not_forget_the_others(course, counted):
    course(lab00_first=["1"], lab01_next=["2"])
    run.run(headline=False)
    assert [lab["lab"] for lab in run.run(["01"], headline=False, force=True).results["labs"]] == ["01"]
    run.run(headline=False)
    assert counted == ["00", "01", "01"]


def test_a_process_that_hangs_is_ended_with_all_its_children():
    import psutil

    inner = "import time; time.sleep(77)"
    outer = f"import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', {inner!r}]).pid, flush=True); {inner}"
    process = psutil.Popen([sys.executable, "-c", outer], stdout=subprocess.PIPE, text=True)
    grandchild = int(process.stdout.readline())
    seen, late = watch(process, time.monotonic() + 0.5)
    assert late == "time" and seen.peak_bytes > 0 and process.poll() is not None
    assert not psutil.pid_exists(grandchild) or psutil.Process(grandchild).status() == psutil.STATUS_ZOMBIE


def test_a_lab_stopped_by_the_clock_names_its_running_cell(tmp_path):
    cells = [new_code_cell("1", id="a", metadata={"papermill": {"start_time": "t"}}), new_code_cell("2", id="b")]
    write(new_notebook(cells=cells), tmp_path / "x.ipynb")
    verdict = run._verdict(tmp_path / "x.ipynb", tmp_path, 10, 60.0, False)
    assert verdict["status"] == "timed out"
    assert verdict["failed"] == [{"cell": "a", "index": 0, "signature": "timed out", "message": "Stopped after 60 s."}]


def test_a_solution_that_does_not_pass_fails_the_lab(course, monkeypatch):
    root = course(lab00_first=['import labkit\nlabkit.check("00.1", lambda weights, bits: 7)'])
    monkeypatch.setattr(labs, "folder", lambda solutions=False: root)
    outcome = run.run(headline=False, solutions=True)
    assert outcome.results["labs"][0]["exercises"] == {"00.1": "not yet"}
    assert outcome.results["labs"][0]["failed"][0]["message"] == "Not passed: 00.1 not yet."


def test_a_run_does_not_touch_the_learners_progress(course, tmp_path):
    course(lab00_first=['import labkit\nlabkit.check("00.1", ...)'])
    run.run(headline=False)
    assert not (tmp_path / "home" / "progress.json").exists()


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({"m": "1"}, "no.* parameter 'm'|has a parameter 'm'; they have n, profile"),
        ({"n": "many"}, "Parameter n takes int, got 'many'"),
    ],
)
def test_bad_parameters_are_one_sentence_and_nothing_runs(course, tmp_path, parameters, said):
    course(lab00_first=["1"])
    with pytest.raises(LabkitError, match=said):
        run.run(parameters=parameters, headline=False)
    assert not (tmp_path / "reports").exists()


def test_a_notebook_that_is_not_json_is_one_sentence(course):
    root = course(lab00_first=["1"])
    (root / "01_broken.ipynb").write_text("{ not json")
    with pytest.raises(LabkitError, match=r"01_broken\.ipynb is not a readable notebook"):
        run.run(["01"], headline=False)


def test_the_watcher_sees_memory_of_grandchildren():
    import psutil

    inner = "x = bytearray(b'1') * 150_000_000; import time; time.sleep(1.5)"
    middle = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}])"
    outer = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {middle!r}])"
    process = psutil.Popen([sys.executable, "-c", outer], stdin=subprocess.DEVNULL)
    try:
        seen, late = watch(process, time.monotonic() + 30)
    finally:
        end(process)
    assert not late and 150e6 < seen.peak_bytes < 400e6


def test_report_assets_are_written_once(tmp_path):
    report.write_assets(tmp_path)
    before = (tmp_path / "assets" / "plotly.min.js").stat().st_mtime_ns
    report.write_assets(tmp_path)
    assert (tmp_path / "assets" / "plotly.min.js").stat().st_mtime_ns == before
    assert ".highlight" in (tmp_path / "assets" / "code.css").read_text()

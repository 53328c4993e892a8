"""Running labs: failures are survived and named, finished labs are not run again, pages load nothing."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time

import pytest
from nbformat import write
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from labkit.course import labs, report, run
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
        new_markdown_cell(
            "# A lab\n\n[next](../02_other/01_next.ipynb) and [index](00_first.ipynb#All-labs)", id="title"
        ),
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
        lab02_fine=["import os\nprint(os.getcwd())", "import os\nassert os.environ['OMP_WAIT_POLICY'] == 'PASSIVE'"],
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
    pages = {p.name: p.read_text() for p in outcome.folder.glob("*.html")}
    assert (
        "still 5" in pages["00.html"] and "#cell-id=c2" in pages["index.html"] and 'id="cell-id=c2"' in pages["00.html"]
    )
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

    def run_lab(lab, parameters, folder, timeout, solutions=False):
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


def test_running_one_lab_does_not_forget_the_others(course, counted):
    course(lab00_first=["1"], lab01_next=["2"])
    run.run(headline=False)
    assert [lab["lab"] for lab in run.run(["01"], headline=False, force=True).results["labs"]] == ["01"]
    run.run(headline=False)
    assert counted == ["00", "01", "01"]


def test_a_process_that_hangs_is_ended_with_all_its_children():
    import psutil

    inner = "import time; time.sleep(77)"
    outer = (
        f"import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', {inner!r}]).pid, flush=True); {inner}"
    )
    process = psutil.Popen([sys.executable, "-c", outer], stdout=subprocess.PIPE, text=True)
    grandchild = int(process.stdout.readline())
    seen, late = watch(process, time.monotonic() + 0.5)
    assert late and seen.peak_bytes > 0 and process.poll() is not None
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

"""Learners' copies of the labs, the links in them, and a real JupyterLab that serves them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from urllib.error import URLError
from urllib.parse import unquote
from urllib.request import Request, urlopen

import nbformat
import pytest

from labkit import cli
from labkit.course import copies
from labkit.course.labs import editions, folder

ROOT = Path(__file__).parents[1]


def dangling(root: Path) -> list[str]:
    """Links in notebooks below `root` that lead to no file inside it."""
    found = []
    for lab in editions(root):
        cells = [cell.source for cell in nbformat.read(lab.path, 4).cells if cell.cell_type == "markdown"]
        for link in re.findall(r"\]\(([^)\s]+)\)|(?:href|src)=[\"']([^\"']+)", "\n".join(cells)):
            link = link[0] or link[1]
            if re.match(r"https?:|mailto:|#|data:", link):
                continue
            target = (lab.path.parent / unquote(link.partition("#")[0])).resolve()
            if link.startswith("/") or not target.is_relative_to(root.resolve()) or not target.is_file():
                found.append(f"{lab.relative}: {link}")
    return found


def test_links_work_in_the_course_and_in_the_copies(tmp_path: Path):
    assert dangling(folder()) == []
    copies.fill(tmp_path / "work")
    assert dangling(tmp_path / "work") == []
    (tmp_path / "work" / "00_start_here.ipynb").unlink()
    assert dangling(tmp_path / "work") != []  # the check sees a lab that is gone


def small_course(folder: Path) -> Path:
    for name in ("00_start_here.ipynb", "module04_quantization/01_foundations.ipynb", "glossary.md", ".hidden/x.ipynb"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f'{{"cells": [], "of": "{name}"}}')
    return folder


def test_copies_follow_updates_until_they_are_worked_in(tmp_path: Path):
    course, work = small_course(tmp_path / "course"), tmp_path / "work"
    assert len(copies.fill(work, course)) == 3 and copies.fill(work, course) == [] and not (work / ".hidden").exists()
    (work / "00_start_here.ipynb").write_text("mine")
    for name in ("00_start_here.ipynb", "module04_quantization/01_foundations.ipynb"):
        (course / name).write_text("new edition")
    assert copies.fill(work, course) == [work / "module04_quantization/01_foundations.ipynb"]
    assert (work / "00_start_here.ipynb").read_text() == "mine"
    assert not list(tmp_path.rglob(".partial-*"))


def test_new_gives_a_copy_and_keeps_what_was_done_in_it(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setenv("LABKIT_NOTEBOOKS", str(small_course(tmp_path / "course")))
    monkeypatch.chdir(tmp_path)
    for lab in ("00", "module04/01", "module04/01"):  # one that was copied along is nobody's work yet
        assert cli.main(["new", lab]) == 0
    copy = Path(capsys.readouterr().out.splitlines()[-1])
    assert copy == tmp_path / "work/module04_quantization/01_foundations.ipynb"
    copy.write_text("mine")
    assert cli.main(["new", "module04/01"]) == 2 and copy.read_text() == "mine"
    assert cli.main(["new", "module04/01", "--force"]) == 0 and copy.read_text() != "mine"


def test_new_for_a_learner_writes_the_seed(tmp_path: Path, monkeypatch, capsys):
    course = small_course(tmp_path / "course")
    parameters = nbformat.v4.new_code_cell("seed: int = 0  # yours", metadata={"tags": ["parameters"]})
    nbformat.write(nbformat.v4.new_notebook(cells=[parameters]), course / "00_start_here.ipynb")
    monkeypatch.setenv("LABKIT_NOTEBOOKS", str(course))
    monkeypatch.chdir(tmp_path)
    assert cli.main(["new", "00", "--learner", "ana"]) == 0
    (cell,) = nbformat.read(tmp_path / "work" / "00_start_here.ipynb", 4).cells
    assert re.fullmatch(r"seed: int = [1-9]\d*  # yours", cell.source)
    assert copies.fill(tmp_path / "work", course) == []  # an update does not take the seed away


@pytest.mark.skipif(sys.platform == "win32", reason="Windows ends a process without letting JupyterLab stop its kernels.")
def test_labkit_lab_serves_the_copies_with_this_environments_kernel(tmp_path: Path, home: Path):
    """A real JupyterLab, and a user who has another kernel called python3."""
    wrong = tmp_path / "user" / "kernels" / "python3"
    wrong.mkdir(parents=True)
    (wrong / "kernel.json").write_text(json.dumps({"argv": ["/elsewhere/python"], "display_name": "wrong", "language": "python"}))
    env = os.environ | {"JUPYTER_DATA_DIR": str(tmp_path / "user"), "JUPYTER_CONFIG_DIR": str(tmp_path / "config"),
                        "JUPYTER_RUNTIME_DIR": str(tmp_path / "runtime"), "PYTHONPATH": str(ROOT), "NO_PROXY": "127.0.0.1"}  # fmt: skip
    command = [sys.executable, "-m", "labkit", "lab", "module04/01", "--no-browser", "--ServerApp.port=0",
               "--ServerApp.ip=127.0.0.1", "--IdentityProvider.token=secret", "--allow-root"]  # fmt: skip
    log = tmp_path / "log"
    with log.open("w") as said:
        child = subprocess.Popen(command, cwd=tmp_path, env=env, stdout=said, stderr=said, start_new_session=True)
    try:
        url = wait_for_server(tmp_path / "runtime", child, log)
        kernels = ask(url, "api/kernelspecs")["kernelspecs"]
        program = kernels["python3"]["spec"]["argv"][0]
        assert program == "python" or Path(program).parent == Path(sys.executable).parent  # a bare one is the server's own
        for name in ("00_start_here.ipynb", "module04_quantization/01_foundations.ipynb"):
            assert ask(url, f"api/contents/{name}?content=0")["type"] == "notebook"
        assert "/lab/tree/module04_quantization/01_foundations.ipynb" in log.read_text()
    finally:
        os.killpg(child.pid, signal.SIGTERM)
        child.wait(timeout=30)
    assert (tmp_path / "work" / "00_start_here.ipynb").is_file()


def wait_for_server(runtime: Path, child: subprocess.Popen, log: Path) -> str:
    for _ in range(300):
        for file in runtime.glob("jpserver-*.json"):
            try:
                url = json.loads(file.read_text())["url"]
                ask(url, "api/status")
                return url
            except (ValueError, URLError, ConnectionError):
                pass  # half written, or not listening yet
        assert child.poll() is None, log.read_text()
        time.sleep(0.2)
    raise AssertionError(f"JupyterLab did not answer within a minute: {log.read_text()[-2000:]}")


def ask(url: str, what: str) -> dict:
    with urlopen(Request(f"{url}{what}", headers={"Authorization": "token secret"}), timeout=20) as answer:
        return json.load(answer)

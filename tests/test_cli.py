"""The command line: thin, honest about failure, one JSON object at the end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import fake_engine
import pytest

from labkit import __version__, cli, engines
from labkit._files import locked
from labkit.clean import clean
from labkit.types import LabkitError

REPO = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def fake(monkeypatch: pytest.MonkeyPatch, home: Path):
    monkeypatch.setattr(engines, "ENGINES", engines.ENGINES)
    monkeypatch.setitem(sys.modules, "labkit.engines.fake", fake_engine)
    fake_engine.install()


def call(capsys: pytest.CaptureFixture, *arguments: str) -> tuple[int, str, str]:
    status = cli.main(arguments)
    said = capsys.readouterr()
    return status, said.out, said.err


def program(*arguments: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "PYTHONPATH": str(REPO)}
    return subprocess.run([sys.executable, "-m", "labkit", *arguments], env=env, text=True, capture_output=True)


def test_help_is_quick_and_light():
    code = (
        "import sys; from labkit.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'pandas', 'plotly', 'tokenizers', 'jinja2', 'huggingface_hub',\n"
        "         'onnxruntime', 'llama_cpp', 'openvino', 'mlx', 'IPython', 'papermill', 'tqdm'}\n"
        "sys.exit(repr(sorted(heavy & set(sys.modules))) if heavy & set(sys.modules) else 0)\n"
    )
    env = {**os.environ, "PYTHONPATH": str(REPO)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in ("build", "measure", "run", "test", "lab", "new", "doctor", "models", "clean", "report", "house"):
        assert f"\n    {name} " in done.stdout


def test_the_module_is_the_program():
    done = program("--version")
    assert (done.returncode, done.stdout) == (0, f"labkit {__version__}\n")


def test_build_says_one_json_object(capsys, tiny_llama: Path, tmp_path: Path):
    out = tmp_path / "built"
    arguments = ["build", str(tiny_llama), "--engine", "fake", "--precision", "F16", "-o", "group=32",
                 "-o", "kind=round", "--out", str(out)]  # fmt: skip
    status, said, _ = call(capsys, *arguments, "--json")
    made = json.loads(said)
    assert status == 0 and said.count("\n") == 1
    assert made["artifact"] == str(out) and made["precision"] == "f16" and made["bits_per_weight"] == 16.0
    assert made["options"] == {"group": 32, "kind": "round"} and made["notes"] == ["norms are kept in float16"]
    status, said, _ = call(capsys, *arguments)
    assert status == 0 and "16.000 bits per weight" in said and "note: norms are kept in float16" in said


def test_what_the_user_gets_wrong_is_one_sentence_and_status_2(capsys, tiny_llama: Path):
    wrong = ["build", str(tiny_llama), "--engine", "fake", "--precision", "q9"]
    status, said, complaint = call(capsys, *wrong)
    assert (status, said) == (2, "") and complaint.startswith("labkit: Fake Engine has no precision 'q9'")
    status, said, _ = call(capsys, *wrong, "--json")
    assert status == 2 and json.loads(said)["error"].startswith("Fake Engine has no precision")
    status, _, complaint = call(capsys, "build", "nowhere", "--engine", "fake", "--precision", "f16")
    assert status == 2 and "No checkpoint 'nowhere'" in complaint
    status, _, complaint = call(capsys, *wrong[:-1], "f16", "-o", "group")
    assert status == 2 and "expected NAME=VALUE" in complaint


def test_no_traceback_from_the_real_program(home: Path):
    done = program("build", "nowhere", "--engine", "fake", "--precision", "f16")
    assert done.returncode == 2 and done.stdout == "" and "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1


def test_interrupted(capsys, tiny_llama: Path, home: Path):
    status, _, complaint = call(capsys, "build", str(tiny_llama), "--engine", "fake", "--precision", "stopped")
    assert (status, complaint) == (130, "labkit: interrupted\n")
    assert not list(home.rglob("artifact.json")) and not list(home.rglob(".partial-*"))


@pytest.fixture
def artifact(tiny_llama: Path, capsys) -> str:
    status, said, _ = call(capsys, "build", str(tiny_llama), "--engine", "fake", "--precision", "f16", "--json")
    assert status == 0
    return json.loads(said)["artifact"]


def test_measure_and_save(capsys, artifact: str, home: Path):
    status, said, _ = call(capsys, "measure", artifact, "--metric", "size", "--save", "--json")
    result = json.loads(said)
    assert status == 0 and result["schema"] == 1 and result["metric"] == "size"
    assert result["artifact"]["engine"] == "fake" and result["summary"]
    assert len((home / "ledger.jsonl").read_text().splitlines()) == 1
    status, said, _ = call(capsys, "measure", artifact, "--metric", "size")
    assert status == 0 and "Size of the weights" in said


def test_measure_refuses(capsys, artifact: str):
    for arguments, sentence in [
        ([artifact, "--metric", "charm"], "No metric 'charm'; expected one of size"),
        ([artifact, "--metric", "size", "--n", "3"], "size takes no --n"),
        ([artifact, "--metric", "divergence"], "divergence needs --reference DIR"),
        (["/nowhere", "--metric", "size"], "holds no artifact.json"),
    ]:
        status, _, complaint = call(capsys, "measure", *arguments)
        assert status == 2 and sentence in complaint


def test_models(capsys):
    status, said, _ = call(capsys, "models")
    assert status == 0 and "standin:phi-4-mini" in said and "3,836.0 M" in said and "Apache-2.0" in said
    status, said, _ = call(capsys, "models", "--context", "100", "--json")
    rows = {row["name"]: row for row in json.loads(said)["models"]}
    assert rows["standin:smollm2-135m"]["cache_bytes"] == 2 * 30 * 3 * 64 * 100 * 2


def test_new_copies_a_lab_and_keeps_your_work(capsys, tmp_path: Path, monkeypatch):
    course = tmp_path / "course" / "module04_quantization"
    course.mkdir(parents=True)
    (course / "02_llamacpp.ipynb").write_text('{"cells": []}')
    monkeypatch.setenv("LABKIT_NOTEBOOKS", str(course.parent))
    into = ["new", "module04/02", "--into", str(tmp_path / "work")]
    status, said, _ = call(capsys, *into, "--json")
    copy = Path(json.loads(said)["notebook"])
    assert status == 0 and copy == tmp_path / "work/module04_quantization/02_llamacpp.ipynb"
    copy.write_text("mine")
    status, _, complaint = call(capsys, *into)
    assert status == 2 and "is there already" in complaint and copy.read_text() == "mine"
    assert call(capsys, *into, "--force")[0] == 0 and copy.read_text() != "mine"


def test_arguments_for_pytest_and_jupyterlab_are_handed_on(tmp_path: Path, monkeypatch):
    (tmp_path / "course").mkdir()
    (tmp_path / "course" / "00_start_here.ipynb").write_text('{"cells": []}')
    monkeypatch.setenv("LABKIT_NOTEBOOKS", str(tmp_path / "course"))
    monkeypatch.chdir(tmp_path)
    ran = []
    finished = SimpleNamespace(returncode=5)
    monkeypatch.setattr(subprocess, "run", lambda command, **_: ran.append(command[2:]) or finished)
    for given in (["test"], ["test", "-k", "x", "--json"], ["lab", "--no-browser"], ["lab", "00", "--port", "1"]):
        assert cli.main(given) == 5
    where = [f"--ServerApp.root_dir={tmp_path / 'work'}", "--LabApp.default_url=/lab/tree/00_start_here.ipynb"]
    assert ran == [["pytest"], ["pytest", "-k", "x", "--json"], ["jupyterlab", *where, "--no-browser"],
                   ["jupyterlab", *where, "--port", "1"]]  # fmt: skip


def test_run_and_report(capsys, tmp_path: Path, monkeypatch):
    from nbformat import write
    from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

    parameters = new_code_cell('profile: str = "ci"\nn: int = 3', metadata={"tags": ["parameters"]})
    for name, source in [("00_fine", "print('n is', n)"), ("01_wrong", "1 / 0")]:
        cells = [new_markdown_cell(f"# {name}"), parameters, new_code_cell(source)]
        (tmp_path / "course").mkdir(exist_ok=True)
        write(new_notebook(cells=cells), tmp_path / "course" / f"{name}.ipynb")
    monkeypatch.setenv("LABKIT_NOTEBOOKS", str(tmp_path / "course"))
    monkeypatch.chdir(tmp_path)
    status, said, _ = call(capsys, "run", "00", "-p", "n", "7", "--no-headline", "--json")
    page = Path(json.loads(said)["report"])
    assert status == 0 and page == tmp_path / "reports" / "ci" / "index.html" and page.exists()
    assert "n is 7" in (page.parent / "00.html").read_text()
    page.unlink()
    assert call(capsys, "report")[:2] == (0, f"{page}\n") and page.exists()
    status, said, _ = call(capsys, "run", "01", "--no-headline")
    assert status == 1 and said.strip().endswith(f"Report: {page}")
    status, _, complaint = call(capsys, "run", "99")
    assert status == 2 and "There is no lab '99'" in complaint
    status, _, complaint = call(capsys, "run", "00", "-p", "n", "many")
    assert status == 2 and "Parameter n takes int" in complaint


def test_report_without_a_run(capsys, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, _, complaint = call(capsys, "report")
    assert status == 2 and "make one with `labkit run`" in complaint


def test_clean_frees_what_can_be_made_again(capsys, artifact: str, home: Path):
    (home / "ledger.jsonl").write_text("{}\n")
    (home / "progress.json").write_text("{}")
    (home / "checkpoints" / "standin-x").mkdir(parents=True)
    (home / "checkpoints" / "standin-x" / "w").write_bytes(b"12345")
    left = home / "artifacts" / "tiny-llama" / ".partial-other-1"
    left.mkdir()
    status, said, _ = call(capsys, "clean", "--dry-run", "--json")
    told = json.loads(said)
    assert status == 0 and set(told["removed"]) == {artifact, str(left)} and Path(artifact).exists()
    status, said, _ = call(capsys, "clean", "--partial")
    assert not left.exists() and Path(artifact).exists()
    status, said, _ = call(capsys, "clean")
    assert not Path(artifact).exists() and "freed" in said and (home / "checkpoints" / "standin-x").exists()
    call(capsys, "clean", "--checkpoints")
    assert not (home / "checkpoints" / "standin-x").exists()
    assert (home / "ledger.jsonl").exists() and (home / "progress.json").exists()


def test_clean_leaves_what_is_being_built(home: Path, tmp_path: Path):
    building = home / "artifacts" / "m" / ".partial-fake-f16-12ab34cd-77"
    building.mkdir(parents=True)
    fetching = home / "checkpoints" / "acme--tiny" / ".partial-0123"
    fetching.mkdir(parents=True)
    code = (
        "import sys; from pathlib import Path; from labkit._files import locked\n"
        "with locked(Path(sys.argv[1])), locked(Path(sys.argv[2])):\n"
        "    print('held', flush=True); sys.stdin.read()\n"
    )
    locks = [building.parent / ".lock-fake-f16-12ab34cd", fetching.parent.parent / ".lock-acme--tiny"]
    holder = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, locks)], env={**os.environ, "PYTHONPATH": str(REPO)}, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert holder.stdout.readline() == "held\n"
        assert clean(("partial", "artifacts", "checkpoints")) == [] and building.exists() and fetching.exists()
    finally:
        holder.communicate()
    with locked(locks[0]):
        pass
    assert {path for path, _ in clean()} == {building, fetching}
    with pytest.raises(LabkitError, match="Cannot clean 'everything'"):
        clean(("everything",))


def test_a_reader_that_leaves_early(home: Path):
    env = {**os.environ, "PYTHONPATH": str(REPO)}
    child = subprocess.Popen(
        [sys.executable, "-m", "labkit", "models"], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    child.stdout.close()
    assert b"Traceback" not in child.stderr.read() and child.wait() == 0

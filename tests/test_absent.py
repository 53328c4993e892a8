"""Labs where an engine is absent: cells that need it are skipped with a sentence, all others run, real errors stay errors."""

from __future__ import annotations

import ast
from pathlib import Path

import nbformat
import pytest

from labkit.course import run
from labkit.course.absent import EXCUSED, SHOW, Skipper
from labkit.types import LabkitError, NotInstalled

PACKAGES = {
    "llamacpp": "llama_cpp_python,llama_cpp,gguf", "onnxruntime": "onnxruntime_genai,onnxruntime,onnx,onnx_ir,onnxscript,olive_ai,olive",
    "openvino": "openvino,openvino_genai,openvino_tokenizers,nncf", "mlx": "mlx,mlx_lm",
}  # fmt: skip


@pytest.fixture
def cells(capsys):
    """`cells(source, ...)` runs cells one after the other as a kernel without an engine would; returns what they printed."""
    space = {"NotInstalled": NotInstalled, "LabkitError": LabkitError}
    skipper = Skipper(space)
    space |= {SHOW: print, EXCUSED: skipper.excused}

    def run_all(*sources):
        for source in sources:
            exec(compile(skipper.visit(ast.parse(source)), "cell", "exec"), space)
        return capsys.readouterr().out

    return run_all


def test_a_cell_that_needs_the_engine_is_skipped_and_so_is_what_comes_from_it(cells):
    said = cells("import no_such_engine as engine\nx = engine.open()", "y = x + 1", "y * 2", "z = 3\nz + 1")
    assert said.splitlines() == [
        "Skipped: no_such_engine is not installed here.", "Skipped: x comes from a cell that was skipped.",
        "Skipped: y comes from a cell that was skipped.", "4",
    ]  # fmt: skip


def test_what_a_skipped_cell_began_is_not_used(cells):
    said = cells("w = 2", "rows = {}\nfor name in ('a',):\n    import no_such_engine\n    rows[name] = [w for w in (1,)]", "rows['a']", "w")
    assert said.splitlines()[1:] == ["Skipped: rows comes from a cell that was skipped.", "2"]


def test_a_sentence_of_labkit_is_passed_on_also_from_within_another_error(cells):
    assert cells("raise NotInstalled('X is not installed. Try:  pip install x')") == "Skipped: X is not installed. Try:  pip install x\n"
    wrapped = "try:\n    import no_such_engine\nexcept ImportError as error:\n    raise LabkitError('could not build') from error"
    assert "no_such_engine" in cells(wrapped)


@pytest.mark.parametrize("source", ["1 / 0", "unknown_name", "raise LabkitError('No precision q9.')", "import labkit.no_such_module"])
def test_any_other_error_stays_one(cells, source):
    with pytest.raises((ZeroDivisionError, NameError, LabkitError, ModuleNotFoundError)):
        cells(source)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("lab", "engine"), [("module04/04", "openvino"), ("module04/05", "mlx"), ("phi_family/01", "llamacpp"), ("phi_family/02", "onnxruntime")]
)
def test_a_lab_runs_without_its_engine(lab, engine, tmp_path, monkeypatch):
    monkeypatch.setenv("LABKIT_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("LABKIT_WITHOUT", PACKAGES[engine])
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent / "without"))
    monkeypatch.delenv("LABKIT_NOTEBOOKS", raising=False)
    outcome = run.run([lab], out=tmp_path / "out", headline=False)
    (record,) = outcome.results["labs"]
    assert record["status"] == "passed", record["failed"]
    notebook = nbformat.read(outcome.folder / record["executed"], as_version=4)
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    said = [output.get("text") or output.get("data", {}).get("text/plain", "") for output in outputs]
    assert any("is not installed" in text for text in said) and set(record["exercises"].values()) == {"not started"}

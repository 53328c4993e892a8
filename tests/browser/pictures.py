"""Makes README's pictures from what the browser shows: `python tests/browser/pictures.py` writes three PNG files into images/.

They are taken in a real JupyterLab: the first lab is run, its slider moved with the keyboard, a question answered.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

from lab_browser import ROOT, Notebook, browser, jupyter, missing, watched_page
from nbformat import write
from nbformat.v4 import new_code_cell, new_notebook

from labkit.course import labs

LARGEST = 300_000  # bytes of one picture
MATRIX = (
    "import labkit\nfrom labkit import panels\n"
    'weights = labkit.checkpoint("edgehome").tensors()["model.layers.0.mlp.up_proj.weight"]\n'
    "panels.matrix(weights, bits=4, group=32)"
)


def main() -> int:
    """Take the pictures; exit status 1 with a sentence where there is no browser."""
    if reason := missing():
        print(reason, file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as folder:
        desk, home = Path(folder, "desk"), Path(folder, "home")
        desk.mkdir()
        (desk / "00_start_here.ipynb").write_bytes(labs.find("00").path.read_bytes())
        kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
        write(new_notebook(cells=[new_code_cell(MATRIX, id="matrix")], metadata=kernel), desk / "matrix.ipynb")
        with jupyter(desk, home) as lab, browser() as one:
            for file in (matrix_panel(one, lab, desk), *first_lab(one, lab, desk)):
                print(f"{file.relative_to(ROOT)}: {file.stat().st_size / 1e3:.0f} kB")
    return 0


def matrix_panel(one: Any, lab: str, desk: Path) -> Path:
    """One weight matrix at three bits."""
    page, _ = watched_page(one, 1240, 1000)
    notebook = Notebook(page, lab, desk / "matrix.ipynb")
    notebook.run_all()
    panel = notebook.output("matrix")
    panel.get_by_role("slider", name="bits a code").focus()
    page.keyboard.press("ArrowRight")
    panel.get_by_role("status").filter(has_text="at 3 bits").wait_for()
    return _take(panel, "panel")


def first_lab(one: Any, lab: str, desk: Path) -> list[Path]:
    """The whole model's slider inside JupyterLab, and an answered question of the quiz."""
    page, _ = watched_page(one, 1240, 1000)
    notebook = Notebook(page, lab, desk / "00_start_here.ipynb")
    notebook.run_all()
    panel = notebook.output("panel")
    panel.get_by_role("slider", name="precision").focus()
    page.keyboard.press("End")
    panel.get_by_text("q2_k answers in").wait_for()
    notebook.cell("panel").evaluate("cell => cell.scrollIntoView({block: 'start'})")
    whole = _take(page, "jupyterlab")
    question = notebook.output("quiz").locator(".labkit-question").first
    question.get_by_role("radio").first.check()
    question.get_by_role("button", name="Check").click()
    question.get_by_role("status").filter(has_text=".").wait_for()
    return [whole, _take(question, "quiz")]


def _take(place: Any, name: str) -> Path:
    page = getattr(place, "page", place)
    page.mouse.move(0, 0)  # no cell toolbar in the picture
    page.wait_for_timeout(1000)  # plotly draws a moment after its numbers
    file = ROOT / "images" / f"{name}.png"
    taken = place.screenshot()
    if len(taken) > LARGEST:
        raise SystemExit(f"{file.name} would take {len(taken)} bytes; README's pictures take {LARGEST} at most.")
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(taken)
    return file


if __name__ == "__main__":
    raise SystemExit(main())

"""A learner's first lab in a real JupyterLab: run, move the slider, answer the quiz, fail and pass, without a mouse too."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from lab_browser import WAIT, Notebook, picture, violations, watched_page
from nbformat import write
from nbformat.v4 import new_code_cell, new_notebook

from labkit import i18n
from labkit.course import report

playwright = pytest.importorskip("playwright.sync_api", reason='Playwright is not installed. Try:  pip install "labkit[test]"')
pytestmark = pytest.mark.timeout(480)
playwright.expect.set_options(timeout=1e3 * WAIT)
expect = playwright.expect

PANELS = {
    "weights": "import numpy as np\nfrom labkit import panels\nw = np.random.default_rng(0).normal(0, 0.02, (256, 256))",
    "view": "panels.matrix_view(w, bits=4)",
    "matrix": "panels.matrix(w, bits=4)",
    "quiz": "import labkit\nlabkit.quiz('module04/01')",
}


@pytest.fixture(scope="module")
def opened(chromium, lab, desk, browser_home):
    """(notebook, what went wrong so far) of a learner's own copy of the first lab, all cells run."""
    command = [sys.executable, "-m", "labkit", "new", "00", "--into", str(desk)]
    subprocess.run(command, check=True, capture_output=True, timeout=WAIT)
    yield from _opened(chromium, lab, desk / "00_start_here.ipynb")


@pytest.fixture(scope="module")
def opened_panels(chromium, lab, desk):
    """The same for a notebook that holds the panels of later labs."""
    cells = [new_code_cell(source, id=name) for name, source in PANELS.items()]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    write(new_notebook(cells=cells, metadata=kernel), desk / "panels.ipynb")
    yield from _opened(chromium, lab, desk / "panels.ipynb")


def _opened(chromium, lab: str, file: Path):
    page, seen = watched_page(chromium)
    try:
        notebook = Notebook(page, lab, file)
        notebook.run_all()
        yield notebook, seen
    except Exception:
        picture(page, f"failed-to-open-{file.stem}")
        raise
    finally:
        page.context.close()


def _checked(opened, request):
    """Hand out the notebook, and look afterwards at what the page did behind its back."""
    notebook, seen = opened
    yield notebook
    picture(notebook.page, request.node.name)
    errors, foreign = list(seen.errors), list(seen.foreign)
    seen.errors.clear()
    seen.foreign.clear()
    assert not errors, f"the browser's console says: {errors}"
    assert not foreign, f"the page asked other machines: {foreign}"


@pytest.fixture
def start_here(opened, request):
    yield from _checked(opened, request)


@pytest.fixture
def panels(opened_panels, request):
    yield from _checked(opened_panels, request)


def focused(page) -> str:
    """The element the keyboard acts on: its role or tag, and its name."""
    return page.evaluate(
        "() => { const e = document.activeElement; return (e.getAttribute('role') || e.tagName.toLowerCase()) + ' ' + "
        "(e.getAttribute('aria-label') || (e.labels && e.labels[0] || e).textContent); }"
    )


# --- the first lab -----------------------------------------------------------------------------------------------


def test_every_cell_ran(start_here):
    page = start_here.page
    failed = page.locator('.jp-OutputArea-output[data-mime-type="application/vnd.jupyter.error"]')
    assert failed.count() == 0, failed.first.text_content()
    expect(start_here.output("start").locator("table.labkit-start")).to_contain_text("profile ci")
    expect(start_here.output("ex1-check")).to_contain_text("not started")


def test_a_figure_stands_beside_its_words_and_numbers(start_here):
    shown = start_here.output("chart")
    expect(shown.locator(".js-plotly-plot .point").first).to_be_visible()
    assert shown.locator(".modebar-btn").count() == 0, "buttons nobody can tell apart, one of which uploads the figure"
    words = shown.locator("details.labkit-words")
    expect(words.locator("table")).to_be_hidden()
    words.locator("summary").focus()
    start_here.page.keyboard.press("Enter")
    expect(words.locator("caption")).to_contain_text("the files shrink to the left")
    expect(words.locator("tbody tr")).to_have_count(4)


def ladder(notebook):
    """Slider handle, figure, words and reply of the panel of the whole model."""
    panel = notebook.output("panel")
    words = panel.get_by_role("status")
    return panel.get_by_role("slider", name="precision"), panel.locator(".js-plotly-plot"), words.nth(1), words.nth(0)


def marked(figure) -> str:
    """Where the figure's line for the chosen precision runs, as drawn."""
    return figure.locator(".shapelayer path").first.get_attribute("d")


def test_the_precision_slider_moves_with_the_mouse(start_here):
    handle, figure, words, reply = ladder(start_here)
    expect(words).to_contain_text("q8_0: ")
    before, line = words.inner_text(), marked(figure)
    track = start_here.output("panel").locator(".noUi-base").bounding_box()
    grip = handle.bounding_box()
    mouse = start_here.page.mouse
    mouse.move(grip["x"] + grip["width"] / 2, grip["y"] + grip["height"] / 2)
    mouse.down()
    mouse.move(track["x"] + track["width"], grip["y"] + grip["height"] / 2, steps=8)
    mouse.up()
    expect(words).to_contain_text("q2_k: ")
    expect(reply).to_contain_text("q2_k answers in")
    assert words.inner_text() != before
    expect(figure.locator(".shapelayer path").first).not_to_have_attribute("d", line)
    picture(start_here.output("panel"), "ladder")


def test_the_precision_slider_moves_with_the_keyboard(start_here):
    handle, figure, words, reply = ladder(start_here)
    handle.focus()
    start_here.page.keyboard.press("Home")
    expect(reply).to_contain_text("f16 answers in")
    line = marked(figure)
    start_here.page.keyboard.press("ArrowRight")
    expect(words).to_contain_text("q8_0: ")
    expect(reply).to_contain_text("q8_0 answers in")
    assert json.loads(reply.locator("code").inner_text())["intent"], "a live reply of the trained model"
    expect(figure.locator(".shapelayer path").first).not_to_have_attribute("d", line)
    expect(handle).to_have_attribute("aria-valuetext", "q8_0")
    assert focused(start_here.page) == "slider precision", "the focus stays for the next step"


def test_a_quiz_is_answered_wrong_and_right(start_here):
    question = start_here.output("quiz").locator(".labkit-question").first
    said, check = question.get_by_role("status"), question.get_by_role("button", name="Check")
    options = question.get_by_role("radio")
    verdicts = []
    for number in range(options.count()):
        options.nth(number).check()
        before = said.inner_text()
        check.click()
        expect(said).not_to_have_text(before)
        verdicts.append(said.inner_text())
    right = [text.startswith("Right.") for text in verdicts]
    assert sum(right) == 1 and all(text.startswith(("Right.", "Not yet.")) and len(text) > 30 for text in verdicts), verdicts


def test_an_exercise_fails_and_then_passes(start_here):
    start_here.run("ex1", "def megabytes(weights, bits):\n    return weights * bits / 1e6")
    start_here.run("ex1-check")
    verdict = start_here.output("ex1-check")
    expect(verdict).to_contain_text("not yet")
    expect(verdict).to_contain_text("A new hint is open")
    start_here.run("ex1-hint")
    expect(start_here.output("ex1-hint")).to_contain_text("2 of 3 hints closed")
    start_here.run("ex1", "def megabytes(weights, bits):\n    return weights * bits / 8 / 1e6")
    start_here.run("ex1-check")
    expect(verdict).to_contain_text("passed")


@pytest.mark.parametrize("name", ["start", "chart", "panel-view", "panel", "quiz"])
def test_the_outputs_of_the_lab_are_accessible(start_here, name):
    start_here.output(name)
    assert violations(start_here.page, f'.jp-Cell[data-windowed-list-index="{start_here.place[name]}"] .jp-OutputArea') == []


# --- panels of later labs, by keyboard alone ---------------------------------------------------------------------


def test_every_control_of_the_matrix_panel_is_reached_and_moved_by_keyboard(panels):
    panel, keys = panels.output("matrix"), panels.page.keyboard
    said = panel.get_by_role("status")
    panel.get_by_role("slider", name="bits a code").focus()
    steps = [
        ("slider bits a code", "ArrowRight", "at 3 bits"),
        ("select one scale per", "ArrowUp", "each channel"),
        ("select one scale per", "ArrowDown", "each group of 32"),
        ("slider group size", "ArrowRight", "each group of 64"),
        ("select scheme", "ArrowDown", None),
    ]
    for control, key, expected in steps:
        for _ in range(4):
            if focused(panels.page).startswith(control):
                break
            keys.press("Tab")
        assert focused(panels.page).startswith(control)
        before = said.inner_text()
        keys.press(key)
        expect(said).not_to_have_text(before)
        if expected:
            expect(said).to_contain_text(expected)
    picture(panel, "matrix")


def test_a_question_with_several_right_answers_is_answered_by_keyboard(panels):
    keys = panels.page.keyboard
    question = panels.output("quiz").locator(".labkit-question").filter(has=panels.page.get_by_role("checkbox")).first
    expect(question.get_by_role("group")).to_have_attribute("aria-label", re.compile("Tick all that do"))
    question.get_by_role("checkbox").first.focus()
    keys.press("Space")
    expect(question.get_by_role("checkbox").first).to_be_checked()
    for _ in range(question.get_by_role("checkbox").count()):
        keys.press("Tab")
    keys.press("Enter")
    expect(question.get_by_role("status")).to_have_text(re.compile("Not yet|Right"))


def test_arrow_keys_move_between_the_options_of_a_question_and_nowhere_else(panels):
    question = panels.output("quiz").locator(".labkit-question").first
    question.get_by_role("radio").first.focus()
    panels.page.keyboard.press("Space")
    panels.page.keyboard.press("ArrowDown")
    expect(question.get_by_role("radio").nth(1)).to_be_checked()
    expect(question.get_by_role("radio").nth(1)).to_be_focused()


@pytest.mark.parametrize("name", ["view", "matrix", "quiz"])
def test_the_panels_are_accessible(panels, name):
    panels.output(name)
    assert violations(panels.page, f'.jp-Cell[data-windowed-list-index="{panels.place[name]}"] .jp-OutputArea') == []


# --- the language ------------------------------------------------------------------------------------------------


def test_the_language_changes_in_the_start_cell(start_here):
    shown, checked = start_here.output("start"), start_here.cell("ex2-check").locator(".jp-Cell-outputArea")
    choice = shown.get_by_role("combobox", name="Language / Idioma")
    expect(checked).to_contain_text("not started")
    choice.focus()
    try:
        start_here.page.keyboard.press("ArrowDown")
        expect(shown.locator("table.labkit-start")).to_contain_text("idioma")
        start_here.run("ex2-check")
        expect(checked).not_to_contain_text("not started")
        start_here.run("quiz")
        buttons = start_here.output("quiz").get_by_role("button")
        with i18n.speaking("pt_BR"):
            word = i18n.tr("Check")
        expect(buttons.first).to_have_text(word)
        assert word != "Check" and buttons.count() >= 5 and set(buttons.all_inner_texts()) == {word}
        picture(start_here.output("quiz"), "quiz-in-portuguese")
    finally:
        choice.select_option("English")
    expect(shown.locator("table.labkit-start")).to_contain_text("language")
    start_here.run("ex2-check")
    expect(checked).to_contain_text("not started")


# --- the page of the lab -----------------------------------------------------------------------------------------


def test_the_saved_lab_makes_an_accessible_page(start_here, chromium, desk, tmp_path):
    page, file = start_here.page, desk / "00_start_here.ipynb"
    before = file.stat().st_mtime_ns
    start_here.cell("ex2-check").locator(".jp-InputArea-prompt").click()
    page.keyboard.press("Control+s")
    deadline = time.monotonic() + WAIT
    while file.stat().st_mtime_ns == before and time.monotonic() < deadline:
        page.wait_for_timeout(200)
    shutil.copyfile(file, tmp_path / "00.ipynb")
    record = {"executed": "00.ipynb", "html": "00.html", "notebook": file.name, "title": "Start here", "failed": []}
    made, seen = watched_page(chromium, 1100, 900)
    try:
        made.goto(report.write_lab(tmp_path, record).as_uri())
        expect(made.locator(".plot svg.main-svg:first-of-type")).to_have_count(2)
        picture(made, "report-00")
        assert violations(made) == [] and not seen.errors and not seen.foreign
    finally:
        made.context.close()

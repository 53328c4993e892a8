"""The report of `labkit run`, opened from the disk as from a USB stick: drawn, complete, accessible, and silent."""

from __future__ import annotations

import pytest
from lab_browser import picture, violations, watched_page
from nbformat import write
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from labkit.course import report, run, sweep

pytestmark = pytest.mark.timeout(480)
CELLS = {
    "parameters": 'profile: str = "ci"  # how long',
    "start": 'import numpy as np\nimport pandas as pd\nimport labkit\nfrom labkit import bitchart, charts, panels\n\nlab = labkit.start("01")',
    "frame": (
        'model = labkit.checkpoint("edgehome")\n'
        'built = [labkit.build(model, labkit.Recipe("llamacpp", p)) for p in ("f16", "q8_0", "q2_k")]\n'
        "for one in built:\n"
        "    labkit.ledger().append(labkit.measure.size(one), labkit.measure.perplexity(one, limit=1),\n"
        "                           labkit.measure.divergence(one, built[0], limit=1))\n"
        'frame = labkit.ledger().frame(checkpoint="edgehome", engine="llamacpp")\n'
        "table = charts.headline(frame)"
    ),
    "size": 'labkit.show(charts.size_against_perplexity(frame), alt="Size against perplexity.", table=table)',
    "divergence": 'labkit.show(charts.bits_against_divergence(frame), alt="Bits against divergence.", table=table)',
    "ladder": "panels.ladder_view(frame)",
    "matrix": "w = np.random.default_rng(0).normal(0, 0.02, (64, 256))\npanels.matrix_view(w, bits=3)",
    "panel": "panels.matrix(w, bits=3)",
    "heatmap": 'labkit.show(charts.error_heatmap(w), alt="A map of errors.", table=pd.DataFrame(w).describe().iloc[:, :2])',
    "levels": 'labkit.show(charts.levels({"int2": [-2, -1, 0, 1]}), alt="Four levels.", table=table)',
    "quiz": "labkit.quiz('00')",
    "check": 'labkit.check("00.1", lambda weights, bits: weights)',
    "wide": "pd.DataFrame(w[:3, :40])",
    "long": 'print("a long line of words " * 30)\nlabkit.hint("00.1")',
    "broken": 'labkit.checkpoint("no-such-model")',
}


@pytest.fixture(scope="module")
def pages(tmp_path_factory, browser_home):
    """The folder of a report over a lab that shows every kind of output and then fails."""
    course, out = tmp_path_factory.mktemp("course"), tmp_path_factory.mktemp("report")
    cells = [new_markdown_cell("# Every figure", id="title")]
    cells += [new_code_cell(source, id=name) for name, source in CELLS.items()]
    cells[1].metadata["tags"] = ["parameters"]
    write(new_notebook(cells=cells), course / "01_every_figure.ipynb")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LABKIT_NOTEBOOKS", str(course))
        patch.setenv("LABKIT_HOME", str(browser_home))
        (record,) = run.run(out=out, headline=False).results["labs"]
    assert record["status"] == "failed" and [one["cell"] for one in record["failed"]] == ["broken"], record["failed"]
    return out


def _open(chromium, file):
    page, seen = watched_page(chromium, 1100, 900)
    page.goto(file.as_uri())
    return page, seen


@pytest.mark.parametrize("name", ["index", "01"])
def test_a_page_is_accessible_and_asks_nobody(chromium, pages, name):
    page, seen = _open(chromium, pages / f"{name}.html")
    try:
        figures = page.locator(".labkit-figure")
        drawn = page.locator(".labkit-figure .plot svg.main-svg:first-of-type")
        page.wait_for_function("() => [...document.querySelectorAll('.plot')].every(plot => plot.querySelector('svg'))")
        assert figures.count() == drawn.count() == {"index": 0, "01": 6}[name]
        for figure in figures.all():
            assert figure.locator(".plot[role=img]").get_attribute("aria-label") and figure.locator("table caption").inner_text()
        picture(page, f"report-{name}")
        assert violations(page) == []
        assert not seen.errors and not seen.foreign
    finally:
        page.context.close()


def test_nothing_of_the_page_is_cut_off(chromium, pages):
    for name in ("index", "01"):
        page, _ = _open(chromium, pages / f"{name}.html")
        try:
            assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), name
            cut = page.locator("pre, #main > table").evaluate_all(
                "all => all.filter(e => e.scrollWidth > e.clientWidth + 1).length"
            )
            assert cut == 0, name
        finally:
            page.context.close()


def test_the_index_says_its_notes_below_the_table_and_long_ones_on_demand(chromium, pages, tmp_path):
    results = {"labs": [], "profile": "ci", "memory_method": "PSS", "labkit": "1", "started": "", "finished": ""}
    results["host"] = {"cpus": 1, "memory_limit_bytes": 1}
    rows = [
        sweep._row("llama.cpp", p, note=note) for p, note in (("a", "Short."), ("b", ""), ("c", "word " * 400), ("d", "Short."))
    ]
    page, _ = _open(chromium, report.write_index(tmp_path, results | {"headline": rows}))
    try:
        cells = page.locator("table").first.locator("tbody td:nth-child(2)").all_inner_texts()
        assert cells == ["a [1]", "b", "c [2]", "d [1]"]
        notes = page.locator("ol.notes > li")
        assert notes.count() == 2 and not notes.nth(1).locator("p").is_visible()
        notes.nth(1).locator("summary").focus()
        page.keyboard.press("Enter")
        assert notes.nth(1).locator("p").inner_text().count("word") == 400
        assert violations(page) == []
    finally:
        page.context.close()


def test_a_wide_table_scrolls_with_the_keyboard(chromium, pages):
    page, _ = _open(chromium, pages / "01.html")
    try:
        table = page.locator("#main table[tabindex='0']").last
        table.focus()
        for _ in range(3):
            page.keyboard.press("ArrowRight")
        page.wait_for_function("table => table.scrollLeft > 0", arg=table.element_handle())
    finally:
        page.context.close()


def test_the_first_tab_skips_to_the_content_and_figures_are_no_trap(chromium, pages):
    page, _ = _open(chromium, pages / "01.html")
    try:
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.getAttribute('href')") == "#main"
        assert page.locator(".plot button, .plot [tabindex='0']").count() == 0
    finally:
        page.context.close()

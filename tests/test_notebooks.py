"""The labs themselves: their shape, that learners' notebooks are fresh, and a real run of each, undone and solved.

The labs are run once for the learner who did nothing and once for the solution; all other tests read what came out.
"""

from __future__ import annotations

import ast
import json
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from labkit import __version__
from labkit.course import exercises, generate, labs, quizzes, run
from labkit.course import parameters as given_to

ROOT = Path(__file__).resolve().parents[1]
SOURCES, LEARNERS = ROOT / "tests" / "solutions", ROOT / "notebooks"
TAGS = {
    "parameters",
    "exercise",
    "solution",
    "check",
    "hint",
    "quiz",
    "interactive",
    "nbval-check-output",
    "skip-execution",
    "slow",
}
REPORT = ROOT / "reports" / "ci"  # of README's first command, if it was run here
PEAK = 2e9  # bytes, kernel and children together
PLOTLY = "application/vnd.plotly.v1+json"
IDS = [lab.id for lab in labs.labs(SOURCES)]


def source(lab_id):
    return nbformat.read(labs.find(lab_id, SOURCES).path, as_version=4)


def tags(cell):
    return cell.metadata.get("tags", [])


def tagged(notebook, tag):
    return [cell for cell in notebook.cells if tag in tags(cell)]


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


# --- shape -------------------------------------------------------------------------------------------------------


def test_learners_notebooks_are_fresh():
    stale = generate.generate(SOURCES, LEARNERS, check=True)
    assert not stale, f"run  python -m labkit.course.generate  ({', '.join(map(str, stale))})"


@pytest.mark.parametrize("lab_id", IDS)
def test_notebook_files_are_clean(lab_id):
    for root in (SOURCES, LEARNERS):
        notebook = nbformat.read(labs.find(lab_id, root).path, as_version=4)
        nbformat.validate(notebook)
        assert notebook.nbformat_minor >= 5
        ids = [cell.id for cell in notebook.cells]
        assert len(set(ids)) == len(ids) and all(re.fullmatch(r"[a-z][a-z0-9-]*", one) for one in ids), "ids are words"
        for cell in notebook.cells:
            assert set(tags(cell)) <= TAGS, f"{cell.id}: {tags(cell)}"
            assert set(cell.metadata) <= {"tags"}, f"{cell.id}: {dict(cell.metadata)}"
        assert not any(cell.outputs or cell.execution_count for cell in code(notebook)), "committed with outputs"


@pytest.mark.parametrize("lab_id", IDS)
def test_a_lab_has_the_shape_of_a_lab(lab_id):
    notebook = source(lab_id)
    first, last = notebook.cells[0], notebook.cells[-1]
    heads = [
        line
        for cell in notebook.cells
        if cell.cell_type == "markdown"
        for line in cell.source.splitlines()
        if line.startswith("# ")
    ]
    assert len(heads) == 1 and first.source.startswith("# ")
    assert first.source.count("<!-- labkit:facts -->") == first.source.count("<!-- labkit:links -->") == 1
    assert "<!-- labkit:links -->" in last.source
    goals = re.findall(r"^[-*] (\w+)", first.source, re.M)
    assert 3 <= len(goals) <= 5, f"{len(goals)} goals"
    cells = code(notebook)
    assert tags(cells[0]) == ["parameters"] and len(tagged(notebook, "parameters")) == 1
    assert f'labkit.start("{lab_id}")' in cells[1].source


@pytest.mark.parametrize("lab_id", IDS)
def test_parameters_are_typed_literals_with_help(lab_id):
    lab = labs.find(lab_id, SOURCES)
    cell = tagged(source(lab_id), "parameters")[0]
    for line, node in zip(cell.source.splitlines(), ast.parse(cell.source).body, strict=True):
        assert isinstance(node, ast.AnnAssign) and node.value is not None, line
        ast.literal_eval(node.value)
        given_to.typed(node.target.id, ast.literal_eval(node.value), ast.unparse(node.annotation))
    found = given_to.declared(lab)
    assert found["profile"]["default"] == '"ci"' and all(one["help"] for one in found.values())


@pytest.mark.parametrize("lab_id", IDS)
def test_cells_are_small(lab_id):
    notebook = source(lab_id)
    plain = [cell for cell in code(notebook) if not {"solution", "parameters"} & set(tags(cell))]
    lines = [sum(bool(line.strip()) for line in cell.source.splitlines()) for cell in plain]
    assert statistics.median(lines) <= 6 and max(lines) <= 20, sorted(zip(lines, [c.id for c in plain], strict=True))[
        -3:
    ]
    texts = [
        cell for cell in notebook.cells[1:-1] if cell.cell_type == "markdown" and "labkit:index" not in cell.source
    ]
    words = {cell.id: len(re.findall(r"\w+", cell.source)) for cell in texts}
    assert statistics.median(words.values()) <= 35 and max(words.values()) <= 80, sorted(
        words.items(), key=lambda w: w[1]
    )[-3:]


@pytest.mark.parametrize("lab_id", IDS)
def test_figures_go_through_labkit_and_panels_have_a_twin(lab_id):
    notebook = source(lab_id)
    for cell in code(notebook):
        for banned in (".show(renderer", "fig.show(", "FigureWidget", "plt.", "iplot(", "interact("):
            assert banned not in cell.source, f"{cell.id}: {banned}"
        if "panels." in cell.source and "_view(" not in cell.source:
            assert "interactive" in tags(cell), f"{cell.id} holds a panel"
    for cell in tagged(notebook, "interactive"):
        if "quiz" in tags(cell):  # labkit.quiz shows its own text form first
            continue
        before = code(notebook)[code(notebook).index(cell) - 1]
        assert "_view(" in before.source, f"{cell.id}: the cell before must call the static twin"


@pytest.mark.parametrize("lab_id", IDS)
def test_exercises_checks_hints_and_quiz_belong_together(lab_id):
    notebook = source(lab_id)
    prefix = (
        lab_id if "/" not in lab_id else f"{lab_id.split('/')[0].removeprefix('module')}.{int(lab_id.split('/')[1])}"
    )
    checked = re.findall(r'labkit\.check\("([^"]+)"', "\n".join(c.source for c in tagged(notebook, "check")))
    registered = [name for name in exercises.exercises() if name.rpartition(".")[0] == prefix]
    assert sorted(checked) == sorted(registered) and len(checked) >= 5
    hinted = re.findall(r'labkit\.hint\("([^"]+)"', "\n".join(c.source for c in tagged(notebook, "hint")))
    assert set(hinted) <= set(checked)
    assert all({"exercise", "solution"} <= set(tags(c)) for c in notebook.cells if "exercise" in tags(c))
    assert any(f'labkit.quiz("{lab_id}")' in c.source for c in tagged(notebook, "quiz"))
    assert len(quizzes.read(lab_id).questions) >= 5


@pytest.mark.parametrize("lab_id", IDS)
def test_links_lead_somewhere(lab_id):
    lab = labs.find(lab_id, LEARNERS)
    for cell in nbformat.read(lab.path, as_version=4).cells:
        for target in re.findall(r"\]\(([^)\s]+)\)", cell.source) if cell.cell_type == "markdown" else []:
            if target.startswith(("http://", "https://")):
                continue
            file, _, anchor = target.partition("#")
            path = (lab.path.parent / file).resolve() if file else lab.path
            assert path.exists(), f"{cell.id}: {target}"
            if anchor:
                heads = re.findall(r"^#+ (.+)$", "\n".join(c.source for c in nbformat.read(path, 4).cells), re.M)
                assert anchor in [head.strip().replace(" ", "-") for head in heads], f"{cell.id}: {target}"


@pytest.mark.parametrize("lab_id", IDS)
def test_text_needs_no_formula_renderer(lab_id):
    for cell in source(lab_id).cells:
        if cell.cell_type == "markdown":
            assert "$$" not in cell.source and "\\frac" not in cell.source, (
                f"{cell.id}: the report has no MathJax; write it as text"
            )


def test_versions_agree():
    for lab in labs.labs(LEARNERS):
        about = json.loads(lab.path.read_text(encoding="utf-8"))["metadata"]["labkit"]
        assert about == {"lab": lab.id, "version": __version__}


# --- a real run --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """One home for both runs, so that the second finds what the first built."""
    return tmp_path_factory.mktemp("home")


def _run(home, out, **options):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LABKIT_HOME", str(home))
        patch.delenv("LABKIT_NOTEBOOKS", raising=False)
        return run.run(out=out, headline=False, **options)


@pytest.fixture(scope="session")
def undone(home, tmp_path_factory):
    """Every lab as the learner who did nothing leaves it; those that `labkit run` just ran are not run again."""
    folder = tmp_path_factory.mktemp("undone") / "report"
    if (REPORT / "results.json").exists():
        shutil.copytree(REPORT, folder, ignore=shutil.ignore_patterns("work"))
    return _run(home, folder)


@pytest.fixture(scope="session")
def solved(home, undone, tmp_path_factory):
    """Every lab with its solutions."""
    return _run(home, tmp_path_factory.mktemp("solved"), solutions=True)


def _record(outcome, lab_id):
    return next(lab for lab in outcome.results["labs"] if lab["lab"] == lab_id)


def _executed(outcome, lab_id):
    return nbformat.read(outcome.folder / _record(outcome, lab_id)["executed"], as_version=4)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("lab_id", IDS)
def test_the_learner_who_did_nothing_reaches_the_end(undone, lab_id):
    lab = _record(undone, lab_id)
    assert lab["status"] == "passed", lab["failed"]
    assert set(lab["exercises"].values()) == {"not started"} and len(lab["exercises"]) >= 5


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("lab_id", IDS)
def test_the_solution_passes_every_check(solved, lab_id):
    lab = _record(solved, lab_id)
    assert lab["status"] == "passed", lab["failed"]
    assert set(lab["exercises"].values()) == {"passed"} and len(lab["exercises"]) >= 5


@pytest.mark.slow
@pytest.mark.parametrize("lab_id", IDS)
def test_labs_stay_within_memory_and_off_the_network(undone, solved, lab_id):
    for outcome in (undone, solved):
        lab = _record(outcome, lab_id)
        assert 0 < lab["peak_bytes"] < PEAK and lab["network"] == []


@pytest.mark.slow
@pytest.mark.parametrize("lab_id", IDS)
def test_cells_marked_deterministic_say_the_same_twice(undone, solved, lab_id):
    first, second = (
        {c.id: _shown(c) for c in _executed(outcome, lab_id).cells if "nbval-check-output" in tags(c)}
        for outcome in (undone, solved)
    )
    assert first == second


def _shown(cell):
    return [output.get("text") or output.get("data", {}).get("text/plain") for output in cell.outputs]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_nbval_finds_the_same_outputs_again(solved, home, tmp_path):
    """nbval itself, on the shortest lab: outputs of the tagged cells must come again; other cells must run."""
    import os

    notebook = tmp_path / "00.ipynb"
    notebook.write_text((solved.folder / "00.ipynb").read_text(encoding="utf-8"), encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "nbval",
        "--nbval-lax",
        "-q",
        "-p",
        "no:cacheprovider",
        "-c",
        os.devnull,
        str(notebook),
    ]
    lab = labs.find("00", SOURCES)
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=run.environment(lab, tmp_path) | {"LABKIT_HOME": str(home)},
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    checked = len(tagged(source("00"), "nbval-check-output"))
    assert checked and re.search(r"\d+ passed", done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("lab_id", IDS)
def test_every_figure_has_words_and_numbers(solved, lab_id):
    figures = [o.data for c in code(_executed(solved, lab_id)) for o in c.outputs if PLOTLY in o.get("data", {})]
    assert figures, "a lab without a picture"
    for data in figures:
        assert len(data[PLOTLY]["layout"]["meta"]["alt"]) > 20
        assert (
            "<caption>" in data["text/html"] and "<th scope='col'>" in data["text/html"] and data["text/plain"].strip()
        )
    page = (solved.folder / _record(solved, lab_id)["html"]).read_text(encoding="utf-8")
    assert page.count("labkit-plotly") == len(figures)
    assert len(re.findall(r"aria-label=\"[^\"]{20,}\" class=\"plot\"", page)) == len(figures)


@pytest.mark.slow
def test_the_report_loads_nothing_from_elsewhere(solved):
    pages = list(solved.folder.glob("*.html"))
    assert len(pages) == len(IDS) + 1
    for page in pages:
        text = page.read_text(encoding="utf-8")
        for tag in re.findall(r"<(?:script|link|img|iframe|source|video|audio|object|embed)\b[^>]*>", text):
            assert not re.search(r"(?:src|href|data)\s*=\s*[\"']?(?:https?:)?//", tag), f"{page.name}: {tag[:200]}"
        for local in re.findall(r"<(?:script|link)\b[^>]*?(?:src|href)=[\"']([^\"']+)", text):
            assert (page.parent / local).exists(), f"{page.name}: {local}"
    for style in (solved.folder / "assets").glob("*.css"):
        assert "url(" not in style.read_text(encoding="utf-8") and "@import" not in style.read_text(encoding="utf-8")


@pytest.mark.slow
def test_links_between_pages_of_the_report_hold(solved):
    for page in solved.folder.glob("*.html"):
        for target in re.findall(r"<a\b[^>]*?href=[\"']([^\"'#]+)", page.read_text(encoding="utf-8")):
            if not target.startswith(("http:", "https:", "mailto:")):
                assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.slow
def test_a_second_run_does_nothing_again(undone, home, monkeypatch):
    monkeypatch.setattr(run, "run_lab", lambda *a: pytest.fail("a finished lab was run again"))
    again = _run(home, undone.folder)
    assert [lab["when"] for lab in again.results["labs"]] == [lab["when"] for lab in undone.results["labs"]]


def test_the_recorded_facts_are_of_every_lab():
    from labkit.course import facts

    known = facts.read()
    for lab_id in IDS:
        assert lab_id in known, (
            f"record a run: labkit run --solutions, then  python -m labkit.course.facts (lab {lab_id})"
        )
        assert 0 < known[lab_id]["peak_bytes"] < PEAK and known[lab_id]["network"] == "not used"

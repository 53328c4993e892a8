"""Exercises, hints, quizzes, progress, finding labs, generating notebooks."""

from __future__ import annotations

import json
import threading
import time

import nbformat
import numpy as np
import pytest

from labkit.course import compare, exercises, facts, generate, labs, progress, quizzes
from labkit.course import parameters as given_to
from labkit.course.compare import NotStarted, NotYet
from labkit.course.failures import failed_cells, signature
from labkit.types import LabkitError

NOTHING = [
    None,
    ...,
    0,
    1,
    -1,
    True,
    False,
    0.5,
    "",
    "x",
    b"",
    [],
    {},
    (),
    set(),
    np.zeros(8),
    np.zeros((4, 4)),
    np.ones(3),
    [...],
]


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("LABKIT_HOME", str(tmp_path))
    monkeypatch.delenv("LABKIT_PROGRESS", raising=False)
    return tmp_path


@pytest.fixture
def task(monkeypatch):
    """An exercise of our own, seen by `check` beside the course's."""

    def judge(answer):
        compare.close(answer, [1.0, 2.0, 3.0], what="the list")

    own = exercises.Exercise("99.1", "A list", judge, ("first", "second"), seconds=0.3)
    known = exercises.exercises() | {"99.1": own}
    monkeypatch.setattr(exercises, "exercises", lambda: known)
    return own


def stub(x):
    """A docstring does not make it an answer."""
    ...


def unfinished(x):
    scale = ...
    return scale


def refusing(x):
    raise NotImplementedError


@pytest.mark.parametrize("answer", [None, ..., stub, unfinished, refusing, [1, ...], {"a": None}, NotImplemented])
def test_an_untouched_stub_is_not_started(home, task, answer):
    verdict = exercises.check("99.1", answer)
    assert verdict.state == "not started" and not verdict
    assert progress.read()["exercises"]["99.1"]["attempts"] == 0


def test_a_wrong_answer_shows_the_first_difference_and_opens_one_hint_at_a_time(home, task):
    assert exercises.hint("99.1").lines == ()
    verdict = exercises.check("99.1", [1, 2.5, 4])
    assert verdict.state == "not yet"
    assert "2 of 3 values differ; first difference at 1: expected 2, got 2.5" in verdict.message
    assert exercises.hint("99.1").lines == ("first",)
    exercises.check("99.1", [1, 2])
    assert exercises.hint("99.1").lines == ("first", "second")
    assert exercises.check("99.1", [1, 2, 3])


def test_a_right_answer_stays_passed(home, task):
    assert exercises.check("99.1", np.array([1, 2, 3]))
    assert not exercises.check("99.1", [0, 0, 0])
    assert progress.read()["exercises"]["99.1"]["state"] == "passed"


def test_an_endless_answer_is_stopped(home, task, monkeypatch):
    slow = exercises.Exercise("99.2", "slow", lambda answer: answer(), (), seconds=0.2)
    monkeypatch.setattr(exercises, "_find", lambda name: slow)
    start = time.monotonic()
    verdict = exercises.judge("99.2", lambda: time.sleep(30))
    assert verdict.state == "not yet" and "0.2 s" in verdict.message
    assert time.monotonic() - start < 5


def test_an_unknown_exercise_names_the_ones_there_are(home, task):
    with pytest.raises(LabkitError, match=r"no exercise '99.7'.*99\.1"):
        exercises.check("99.7", 1)


def test_what_a_learner_writes_is_escaped(home, task):
    verdict = exercises.check("99.1", "<script>alert(1)</script>")
    assert "<script>" not in verdict._repr_html_()


@pytest.mark.parametrize("name", sorted(exercises.exercises()))
def test_no_check_is_passed_by_nothing_or_by_a_constant(name):
    task = exercises.exercises()[name]
    assert len(task.hints) <= exercises.HINTS and task.title
    for answer in NOTHING:
        assert exercises.judge(name, answer).state != "passed", f"{name} is passed by {answer!r}"
        assert exercises.judge(name, lambda *a, answer=answer, **k: answer).state != "passed", f"{name}: lambda: {answer!r}"
    assert exercises.judge(name, lambda *a, **k: a[0] if a else None).state != "passed", f"{name} is passed by the identity"


@pytest.mark.parametrize(
    ("answer", "expected", "said"),
    [
        (True, 1, "expected 1, got True"),
        (1, True, "expected True, got 1"),
        ("abd", "abc", "first difference at character 2"),
        ([1, 2], [1, 2, 3], "expected 3 items, got 2"),
        ({"a": 1}, {"a": 1, "b": 2}, "the key 'b' is missing"),
        ({"a": 1, "c": 0}, {"a": 1}, "the key 'c' was not expected"),
        ({"a": {"b": 2}}, {"a": {"b": 3}}, r"\['a'\]\['b'\]: expected 3, got 2"),
        ("1", 1, "expected int 1, got str '1'"),
    ],
)
def test_same_says_where_two_values_part(answer, expected, said):
    compare.same(expected, expected)
    with pytest.raises(NotYet, match=said):
        compare.same(answer, expected)


def test_close_compares_shape_and_tolerance():
    compare.close([1.0, np.nan], [1.0 + 1e-9, np.nan])
    compare.close(np.float32(0.5), 0.5)
    with pytest.raises(NotYet, match=r"expected shape \(2,\), got \(3,\)"):
        compare.close([1, 2, 3], [1, 2])
    with pytest.raises(NotYet, match=r"expected 1, got 1\.1"):
        compare.close(1.1, 1.0)
    with pytest.raises(NotYet, match=r"first difference at \(1, 0\)"):
        compare.close([[1, 2], [0, 4]], [[1, 2], [3, 4]])
    with pytest.raises(NotYet, match="expected numbers"):
        compare.close("one", 1)


def test_raw_bytes_draws_the_first_differing_byte():
    compare.raw_bytes(np.arange(4, dtype=np.uint8), bytes(range(4)))
    with pytest.raises(NotYet, match=r"byte 5 \(block 1, byte 1 of it\): expected 00000101, got 00000111"):
        compare.raw_bytes(bytes([0, 1, 2, 3, 4, 7]), bytes(range(6)), block=4)
    with pytest.raises(NotYet, match="one byte an element"):
        compare.raw_bytes(np.zeros(4), bytes(4))


def test_function_answers_are_called_on_copies():
    def spoils(x):
        x[:] = 0
        return x

    case = np.ones(3)
    with pytest.raises(NotYet):
        compare.function(spoils, lambda x: x, [(case,)])
    assert case.sum() == 3
    with pytest.raises(NotYet, match="raised ZeroDivisionError"):
        compare.function(lambda x: 1 / 0, lambda x: x, [(1,)])
    with pytest.raises(NotStarted):
        compare.function(stub, lambda x: x, [(1,)])


def test_an_index_with_dots_is_an_answer_not_a_stub():
    assert not exercises._has_dots(lambda a: a[..., 0])
    assert exercises._has_dots(unfinished)


def test_progress_survives_damage_and_keeps_the_damaged_file(home):
    progress.note("exercises", "1", state="passed")
    (home / "progress.json").write_text("{ half")
    assert progress.read()["exercises"] == {}
    assert (home / "progress.json.broken").read_text() == "{ half"


def test_two_notebooks_write_progress_at_once(home):
    def work(prefix):
        for i in range(10):
            progress.note("exercises", f"{prefix}{i}", state="passed")

    threads = [threading.Thread(target=work, args=(p,)) for p in "abc"]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert len(progress.read()["exercises"]) == 30


def test_progress_counts_what_is_passed_and_right_in_each_lab(home):
    import labkit

    exercises.check("00.1", lambda weights, bits: weights * bits / 8e6)
    exercises.check("00.2", lambda stored, weights: 0)
    (question, *_) = quizzes.read("module04/01").questions
    quizzes.answer(question, question.right)
    rows = {row.lab: row for row in labkit.progress().rows}
    assert set(rows) == {quizzes.read(file.stem).lab for file in quizzes.FOLDER.glob("*.json")}
    assert (rows["00"].passed, rows["00"].exercises, rows["00"].right) == (1, 5, 0)
    assert (rows["module04/01"].passed, rows["module04/01"].right) == (0, 1)
    assert sum(row.exercises for row in rows.values()) == len(exercises.exercises()), "an exercise belongs to no lab"
    assert "00: 1 of 5 exercises passed" in repr(labkit.progress())
    assert labkit.progress()._repr_html_().count("<tr>") == 1 + len(rows)


def _quiz(tmp_path, monkeypatch, options):
    monkeypatch.setattr(quizzes, "FOLDER", tmp_path)
    data = {"lab": "x/1", "questions": [{"id": "q", "ask": "A < B?", "options": options}]}
    (tmp_path / "x_1.json").write_text(json.dumps(data))
    return quizzes.read("x/1")


def test_quiz_answers_are_judged_and_explained(home, monkeypatch):
    options = [{"text": "yes", "right": True, "why": "because"}, {"text": "no", "why": "not so"}]
    question = _quiz(home, monkeypatch, options).questions[0]
    (right,) = question.right
    assert quizzes.answer(question, [1 - right]) == (False, "no: not so")
    assert quizzes.answer(question, [right]) == (True, "yes: because")
    assert progress.read()["quizzes"]["q"] | {"when": 0} == {"right": True, "tries": 2, "when": 0}
    assert quizzes.answer(question, []) == (False, "Choose an option first.")


def test_a_quiz_has_a_text_twin_with_every_explanation(home, monkeypatch):
    options = [
        {"text": "a", "right": True, "why": "w1"},
        {"text": "b", "right": True, "why": "w2"},
        {"text": "c", "why": "w3"},
    ]
    quiz = _quiz(home, monkeypatch, options)
    assert quiz.questions[0].many and repr(quiz).startswith("1. A < B?\n   a) ")
    assert sorted(line[-1] for line in repr(quiz).splitlines()[1:]) == ["a", "b", "c"]
    shown = quiz._repr_html_()
    assert "A &lt; B?" in shown and all(w in shown for w in ("w1", "w2", "w3")) and "<details" in shown


@pytest.mark.parametrize(
    "options",
    [
        [{"text": "a", "right": True, "why": "w"}],
        [{"text": "a", "why": "w"}, {"text": "b", "why": "v"}],
        [{"text": "a", "right": True, "why": " "}, {"text": "b", "why": "v"}],
    ],
)
def test_a_quiz_that_cannot_teach_is_refused(home, monkeypatch, options):
    with pytest.raises(LabkitError, match=r"x_1.json"):
        _quiz(home, monkeypatch, options)


@pytest.mark.parametrize("file", sorted(quizzes.FOLDER.glob("*.json")), ids=lambda p: p.stem)
def test_every_quiz_of_the_course(file):
    quiz = quizzes.read(file.stem)
    assert len(quiz.questions) >= 5 and quiz.lab.replace("/", "_") == file.stem
    ids = [q.id for q in quiz.questions]
    assert len(set(ids)) == len(ids)
    positions = [min(q.right) for q in quiz.questions]
    assert len(set(positions)) > 1, "the right option always stands in the same place"


def _course(tmp_path, files):
    for name in files:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        cell = nbformat.v4.new_markdown_cell(f"# Title of {path.stem}\n\n<!-- labkit:links -->", id="top")
        nbformat.write(nbformat.v4.new_notebook(cells=[cell]), path)
    return tmp_path


FILES = ["phi_family/01_llamacpp.ipynb", "module04_quantization/02_llamacpp.ipynb", "00_start_here.ipynb",
         "module04_quantization/01_foundations.ipynb", "module03_deployment/01_slm.ipynb"]  # fmt: skip


def test_labs_have_ids_order_and_neighbours(tmp_path):
    root = _course(tmp_path, FILES)
    found = labs.labs(root)
    assert [lab.id for lab in found] == ["00", "module03/01", "module04/01", "module04/02", "phi_family/01"]
    before, after = labs.neighbours(found[2])
    assert (before.id, after.id) == ("module03/01", "module04/02")
    assert labs.neighbours(found[0])[0] is None and labs.neighbours(found[-1])[1] is None


@pytest.mark.parametrize("name", ["module04/02", "module04_02", "module04_quantization/02_llamacpp",
                                  "notebooks/module04_quantization/02_llamacpp.ipynb"])  # fmt: skip
def test_a_lab_is_found_by_any_of_its_names(tmp_path, name):
    assert labs.find(name, _course(tmp_path, FILES)).id == "module04/02"


def test_an_unknown_lab_names_the_known_ones(tmp_path):
    with pytest.raises(LabkitError, match=r"no lab 'module09/01'.*module04/01"):
        labs.find("module09/01", _course(tmp_path, FILES))


def test_labs_are_looked_for_where_LABKIT_NOTEBOOKS_says(tmp_path, monkeypatch):
    monkeypatch.setenv("LABKIT_NOTEBOOKS", str(_course(tmp_path / "mine", FILES)))
    assert labs.folder() == (tmp_path / "mine").resolve()
    monkeypatch.setenv("LABKIT_NOTEBOOKS", str(tmp_path / "nowhere"))
    with pytest.raises(LabkitError, match=r"Cannot find the notebooks in .*nowhere"):
        labs.folder()


def test_a_stub_replaces_the_solution_and_keeps_the_rest():
    solution = "    # BEGIN SOLUTION\n    # STUB: return ...\n    y = x * 2\n    return y\n    # END SOLUTION\n"
    source = f"def f(x):\n{solution}\nf(3)"
    assert generate.stub(source) == "def f(x):\n    return ...\n\nf(3)"
    assert generate.stub("# BEGIN SOLUTION\nx = 1\n# END SOLUTION") == "..."
    with pytest.raises(LabkitError, match="END SOLUTION"):
        generate.stub("# BEGIN SOLUTION\nx = 1")


def test_generating_twice_changes_nothing_and_keeps_cell_ids(tmp_path):
    source = _course(tmp_path / "tests/solutions", FILES)
    path = source / FILES[3]
    notebook = nbformat.read(path, 4)
    tags = {"tags": ["exercise", "solution"]}
    cell = nbformat.v4.new_code_cell("# BEGIN SOLUTION\n# STUB: x = ...\nx = 1\n# END SOLUTION", id="ex1", metadata=tags)
    hidden = nbformat.v4.new_markdown_cell("why 1", id="why", metadata={"tags": ["solution"]})
    notebook.cells += [cell, hidden]
    nbformat.write(notebook, path)
    out = tmp_path / "notebooks"
    assert len(generate.generate(source, out)) == len(FILES) + 1  # and the glossary
    assert generate.generate(source, out) == [] and generate.generate(source, out, check=True) == []
    made = nbformat.read(out / FILES[3], 4)
    assert [c.id for c in made.cells] == ["top", "ex1"]
    assert made.cells[1].source == "x = ..." and made.cells[1].metadata.tags == ["exercise"]
    assert "[Previous: Title of 01_slm](../module03_deployment/01_slm.ipynb)" in made.cells[0].source
    assert "[Index](../00_start_here.ipynb#All-labs)" in made.cells[0].source
    (out / FILES[3]).write_text("{}")
    assert generate.generate(source, out, check=True) == [out / FILES[3]]


def test_facts_come_from_a_run(tmp_path, monkeypatch):
    monkeypatch.setattr(facts, "FILE", tmp_path / "facts.json")
    assert "No run" in facts.table("00")
    lab = {"lab": "00", "status": "passed", "when": "2026-01-02T03:04:05+00:00", "seconds": 12.34, "peak_bytes": 412e6,
           "disk_bytes": 3e6, "network": []}  # fmt: skip
    failed = lab | {"lab": "01", "status": "failed"}
    (tmp_path / "results.json").write_text(json.dumps({"profile": "ci", "host": {"cpus": 2}, "labs": [lab, failed]}))
    assert facts.record(tmp_path / "results.json") == ["00"]
    assert "| 12 s | 412 MB | 3 MB | not used |" in facts.table("00")
    with pytest.raises(LabkitError, match=r"not the results.json"):
        facts.record(tmp_path / "facts.json")


@pytest.mark.parametrize(
    ("value", "declared", "expected"),
    [("4", "int", 4), ("7", "str", "7"), ("true", "bool", True), ("2", "float", 2.0), (["a"], "list[str]", ["a"]),
     ("none", "str | None", "none"), ("['a', 'b']", "list[str]", ["a", "b"]), (None, "int | None", None)],
)  # fmt: skip
def test_parameters_become_their_declared_type(value, declared, expected):
    assert given_to.typed("p", value, declared) == expected


@pytest.mark.parametrize(
    ("value", "declared"), [("four", "int"), ("1.5", "int"), ("1", "bool"), (True, "int"), ("a", "list"), (3, "str")]
)
def test_a_parameter_of_the_wrong_type_is_one_sentence(value, declared):
    with pytest.raises(LabkitError, match=f"Parameter bits takes {declared}, got"):
        given_to.typed("bits", value, declared)


def test_failure_signatures_are_the_same_on_every_machine():
    one = signature("OSError", "cannot open /home/ana/x.gguf at 0x7f12ab (line 42)\nmore")
    two = signature("OSError", "cannot open /tmp/run/y/x.gguf at 0x55aa00 (line 7)\nother")
    assert one == two == "OSError: cannot open <path> at <address> (line <n>)"


def test_failed_cells_are_counted_without_what_papermill_adds():
    error = {"output_type": "error", "ename": "ValueError", "evalue": "no 7", "traceback": []}
    leave = {"output_type": "error", "ename": "SystemExit", "evalue": "0", "traceback": []}
    cells = [
        {"cell_type": "code", "id": "p", "metadata": {"tags": ["injected-parameters"]}, "outputs": [], "source": ""},
        {"cell_type": "code", "id": "a", "metadata": {}, "outputs": [leave], "source": ""},
        {"cell_type": "code", "id": "b", "metadata": {}, "outputs": [error], "source": ""},
    ]
    found = failed_cells({"cells": cells})
    assert [(f["cell"], f["index"], f["signature"]) for f in found] == [("b", 1, "ValueError: no <n>")]

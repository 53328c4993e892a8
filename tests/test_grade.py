"""Grading: points are right, verdicts cannot be forged, and no submission hurts, holds up or reads another."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import submissions

from labkit import Recipe, cli
from labkit.course import exercises, grade_inbox, grade_sandbox, variants
from labkit.course.grade import grade
from labkit.course.grade_sandbox import Limits
from labkit.course.grade_wire import Broken, Foreign, Peer

LINUX = sys.platform.startswith("linux")
pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows has neither limits nor signals to grade hostile notebooks with")
SCHEMA = Path(grade_sandbox.PACKAGE) / "data/grades.schema.json"
QUICK = Limits(memory_bytes=500_000_000, seconds=60, cell_seconds=2, disk_bytes=50_000_000)


@pytest.fixture
def course(tmp_path, monkeypatch):
    """A lab of three exercises; the folder that submissions go into."""
    monkeypatch.setenv("LABKIT_NOTEBOOKS", str(submissions.write_course(tmp_path / "course")))
    monkeypatch.setenv("LABKIT_HOME", str(tmp_path / "home"))
    return tmp_path / "submissions"


def graded(course, kinds, **options):
    """Grade one submission of each kind; (points by learner, points deserved, results)."""
    expected = submissions.write(course, len(kinds), places=str(course.parent), only=kinds)
    outcome = grade(course, course.parent / "out", limits=QUICK, **options)
    return {one["learner"]: one["points"] for one in outcome.results["learners"]}, expected, outcome


def record(outcome, kind):
    (one,) = [one for one in outcome.results["learners"] if one["learner"].endswith(f"-{kind}")]
    return one["labs"][0]


def test_a_class_gets_the_points_it_deserves_and_every_file_agrees(course):
    import jsonschema

    kinds = ["good", "half", "untouched", "not_json", "deep", "copied_cells", "reordered", "needs_later_cell", "no_checks",
             "no_metadata", "markup", "half_characters"]  # fmt: skip
    points, expected, outcome = graded(course, kinds)
    assert points == expected and outcome.complete
    results = json.loads((outcome.folder / "results.json").read_text())
    jsonschema.validate(results, json.loads(SCHEMA.read_text()), format_checker=jsonschema.FormatChecker())
    rows = list(csv.DictReader(io.StringIO((outcome.folder / "grades.csv").read_text(encoding="utf-8-sig"))))
    assert {row["learner"]: int(row["points"]) for row in rows} == expected
    assert all(int(row["00.1"]) + int(row["00.2"]) + int(row["00.5"]) == int(row["points"]) for row in rows)
    assert results["cohort"]["exercises"]["00.2"]["passed"] == sum(int(row["00.2"]) for row in rows)
    (page,) = [path.read_text() for path in (outcome.folder / "learners").glob("*-markup.html")]
    assert "<script>alert" not in page and "&lt;script&gt;alert" in page and "3 of 3 points" in page
    assert "not JSON" in (outcome.folder / "index.html").read_text()


def test_what_kills_hangs_or_floods_costs_only_itself(course):
    kinds = ["hangs", "exits", "eats_memory", "prints", "deletes", "fills_disk", "kills", "closes_the_line", "good"]
    points, expected, outcome = graded(course, kinds)
    assert points == expected, {one["learner"]: one["labs"][0]["notes"] for one in outcome.results["learners"]}
    assert record(outcome, "exits")["status"] == "cut short" and "Code cell 5" in record(outcome, "exits")["notes"][0]
    assert max(len(cell["said"]) for cell in record(outcome, "prints")["cells"]) < 30_000
    assert record(outcome, "good")["status"] == "graded"
    assert len(list(course.iterdir())) == len(kinds), "the submissions themselves are untouched"


@pytest.mark.skipif(not LINUX, reason="the number of processes of one submission is held down on Linux only")
def test_forks_and_what_they_leave_behind_are_ended(course):
    import psutil

    points, expected, _ = graded(course, ["forks_away", "eats_memory_in_children"])
    assert points == expected
    left = [p for p in psutil.process_iter(["cmdline"]) if "labkit.course.grade_cells" in (p.info["cmdline"] or [])]
    assert [p for p in left if str(course.parent) in str(p.environ().get("HOME"))] == []


def test_a_verdict_cannot_be_forged(course):
    points, expected, outcome = graded(course, ["forged", "forged_function", "speaks_on_the_line", "guesses"])
    assert outcome.complete and points == expected == dict.fromkeys(expected, 0)
    assert record(outcome, "forged")["exercises"]["00.1"]["state"] == "not yet"


def test_a_process_that_lies_to_the_grader_gets_nothing_and_breaks_nothing(course):
    points, expected, outcome = graded(course, ["lies_about_answers", "lies_about_everything", "lies_with_errors"])
    assert points == expected == dict.fromkeys(expected, 0) and outcome.complete
    assert "broke the line to the grader" in record(outcome, "lies_about_everything")["notes"][0]


def test_no_submission_sees_the_others_the_checks_or_the_network(course):
    outcome = graded(course, ["good", "pries", "network"])[2]
    walls = outcome.results["walls"]
    if not walls["files"] or not walls["network"]:
        assert outcome.results["warnings"], "a missing wall is said"
        pytest.skip(f"this system lets us build only these walls: {[wall for wall in walls if walls[wall]]}")
    seen = [cell["said"] for cell in record(outcome, "pries")["cells"] if "SEEN" in cell["said"]]
    assert seen and seen[0].strip() == "SEEN []"
    assert any("unreachable" in cell["message"] for cell in record(outcome, "network")["cells"])


def test_a_missing_wall_is_said_and_grading_goes_on(course, monkeypatch):
    monkeypatch.setattr(grade_sandbox, "walls", lambda *_: ())
    points, expected, outcome = graded(course, ["good", "hangs"])
    assert points == expected and len(outcome.results["warnings"]) == 4
    assert "The network could not be cut." in (outcome.folder / "index.html").read_text()


def test_the_strongest_walls_that_stand_are_found(tmp_path, monkeypatch):
    tried = []

    def stands(base, wanted, limits, hidden):
        tried.append(tuple(wanted))
        return "network" not in wanted

    monkeypatch.setattr(grade_sandbox, "_stands", stands)
    monkeypatch.setattr(grade_sandbox, "LINUX", True)
    found = grade_sandbox.walls(tmp_path, QUICK, [])
    assert "network" not in found and {"files", "processes"} <= set(found) and len(tried[0]) >= 3


def test_a_judge_that_dies_costs_one_learner_and_the_exit_status(course, monkeypatch, capsys):
    from labkit.course import grade_judge

    real = grade_judge.grade

    def dies(task):
        return os._exit(1) if task.number == 1 else real(task)

    if not LINUX:
        pytest.skip("elsewhere the judge is a fresh process that this test cannot change")
    monkeypatch.setattr(grade_judge, "grade", dies)
    submissions.write(course, 2, only=["good"])
    out = course.parent / "out"
    assert cli.main(["grade", str(course), "--out", str(out), "--memory", "500", "--json"]) == 1
    results = json.loads(capsys.readouterr().out)
    assert [one["labs"][0]["status"] for one in results["learners"]] == ["graded", "not graded"]
    assert results["learners"][0]["points"] == 3


def test_names_are_safe_for_files_and_spreadsheets(course):
    for name in ("=cmd|' /C calc'!A0", "Ana", "ana", "José & <b>", "a/../b".replace("/", "\u2215")):
        (course / name).mkdir(parents=True)
    out = grade(course, course.parent / "out", labs=["00"]).folder
    rows = list(csv.DictReader(io.StringIO((out / "grades.csv").read_text(encoding="utf-8-sig"))))
    assert len(rows) == 5 == len(list((out / "learners").glob("*.html")))
    assert not any(row["learner"].startswith(("=", "+", "-", "@")) for row in rows)
    assert rows[0]["status"] == "missing" and "<b>" not in (out / "index.html").read_text()


def test_links_are_not_followed_and_only_one_notebook_a_lab_counts(course):
    submissions.write(course, 1, only=["good"])
    own = course / "eve"
    own.mkdir()
    (own / "00_start_here.ipynb").symlink_to(course / "000-good/00_start_here.ipynb")
    (own / "copy.ipynb").write_text(submissions.notebook(submissions.solved("00.1")))
    (own / "another.ipynb").write_text(submissions.notebook(submissions.solved("00.1", "00.2")))
    (own / "copy_of_nothing.ipynb").write_text(submissions.notebook(submissions.solved()))
    eve = next(one for one in grade_inbox.learners(course) if one.id == "eve")
    assert [path.name for path in eve.notebooks] == ["another.ipynb", "copy.ipynb", "copy_of_nothing.ipynb"]
    from labkit.course.labs import find

    counts, notes = grade_inbox.chosen([grade_inbox.read(path) for path in eve.notebooks], find("00"))
    assert counts.path.name == "another.ipynb" and notes == ["copy.ipynb is this lab too and was not graded."]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere", "--out", "out"], "not a folder; expected a folder of submissions"),
        (["empty", "--out", "out"], "holds no submissions"),
        (["full", "--out", "full"], "give a folder of its own"),
        (["full", "--out", "empty-not"], "holds something else than grades"),
        (["full", "--out", "out", "--lab", "09"], "There is no lab '09'"),
        (["full", "--out", "out", "--workers", "0"], "expected 1 or more"),
        (["full", "--out", "out", "--memory", "0"], "must be above 0"),
        (["full", "--out", "out", "-p", "bits", "4"], "has a parameter 'bits'"),
    ],
)
def test_a_bad_request_is_one_sentence_and_nothing_is_written(course, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(course.parent)
    submissions.write(Path("full"), 1, only=["good"])
    Path("empty").mkdir()
    Path("empty-not").mkdir()
    Path("empty-not/thesis.txt").write_text("mine")
    assert cli.main(["grade", *arguments]) == 2
    assert said in capsys.readouterr().err
    assert not Path("out").exists() and [p.name for p in Path("empty-not").iterdir()] == ["thesis.txt"]


# --- personal variants -----------------------------------------------------------------------------------------------


def test_a_learner_has_one_seed_in_the_copy_and_in_grading(course, tmp_path, monkeypatch, capsys):
    lab = Path(os.environ["LABKIT_NOTEBOOKS"]) / "00_start_here.ipynb"
    text = json.loads(lab.read_text())
    text["cells"][0]["source"] += "\nseed: int = 0  # your own"
    lab.write_text(json.dumps(text))
    seed = variants.seed_for("ana")
    assert seed == variants.seed_for(" Ana ") != variants.seed_for("bia") and 0 < seed < 10**6
    assert cli.main(["new", "00", "--learner", "ana", "--into", str(tmp_path / "work"), "--json"]) == 0
    copy = json.loads(Path(json.loads(capsys.readouterr().out)["notebook"]).read_text())
    assert f"seed: int = {seed}  # your own" in "".join(copy["cells"][0]["source"])
    course.mkdir()
    cells = [*submissions.solved(), "from labkit.course import variants\nprint('seed', seed, variants.seed())"]
    (course / "ana.ipynb").write_text(submissions.notebook([cells[0] + "\nseed: int = 1", *cells[1:]]))
    (one,) = grade(course, tmp_path / "out", limits=QUICK).results["learners"]
    assert one["labs"][0]["seed"] == seed and f"seed {seed} {seed}" in one["labs"][0]["cells"][-1]["said"]
    monkeypatch.setenv("LABKIT_SEED", str(seed))
    assert variants.seed() == seed


def test_a_lab_without_a_seed_has_no_variants(course, tmp_path, capsys):
    assert cli.main(["new", "00", "--learner", "ana", "--into", str(tmp_path / "work")]) == 2
    assert "no parameter `seed`" in capsys.readouterr().err and not list((tmp_path / "work").rglob("*.ipynb"))


# --- the wire --------------------------------------------------------------------------------------------------------


@pytest.fixture
def line():
    """(ours, theirs): two ends of a line in this process, the other one serving in a thread; `line.close()` ends all of them."""
    open_ones = []

    def make(**handlers):
        (a, b), (c, d) = os.pipe(), os.pipe()
        files = os.fdopen(d, "wb"), os.fdopen(c, "rb"), os.fdopen(b, "wb"), os.fdopen(a, "rb")
        ours, theirs = Peer(files[3], files[0]), Peer(files[1], files[2], handlers)
        thread = threading.Thread(target=theirs.serve, daemon=True)
        thread.start()
        open_ones.append((files, thread))
        return ours, theirs

    def close():
        for files, thread in open_ones:
            files[0].close()  # the other side reads to the end and stops
            thread.join(5)
            for file in files[1:]:
                if not thread.is_alive():
                    file.close()
        open_ones.clear()

    make.close = close
    yield make
    close()


VALUES = [None, True, -3, 2**100, 1.5, float("inf"), "é\n", b"\0\xff", 1 + 2j, ..., [1, [2]], (1, "a"), {1, 2}, {1: (2,)},
          np.arange(6, dtype=np.int8).reshape(2, 3), np.float16(0.5), np.array(["a", "bc"]), Path("a/b"),
          Recipe("llamacpp", "q4_k_m", imatrix=True)]  # fmt: skip


@pytest.mark.parametrize("value", VALUES, ids=[type(v).__name__ for v in VALUES])
def test_values_come_over_the_line_as_they_are(line, value):
    ours, _ = line(same=lambda x: x)
    back = ours.ask("same", value, seconds=5)
    assert type(back) is type(value) or isinstance(value, Path)
    assert np.all(back == value) and getattr(back, "dtype", None) == getattr(value, "dtype", None)


def test_functions_are_called_where_they_live_in_both_directions(line):
    ours, _ = line(make=lambda: lambda f, n: [f(i) for i in range(n)], count=lambda: iter(range(3)), fail=lambda: 1 / 0)
    assert ours.ask("make", seconds=5)(lambda i: i * 10, n=3) == [0, 10, 20]
    assert list(ours.ask("count", seconds=5)) == [0, 1, 2]
    with pytest.raises(ZeroDivisionError):
        ours.ask("fail", seconds=5)


def test_nothing_but_plain_values_is_made_of_a_message(line):
    class Sly(int):
        def __eq__(self, other):
            return True

        __hash__ = None

    ours, _ = line(sly=lambda: Sly(3))
    assert isinstance(ours.ask("sly", seconds=5), Foreign)
    for data in ({"record": ["os", "system", []]}, {"record": ["labkit.types", "LabkitError", []]}, {"array": ["|O8", [1], ""]},
                 {"pack": 1}, {"a": 1, "b": 2}, {"init__": []}):  # fmt: skip
        with pytest.raises((ValueError, TypeError)):
            ours.unpack(data)


def test_a_silent_side_is_given_up_in_time_and_a_late_reply_is_not_taken_for_the_next(line):
    ours, _ = line(sleep=lambda: time.sleep(0.5) or "late", now=lambda: "now")
    with pytest.raises(Broken, match="no reply in time"):
        ours.ask("sleep", seconds=0.1)
    assert ours.ask("now", seconds=5) == "now"


def test_every_answer_of_the_course_is_judged_alike_over_the_line(line):
    """Every check calls the learner's function with values that can travel: a probe that records is refused alike."""
    for name in exercises.exercises():
        for answer in (lambda *a: 7, lambda *a: a[0], "x", [1]):
            ours, _ = line(answer=lambda answer=answer: answer)
            there = exercises.judge(name, ours.ask("answer", seconds=5))
            here = exercises.judge(name, answer)
            assert there.state == here.state and "travel" not in there.message
            assert there.message.replace("your function", "<lambda>") == here.message, name
        line.close()


# --- the whole course and a large class ------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_solution_of_a_real_lab_gets_every_point(tmp_path, monkeypatch):
    monkeypatch.delenv("LABKIT_NOTEBOOKS", raising=False)
    monkeypatch.setenv("LABKIT_HOME", str(tmp_path / "home"))
    (tmp_path / "handed_in").mkdir()
    shutil.copyfile(Path(__file__).parent / "solutions/00_start_here.ipynb", tmp_path / "handed_in/ana.ipynb")
    (one,) = grade(tmp_path / "handed_in", tmp_path / "out").results["learners"]
    assert one["labs"][0]["lab"] == "00" and one["points"] == one["of"] >= 5, one["labs"][0]["exercises"]


@pytest.mark.slow
def test_two_hundred_submissions_within_two_gigabytes(course):
    """In one command, good and hostile ones mixed, every point right; memory is the peak of the whole process tree."""
    import psutil

    expected = submissions.write(course, 200, places=str(course.parent))
    out = course.parent / "out"
    arguments = ["grade", str(course), "--out", str(out), "--memory", "500", "--workers", "2", "--cell-timeout", "4"]
    log = open(course.parent / "log.txt", "wb")  # noqa: SIM115
    process = psutil.Popen([sys.executable, "-m", "labkit", *arguments, "--timeout", "60"], stdout=log, stderr=log)
    from labkit.course.watch import watch

    seen, _ = watch(process, time.monotonic() + 1500, itself=True)
    assert process.returncode == 0, (course.parent / "log.txt").read_text()[-3000:]
    results = json.loads((out / "results.json").read_text())
    assert {one["learner"]: one["points"] for one in results["learners"]} == expected
    assert seen.peak_bytes < 2e9

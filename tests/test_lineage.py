"""Products known by their bytes: done once, found again, traced back, and refused when a byte changed."""

from __future__ import annotations

import hashlib
import json

import pytest

from labkit import lineage
from labkit.types import LabkitError


def write(folder, text):
    (folder / "data.txt").write_text(text)


def double(folder, source, times):
    (folder / "sub").mkdir()
    (folder / "sub" / "out.txt").write_text((source / "data.txt").read_text() * times)


@pytest.fixture
def line(tmp_path):
    return lineage.Line(tmp_path / "line")


def test_the_digest_of_many_files_is_that_of_their_sorted_lines():
    files = {"b": "2" * 64, "a": "1" * 64}
    assert lineage.digest(files) == hashlib.sha256(f"a {'1' * 64}\nb {'2' * 64}\n".encode()).hexdigest()
    assert lineage.digest(dict(reversed(files.items()))) == lineage.digest(files)


def test_a_stage_is_done_once_for_the_same_inputs_settings_and_code(line):
    calls = []

    def make(folder, text):
        calls.append(text)
        write(folder, text)

    first = line.stage("data", make, text="x")
    assert line.stage("data", make, text="x") == first and calls == ["x"]
    assert line.stage("data", make, text="y").digest != first.digest and calls == ["x", "y"]
    assert line.stage("data", lambda folder, text: write(folder, text), text="x").digest == first.digest, "other code, same bytes"
    assert len(line.steps()) == 3


def test_a_product_that_was_damaged_is_made_again(line):
    first = line.stage("data", write, text="x")
    (first.folder / "data.txt").write_text("z")
    assert line.stage("data", write, text="x").digest == first.digest
    assert (first.folder / "data.txt").read_text() == "x"


def test_the_digest_depends_on_bytes_and_not_on_the_place(line, tmp_path):
    other = lineage.Line(tmp_path / "elsewhere")
    assert other.stage("data", write, text="x").digest == line.stage("data", write, text="x").digest


def test_a_product_is_traced_to_its_sources_with_settings(line):
    source = line.stage("data", write, text="ab")
    made = line.stage("double", double, source, times=2)
    assert (made.folder / "sub" / "out.txt").read_text() == "abab" and set(made.files) == {"sub/out.txt"}
    path = line.trace(made.digest)
    assert [one.stage for one in path] == ["double", "data"] and path[1].settings == {"text": "ab"}
    table = lineage.frame(path)
    assert list(table["stage"]) == ["double", "data"] and source.short in table["from"][0] and table["bytes"][1] == 2
    assert lineage.Line(line.root).trace(made.digest) == path, "another process finds the same"


def test_a_changed_byte_anywhere_breaks_the_trace(line):
    source = line.stage("data", write, text="ab")
    made = line.stage("double", double, source, times=2)
    (source.folder / "data.txt").write_text("aB")
    with pytest.raises(LabkitError, match=r"data\.txt of stage 'data' is not what was recorded"):
        line.trace(made.digest)
    with pytest.raises(LabkitError, match=r"No stage in .* made 000000000000"):
        line.trace("0" * 64)


def test_a_stage_that_fails_leaves_nothing(line):
    def half(folder):
        write(folder, "half")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        line.stage("data", half)
    assert line.steps() == [] and not list(line.root.glob("data-*"))


def test_senseless_stages_get_a_sentence(line):
    source = line.stage("data", write, text="a")
    with pytest.raises(LabkitError, match="wrote no file"):
        line.stage("empty", lambda folder: None)
    with pytest.raises(LabkitError, match="stages of the same name"):
        line.stage("double", double, source, line.stage("data", write, text="b"), times=2)
    with pytest.raises(LabkitError, match="setting cannot be written down"):
        line.stage("odd", write, text=object())
    record = next(line.root.glob("data-*.json"))
    record.write_text(json.dumps({"folder": "x"}))
    with pytest.raises(LabkitError, match="is no lineage record"):
        line.steps()

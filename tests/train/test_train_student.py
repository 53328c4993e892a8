"""Students: their weights, the folder that makes one a checkpoint, and the intervals that are told about them."""

from __future__ import annotations

import numpy as np
import pytest

import labkit
from labkit.train.data import house
from labkit.types import LabkitError

torch = pytest.importorskip("torch")

from labkit.train import student  # noqa: E402
from labkit.train.folder import load  # noqa: E402
from labkit.train.llama import Llama, Shape  # noqa: E402
from labkit.train.loop import answer_loss  # noqa: E402
from labkit.train.rows import encode_all, pack  # noqa: E402


@pytest.fixture(scope="module")
def base():
    return labkit.checkpoint("edgehome")


def test_students_are_as_large_as_they_are_called_and_repeatable():
    assert 0.9e6 < student.weights(student.new("1M")) < 1.2e6 and 0.25e6 < student.weights(student.new("0.3M")) < 0.35e6
    first, again, other = (student.new("0.3M", seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(first[k], again[k]) for k in first) and not torch.equal(
        first["model.embed_tokens.weight"], other["model.embed_tokens.weight"]
    )
    with pytest.raises(LabkitError, match=r"'2M' given; expected 1M or 0\.3M"):
        student.new("2M")


def test_attention_of_a_new_student_is_not_flat():
    """What the wider start is for: with 0.02 every position would look at all others alike."""
    from labkit.train.distil import watched

    ids, largest = torch.arange(3, 35)[None], []
    for model in (student.new("0.3M", 1), Llama(student.SHAPES["0.3M"])):
        with torch.no_grad(), watched(model) as shares:
            model(ids)
        largest.append(shares[1][..., -1, :].max().item())
    assert largest[0] > 2 / 32 > largest[1]


def test_a_written_student_is_a_checkpoint_that_says_the_same(base, tmp_path):
    child = student.new("0.3M", 5)
    written = student.write(child, tmp_path / "child", base)
    ids = torch.tensor([base.encode("turn on the lamp")])
    with torch.no_grad():
        assert torch.equal(load(written)(ids), child.eval()(ids))
    assert written.chat([{"role": "user", "content": "hi"}]) == base.chat([{"role": "user", "content": "hi"}])
    assert written.config["hidden_size"] == 64 and written.eos_ids == base.eos_ids and written.trained
    with pytest.raises(LabkitError, match="expected one with the same vocabulary"):
        student.write(Llama(Shape(vocab_size=300, hidden_size=32, intermediate_size=32)), tmp_path / "odd", base)


def test_a_written_student_runs_in_transformers(base, tmp_path):
    transformers = pytest.importorskip("transformers")
    child = student.new("0.3M", 6).eval()
    folder = student.write(child, tmp_path / "child", base).path
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert (theirs(ids).logits - child(ids)).abs().max() < 1e-4


def test_surprise_adds_up_to_the_loss(base):
    rows = pack(encode_all(base, house("train", 9, intents=["light"]), 96), 96, alone=True)
    model = student.new("0.3M", 2)
    each = np.array(student.surprise(model, rows, size=4))
    counts = rows.weights.sum(1).numpy()
    with torch.no_grad():
        whole = answer_loss(model, rows).item()
    assert len(each) == 9 and (each * counts).sum() == pytest.approx(whole, rel=1e-5)


def test_a_gain_is_the_mean_difference_and_its_interval_knows_seeds_and_questions():
    draws = np.random.default_rng(0)
    alone = draws.random((3, 200)) < 0.3
    better = alone | (draws.random((3, 200)) < 0.4)
    found = student.gain(better, alone)
    assert found.value == pytest.approx(better.mean() - alone.mean()) and 0 < found.low < found.value < found.high
    same = student.gain(alone, alone)
    assert same.value == same.low == same.high == 0
    lucky = np.zeros((3, 200))
    lucky[0] = 1  # one start of three: no method
    assert student.gain(lucky, np.zeros((3, 200))).low == 0
    one = student.gain(better[:1], alone[:1])
    assert one.low < one.value < one.high
    assert student.gain(better, alone) == found
    with pytest.raises(LabkitError, match=r"Scores of shape \(200,\)"):
        student.gain(better[0], alone[0])


def test_the_interval_covers_as_often_as_it_says():
    """Questions drawn from a known rate: 95 % intervals of one start hold the true gain about 95 times in 100."""
    draws, held = np.random.default_rng(1), 0
    for _ in range(300):
        alone, better = draws.random((1, 100)) < 0.4, draws.random((1, 100)) < 0.6
        low, high = student.gain(better, alone, resamples=400)[1:]
        held += low <= 0.2 <= high
    assert 0.9 <= held / 300 <= 0.985


def test_what_is_kept_is_a_share_of_the_teachers_right_answers():
    teacher, child = np.array([1, 1, 1, 1, 0]), np.array([[1, 1, 0, 1, 0]])
    found = student.kept(child, teacher)
    assert found.value == pytest.approx(0.75) and 0 <= found.low < 0.75 < found.high <= 1
    with pytest.raises(LabkitError, match="answered nothing right"):
        student.kept(child, np.zeros(5))

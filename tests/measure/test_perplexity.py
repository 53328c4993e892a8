import json

import numpy as np
import pytest
from fakes import CORPUS, VOCAB, FakeRunner, table_logits

from labkit import LabkitError
from labkit.measure import bits_per_byte, perplexity, plus_minus, summary
from labkit.types import Measurement


def uniform(ids):
    return np.zeros((len(ids), VOCAB))


def all_knowing(ids):
    """All weight on the token that really follows."""
    logits = np.full((len(ids), VOCAB), -1e4)
    logits[np.arange(len(ids) - 1), ids[1:]] = 0
    return logits


@pytest.mark.parametrize("stride", [None, 5, 31])
def test_uniform_logits_give_the_vocabulary(artifact, text, stride):
    found = perplexity(artifact, text, window=32, stride=stride, runner=FakeRunner(uniform))
    assert summary(found).value == pytest.approx(VOCAB, rel=1e-12)


@pytest.mark.parametrize("stride", [None, 5])
def test_a_model_that_knows_gets_one(artifact, text, stride):
    found = perplexity(artifact, text, window=32, stride=stride, runner=FakeRunner(all_knowing))
    assert summary(found) == (1, 1, 1)
    assert bits_per_byte(found).value == 0


def test_against_an_independent_implementation(artifact, text):
    model, window = table_logits(), 24
    found = perplexity(artifact, text, window=window, runner=FakeRunner(model))
    ids, every = artifact.checkpoint.encode(text), []
    for chunk in range(len(ids) // window):
        part = ids[chunk * window : (chunk + 1) * window]
        rows = model(np.array(part)).astype(np.float64)
        for i in range(window // 2, window - 1):
            every.append(-(rows[i, part[i + 1]] - np.log(np.exp(rows[i]).sum())))
    assert len(every) == (window - 1 - window // 2) * (len(ids) // window) == sum(found.details["counts"])
    assert summary(found).value == pytest.approx(np.exp(np.mean(every)), rel=1e-6)
    error = np.exp(np.mean(every)) * np.sqrt(np.var(every) / (len(every) - 1))
    assert plus_minus(found) == pytest.approx(error, rel=1e-6)


def test_bits_per_byte_of_uniform_logits(artifact, text):
    found = perplexity(artifact, text, window=32, stride=31, runner=FakeRunner(uniform))
    ids = artifact.checkpoint.encode(text)
    bytes_ = len(text.encode()) - len(artifact.checkpoint.decode(ids[:1]).encode())
    assert sum(found.details["bytes"]) == bytes_
    assert bits_per_byte(found).value == pytest.approx((len(ids) - 1) * np.log2(VOCAB) / bytes_)


def test_more_context_helps_a_model_that_uses_it(artifact):
    text = CORPUS[0] * 40  # comes round within a window, so a model that looks back can guess it

    def copies(ids):  # bets on tokens seen before
        logits = np.zeros((len(ids), VOCAB))
        for i in range(len(ids)):
            logits[i, ids[: i + 1]] = 4.0
        return logits

    few = perplexity(artifact, text, window=48, stride=47, runner=FakeRunner(copies))
    many = perplexity(artifact, text, window=48, stride=8, runner=FakeRunner(copies))
    assert summary(many).value < summary(few).value


def test_begin_of_text_is_read_but_not_scored(artifact, text):
    artifact.checkpoint.bos_id = 1
    read = []

    def spy(ids):
        read.append(ids.tolist())
        return uniform(ids)

    perplexity(artifact, text, window=16, limit=3, runner=FakeRunner(spy))
    assert len(read) == 3 and all(ids[0] == 1 for ids in read)
    assert read[0][1:] == artifact.checkpoint.encode(text)[:15]


def test_record_survives_json_and_names_its_workload(artifact, text, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(text, encoding="utf-8")
    found = perplexity(artifact, file, window=32, limit=4, runner=FakeRunner(table_logits()))
    again = Measurement.from_json(json.loads(json.dumps(found.to_json())))
    assert summary(again) == summary(found)
    assert len(found.values) == 4 and found.unit == "nats/token"
    same = perplexity(artifact, text, window=32, limit=4, runner=FakeRunner(table_logits()))
    assert same.workload == found.workload and same.values == found.values


def test_a_handed_in_runner_stays_open(artifact, text):
    runner = FakeRunner(uniform)
    perplexity(artifact, text, window=32, runner=runner)
    assert runner.closed == 0


def test_stand_ins_are_refused(artifact, text):
    artifact.checkpoint.trained = False
    with pytest.raises(LabkitError, match="random weights"):
        perplexity(artifact, text, runner=FakeRunner(uniform))


def test_bad_input_is_one_sentence(artifact, tmp_path):
    runner = FakeRunner(uniform)
    with pytest.raises(LabkitError, match="shorter than one window"):
        perplexity(artifact, "short", window=512, runner=runner)
    with pytest.raises(LabkitError, match="has no held-out text"):
        perplexity(artifact, runner=runner)
    with pytest.raises(LabkitError, match="Cannot read"):
        perplexity(artifact, tmp_path / "absent.txt", runner=runner)
    with pytest.raises(LabkitError, match="logits of shape"):
        perplexity(artifact, "the lamp " * 40, window=16, runner=FakeRunner(lambda ids: uniform(ids)[:3]))

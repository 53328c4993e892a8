import numpy as np
import pytest
from fakes import VOCAB, FakeRunner, table_logits

from labkit import LabkitError
from labkit.measure import divergence, perplexity, perplexity_ratio, read_base, same_top, summary, write_base
from labkit.measure import logits_file as lf
from labkit.measure.divergence import compare


def coarse(seed=0, step=0.5):
    """A bigram model whose table is rounded to multiples of `step`."""
    exact = table_logits(seed)
    return lambda ids: np.round(exact(ids) / step) * step


def test_with_itself_is_zero(artifact, text):
    found = divergence(artifact, FakeRunner(table_logits()), text, window=32, runner=FakeRunner(table_logits()))
    assert summary(found) == (0, 0, 0)
    assert same_top(found) == (1, 1, 1)
    assert perplexity_ratio(found) == (1, 1, 1)
    assert found.details["delta_p_rms"] == 0 and found.details["quantiles"]["max"] == 0


def test_against_scipy():
    from scipy.special import rel_entr, softmax

    rng = np.random.default_rng(0)
    q, p = rng.normal(0, 3, (2, 40, 17)).astype(np.float32)
    targets = rng.integers(0, 17, 40)
    found = compare(q, p, targets)
    pq, pp = softmax(q.astype(np.float64), axis=1), softmax(p.astype(np.float64), axis=1)
    np.testing.assert_allclose(found["kl"], rel_entr(pp, pq).sum(1), rtol=1e-5)
    rows = np.arange(40)
    np.testing.assert_allclose(found["delta_p"], pq[rows, targets] - pp[rows, targets], atol=1e-6)
    assert (found["same_top"] == (pq.argmax(1) == pp.argmax(1))).all()


def test_statistics_follow_their_definitions(artifact, text):
    found = divergence(artifact, FakeRunner(table_logits()), text, window=32, runner=FakeRunner(coarse()))
    ids = np.array(artifact.checkpoint.encode(text))
    rows = [
        compare(coarse()(c)[16:31], table_logits()(c)[16:31], c[17:])
        for c in ids[: len(ids) // 32 * 32].reshape(-1, 32)
    ]
    every = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
    details = found.details
    assert summary(found).value == pytest.approx(every["kl"].mean())
    assert details["quantiles"]["median"] == pytest.approx(np.median(every["kl"]))
    ordered = np.sort(every["kl"])
    place = 0.99 * (ordered.size - 1)
    low = int(place)
    assert details["quantiles"]["99%"] == pytest.approx(
        (1 - (place - low)) * ordered[low] + (place - low) * ordered[low + 1]
    )
    assert details["delta_p_rms"] == pytest.approx(np.sqrt((every["delta_p"] ** 2).mean()))
    a, b = every["nll"], every["nll_reference"]
    variance = (a.var() + b.var() - 2 * ((a * b).mean() - a.mean() * b.mean())) / (a.size - 1)
    assert details["ln_ppl_ratio_se"] == pytest.approx(np.sqrt(variance), rel=1e-6)
    assert details["ln_ppl_correlation"] == pytest.approx(np.corrcoef(a, b)[0, 1])


def test_perplexities_agree_with_the_perplexity_metric(artifact, text):
    found = divergence(artifact, FakeRunner(table_logits()), text, window=32, runner=FakeRunner(coarse()))
    alone = summary(perplexity(artifact, text, window=32, runner=FakeRunner(coarse()))).value
    reference = summary(perplexity(artifact, text, window=32, runner=FakeRunner(table_logits()))).value
    assert perplexity_ratio(found).value == pytest.approx(alone / reference)


def test_coarser_is_further_away(artifact, text):
    means = [
        summary(
            divergence(artifact, FakeRunner(table_logits()), text, window=32, runner=FakeRunner(coarse(step=s)))
        ).value
        for s in (0.1, 0.4, 1.6)
    ]
    assert 0 < means[0] < means[1] < means[2]


def test_other_vocabulary_and_wrong_reference(artifact, text):
    with pytest.raises(LabkitError, match="one checkpoint"):
        other = FakeRunner(lambda ids: np.zeros((len(ids), 9)))
        divergence(artifact, other, text, window=32, runner=FakeRunner(table_logits()))
    with pytest.raises(LabkitError, match="expected an Artifact, a Runner or the Path"):
        divergence(artifact, "f16", text, window=32, runner=FakeRunner(table_logits()))
    artifact.checkpoint.trained = False
    with pytest.raises(LabkitError, match="random weights"):
        divergence(artifact, FakeRunner(table_logits()), text, runner=FakeRunner(table_logits()))


@pytest.mark.parametrize("vocab, window, chunks", [(7, 8, 3), (10, 9, 2)])
def test_logits_file_has_the_size_of_its_formula(tmp_path, vocab, window, chunks):
    tokens = np.random.default_rng(0).integers(0, vocab, window * chunks + 3)
    path = write_base(tmp_path / "base.bin", FakeRunner(table_logits(vocab=vocab)), tokens, window)
    nv = 2 * ((vocab + 1) // 2) + 4
    assert path.stat().st_size == 20 + 4 * chunks * window + 2 * nv * chunks * (window - 1 - window // 2)
    assert path.read_bytes()[:8] == b"_logits_"
    base = read_base(path)
    assert (base.window, base.vocabulary, base.tokens.size) == (window, vocab, window * chunks)
    assert base.tokens.ravel().tolist() == tokens[: window * chunks].tolist()


def test_logits_file_keeps_log_probabilities_to_one_step(tmp_path):
    model = table_logits(spread=2.0)
    tokens = np.random.default_rng(1).integers(0, VOCAB, 64)
    base = read_base(write_base(tmp_path / "base.bin", FakeRunner(model), tokens, 32))
    exact = model(tokens[:32])[16:31].astype(np.float64)
    exact -= np.log(np.exp(exact).sum(1, keepdims=True))
    np.testing.assert_allclose(base.log_probs(0), exact, atol=16 / 65535)


def test_packed_row_against_a_plain_loop():
    logits = np.random.default_rng(2).normal(0, 8, (5, 11)).astype(np.float32)
    logits[4] = 1.0  # a flat row has no scale
    for row, packed in zip(logits, lf.pack(logits), strict=True):
        top, low = row.max(), max(row.min(), row.max() - np.float32(16))
        scale = np.float32((top - low) / np.float32(65535))
        total = np.float32(np.log(np.exp(row - top).astype(np.float64).sum()))
        stored = packed[:4].view(np.float32)
        assert stored[0] == scale and stored[1] == pytest.approx(low - top - total, rel=1e-6)
        steps = [round(float(np.float32(1) / scale * (x - low))) if scale and x > low else 0 for x in row]
        assert np.abs(packed[4:15].astype(int) - steps).max() <= 1 and packed[15] == 0


def test_a_logits_file_serves_as_reference(artifact, text, tmp_path):
    ids = artifact.checkpoint.encode(text)
    path = write_base(tmp_path / "base.bin", FakeRunner(table_logits()), ids, 32)
    own = divergence(artifact, path, runner=FakeRunner(table_logits()))
    assert 0 <= summary(own).value < 2e-5  # the floor of sixteen bits
    with pytest.raises(LabkitError, match="its own text"):
        divergence(artifact, path, text, runner=FakeRunner(coarse()))
    live = divergence(artifact, FakeRunner(table_logits()), text, window=32, runner=FakeRunner(coarse()))
    filed = divergence(artifact, path, runner=FakeRunner(coarse()))
    assert summary(filed).value == pytest.approx(summary(live).value, rel=1e-3)
    assert filed.workload["tokens_hash"] != "" and filed.details["counts"] == live.details["counts"]


def test_damaged_logits_files_are_refused(tmp_path):
    path = write_base(tmp_path / "base.bin", FakeRunner(table_logits()), np.zeros(64, int), 32)
    data = path.read_bytes()
    cases = {"size": data[:-2], "begin": b"nonsense" + data[8:], "empty": b""}
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(LabkitError):
            read_base(tmp_path / name)
    with pytest.raises(LabkitError, match="Cannot read"):
        read_base(tmp_path / "absent")


def test_a_failed_write_leaves_nothing(tmp_path):
    def fails_later(ids):
        if ids[0] == 99:
            raise RuntimeError
        return np.zeros((len(ids), VOCAB))

    with pytest.raises(RuntimeError):
        write_base(tmp_path / "base.bin", FakeRunner(fails_later), [1] * 16 + [99] * 16, 16)
    assert list(tmp_path.iterdir()) == []

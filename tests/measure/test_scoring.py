import subprocess
from pathlib import Path

import numpy as np
import pytest
from fakes import CORPUS

from labkit import LabkitError
from labkit.measure import scoring


def test_chunks_score_the_second_half():
    tokens = np.arange(1100)
    parts = list(scoring.chunks(tokens, 512))
    assert len(parts) == 2
    for i, part in enumerate(parts):
        assert part.first == 256
        assert part.targets.size == 512 - 1 - 256 == 255
        assert part.targets.tolist() == list(range(512 * i + 257, 512 * i + 512))


def test_odd_window():
    (part,) = scoring.chunks(np.arange(7), 7)
    assert (part.first, part.targets.tolist()) == (3, [4, 5, 6])


def test_begin_of_text_replaces_the_first_token_only_in_what_the_model_reads():
    first, second = scoring.chunks(np.arange(100, 116), 8, bos=7)
    assert first.ids.tolist() == [7, *range(101, 108)]
    assert second.ids[0] == 7 and second.targets.tolist() == [113, 114, 115]


@pytest.mark.parametrize("total", [16, 17, 40, 41])
@pytest.mark.parametrize("stride", [1, 4, 15])
def test_strides_score_every_token_once(total, stride):
    tokens = np.arange(1000, 1000 + total)
    parts = list(scoring.strides(tokens, 16, stride))
    assert np.concatenate([part.targets for part in parts]).tolist() == tokens[1:].tolist()
    for part in parts:
        assert part.ids.size <= 16
        assert part.ids[part.first + 1 :].tolist() == part.targets.tolist()
    assert all(part.ids.size == 16 for part in parts)  # as much context as fits


@pytest.mark.parametrize("window, stride", [(8, 0), (8, 8)])
def test_stride_out_of_range(window, stride):
    with pytest.raises(LabkitError, match="stride"):
        list(scoring.strides(range(50), window, stride))


def test_text_shorter_than_a_window():
    with pytest.raises(LabkitError, match="shorter than one window of 512"):
        list(scoring.chunks(range(511), 512))


def test_nll_against_a_plain_loop(monkeypatch):
    monkeypatch.setattr(scoring, "SLAB", 64)  # several slabs, the last one short
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 5, (11, 30)).astype(np.float32)
    targets = rng.integers(0, 30, 11)
    expected = []
    for row, target in zip(logits.astype(np.float64), targets, strict=True):
        expected.append(-np.log(np.exp(row[target]) / np.exp(row).sum()))
    np.testing.assert_allclose(scoring.nll(logits, targets), expected, rtol=1e-6)
    np.testing.assert_allclose(np.exp(scoring.log_probs(logits)).sum(1), 1, rtol=1e-6)


def test_huge_logits_do_not_overflow():
    logits = np.array([[3e4, 0, -3e4]], dtype=np.float32)
    assert scoring.nll(logits, np.array([0])) == pytest.approx([0])
    assert scoring.nll(logits, np.array([2])) == pytest.approx([6e4])


def test_broken_logits_are_refused():
    with pytest.raises(LabkitError, match="not finite"):
        scoring.nll(np.array([[np.nan, 1.0]], dtype=np.float32), np.array([0]))


@pytest.mark.parametrize("sample", [*CORPUS, "emoji 🙂 split", "<|im_end|> and text", "\x00\x7f"])
def test_token_bytes_add_up_to_the_text(fake_checkpoint, sample):
    lengths = scoring.token_bytes(fake_checkpoint)
    assert lengths[fake_checkpoint.encode(sample)].sum() == len(sample.encode())


def test_token_bytes_of_a_sentencepiece_vocabulary(tmp_path):
    from types import SimpleNamespace

    (tmp_path / "tokenizer.json").write_text(
        '{"decoder": {"type": "Sequence"}, "added_tokens": [{"id": 0, "content": "<s>"}],'
        ' "model": {"vocab": {"<s>": 0, "▁lamp": 1, "<0x0A>": 2, "é": 3}}}',
        encoding="utf-8",
    )
    lengths = scoring.token_bytes(SimpleNamespace(path=tmp_path))
    assert lengths.tolist() == [3, len(" lamp"), 1, 2]


def test_measures_name_no_engine():
    folder = Path(scoring.__file__).parent
    found = subprocess.run(
        ["grep", "-rE", "--include=*.py", "llama|onnx|openvino|mlx", str(folder)], capture_output=True, text=True
    )
    assert found.stdout == "" and found.returncode == 1


def test_remembered_asks_once(tmp_path):
    class Counting:
        settings, calls = {}, 0

        def logits(self, tokens):
            self.calls += 1
            return np.full((len(tokens), 3), float(len(tokens)))

    inner = Counting()
    kept = scoring.Remembered(inner, tmp_path)
    assert (kept.logits([1, 2]) == 2).all() and (kept.logits([1, 2, 3]) == 3).all() and (kept.logits([1, 2]) == 2).all()
    assert inner.calls == 2

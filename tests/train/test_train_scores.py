"""Scores from scratch against published examples and against the libraries that people quote."""

from __future__ import annotations

import math
import random

import pytest

from labkit.train import scores
from labkit.types import LabkitError

SAID = ["the cat sat on the mat", "there is a light on in the kitchen", "turn the lights off", "the the the the the the the"]
WANTED = ["the cat is on the mat", "a light is on in the kitchen now", "turn off the lights in the hall", "the cat is on the mat"]
MORE = ["the cat is sitting on the mat", "a light burns in the kitchen", "switch the lights off"]


def test_the_examples_of_the_papers():
    # Papineni et al. 2002, section 2.1: seven times "the" has a modified unigram precision of 2 / 7.
    assert scores.rouge("the the the the the the the", "the cat is on the mat").precision == pytest.approx(2 / 7)
    assert scores.bleu(SAID[3:], [[WANTED[3], "there is a cat on the mat"]], order=1) == pytest.approx(2 / 7)
    # Lin 2004, section 3.1: S1 is "police killed the gunman"; its ROUGE-L with S2 is 3 / 4, with S3 2 / 4.
    for other, share in (("police kill the gunman", 3 / 4), ("the gunman kill police", 2 / 4)):
        assert scores.rouge_l(other, "police killed the gunman") == pytest.approx((share, share, share))


def test_bleu_as_sacrebleu_computes_it():
    """Values of sacrebleu 2.6.0, corpus_bleu(tokenize="none", smooth_method="none") / 100."""
    assert scores.bleu(SAID, [[one] for one in WANTED]) == pytest.approx(0.22802868558636717, rel=1e-12)
    assert scores.bleu(SAID[:3], list(zip(WANTED, MORE, strict=False))) == pytest.approx(0.374894216793566, rel=1e-12)
    assert scores.bleu(SAID[1:2], [WANTED[1:2]]) == pytest.approx(0.427287006396234, rel=1e-12)
    assert scores.bleu(SAID[:1], [WANTED[:1]]) == 0  # no run of four words in common


def test_rouge_as_rouge_score_computes_it():
    """Values of rouge-score 0.1.2, RougeScorer(use_stemmer=False): precision, recall, F1 of the third pair."""
    said, wanted = SAID[2], WANTED[2]
    assert scores.rouge(said, wanted) == pytest.approx((1.0, 0.5714285714285714, 0.7272727272727273))
    assert scores.rouge(said, wanted, 2) == pytest.approx((0.3333333333333333, 0.16666666666666666, 0.2222222222222222))
    assert scores.rouge_l(said, wanted) == pytest.approx((0.75, 0.42857142857142855, 0.5454545454545454))
    assert scores.rouge(SAID[3], WANTED[3], 2) == (0.0, 0.0, 0.0)


def test_the_libraries_agree_on_random_texts():
    sacrebleu, rouge_score = pytest.importorskip("sacrebleu"), pytest.importorskip("rouge_score.rouge_scorer")
    rng = random.Random(3)
    make = lambda: " ".join(rng.choice("abcde") for _ in range(rng.randint(4, 12)))  # noqa: E731
    said, first, second = ([make() for _ in range(40)] for _ in range(3))
    theirs = sacrebleu.corpus_bleu(said, [first, second], tokenize="none", smooth_method="none").score / 100
    assert scores.bleu(said, list(zip(first, second, strict=True))) == pytest.approx(theirs, rel=1e-9)
    scorer = rouge_score.RougeScorer(["rouge1", "rouge2", "rougeL"])
    for a, b in zip(said, first, strict=True):
        found = scorer.score(b, a)
        for ours, name in ((scores.rouge(a, b), "rouge1"), (scores.rouge(a, b, 2), "rouge2"), (scores.rouge_l(a, b), "rougeL")):
            assert ours == pytest.approx((found[name].precision, found[name].recall, found[name].fmeasure))


def test_f1_of_classes_as_scikit_learn_computes_it():
    said, wanted = list("aabbbcad"), list("abbbacab")
    found = scores.classes(said, wanted)
    assert found["a"] == pytest.approx((2 / 3, 2 / 3, 2 / 3)) and found["d"] == (0, 0, 0)
    metrics = pytest.importorskip("sklearn.metrics")
    assert scores.macro_f1(said, wanted) == pytest.approx(metrics.f1_score(wanted, said, average="macro", zero_division=0))
    assert scores.exact_match(said, wanted) == pytest.approx(metrics.accuracy_score(wanted, said))


def test_a_guess_among_v_has_perplexity_v_and_the_ends_are_right():
    assert scores.perplexity([math.log(2048)] * 5) == pytest.approx(2048) and scores.perplexity([0.0]) == 1
    assert scores.bleu(WANTED, [[one] for one in WANTED]) == pytest.approx(1)
    assert scores.overlap("on the mat", "the mat on") == (1, 1, 1) and scores.rouge_l("on the mat", "the mat on").f1 < 1
    assert scores.rouge_l("", "a b") == (0, 0, 0)
    for call in (lambda: scores.exact_match(["a"], []), lambda: scores.bleu([], []), lambda: scores.perplexity([])):
        with pytest.raises(LabkitError):
            call()

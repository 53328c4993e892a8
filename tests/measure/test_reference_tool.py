"""Perplexity and divergence against what llama.cpp's own tool printed for the same weights and text.

`reference/make.py` made the figures. The tolerances allow for another processor's rounding, not for another definition.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from tiny_checkpoint import TEXT

import labkit
from labkit import engines, measure

pytestmark = pytest.mark.skipif(engines.version("llamacpp") is None, reason="llama-cpp-python is not installed")
HERE = Path(__file__).parent / "reference"
SAID = json.loads((HERE / "figures.json").read_text(encoding="utf-8"))
WINDOW, CHUNKS = SAID["window"], SAID["chunks"]


@pytest.fixture(scope="module")
def text():
    return " ".join(TEXT) * 12


@pytest.fixture(scope="module")
def built(tiny_llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference")
    return {
        precision: labkit.build(tiny_llama, labkit.Recipe("llamacpp", precision), out=folder / precision)
        for precision in ("f32", "q8_0", "q2_k")
    }


@pytest.fixture(scope="module")
def base(built, text, tmp_path_factory):
    ids = built["f32"].checkpoint.encode(text)[: WINDOW * CHUNKS]
    with labkit.load(built["f32"], exact=True) as runner:
        return measure.write_base(tmp_path_factory.mktemp("base") / "base.bin", runner, ids, WINDOW)


def test_perplexity_and_its_error(built, text):
    found = measure.perplexity(built["f32"], text, window=WINDOW, limit=CHUNKS)
    assert measure.summary(found).value == pytest.approx(SAID["figures"]["f32"]["PPL"], rel=1e-5)
    assert measure.plus_minus(found) == pytest.approx(SAID["figures"]["f32"]["PPL error"], rel=1e-5)


@pytest.mark.parametrize("precision", ["q8_0", "q2_k"])
def test_divergence_statistics(built, base, precision):
    said, found = SAID["figures"][precision], measure.divergence(built[precision], base)
    details = found.details
    quantiles = {"Median": "median", "90.0%": "90%", "95.0%": "95%", "99.0%": "99%", "99.9%": "99.9%", "Maximum": "max"}
    ours = {f"{theirs} KLD": details["quantiles"][name] for theirs, name in quantiles.items()} | {
        "Mean KLD": measure.summary(found).value,
        "Mean KLD error": details["kl_se"],
        "Mean PPL(Q)": np.exp(np.mean(details["nll"])),
        "Mean PPL(base)": np.exp(np.mean(details["nll_reference"])),
        "Mean ln(PPL(Q)/PPL(base))": details["ln_ppl_ratio"],
        "Mean ln(PPL(Q)/PPL(base)) error": details["ln_ppl_ratio_se"],
        "Mean PPL(Q)/PPL(base)": measure.perplexity_ratio(found).value,
        "Cor(ln(PPL(Q)), ln(PPL(base)))": 100 * details["ln_ppl_correlation"],
        "Mean Δp": 100 * details["delta_p_mean"],
        "RMS Δp": 100 * details["delta_p_rms"],
        "RMS Δp error": 100 * details["delta_p_rms_se"],
        "Same top p": 100 * measure.same_top(found).value,
    }
    printed = {"Cor(ln(PPL(Q)), ln(PPL(base)))": 0.006} | {name: 6e-4 for name in said if "Δp" in name}
    for name, value in ours.items():
        assert value == pytest.approx(said[name], rel=2e-3, abs=printed.get(name, 2e-6)), name


def test_a_logits_file_of_the_tool_is_read_and_ours_is_the_same(built, text, tmp_path):
    theirs = HERE / "base_16x2.bin"
    ids = built["f32"].checkpoint.encode(text)[:32]
    with labkit.load(built["f32"], exact=True) as runner:
        ours = measure.write_base(tmp_path / "ours.bin", runner, ids, 16)
    opened = measure.read_base(theirs)
    assert opened.tokens.ravel().tolist() == ids
    a, b = (np.fromfile(path, dtype=np.uint16) for path in (theirs, ours))
    assert a.size == b.size and np.mean(a != b) < 0.02  # steps that another processor rounds to the neighbour
    for i in range(2):
        np.testing.assert_allclose(opened.log_probs(i), measure.read_base(ours).log_probs(i), atol=5e-4)

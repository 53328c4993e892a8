"""Rearranged weights chosen tensor by tensor, as processors with AMX need it: the same arithmetic as the library's own choice."""

from __future__ import annotations

import json

import numpy as np
import pytest

import labkit
from labkit import engines
from labkit.engines import _llamacpp_repack as repack
from labkit.engines._gguf import tensors
from labkit.engines._llamacpp_runner import LlamaRunner

pytestmark = pytest.mark.skipif(engines.version("llamacpp") is None, reason="llama-cpp-python is not installed")
TOKENS = list(range(5, 45))


@pytest.fixture(scope="module")
def q4(tiny_llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("artifacts") / "q4"
    return next(labkit.build(tiny_llama, labkit.Recipe("llamacpp", "q4_0"), out=folder).path.glob("*.gguf"))


@pytest.fixture
def amx(monkeypatch, home):
    monkeypatch.setattr(repack, "broken_amx", lambda: True)


def _logits(path, **options):
    with LlamaRunner(path, exact=False, threads=1, **options) as runner:
        return runner.read(TOKENS), runner.settings["repack"]


def test_the_type_that_is_taken_is_the_one_that_rearranges():
    if repack._buffer_type() is None:
        pytest.skip("this build has no rearranged weights")
    assert isinstance(repack._buffer_type(), int)


def test_tensor_by_tensor_gives_the_same_bits_as_the_librarys_choice(q4, amx, monkeypatch):
    if repack.overrides(tensors(q4)) is None:
        pytest.skip("this processor has no instructions for rearranged weights")
    ours, how = _logits(q4)
    assert how == repack.WITHOUT_AMX
    monkeypatch.undo()
    if repack.broken_amx():
        pytest.skip("the library's own choice would end the process here")
    theirs, how = _logits(q4)
    plain, off = _logits(q4, repack=False)
    assert how is True and off is False
    assert np.array_equal(ours, theirs)
    assert not np.array_equal(ours, plain), "rearranged rows are summed in another order: else nothing was rearranged"


def test_rows_that_are_looked_up_or_do_not_divide_stay_as_they_are(monkeypatch):
    monkeypatch.setattr(repack._ggml.library(), "llama_print_system_info", lambda: b"CPU : AVX2 = 1 | ")
    fits = {"name": "blk.0.ffn_up.weight", "type": "q4_k", "shape": (512, 256)}
    assert repack._fits(fits)
    changes = ({"name": "token_embd.weight"}, {"shape": (100, 256)}, {"shape": (512,)}, {"type": "q6_k"}, {"type": "q2_k"})
    assert not any(repack._fits(fits | change) for change in changes)


def test_it_is_tried_in_a_process_of_its_own_and_remembered(q4, amx, monkeypatch, home):
    assert repack.holds(q4) is True and list(json.loads((home / "repack.json").read_text()).values()) == [True]
    monkeypatch.setattr(repack, "_tried", lambda path: pytest.fail("tried again"))
    assert repack.holds(q4) is True


@pytest.mark.parametrize("ending", ["os.kill(os.getpid(), 4)", "time.sleep(60)"])
def test_a_process_that_dies_or_hangs_leaves_the_weights_as_they_are(q4, amx, monkeypatch, ending):
    run = repack.subprocess.run
    dying = [repack.sys.executable, "-c", f"import os, time; {ending}"]
    monkeypatch.setattr(repack.subprocess, "run", lambda command, **given: run(dying, **given))
    monkeypatch.setattr(repack, "SECONDS", 1)
    logits, how = _logits(q4)
    assert how == repack.OFF and len(logits)

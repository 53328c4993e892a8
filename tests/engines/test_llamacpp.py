"""llama.cpp as an engine: the runner against transformers, the quantizer's mixes, the importance matrix, the builds."""

from __future__ import annotations

import re
import shutil
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("llama_cpp")
from labkit.build import build as labkit_build
from labkit.checkpoint import open_checkpoint
from labkit.engines import _ggml, llamacpp
from labkit.engines._gguf import tensor_data
from labkit.engines._llamacpp_runner import LlamaRunner
from labkit.types import LabkitError, Recipe

FAMILIES = ["llama", "llama-3", "llama-bias", "mistral", "qwen2", "qwen3", "phi3"]


def opened(folder, path, dtype="f32", exact=True, **settings):
    llamacpp.write_gguf(open_checkpoint(folder), path, dtype)
    return LlamaRunner(path, exact=exact, **settings)


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_and_greedy_equal_transformers(family, reference, tmp_path, name):
    ids, logits, continuation = reference(family(name))
    with opened(family(name), tmp_path / "m.gguf") as run:
        found = run.logits(ids)
        assert found.shape == logits.shape and found.dtype == np.float32
        assert np.abs(found - logits).max() < 1e-4
        assert list(run.generate(ids[:20], 24)) == continuation


def test_gemma_equals_transformers_with_the_gelu_llama_cpp_computes(family, tmp_path):
    """llama.cpp looks GELU up in a table of float16: with the same table in transformers nothing else differs."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(family("gemma3"), dtype=torch.float32).eval()

    class Table(torch.nn.Module):
        def forward(self, x):
            return torch.nn.functional.gelu(x.half().float(), approximate="tanh").half().float()

    for layer in model.model.layers:
        layer.mlp.act_fn = Table()
    ids = np.random.default_rng(3).integers(3, 512, 72).tolist()  # four and a half sliding windows
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0].numpy()
    with opened(family("gemma3"), tmp_path / "m.gguf") as run:
        assert np.abs(run.logits(ids) - expected).max() < 1e-3


def test_longrope_uses_short_factors_then_long(tmp_path, tiny_llama):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    rope = {
        "rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 0.75,
        "original_max_position_embeddings": 256,
        "short_factor": [1.0 + 0.02 * i for i in range(12)], "long_factor": [2.0 + 0.3 * i for i in range(12)],
    }  # fmt: skip
    config = transformers.Phi3Config(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=512, max_position_embeddings=1024, original_max_position_embeddings=256, partial_rotary_factor=0.75,
        rope_parameters=rope, bos_token_id=0, eos_token_id=2, pad_token_id=0, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, float(weight.ndim == 1), 0.06)
    model.save_pretrained(tmp_path / "phi")
    shutil.copy(tiny_llama / "tokenizer.json", tmp_path / "phi")
    ids = np.random.default_rng(0).integers(3, 512, 300).tolist()
    with opened(tmp_path / "phi", tmp_path / "m.gguf") as run:
        for length in (40, 300):
            with torch.no_grad():
                expected = model(torch.tensor([ids[:length]])).logits[0].numpy()
            assert np.abs(run.logits(ids[:length]) - expected).max() < 1e-3
            run.close()
            run = LlamaRunner(tmp_path / "m.gguf", exact=True)  # the context's size chooses the factors
        run.close()


def test_a_sliding_window_llama_cpp_lacks_is_noted(family, reference, tmp_path):
    checkpoint = open_checkpoint(family("mistral-window"))
    notes = llamacpp.write_gguf(checkpoint, tmp_path / "m.gguf", "f32")["notes"]
    assert "equal up to 16 tokens only" in notes[0]
    ids, logits, _ = reference(family("mistral-window"))
    with LlamaRunner(tmp_path / "m.gguf", exact=True) as run:
        found = run.logits(ids)
    assert np.abs(found - logits)[:16].max() < 1e-4 < np.abs(found - logits)[17:].max()


def test_rows_left_unpermuted_would_be_caught(family, reference, tmp_path, monkeypatch):
    ids, logits, _ = reference(family("llama"))
    monkeypatch.setattr("labkit.engines._gguf_model.interleave", lambda rows, head_rows: rows)
    with opened(family("llama"), tmp_path / "m.gguf") as run:
        assert np.abs(run.logits(ids) - logits).max() > 0.01


@pytest.fixture(scope="module")
def small(tiny_llama, tmp_path_factory):
    """The tiny Llama as float32 GGUF."""
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    llamacpp.write_gguf(open_checkpoint(tiny_llama), path, "f32")
    return path


IDS = [int(i) for i in np.random.default_rng(9).integers(3, 512, 300)]


def test_chunks_and_growing_contexts_do_not_change_logits(small):
    with LlamaRunner(small, exact=True) as run:
        few = run.logits(IDS[:40])
        many = run.logits(IDS)  # needs a larger context than the first call
        again = run.logits(IDS[:40])
        run._rows = 16  # as with a vocabulary of a million: passes of 16 tokens
        run._contexts, old = {}, run._contexts
        chunked = run.logits(IDS)
        run._contexts |= {"old": old["every"]}  # let close free it
    np.testing.assert_array_equal(few, again)
    assert np.abs(many[:40] - few).max() < 1e-4
    assert np.abs(chunked - many).max() < 1e-4


def test_generate_starts_empty_and_yields_exactly_n(small):
    with LlamaRunner(small) as run:
        first = list(run.generate(IDS[:30], 20))
        run.logits(IDS[:50])
        assert list(run.generate(IDS[:30], 20)) == first and len(first) == 20
        assert list(run.generate(IDS[:30], 0)) == []
        assert first[0] == run.logits(IDS[:30])[-1].argmax()
        assert all(isinstance(i, int) for i in first)


def test_two_generations_at_once_are_refused(small):
    with LlamaRunner(small) as run:
        one = run.generate(IDS[:5], 10)
        next(one)
        list(run.generate(IDS[:5], 2))
        with pytest.raises(LabkitError, match="finish one generation"):
            next(one)


@pytest.mark.parametrize(
    ("tokens", "new", "message"),
    [([], 1, "at least one id"), ([512], 1, "Token id 512 is out of range; this model has ids 0 to 511"),
     ([-1], 1, "Token id -1"), ([3] * 513, 0, "context is 512"), ([3] * 500, 13, "500 tokens and 13 new"),
     ([[3, 4]], 1, "flat list")],
)  # fmt: skip
def test_bad_tokens_get_a_sentence(small, tokens, new, message):
    with LlamaRunner(small) as run, pytest.raises(LabkitError, match=message):
        list(run.generate(tokens, new)) if new else run.logits(tokens)


def test_close_twice_and_use_after(small):
    run = LlamaRunner(small)
    run.logits([5])
    run.close()
    run.close()
    with pytest.raises(LabkitError, match="closed"):
        run.logits([5])


def test_settings_say_what_is_effective(small):
    with LlamaRunner(small, exact=True, threads=1) as run:
        assert (run.settings["threads"], run.settings["kv_type"], run.settings["flash_attention"]) == (1, "f32", False)
    with LlamaRunner(small) as run:
        assert (run.settings["kv_type"], run.settings["flash_attention"], run.settings["mmap"]) == ("f16", True, True)
    with pytest.raises(LabkitError, match="threads=0"):
        LlamaRunner(small, threads=0)


def test_a_file_that_is_no_model_gets_llama_cpps_reason(small, tmp_path):
    (tmp_path / "half.gguf").write_bytes(small.read_bytes()[: small.stat().st_size // 2])
    with pytest.raises(LabkitError, match=r"cannot load|not a readable"):
        LlamaRunner(tmp_path / "half.gguf")


def test_nothing_is_printed(small, capfd):
    with LlamaRunner(small) as run:
        run.logits([3, 4])
    assert capfd.readouterr() == ("", "")


# --- quantizing ---------------------------------------------------------------------------------------------------


def test_the_mix_of_q4_k_m(small, tmp_path):
    made = llamacpp.quantize_gguf(small, tmp_path / "q.gguf", "q4_k_m")
    kinds = {t["name"]: t["type"] for t in llamacpp.tensors(tmp_path / "q.gguf")}
    assert kinds["token_embd.weight"] == "q6_k"  # tied: it is the output too
    assert kinds["blk.0.attn_q.weight"] == "q4_k" and kinds["blk.0.attn_norm.weight"] == "f32"
    assert made["fallbacks"] == [] and made["notes"] == []
    assert made["types"]["f32"] == 5


def test_pure_and_overrides_and_ends(small, tmp_path):
    llamacpp.quantize_gguf(small, tmp_path / "pure.gguf", "q2_k", pure=True)
    assert {t["type"] for t in llamacpp.tensors(tmp_path / "pure.gguf")} == {"f32", "q2_k"}
    llamacpp.quantize_gguf(
        small, tmp_path / "o.gguf", "q4_0", tensor_types={r"blk\.1\.ffn_down": "q8_0"}, embedding_type="q5_1"
    )
    kinds = {t["name"]: t["type"] for t in llamacpp.tensors(tmp_path / "o.gguf")}
    assert kinds["blk.1.ffn_down.weight"] == "q8_0" and kinds["blk.0.ffn_down.weight"] == "q4_0"
    assert kinds["token_embd.weight"] == "q5_1"


def test_quantized_bytes_are_what_ggml_makes_of_the_rows(small, tmp_path):
    """The file's bytes against the quantizer called on the float32 rows directly."""
    llamacpp.quantize_gguf(small, tmp_path / "q.gguf", "q3_k_s")
    rows = tensor_data(small, "blk.0.ffn_gate.weight")
    np.testing.assert_array_equal(
        tensor_data(tmp_path / "q.gguf", "blk.0.ffn_gate.weight"), _ggml.quantize(rows, "q3_k")
    )


@pytest.mark.parametrize("precision", ["q4_k_m", "q3_k_l", "q2_k", "q5_0", "tq1_0", "iq4_xs"])
def test_one_pass_equals_two(make_llama, tmp_path, precision):
    """Straight from safetensors, and through a float file: the same metadata and the same bytes."""
    checkpoint = open_checkpoint(make_llama(dtype="BF16", num_hidden_layers=3))
    one, two = tmp_path / "one.gguf", tmp_path / "two.gguf"
    llamacpp.write_gguf(checkpoint, tmp_path / "base.gguf", "bf16")
    expected = llamacpp.quantize_gguf(tmp_path / "base.gguf", two, precision)
    made = llamacpp.write_gguf(checkpoint, one, precision)
    assert llamacpp.metadata(one) == llamacpp.metadata(two)
    table = {t["name"]: t for t in llamacpp.tensors(one)}
    assert table == {t["name"]: t for t in llamacpp.tensors(two)}
    for name in table:
        np.testing.assert_array_equal(tensor_data(one, name), tensor_data(two, name))
    assert made["types"] == expected["types"] and made["weight_bytes"] == expected["weight_bytes"]


def test_one_pass_with_importance_and_overrides(tiny_llama, small, tmp_path):
    imatrix = llamacpp.collect_imatrix(small, IDS[:64])
    mix = {"tensor_types": {"attn_v": "q5_k"}, "output_type": "q5_1"}
    llamacpp.quantize_gguf(small, tmp_path / "two.gguf", "q4_0", imatrix=imatrix, **mix)
    llamacpp.write_gguf(open_checkpoint(tiny_llama), tmp_path / "one.gguf", "q4_0", imatrix=imatrix, **mix)
    for tensor in llamacpp.tensors(tmp_path / "two.gguf"):
        one, two = (tensor_data(tmp_path / f"{n}.gguf", tensor["name"]) for n in ("one", "two"))
        np.testing.assert_array_equal(one, two)


def test_rows_that_do_not_divide_fall_back_and_say_so(make_llama, tmp_path):
    folder = make_llama(hidden_size=192, head_dim=48, intermediate_size=256)
    llamacpp.write_gguf(open_checkpoint(folder), tmp_path / "m.gguf", "f32")
    made = llamacpp.quantize_gguf(tmp_path / "m.gguf", tmp_path / "q.gguf", "q2_k")
    first = next(f for f in made["fallbacks"] if f["tensor"] == "blk.0.attn_q.weight")
    assert first == {"tensor": "blk.0.attn_q.weight", "columns": 192, "wanted": "q2_k", "got": "q4_0"}
    assert re.match(r"\d+ of \d+ tensors fell back", made["notes"][0])
    kinds = {t["name"]: t["type"] for t in llamacpp.tensors(tmp_path / "q.gguf")}
    assert kinds["blk.0.ffn_down.weight"] in ("q2_k", "q3_k")  # rows of 256
    direct = llamacpp.write_gguf(open_checkpoint(folder), tmp_path / "d.gguf", "q2_k")
    assert (direct["fallbacks"], direct["notes"]) == (made["fallbacks"], made["notes"])


def test_what_llama_cpp_refuses_comes_with_its_reason(small, tmp_path):
    llamacpp.quantize_gguf(small, tmp_path / "q.gguf", "q4_0")
    with pytest.raises(LabkitError, match="requantizing from type q4_0"):
        llamacpp.quantize_gguf(tmp_path / "q.gguf", tmp_path / "r.gguf", "q2_k")
    assert not (tmp_path / "r.gguf").exists()
    with pytest.raises(LabkitError, match="no precision 'q7_k'"):
        llamacpp.quantize_gguf(small, tmp_path / "r.gguf", "q7_k")
    with pytest.raises(LabkitError, match="no block type"):
        llamacpp.quantize_gguf(small, tmp_path / "r.gguf", "q4_0", output_type="q9")
    with pytest.raises(LabkitError, match="not a regular expression"):
        llamacpp.quantize_gguf(small, tmp_path / "r.gguf", "q4_0", tensor_types={"(": "q8_0"})
    with pytest.raises(LabkitError, match="needs an importance matrix"):
        llamacpp.quantize_gguf(small, tmp_path / "r.gguf", "iq2_xxs")


# --- importance matrix --------------------------------------------------------------------------------------------


def test_the_importance_matrix_is_the_mean_square_of_the_inputs(tiny_llama, small):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    imatrix = llamacpp.collect_imatrix(small, IDS[:128], window=64)
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    seen: dict[str, list[np.ndarray]] = {}
    for origin, name in (
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.o_proj", "attn_output"),
        ("mlp.down_proj", "ffn_down"),
    ):
        module = model.get_submodule(f"model.layers.1.{origin}")
        module.register_forward_pre_hook(lambda m, x, name=name: seen.setdefault(name, []).append(x[0][0].numpy()))
    with torch.no_grad():
        for first in (0, 64):
            model(torch.tensor([IDS[first : first + 64]]))
    for name, parts in seen.items():
        expected = (np.concatenate(parts) ** 2).mean(0)
        np.testing.assert_allclose(imatrix[f"blk.1.{name}.weight"], expected, rtol=2e-2, atol=1e-4 * expected.max())
    assert len(imatrix) == 14  # seven matrices in each of two layers
    with pytest.raises(LabkitError, match="at least 32"):
        llamacpp.collect_imatrix(small, [3] * 5)


def test_importance_lowers_the_weighted_error(small, tmp_path):
    from gguf import GGMLQuantizationType, quants

    imatrix = {name: v**2 for name, v in llamacpp.collect_imatrix(small, IDS).items()}  # squared: a sharper contrast
    llamacpp.quantize_gguf(small, tmp_path / "plain.gguf", "q2_k")
    llamacpp.quantize_gguf(small, tmp_path / "weighted.gguf", "q2_k", imatrix=imatrix)
    error = {}
    for kind in ("plain", "weighted"):
        total = 0.0
        for tensor in llamacpp.tensors(tmp_path / f"{kind}.gguf"):
            if tensor["name"] in imatrix:
                data = tensor_data(tmp_path / f"{kind}.gguf", tensor["name"])
                values = quants.dequantize(data, GGMLQuantizationType[tensor["type"].upper()])
                weights = imatrix[tensor["name"]] / imatrix[tensor["name"]].sum()
                total += float(((values - tensor_data(small, tensor["name"])) ** 2 @ weights).sum())
        error[kind] = total
    assert error["weighted"] < 0.95 * error["plain"]


def test_an_importance_matrix_survives_its_file(small, tmp_path):
    imatrix = llamacpp.collect_imatrix(small, IDS[:64])
    llamacpp.save_imatrix(imatrix, tmp_path / "i.gguf", tokens=64, text="a test")
    again = llamacpp.load_imatrix(tmp_path / "i.gguf")
    assert list(again) == list(imatrix)
    for name, values in imatrix.items():
        np.testing.assert_allclose(again[name], values, rtol=1e-6)
    assert llamacpp.metadata(tmp_path / "i.gguf")["imatrix.datasets"] == ["a test"]
    with pytest.raises(LabkitError, match="no importance matrix"):
        llamacpp.load_imatrix(small)


# --- build and load -----------------------------------------------------------------------------------------------


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text.txt").write_text("turn on the light in the kitchen, please. set a timer for 5 minutes.\n" * 20)
    return str(tmp_path / "text.txt")


@pytest.mark.parametrize("precision", ["f32", "bf16", "q8_0", "q4_k_m", "q2_k", "tq2_0"])
def test_builds_load_and_stay_inside_their_bounds(make_llama, home, precision):
    artifact = labkit_build(make_llama(dtype="BF16", num_hidden_layers=6), Recipe("llamacpp", precision))
    low, high = llamacpp.PRECISIONS[precision]
    assert low <= artifact.bits_per_weight <= high
    assert artifact.notes == ()
    assert [p.name for p in artifact.path.glob("*.gguf")] == ["model.gguf"]  # no intermediate file stays
    with llamacpp.load(artifact) as run:
        assert np.isfinite(run.logits(IDS[:20])).all()


def test_types_that_need_importance_collect_it_and_say_so(make_llama, home, text):
    recipe = Recipe("llamacpp", "iq2_xs", calibration=text, calibration_tokens=200)
    artifact = labkit_build(make_llama(num_hidden_layers=1), recipe)
    assert "collected from 200 tokens of text.txt" in artifact.notes[0]
    assert artifact.settings["imatrix_tokens"] == 200
    assert len(llamacpp.load_imatrix(artifact.path / "imatrix.gguf")) == 7


def test_the_imatrix_option_changes_the_file(make_llama, home, text):
    folder = make_llama(num_hidden_layers=1)
    plain = labkit_build(folder, Recipe("llamacpp", "q2_k"))
    weighted = labkit_build(folder, Recipe("llamacpp", "q2_k", imatrix=True, calibration=text))
    assert weighted.weight_bytes == plain.weight_bytes and weighted.notes == ()
    one, two = (tensor_data(a.path / "model.gguf", "blk.0.ffn_up.weight") for a in (plain, weighted))
    assert (one != two).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [({"imatrx": True}, "no option 'imatrx'"), ({"base": "q8_0"}, "expected f32, f16 or bf16"),
     ({"imatrix": True, "calibration": "/no/such/file"}, "cannot be read")],
)  # fmt: skip
def test_bad_options_get_a_sentence_and_leave_nothing(make_llama, home, options, message):
    with pytest.raises(LabkitError, match=message):
        labkit_build(make_llama(), Recipe("llamacpp", "q4_0", **options))
    assert not list((home / "artifacts").rglob("*.gguf"))


def test_two_threads_that_meet_the_library_first_set_one_log(monkeypatch):
    """Each installing its own, the library was left now and then with a callback Python had freed: a crash at the next load."""
    met, kept = threading.Barrier(8), []
    module = _ggml.library()
    monkeypatch.setattr(_ggml, "_log", log := _ggml._Log())
    slow = SimpleNamespace(
        llama_log_callback=lambda function: (time.sleep(0.01), module.llama_log_callback(function))[1],
        llama_log_set=lambda callback, _: kept.append(callback),
    )
    threads = [threading.Thread(target=lambda: (met.wait(), log.install(slow))) for _ in range(8)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert kept == [log._keep]

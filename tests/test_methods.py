"""The methods against their libraries where there is one, and against closed forms and brute force."""

from __future__ import annotations

import ast
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from labkit import blocks, gguf_blocks, methods
from labkit.checkpoint import checkpoint
from labkit.house import heldout_text
from labkit.methods import _grid, awq, chart, compare, forward, gptq, hadamard, hqq, imatrix, kvcache, smoothquant
from labkit.types import LabkitError

FOLDER = Path(methods.__file__).parent


def case(rows: int = 48, columns: int = 256, n: int = 400, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """W (out, in), and inputs X (n, in) as a network has them: correlated, some columns loud, one never used."""
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(columns, columns)) * rng.geometric(0.2, columns)  # few directions hold most of it
    x = rng.normal(size=(n, columns)) @ mixing / columns**0.5
    x[:, rng.integers(columns, size=6)] *= 12
    x[:, 5] = 0
    return (rng.standard_t(5, size=(rows, columns)) * 0.05).astype(np.float32), x.astype(np.float32)


def loss(weights: np.ndarray, restored: np.ndarray, x: np.ndarray) -> float:
    """Mean squared error of the outputs."""
    return float(np.mean((x @ (weights - restored).T) ** 2))


def plain(weights: np.ndarray, bits: int = 4, group: int = 64, **how) -> blocks.Quantized:
    return blocks.affine(weights, bits, per=group, **{"zero": "bias", **how})


# --- what all share ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", methods.METHODS)
def test_a_method_is_one_short_file_that_names_its_source(name):
    text = (FOLDER / f"{name}.py").read_text(encoding="utf-8")
    assert len(text.splitlines()) < 60
    module = ast.parse(text)
    assert any(mark in ast.get_docstring(module) for mark in ("arXiv", "llama.cpp, pull request", "hqq_blog"))
    imported = {node.names[0].name for node in ast.walk(module) if isinstance(node, ast.Import)}
    assert imported == {"numpy"}  # neither torch nor an engine


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("method", [gptq.quantize, imatrix.quantize])
def test_no_method_is_worse_than_rounding_on_what_it_was_calibrated_with(method, bits):
    for seed in range(3):
        w, x = case(seed=seed)
        found = method(w, x, bits)
        assert loss(w, found.dequantize(), x) < loss(w, plain(w, bits).dequantize(), x)
        assert found.stored_bytes == plain(w, bits).stored_bytes  # equal bits: the codes differ, not their number
        assert found.error == blocks.error(w, found.dequantize())
        assert found.codes.dtype == np.uint8 and found.codes.max() < 2**bits


@pytest.mark.parametrize("method", [gptq.quantize, imatrix.quantize, awq.quantize, smoothquant.factors])
def test_bad_arguments_are_one_sentence(method):
    w, x = case()
    with pytest.raises(LabkitError, match=r"expected \(out, in\) and \(n, in\)"):
        method(w, x[:, :-1])
    with pytest.raises(LabkitError, match="NaN or infinite"):
        method(w, np.where(x == 0, np.nan, x))
    if method is not smoothquant.factors:
        with pytest.raises(LabkitError, match="whole groups"):
            method(w, x, 4, 60)
        with pytest.raises(LabkitError, match="whole number from 1 to 8"):
            method(w, x, 9)
        with pytest.raises(LabkitError, match="expected 'f16' or 'f32'"):
            method(w, x, scale="f8")


@pytest.mark.parametrize(
    "method", [gptq.quantize, imatrix.quantize, lambda w, x: hqq.quantize(w), lambda w, x: awq.quantize(w, x)[0]]
)
def test_empty_and_constant_rows_survive(method):
    w, x = case()
    w[0], w[1] = 0, 0.25
    restored = method(w, x).dequantize()
    assert np.isfinite(restored).all() and not restored[0].any()
    assert np.isfinite(method(w, np.zeros_like(x)).dequantize()).all()


def test_nearest_on_the_grid_of_rounding_is_rounding():
    w, _ = case()
    expected = plain(w, 3)
    found = _grid.nearest(w, expected.scales, expected.bias, 3, expected.scheme, "f16")
    assert np.array_equal(found.codes, expected.codes) and found.stored_bytes == expected.stored_bytes


# --- GPTQ --------------------------------------------------------------------------------------------------------


def test_gptq_is_rounding_when_inputs_are_independent():
    w, _ = case()
    x = np.diag(np.linspace(1, 9, w.shape[1])).astype(np.float32)  # H is diagonal: no column can help another
    assert np.array_equal(gptq.quantize(w, x).codes, plain(w).codes)


def test_gptq_factor_is_the_inverse_of_the_damped_curvature():
    _, x = case()
    upper = gptq.inverse_factor(x, 0.01).astype(np.float64)
    h = x.T.astype(np.float64) @ x
    h += np.diag(np.where(np.diagonal(h) > 0, 0, 1) + 0.01 * np.diagonal(h).mean())
    assert np.array_equal(upper, np.triu(upper))
    assert np.allclose(upper.T @ upper @ h, np.eye(len(h)), atol=1e-3)


def test_gptq_lies_between_rounding_and_the_best_of_all_codes():
    rng, ours, rounded, best = np.random.default_rng(3), 0.0, 0.0, 0.0
    for _ in range(30):
        w = rng.normal(size=(1, 6)).astype(np.float32)
        x = (rng.normal(size=(40, 2)) @ rng.normal(size=(2, 6)) + 0.1 * rng.normal(size=(40, 6))).astype(np.float32)
        grid = plain(w, 2, 6)
        every = np.array(list(product(range(4), repeat=6))) * grid.scales + grid.bias  # (4^6, 6)
        best += np.mean(((w - every) @ x.T) ** 2, axis=1).min()
        ours += loss(w, gptq.quantize(w, x, 2, 6).dequantize(), x)
        rounded += loss(w, grid.dequantize(), x)
    assert best <= ours < 0.5 * rounded


def test_gptq_equals_olive():
    torch = pytest.importorskip("torch")
    olive = pytest.importorskip("olive.passes.pytorch.gptq")
    from olive.common.quant.utils import WeightQuantizer

    w, x = case()
    module = torch.nn.Linear(w.shape[1], w.shape[0], bias=False)
    module.weight.data = torch.tensor(w)
    quantizer = WeightQuantizer(bits=4, symmetric=False, group_size=64)
    module.quant_info = SimpleNamespace(quantizer=quantizer, data={"H": torch.tensor(2 / len(x) * x.T @ x), "N": len(x)})
    olive.Gptq.process_module(module, blocksize=64)
    ours = gptq.quantize(w, x, zero="integer", scale="f32")
    theirs = module.weight.data.numpy()
    # float32 there, float64 here: a rare code falls to the other side and moves what comes after it
    assert np.mean(np.isclose(ours.dequantize(), theirs, atol=1e-5)) > 0.98
    assert loss(w, ours.dequantize(), x) == pytest.approx(loss(w, theirs, x), rel=0.02)


def test_gptq_equals_mlx_lm():
    mx = pytest.importorskip("mlx.core")
    library = pytest.importorskip("mlx_lm.quant.gptq")
    import mlx.nn as nn

    w, x = case(rows=64)
    model = nn.Sequential(nn.Linear(w.shape[1], w.shape[0], bias=False))
    model.layers[0].weight = mx.array(w)
    library.gptq_quantize(model, mx.array(x), 4, 64, 8, 64)
    layer = model.layers[0]
    theirs = np.array(mx.dequantize(layer.weight, layer.scales, layer.biases, group_size=64, bits=4))
    ours = gptq.quantize(w, x, zero="edge", scale="f32").dequantize()
    assert np.mean(np.isclose(ours, theirs, atol=1e-5)) > 0.98
    assert loss(w, ours, x) == pytest.approx(loss(w, theirs, x), rel=0.02)


# --- importance --------------------------------------------------------------------------------------------------


def weighted(weights: np.ndarray, restored: np.ndarray, h: np.ndarray) -> float:
    return float(np.sum(h * (weights - restored) ** 2))


def test_imatrix_beats_llama_cpp_on_its_own_grid():
    pytest.importorskip("llama_cpp")
    from labkit.engines import _ggml

    w, x = case()
    h = imatrix.importance(x)
    theirs = gguf_blocks.dequantize(_ggml.quantize(w, "q4_1", h), "q4_1").reshape(w.shape)
    without = gguf_blocks.dequantize(_ggml.quantize(w, "q4_1"), "q4_1").reshape(w.shape)
    ours = imatrix.quantize(w, x, 4, 32)
    assert ours.bits_per_weight == 5.0  # as Q4_1: 32 codes of 4 bits and two float16
    assert weighted(w, ours.dequantize(), h) < 1.02 * weighted(w, theirs, h)
    assert weighted(w, theirs, h) < weighted(w, without, h)


def test_imatrix_finds_nearly_the_best_grid_there_is():
    rng, found, rounded, least = np.random.default_rng(5), 0.0, 0.0, 0.0
    for _ in range(5):
        w, x = rng.normal(size=(1, 6)).astype(np.float32), (rng.normal(size=(9, 6)) * rng.exponential(1, 6)).astype(np.float32)
        h, ours = imatrix.importance(x), imatrix.quantize(w, x, 2, 6).dequantize()
        best = np.inf
        for codes in product(range(4), repeat=6):  # the line fitted to every possible choice of codes
            c = np.array(codes, np.float32)
            if c.any():
                design = np.sqrt(h)[:, None] * np.stack([c, np.ones(6)], axis=1)
                fit = np.linalg.lstsq(design, np.sqrt(h) * w[0], rcond=None)[0]
                best = min(best, weighted(w[0], fit[0] * c + fit[1], h))
        found += weighted(w, ours, h)
        rounded += weighted(w, plain(w, 2, 6).dequantize(), h)
        least += best
    assert least <= found * 1.01  # float16 scales
    assert found - least < 0.2 * (rounded - least)


def test_importance_is_the_mean_square():
    _, x = case()
    assert np.allclose(imatrix.importance(x), (x.astype(np.float64) ** 2).mean(axis=0), rtol=1e-5)


# --- HQQ ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 50])  # 50: errors so large that some are taken for outliers
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_hqq_equals_onnxruntime(bits, size):
    torch = pytest.importorskip("torch")
    library = pytest.importorskip("onnxruntime.quantization.matmul_nbits_quantizer")
    w = case()[0] * np.float32(size)
    quantizer = library.HQQWeightOnlyQuantizer(library.HQQWeightOnlyQuantConfig(block_size=64, bits=bits))
    codes, scales, zeros = (part.numpy() for part in quantizer.quantize_internal(torch.tensor(w), bits=bits, group_size=64))
    ours = hqq.quantize(w, bits, 64, scale="f32")
    assert np.allclose(ours.scales, scales.reshape(-1, 1), rtol=1e-6)
    # the same sum in another order may round a tie the other way, and move its group's zero a little
    assert np.mean(np.isclose(ours.bias, -(scales * zeros).reshape(-1, 1), atol=1e-6 * size)) > 0.98
    assert np.mean(ours.codes == codes) > 0.999


def test_hqq_lowers_the_error_it_aims_at():
    for size in (1, 50):
        w = case()[0] * np.float32(size)
        p = lambda q: np.mean(np.abs(w - q.dequantize()) ** 0.7)  # noqa: B023, E731
        assert p(hqq.quantize(w, 3)) < p(plain(w, 3))


def test_shrink_takes_the_large_and_drops_the_small():
    x = np.array([-2.0, -1e-3, 0, 1e-3, 2.0], np.float32)
    found = hqq.shrink(x, 10.0, 0.7)
    assert found[1:4].tolist() == [0, 0, 0] and np.allclose(found[[0, 4]], [-2 + 2**-0.3 / 10, 2 - 2**-0.3 / 10])


# --- AWQ and SmoothQuant -----------------------------------------------------------------------------------------


def test_awq_changes_no_function_and_is_never_worse_than_rounding():
    for seed in range(3):
        w, x = case(seed=seed)
        found, s = awq.quantize(w, x)
        assert np.allclose((x / s) @ (w * s).T, x @ w.T, atol=1e-3 * np.abs(x @ w.T).max())
        assert found.stored_bytes == plain(w).stored_bytes
        assert loss(w, found.dequantize() / s, x) < loss(w, plain(w).dequantize(), x)


def test_awq_finds_the_factors_of_mlx_lm():
    mx = pytest.importorskip("mlx.core")
    library = pytest.importorskip("mlx_lm.quant.awq")
    import mlx.nn as nn

    w, x = case(rows=64)
    layer = nn.Linear(w.shape[1], w.shape[0], bias=False)
    layer.weight, layer.input_feat = mx.array(w), mx.array(x)[None]
    rounded = lambda v: mx.dequantize(*mx.quantize(v, bits=4, group_size=64), bits=4, group_size=64)  # noqa: E731
    theirs = np.array(library.search_best_scale([layer], rounded, None, {}, 20))
    ours = awq.factors(w, x, 4, 64, zero="edge", scale="f32")
    assert ours.std() > 0.01 and np.allclose(ours, theirs, rtol=1e-3)


def test_smoothquant_equals_nncf():
    library = pytest.importorskip("nncf.quantization.algorithms.smooth_quant.algorithm")
    from nncf.tensor import Tensor

    w, x = case()
    loud, heavy = np.abs(x).max(axis=0), np.abs(w).max(axis=0)
    loud[5] = 1e-3  # NNCF has a rule of its own for a column never used
    x[0, 5] = 1e-3
    theirs, _ = library.SmoothQuant._calculate_scale_and_ratio(Tensor(loud), Tensor(heavy), 0.5, quantile=0.0)
    ours = smoothquant.factors(w, x)
    assert ours.max() < 100 and np.allclose(ours, theirs.data, rtol=1e-4)  # 100: NNCF's own limit


def test_smoothquant_changes_no_function_and_helps_integer_inputs():
    w, x = case()
    s = smoothquant.factors(w, x)
    exact = x @ w.T
    assert np.allclose((x / s) @ (w * s).T, exact, atol=1e-3 * np.abs(exact).max())
    wrong = [
        np.mean((smoothquant.product(smoothquant.quantize_inputs(a), blocks.symmetric(b, 8, per="channel")) - exact) ** 2)
        for a, b in ((x, w), (x / s, w * s))
    ]
    assert wrong[1] < 0.7 * wrong[0]


def test_integer_product_equals_the_product_of_what_was_restored():
    w, x = case()
    left, right = smoothquant.quantize_inputs(x), blocks.symmetric(w, 8, per="channel")
    expected = left.dequantize().astype(np.float64) @ right.dequantize().T
    assert np.allclose(smoothquant.product(left, right), expected, atol=1e-5 * np.abs(expected).max())


# --- Hadamard ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 64, 256, 768])
def test_rotation_is_orthogonal_and_equals_scipy(n):
    r = hadamard.matrix(n, seed=4)
    assert np.allclose(r @ r.T, np.eye(n), atol=1e-5)
    linalg = pytest.importorskip("scipy.linalg")
    block = n & -n
    sylvester = np.kron(np.eye(n // block), linalg.hadamard(block)) / block**0.5
    assert np.allclose(r, hadamard.signs(n, 4)[:, None] * sylvester, atol=1e-6)


def test_rotation_equals_olive():
    torch = pytest.importorskip("torch")
    library = pytest.importorskip("olive.passes.pytorch.hadamard_utils")
    _, x = case()
    theirs = library.matmul_hadU(torch.tensor(x * hadamard.signs(256))).numpy()
    assert np.allclose(hadamard.rotate(x), theirs, atol=1e-5 * np.abs(x).max())


def test_rotation_changes_no_function_and_spreads_outliers():
    w, x = case()
    turned = hadamard.rotate(x)
    assert np.allclose(turned @ hadamard.rotate(w).T, x @ w.T, atol=1e-4 * np.abs(x @ w.T).max())
    assert hadamard.peak(turned) < 0.6 * hadamard.peak(x)
    assert hadamard.peak(np.full(9, -3.0)) == 1
    rounded = [smoothquant.quantize_inputs(a, 4).error.rmse for a in (x, turned)]
    assert rounded[1] < 0.8 * rounded[0]
    kept = hadamard.quantize(w)
    assert np.allclose(kept.dequantize(), hadamard.rotate(w), atol=0.05) and kept.stored_bytes == plain(w).stored_bytes


# --- KV cache ----------------------------------------------------------------------------------------------------


def keys(positions: int = 96) -> np.ndarray:
    """(2, T, 64): three loud channels, as keys have."""
    x = np.random.default_rng(0).normal(size=(2, positions, 64)).astype(np.float32)
    x[:, :, [3, 20, 40]] = 15 + x[:, :, [3, 20, 40]]
    return x


@pytest.mark.parametrize("rule", [kvcache.by_token, kvcache.by_channel])
def test_cache_error_shrinks_with_bits(rule):
    x = keys()
    wrong = [float(np.square(rule(x, bits) - x).mean()) for bits in (2, 3, 4, 8)]
    assert wrong == sorted(wrong, reverse=True) and wrong[-1] < 1e-3 * wrong[0]


def test_loud_channels_want_a_scale_a_channel_loud_tokens_one_a_token():
    x, turned = keys(), keys(64).swapaxes(1, 2).copy()
    rmse = lambda rule, y: float(np.square(rule(y, 4) - y).mean())  # noqa: E731
    assert rmse(kvcache.by_channel, x) < 0.5 * rmse(kvcache.by_token, x)
    assert rmse(kvcache.by_token, turned) < 0.5 * rmse(kvcache.by_channel, turned)


def test_the_latest_keys_wait_in_full_precision():
    x = keys(70)
    found = kvcache.by_channel(x, 2, 32)
    assert np.array_equal(found[:, 64:], x[:, 64:]) and not np.array_equal(found[:, :64], x[:, :64])
    assert np.array_equal(kvcache.by_channel(x[:, :31], 2, 32), x[:, :31])
    with pytest.raises(LabkitError, match="expected 'channel' or 'token'"):
        kvcache.cache(2, 2, keys_by="head")
    # a scale reaches no further than its own 32 positions
    assert np.array_equal(kvcache.by_channel(x[:, 32:64], 2, 32), found[:, 32:64])


def test_the_cache_by_token_is_mlx_lm_s_but_for_its_kind_of_grid():
    mx = pytest.importorskip("mlx.core")
    library = pytest.importorskip("mlx_lm.models.cache")
    x = keys(32)
    cache = library.QuantizedKVCache(group_size=32, bits=4)
    found, _ = cache.update_and_fetch(mx.array(x)[None], mx.array(x)[None])
    theirs = np.array(mx.dequantize(*found, group_size=32, bits=4))[0]
    ours, mean = kvcache.by_token(x, 4, 32), lambda y: float(np.square(y - x).mean())
    assert mean(ours) == pytest.approx(mean(theirs), rel=0.1)  # MLX moves the grid so that 0 is exact
    assert kvcache.bits_per_value(4, 32) == 8 * sum(part.nbytes for part in found) / x.size - 1  # its scales here: float32


# --- the forward pass --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def house():
    files = checkpoint("edgehome")
    return forward.open_llama(files), files.encode(heldout_text())[:200], files


def test_forward_equals_transformers_in_both_precisions(house):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    model, ids, files = house
    for kind, wide, limit in ((torch.float64, np.float64, 1e-4), (torch.float32, np.float32, 1e-5)):
        with torch.no_grad():
            theirs = transformers.AutoModelForCausalLM.from_pretrained(files.path, dtype=kind)(torch.tensor([ids])).logits[0]
        ours = model.with_({name: w.astype(wide) for name, w in model.weights.items()}).logits(ids)
        # float32 sums in another order differ by their last digits: a share of the largest logit there
        assert np.abs(ours - theirs.numpy()).max() < limit * (1 if wide is np.float64 else np.abs(ours).max())


def test_forward_equals_our_torch_model(house):
    torch = pytest.importorskip("torch")
    from labkit.house.model import Llama

    model, ids, _ = house
    ours, theirs = model.logits(ids), Llama().double()
    theirs.load_state_dict({name: torch.tensor(w) for name, w in model.weights.items()})
    with torch.no_grad():
        assert np.abs(ours - theirs(torch.tensor([ids]))[0].numpy()).max() < 1e-5 * np.abs(ours).max()


@pytest.mark.parametrize(
    "how", [{}, {"tie_word_embeddings": False, "num_key_value_heads": 4}, {"head_dim": 32, "rope_theta": 5e5}]
)
def test_forward_of_other_llamas(make_llama, how):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    folder, ids = make_llama(**how), list(range(3, 60))
    with torch.no_grad():
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(torch.tensor([ids])).logits[0]
    assert np.abs(forward.open_llama(checkpoint(folder)).logits(ids) - theirs.numpy()).max() < 1e-4


def test_captured_inputs_are_what_the_matrices_read(house):
    model, ids, _ = house
    found = forward.capture(model, [ids[:50], ids[50:120]])
    assert list(found) == model.sites() and len(found) == 4 * 6
    assert sum(len(site) for site in found) == 7 * 6
    for site, x in found.items():
        assert x.dtype == np.float32 and {model.weights[name].shape[1] for name in site} == {x.shape[1]} and len(x) == 120
    first = model.weights["model.embed_tokens.weight"][ids[:50]]
    normed = first / np.sqrt((first**2).mean(-1, keepdims=True) + 1e-5) * model.weights["model.layers.0.input_layernorm.weight"]
    assert np.allclose(found[model.sites()[0]][:50], normed, atol=1e-5)


def test_replaced_matrices_and_hooks_reach_the_logits(house):
    model, ids, _ = house
    name = "model.layers.3.mlp.down_proj.weight"
    plain_, zero = model.logits(ids), np.zeros_like(model.weights[name])
    assert np.abs(model.with_({name: zero}).logits(ids) - plain_).max() > 0.1
    assert np.array_equal(model.logits(ids), plain_)  # the copy left the model alone
    halved = model.with_({name: model.weights[name] / 2}, inputs=lambda site, x: x * 2 if site == (name,) else x)
    assert np.allclose(halved.logits(ids), plain_, atol=1e-3)
    blank = model.with_(cache=lambda layer, k, v: (k, np.zeros_like(v)))
    assert np.abs(blank.logits(ids) - plain_).max() > 0.1
    with pytest.raises(LabkitError, match="none of that name"):
        model.with_({"model.layers.9.mlp.down_proj.weight": zero})


def test_forward_refuses_other_architectures(make_llama):
    with pytest.raises(LabkitError, match="expected a LlamaForCausalLM"):
        forward.open_llama(checkpoint(make_llama(architectures=["MistralForCausalLM"], model_type="mistral")))


# --- the table ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def frame():
    return compare.table(window=256, windows=4, calibration_windows=3)


def test_the_table_compares_at_equal_bits(frame):
    assert set(frame["method"]) >= {*methods.METHODS} - {"kvcache"}
    for _, contest in frame.groupby("contest", sort=False):
        assert contest["method"].iloc[0] in ("rounding", "by token") and (contest["kl_saved"].iloc[0] == 0)
        assert contest[["bits_per_weight", "input_bits", "cache_bits"]].nunique().tolist() == [1, 1, 1]
    assert frame["bits_per_weight"].iloc[0] == 3.5 and frame["cache_bits"].iloc[-1] == 3
    for name in ("perplexity", "kl", "kl_saved"):
        assert (frame[f"{name}_low"] <= frame[name]).all() and (frame[name] <= frame[f"{name}_high"]).all()


def test_on_the_house_model_gptq_and_rotation_win_their_contests(frame):
    rows = frame.set_index(["contest", "method"])
    assert rows.loc[("weights", "gptq"), "kl_saved_low"] > 0
    assert rows.loc[("weights and inputs", "hadamard"), "kl_saved_low"] > 0
    for contest, part in frame[frame["contest"] != "kv cache"].groupby("contest"):
        assert (part["kl"] < 1.3 * rows.loc[(contest, "rounding"), "kl"]).all() and (part["kl"] > 0).all()


def test_with_enough_bits_every_trial_is_the_float_model(make_llama):
    model, ids = forward.open_llama(checkpoint(make_llama())), [*range(3, 67), *range(100, 160)]
    exact = model.logits(ids)
    setting = compare.Setting(bits=8, input_bits=8, cache_bits=8)
    for trial in compare.trials(model, forward.capture(model, [ids]), setting):
        wrong = np.abs(trial.model.logits(ids) - exact)
        assert 0 < np.sqrt(np.mean(wrong**2)) < 0.1 * exact.std(), trial.method


def test_the_table_s_numbers_are_those_of_the_measures(frame):
    """Perplexity and KL of one row, written out."""
    files = checkpoint("edgehome")
    model, ids = forward.open_llama(files), files.encode(heldout_text())
    changed = model.with_({n: plain(model.weights[n], 3).dequantize() for site in model.sites() for n in site})
    nll, kl = [], []
    for start in range(0, 4 * 256, 256):
        part = ids[start : start + 256]
        ours, exact = (m.logits(part).astype(np.float64)[128:-1] for m in (changed, model))
        log_q, log_p = (y - np.log(np.exp(y).sum(axis=1, keepdims=True)) for y in (ours, exact))
        nll.append(-log_q[np.arange(127), part[129:]])
        kl.append((np.exp(log_p) * (log_p - log_q)).sum(axis=1))
    assert frame["perplexity"].iloc[0] == pytest.approx(np.exp(np.mean(nll)), rel=1e-5)
    assert frame["kl"].iloc[0] == pytest.approx(np.mean(kl), rel=1e-4)


def test_the_figure_shows_every_row_with_its_interval(frame):
    fig = chart.divergence_at_equal_bits(frame, "Equal bits")
    assert sum(len(trace.x) for trace in fig.data) == len(frame) and len(fig.data) == 3
    assert all((np.asarray(trace.error_x.array) >= 0).all() for trace in fig.data)
    with pytest.raises(LabkitError, match="kl is above 0"):
        chart.divergence_at_equal_bits(frame.iloc[:0])

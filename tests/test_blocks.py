"""Number formats, value quantizers and GGUF blocks against independent references."""

from __future__ import annotations

import ctypes
import platform
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from labkit import blocks, formats, gguf_blocks
from labkit.types import LabkitError

WRITTEN = ("q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "tq1_0", "tq2_0")


def weights(rows: int = 16, columns: int = 512, seed: int = 0) -> np.ndarray:
    """Weight-like numbers: a bell curve, a few outliers, an empty row, a constant row, a one-sided row."""
    rng = np.random.default_rng(seed)
    w = (rng.normal(size=(rows, columns)) * 0.04).astype(np.float32)
    w[rng.integers(rows, size=4), rng.integers(columns, size=4)] *= 20
    w[0], w[1], w[2] = 0, 0.03, np.abs(w[2])
    return w


# ---- number formats ----


def reference_cast(name: str):
    if name in ("fp32", "fp16"):
        return {"fp32": np.float32, "fp16": np.float16}[name]
    ml_dtypes = pytest.importorskip("ml_dtypes")
    names = {"bf16": "bfloat16", "fp8_e5m2": "float8_e5m2", "fp8_e4m3": "float8_e4m3fn", "fp4_e2m1": "float4_e2m1fn"}
    return getattr(ml_dtypes, names[name])


@pytest.mark.parametrize("name", [n for n, f in formats.FORMATS.items() if f.is_float])
def test_rounding_equals_reference(name):
    rng, high = np.random.default_rng(1), min(formats.limits(name)[1], 1e38)
    normal, tiny, wide = rng.normal(size=20000), rng.normal(size=5000) * 1e-6, rng.uniform(-high, high, 20000)
    ties = np.arange(-64, 65) / 16  # exact halves between E2M1 and E4M3 values
    x = np.concatenate([normal, tiny, wide, [0.0, -0.0, 1e-45], ties[np.abs(ties) <= high]]).astype(np.float32)
    expected = x.astype(reference_cast(name)).astype(np.float32)
    got = formats.rounded(x, name)
    assert np.array_equal(got, expected) and np.array_equal(np.signbit(got), np.signbit(expected))


@pytest.mark.parametrize("name", [n for n, f in formats.FORMATS.items() if f.is_float and f.bits <= 16])
def test_every_code_decodes_as_reference_and_returns(name):
    f = formats.FORMATS[name]
    codes = np.arange(2 ** int(f.bits), dtype=np.uint32)
    reference = codes.astype(np.uint16 if f.bits == 16 else np.uint8).view(reference_cast(name)).astype(np.float32)
    values = formats.decode(codes, name)
    assert np.array_equal(values, reference, equal_nan=True)
    numbers = ~np.isnan(values)
    assert np.array_equal(formats.encode(values[numbers], name), codes[numbers])


def test_overflow_saturates_or_becomes_infinite():
    assert formats.rounded(np.array([1e9, -1e9]), "fp8_e4m3").tolist() == [448, -448]
    assert np.isinf(formats.rounded(np.array([1e9]), "fp16")).all()
    assert np.isnan(formats.rounded(np.array([np.nan]), "bf16")).all()


def test_bit_fields_and_facts():
    assert formats.bit_fields(-2.0, "fp32") == [("sign", "1"), ("exponent", "10000000"), ("mantissa", "0" * 23)]
    assert "".join(b for _, b in formats.bit_fields(-3, "int4")) == "1101"  # two's complement
    assert formats.facts("fp16")["largest"] == np.finfo(np.float16).max
    assert formats.facts("fp16")["smallest"] == np.finfo(np.float16).smallest_subnormal
    assert formats.values("fp4_e2m1").tolist() == [-6, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert formats.values("int2").tolist() == [-2, -1, 0, 1]


@pytest.mark.parametrize(
    "call",
    [
        lambda: formats.format("fp7"),
        lambda: formats.encode(np.ones(2), "int8"),
        lambda: formats.encode(np.array([np.nan]), "fp4_e2m1"),
        lambda: formats.bit_fields(8, "int4"),
        lambda: formats.bit_fields(1, "ternary"),
        lambda: formats.values("fp16"),
    ],
)
def test_formats_refuse(call):
    with pytest.raises(LabkitError):
        call()


# ---- value quantizers ----


@settings(max_examples=60, deadline=None)
@given(
    bits=st.integers(2, 8),
    per=st.sampled_from(["tensor", "channel", 32, 64]),
    seed=st.integers(0, 10_000),
    size=st.sampled_from([1e-3, 0.05, 3.0]),
    kind=st.sampled_from(["symmetric", "affine", "bias"]),
)
def test_error_is_at_most_half_a_step(bits, per, seed, size, kind):
    w = (np.random.default_rng(seed).standard_t(4, size=(6, 128)) * size).astype(np.float32)
    if kind == "symmetric":
        q = blocks.symmetric(w, bits, per, scale="f32")
    else:
        q = blocks.affine(w, bits, per, scale="f32", zero="bias" if kind == "bias" else "integer")
    # An integer zero point is itself rounded, which can push the end of the range out by up to half a step.
    allowed = 1.0 if kind == "affine" else 0.5
    groups = np.abs(w - q.dequantize()).reshape(len(q.scales), -1)
    assert (groups <= allowed * q.scales * (1 + 1e-4) + 1e-9).all()
    assert q.error.max == pytest.approx(groups.max(), rel=1e-5)
    top = 2 ** (bits - 1) - 1
    assert q.codes.min() >= (-top if kind == "symmetric" else 0)
    assert q.codes.max() <= (top if kind == "symmetric" else 2**bits - 1)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("per", ["tensor", "channel", 32])
def test_bits_per_weight_counts_scales_and_zero_points(bits, per):
    w = weights()
    share = {"tensor": w.size, "channel": w.shape[1], 32: 32}[per]
    slack = 16 / w.size  # whole bytes
    assert blocks.symmetric(w, bits, per).bits_per_weight == pytest.approx(bits + 16 / share, abs=slack)
    assert blocks.affine(w, bits, per).bits_per_weight == pytest.approx(bits + (16 + bits) / share, abs=slack)
    assert blocks.affine(w, bits, per, zero="bias").bits_per_weight == pytest.approx(bits + 32 / share, abs=slack)
    assert blocks.symmetric(w, bits, per, scale="f32").bits_per_weight == pytest.approx(bits + 32 / share, abs=slack)


def test_stored_bytes_are_the_bytes_of_the_packed_codes():
    q = blocks.affine(weights(), 3, 32)
    packed = blocks.pack(q.codes, 3).size + blocks.pack(q.zeros, 3).size + q.scales.astype(np.float16).nbytes
    assert q.stored_bytes == packed


@pytest.mark.parametrize("quantize", [blocks.symmetric, blocks.affine])
def test_finer_scales_and_more_bits_err_less(quantize):
    w = weights()
    by_size = [quantize(w, 4, per).error.rmse for per in ("tensor", "channel", 128, 32)]
    by_bits = [quantize(w, bits, 32).error.rmse for bits in range(2, 9)]
    assert by_size == sorted(by_size, reverse=True) and by_bits == sorted(by_bits, reverse=True)


def test_zero_stays_exactly_zero():
    w = np.abs(weights()) + 0.5
    w[:, ::7] = 0
    for q in (blocks.symmetric(w, 4, 32), blocks.affine(w, 4, 32), blocks.ternary(w), blocks.nf4(w), blocks.mxfp4(w)):
        assert (q.dequantize()[:, ::7] == 0).all()


def test_one_bit_keeps_sign_and_mean_size():
    w = weights()[3:]
    q = blocks.symmetric(w, 1, "channel", scale="f32")
    assert np.array_equal(q.dequantize(), np.where(w < 0, -1, 1) * np.abs(w).mean(axis=1, keepdims=True))


def test_clipping_trades_the_largest_error_for_the_mean():
    w = weights(seed=3)
    for quantize in (blocks.symmetric, blocks.affine):
        plain, best, cut = (quantize(w, 3, "tensor", clip) for clip in ("minmax", "mse", 99.5))
        assert best.error.rmse < plain.error.rmse and best.error.max > plain.error.max
        assert cut.error.max > plain.error.max
        assert quantize(w, 3, 32, "mse").error.rmse <= quantize(w, 3, 32).error.rmse


def test_mse_clipping_is_the_best_of_a_fine_search():
    w = weights()[4:5]
    scales = np.abs(w).max() * np.linspace(0.2, 1, 2000) / 7
    restored = np.clip(np.rint(w[None] / scales[:, None, None]), -7, 7) * scales[:, None, None]
    least = np.sqrt(((restored - w) ** 2).mean(axis=(1, 2)).min())
    assert least <= blocks.symmetric(w, 4, clip="mse", scale="f32").error.rmse <= 1.01 * least


def test_absmean_ternary_is_the_published_rule():
    w = weights()[3:]
    gamma = np.float32(np.float16(np.abs(w).mean()))
    q = blocks.ternary(w)
    assert np.array_equal(q.codes, np.clip(np.round(w / gamma), -1, 1))
    assert np.array_equal(q.dequantize(), q.codes * gamma)
    assert q.bits_per_weight == pytest.approx(1.6 + 16 / w.size, abs=16 / w.size)
    assert set(np.unique(blocks.ternary(w, "absmax", 32).codes)) == {-1, 0, 1}


@pytest.mark.parametrize("double", [False, True])
def test_nf4_takes_the_nearest_level(double):
    w = weights()
    q = blocks.nf4(w, 64, double)
    assert q.bits_per_weight == pytest.approx(4 + (8 / 64 + 32 / (64 * 256) if double else 32 / 64), abs=0.01)
    groups = w.reshape(len(q.scales), -1, 1)
    nearest = np.abs(groups - q.scales[:, None] * blocks.NF4_LEVELS).min(axis=2)
    assert np.allclose(np.abs(w - q.dequantize()).reshape(nearest.shape), nearest, atol=1e-6)
    assert q.error.rmse <= 1.05 * blocks.nf4(w, 64).error.rmse


def test_nf4_levels_are_those_of_the_paper_by_its_own_construction():
    normal = pytest.importorskip("scipy.stats").norm
    edge = 0.9677083  # the paper's mean of two tail offsets: 1 - (1/30 + 1/32) / 2
    upper, lower = normal.ppf(np.linspace(edge, 0.5, 9)[:-1]), normal.ppf(np.linspace(edge, 0.5, 8)[:-1])
    levels = np.sort(np.concatenate([upper, [0], -lower]))
    assert np.allclose(levels / levels.max(), blocks.NF4_LEVELS, atol=2e-4)


def test_mxfp4_equals_the_gguf_package():
    gguf = pytest.importorskip("gguf")
    w, kind = weights(), gguf.GGMLQuantizationType.MXFP4
    expected = gguf.quants.dequantize(gguf.quants.quantize(w, kind), kind)
    q = blocks.mxfp4(w)
    assert np.array_equal(q.dequantize(), expected) and q.bits_per_weight == 4.25


@pytest.mark.parametrize("kind", ["e4m3", "e5m2"])
def test_fp8_relative_error_is_bounded_by_the_mantissa(kind):
    w = weights()[3:]
    q = blocks.fp8(w, kind, "channel")
    normal = np.abs(w) > q.scales * 2.0 ** (1 - formats.format(f"fp8_{kind}").bias)
    relative = np.abs(q.dequantize() - w)[normal] / np.abs(w)[normal]
    assert relative.max() <= 2.0 ** -(formats.format(f"fp8_{kind}").mantissa + 1) * 1.0001
    assert q.bits_per_weight == 8 + 32 / w.shape[1]


def test_cast_is_plain_rounding():
    w = weights()
    assert np.array_equal(blocks.cast(w, "fp16").dequantize(), w.astype(np.float16).astype(np.float32))
    assert blocks.cast(w, "bf16").bits_per_weight == 16
    with pytest.raises(LabkitError, match="beyond fp16"):
        blocks.cast(w * 1e8, "fp16")


@pytest.mark.parametrize("group, bits", [(64, 4), (32, 8), (64, 2), (32, 3)])
def test_affine_edge_equals_mlx(group, bits):
    mx = pytest.importorskip("mlx.core")
    w = weights()
    packed, scales, biases = mx.quantize(mx.array(w), group_size=group, bits=bits)
    theirs = np.array(mx.dequantize(packed, scales, biases, group_size=group, bits=bits))
    ours = blocks.affine(w, bits, group, zero="edge", scale="f32")
    assert np.allclose(ours.dequantize(), theirs, atol=1e-6)
    assert packed.nbytes + scales.nbytes + biases.nbytes == ours.stored_bytes


@settings(max_examples=50, deadline=None)
@given(bits=st.integers(1, 8), count=st.integers(1, 200), seed=st.integers(0, 99))
def test_pack_round_trip(bits, count, seed):
    codes = np.random.default_rng(seed).integers(0, 2**bits, count)
    data = blocks.pack(codes, bits)
    assert data.size == -(-count * bits // 8)
    assert np.array_equal(blocks.unpack(data, bits, count), codes)
    whole = sum(int(c) << (bits * i) for i, c in enumerate(codes))  # one long little-endian number
    assert int.from_bytes(data.tobytes(), "little") == whole


@pytest.mark.parametrize(
    "call",
    [
        lambda w: blocks.symmetric(w, 9),
        lambda w: blocks.symmetric(w, 2.5),
        lambda w: blocks.affine(w, 4, per=33),
        lambda w: blocks.affine(w, 4, per="row"),
        lambda w: blocks.affine(w, 4, clip="best"),
        lambda w: blocks.symmetric(w, 4, clip=20),
        lambda w: blocks.symmetric(np.where(w == 0, np.nan, w)),
        lambda w: blocks.symmetric(w * np.inf),
        lambda w: blocks.symmetric(np.array([])),
        lambda w: blocks.symmetric(np.array(["a"])),
        lambda w: blocks.symmetric(w * np.float32(1e9), 2),
        lambda w: blocks.affine(w, zero="half"),
        lambda w: blocks.ternary(w, "median"),
        lambda w: blocks.fp8(w, "e3m4"),
        lambda w: blocks.pack(np.array([4]), 2),
        lambda w: blocks.unpack(np.zeros(1, np.uint8), 4, 3),
        lambda w: gguf_blocks.quantize(np.where(w == 0, np.nan, w), "q4_0"),
        lambda w: gguf_blocks.quantize(w[:, :33], "q4_0"),
        lambda w: gguf_blocks.quantize(w, "q4_k"),
        lambda w: gguf_blocks.quantize(w, "q9_0"),
        lambda w: gguf_blocks.quantize(w * np.float32(1e9), "q4_0"),
        lambda w: gguf_blocks.dequantize(np.zeros(17, np.uint8), "q4_0"),
        lambda w: gguf_blocks.describe_block(b"12", "q4_0"),
    ],
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_bad_input_is_one_sentence(call):
    with pytest.raises(LabkitError) as failure:
        call(weights())
    assert "\n" not in str(failure.value) and len(str(failure.value)) > 30


# ---- GGUF blocks ----


@pytest.fixture(scope="module")
def ggml():
    """The C library's own quantizer: (weights, type name) -> bytes."""
    llama_cpp, gguf = pytest.importorskip("llama_cpp"), pytest.importorskip("gguf")
    found = sorted((Path(llama_cpp.__file__).parent / "lib").glob("*ggml-base*"))
    if not found:
        pytest.skip("this llama-cpp-python has no separate ggml-base library")
    chunk = ctypes.CDLL(str(found[0])).ggml_quantize_chunk
    chunk.restype = ctypes.c_size_t
    chunk.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p]

    def quantize(w: np.ndarray, name: str) -> np.ndarray:
        form, w = gguf_blocks.layout(name), np.ascontiguousarray(w, np.float32)
        out = np.zeros((len(w), w.shape[1] // form.block * form.size), np.uint8)
        kind = int(gguf.GGMLQuantizationType[name.upper()])
        assert chunk(kind, w.ctypes.data, out.ctypes.data, 0, len(w), w.shape[1], None) == out.size
        return out

    return quantize


@pytest.mark.parametrize("size", [1.0, 1e-4, 1e-7, 1e-30, 1e4])
@pytest.mark.parametrize("name", WRITTEN)
def test_bytes_equal_gguf_package_and_c(name, size, ggml):
    gguf = pytest.importorskip("gguf")
    w = weights(32, 1024, seed=5) * np.float32(size)
    w[5] = np.rint(w[5] / w[5].max() * 16) / 8  # many exact ties
    ours = gguf_blocks.quantize(w, name).data
    assert np.array_equal(ours, gguf.quants.quantize(w, gguf.GGMLQuantizationType[name.upper()]))
    # On Arm, compilers may fuse x * id + 8.5 into one rounding, which moves a rare tie by one code.
    fused = platform.machine().lower() in ("arm64", "aarch64")
    assert (ours != ggml(w, name)).mean() <= (1e-3 if fused else 0)


@pytest.mark.parametrize("name", gguf_blocks.LAYOUTS)
def test_decoding_equals_gguf_package(name, ggml):
    gguf = pytest.importorskip("gguf")
    kind, data = gguf.GGMLQuantizationType[name.upper()], ggml(weights(32, 1024, seed=6), name)
    assert np.array_equal(gguf_blocks.dequantize(data, name), gguf.quants.dequantize(data, kind))
    assert (gguf_blocks.layout(name).block, gguf_blocks.layout(name).size) == gguf.GGML_QUANT_SIZES[kind]


@pytest.mark.parametrize("name", [n for n in gguf_blocks.LAYOUTS if n != "tq1_0"])
def test_every_bit_of_a_block_belongs_to_exactly_one_field(name):
    fields = gguf_blocks.describe_block(np.zeros(gguf_blocks.layout(name).size, np.uint8), name)
    bits = sorted(bit for f in fields for first, last in f.bits for bit in range(first, last + 1))
    assert bits == list(range(8 * gguf_blocks.layout(name).size))


def test_trits_fill_their_bytes():
    fields = gguf_blocks.describe_block(np.zeros(54, np.uint8), "tq1_0")
    owners = [f.bits[0][0] // 8 for f in fields if f.name.startswith("q")]
    assert sorted(np.bincount(owners)) == [4] * 4 + [5] * 48


@pytest.mark.parametrize("name", gguf_blocks.LAYOUTS)
def test_described_fields_rebuild_the_weights(name, ggml):
    data = ggml(weights(8, 256, seed=7), name)[4]
    data = data[: gguf_blocks.layout(name).size]
    said = {f.name: f.value for f in gguf_blocks.describe_block(data, name)}
    count = gguf_blocks.layout(name).block
    q = np.array([said[f"q[{i}]"] for i in range(count)], np.float64)
    if "scale[0]" in said:
        groups = sum(k.startswith("scale[") for k in said)
        share = count // groups
        q = q * said["d"] * np.repeat([said[f"scale[{i}]"] for i in range(groups)], share)
        if "min[0]" in said:
            q -= said["dmin"] * np.repeat([said[f"min[{i}]"] for i in range(groups)], share)
    else:
        q = q * said["d"] + said.get("m", 0)
    assert np.allclose(q, gguf_blocks.dequantize(data, name), atol=1e-6)


def test_error_and_size_are_of_the_bytes():
    w = weights()
    published = {"q8_0": 8.5, "q4_0": 4.5, "q4_1": 5.0, "q5_0": 5.5, "q5_1": 6.0, "tq1_0": 1.6875, "tq2_0": 2.0625}
    for name, bpw in published.items():
        packed = gguf_blocks.quantize(w, name)
        assert packed.bits_per_weight == bpw and packed.stored_bytes == packed.data.nbytes
        assert packed.error == blocks.error(w, packed.dequantize())
        assert packed.dequantize().shape == w.shape

"""The GGUF writer: names, order and bytes of every tensor, against the checkpoint and against gguf's own quantizers."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

pytest.importorskip("llama_cpp")
from labkit.checkpoint import open_checkpoint
from labkit.engines import _ggml, llamacpp
from labkit.engines._gguf import tensor_data
from labkit.engines._gguf_model import interleave, rope_factors
from labkit.types import LabkitError

gguf = pytest.importorskip("gguf")


@pytest.fixture
def written(tmp_path):
    """`written(folder, dtype) -> (checkpoint, path)`."""

    def write(folder, dtype="f32"):
        checkpoint = open_checkpoint(folder)
        path = tmp_path / f"{folder.name}-{dtype}.gguf"
        llamacpp.write_gguf(checkpoint, path, dtype)
        return checkpoint, path

    return write


def paired(rows: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's row order written out the slow way: row i of a head's first half, then row i of its second."""
    size = len(rows) // heads
    order = [h * size + half * size // 2 + i for h in range(heads) for i in range(size // 2) for half in (0, 1)]
    return rows[order]


def test_names_shapes_and_types(tiny_llama, written):
    _, path = written(tiny_llama, "f16")
    table = {t["name"]: t for t in llamacpp.tensors(path)}
    layer = ["attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down"]
    expected = {"token_embd.weight", "output_norm.weight"} | {f"blk.{i}.{n}.weight" for i in (0, 1) for n in layer}
    assert set(table) == expected  # tied: no output.weight
    key = table["blk.0.attn_k.weight"]
    assert (key["shape"], key["type"], key["bytes"]) == ((128, 256), "f16", 65536)
    assert table["blk.1.ffn_norm.weight"]["type"] == "f32"


def test_every_float32_value_arrives(tiny_llama, written):
    checkpoint, path = written(tiny_llama, "f32")
    source = checkpoint.tensors()
    pairs = {"blk.1.attn_q": ("q_proj", 4), "blk.1.attn_k": ("k_proj", 2), "blk.1.attn_v": ("v_proj", 0)}
    for name, (origin, heads) in pairs.items():
        values = source[f"model.layers.1.self_attn.{origin}.weight"].float32()
        np.testing.assert_array_equal(tensor_data(path, f"{name}.weight"), paired(values, heads) if heads else values)
    np.testing.assert_array_equal(tensor_data(path, "token_embd.weight"), source["model.embed_tokens.weight"].float32())


def test_bfloat16_is_copied_bit_for_bit(make_llama, written):
    checkpoint, path = written(make_llama(dtype="BF16"), "bf16")
    source = checkpoint.tensors()["model.layers.0.mlp.up_proj.weight"]
    np.testing.assert_array_equal(tensor_data(path, "blk.0.ffn_up.weight").ravel(), source.raw())


def test_slabs_do_not_change_the_file(make_llama, written, monkeypatch):
    """Small slabs must cut between heads, and put every slab in its place."""
    folder = make_llama(dtype="BF16")
    _, whole = written(folder, "q8_0")
    expected = whole.read_bytes()
    monkeypatch.setattr("labkit.engines._gguf.SLAB", 5000)
    assert written(folder, "q8_0")[1].read_bytes() == expected


def test_shards_give_the_same_file(make_llama, written, tmp_path):
    from safetensors.numpy import load_file, save_file

    folder = make_llama("one")
    split = tmp_path / "two" / "one"  # the same name, for it stands in the file
    shutil.copytree(folder, split)
    tensors = load_file(folder / "model.safetensors")
    (split / "model.safetensors").unlink()
    names = list(tensors)
    index = {}
    for part, chosen in enumerate((names[::2], names[1::2])):
        file = f"model-{part + 1:05}-of-00002.safetensors"
        save_file({n: tensors[n] for n in chosen}, split / file)
        index |= dict.fromkeys(chosen, file)
    (split / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    _, single = written(folder)
    expected = {t["name"]: tensor_data(single, t["name"]).tobytes() for t in llamacpp.tensors(single)}
    _, both = written(split)
    assert {t["name"]: tensor_data(both, t["name"]).tobytes() for t in llamacpp.tensors(both)} == expected


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "TQ1_0", "TQ2_0", "BF16"])
def test_the_c_quantizer_and_gguf_agree(kind):
    rows = np.random.default_rng(0).normal(size=(7, 512)).astype(np.float32)
    expected = gguf.quants.quantize(rows, gguf.GGMLQuantizationType[kind])
    np.testing.assert_array_equal(_ggml.quantize(rows, kind.lower()), np.ascontiguousarray(expected).view(np.uint8))


def test_q8_0_written_directly_is_what_the_quantizer_makes(make_llama, written, tmp_path):
    folder = make_llama(dtype="BF16")
    _, direct = written(folder, "q8_0")
    _, base = written(folder, "bf16")
    made = llamacpp.quantize_gguf(base, tmp_path / "made.gguf", "q8_0")
    for tensor in llamacpp.tensors(direct):
        one, two = (tensor_data(path, tensor["name"]) for path in (direct, tmp_path / "made.gguf"))
        np.testing.assert_array_equal(one, two)
    assert made["weight_bytes"] == sum(t["bytes"] for t in llamacpp.tensors(direct))


def test_rows_that_do_not_divide_are_told(make_llama, tmp_path):
    folder = make_llama(hidden_size=80, head_dim=16, num_attention_heads=5, num_key_value_heads=5)
    done = llamacpp.write_gguf(open_checkpoint(folder), tmp_path / "m.gguf", "q8_0")
    assert "q8_0 blocks do not divide" in done["notes"][0]
    kinds = {t["name"]: t["type"] for t in llamacpp.tensors(tmp_path / "m.gguf")}
    assert kinds["blk.0.ffn_up.weight"] == "f16" and kinds["blk.0.ffn_down.weight"] == "q8_0"


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_weights_are_refused_and_leave_nothing(make_llama, tmp_path, bad):
    from safetensors.numpy import load_file, save_file

    folder = make_llama()
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][3, 5] = bad
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(LabkitError, match=r"blk.1.ffn_down.weight.*NaN or infinite"):
        llamacpp.write_gguf(open_checkpoint(folder), tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists()


def test_weights_too_large_for_float16_are_refused(make_llama, tmp_path):
    from safetensors.numpy import load_file, save_file

    folder = make_llama()
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][0, 0] = 1e5
    save_file(tensors, folder / "model.safetensors")
    checkpoint = open_checkpoint(folder)
    with pytest.raises(LabkitError, match="65504"):
        llamacpp.write_gguf(checkpoint, tmp_path / "m.gguf", "f16")
    llamacpp.write_gguf(checkpoint, tmp_path / "m.gguf", "bf16")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "does not know MambaForCausalLM"),
        ({"hidden_act": "gelu"}, "activation 'gelu'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "scales rope by 'yarn'"),
    ],
)
def test_what_it_cannot_convert_is_said(make_llama, tmp_path, change, message):
    with pytest.raises(LabkitError, match=message):
        llamacpp.write_gguf(open_checkpoint(make_llama(**change)), tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists()


def test_unknown_type_and_broken_file(tiny_llama, tmp_path):
    with pytest.raises(LabkitError, match="does not know 'q9_9'"):
        llamacpp.write_gguf(open_checkpoint(tiny_llama), tmp_path / "m.gguf", "q9_9")
    with pytest.raises(LabkitError, match="does not exist"):
        llamacpp.tensors(tmp_path / "m.gguf")
    (tmp_path / "m.gguf").write_bytes(b"GGUX" + bytes(100))
    with pytest.raises(LabkitError, match="not a readable GGUF"):
        llamacpp.metadata(tmp_path / "m.gguf")


def test_a_full_disk_is_refused_before_writing(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setattr("labkit.host.free_disk", lambda folder=None: 1000)
    with pytest.raises(LabkitError, match="free"):
        llamacpp.write_gguf(open_checkpoint(tiny_llama), tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists()


def test_llama3_rope_factors_equal_transformers():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192}  # fmt: skip
    config = transformers.LlamaConfig(hidden_size=256, num_attention_heads=4, rope_parameters=rope)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = rope["rope_theta"] ** -(np.arange(0, 64, 2) / 64)
    ours = rope_factors({**config.to_dict(), "architectures": ["LlamaForCausalLM"]})["rope_freqs"]
    np.testing.assert_allclose(plain / ours, scaled.numpy(), rtol=1e-5)


def test_interleave_is_a_reordering():
    rows = np.arange(16 * 3, dtype=np.float32).reshape(16, 3)
    np.testing.assert_array_equal(interleave(rows, 8), paired(rows, 2))
    assert sorted(interleave(rows, 8)[:, 0]) == sorted(rows[:, 0])


def test_ggml_quantize_refuses_what_would_crash():
    with pytest.raises(LabkitError, match="multiple of 256"):
        _ggml.quantize(np.zeros((2, 100), np.float32), "q4_k")
    with pytest.raises(LabkitError, match="needs an importance vector"):
        _ggml.quantize(np.ones((2, 256), np.float32), "iq2_xxs")
    with pytest.raises(LabkitError, match="has shape"):
        _ggml.quantize(np.ones((2, 256), np.float32), "q4_k", np.ones(3, np.float32))


@pytest.mark.parametrize(
    "value", [["a", "é😀", ""], [3, -1, 2**31 - 1], [1.5, 2.0], [True, False], [b"a", b"\xff"], "text", 7]
)
def test_metadata_is_packed_as_the_gguf_package_packs_it(value, tmp_path):
    from gguf import GGUFValueType, GGUFWriter

    from labkit.engines._gguf import _pack

    writer = GGUFWriter(tmp_path / "x.gguf", "llama")
    kind = GGUFValueType.get_type(value)
    for add in (True, False):
        assert _pack(writer._pack_val, value, kind, add_vtype=add) == writer._pack_val(value, kind, add_vtype=add)


def test_halves_are_numpys_for_every_kind_of_number():
    bits = np.random.default_rng(0).integers(0, 2**32, 200_000, dtype=np.uint32)
    every = np.concatenate([bits.view(np.float32), np.arange(2**16, dtype=np.uint16).view(np.float16).astype(np.float32)])
    ties = (np.arange(1, 2**15, dtype=np.uint32) << 13 | 1 << 12).view(np.float32)  # halfway between two halves
    for values in (every[np.isfinite(every)], ties[np.isfinite(ties)], np.float32([0.0, -0.0, 65504, 65519.99, 65520, 1e-8, 6e-8])):
        with np.errstate(over="ignore"):
            expected = values.astype(np.float16)
        assert _ggml.half(values).tobytes() == expected.tobytes()

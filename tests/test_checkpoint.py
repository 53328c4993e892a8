"""Checkpoints: opening, tokenizing, memory-mapped tensors, and one clear sentence for everything that can be wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from tiny_checkpoint import random_weights, write_safetensors

from labkit import LabkitError, _shapes, checkpoint
from labkit._tensors import bits_are_finite, is_finite
from labkit.checkpoint import check_finite, open_tensors

NASTY = ["", " ", "  a\t\n\n b ", "naïve ação 東京 שלום", "😀👩‍👩‍👧 ﷽", "3.14159 007 1,000", "<|im_end|>",
         "<|im_start|>user\nx", "a" * 300, "don't WE'LL it’s", "\x00\x07 zero"]  # fmt: skip


@pytest.fixture
def broken(tiny_llama: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint, to be damaged."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "broken"))


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def edit_header(file: Path, change) -> None:
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


# --- what a good one offers ------------------------------------------------------------------------------------------


def test_record(tiny_llama: Path):
    found = checkpoint(tiny_llama)
    assert (found.name, found.trained, found.vocab_size, found.context) == ("tiny-llama", True, 512, 512)
    assert found.architecture == "LlamaForCausalLM" and found.family == "llama" and found.tied
    assert found.eos_ids == (2,) and found.bos_id is None
    assert checkpoint(found) is found
    assert checkpoint(str(tiny_llama)) == found and hash(checkpoint(tiny_llama)) == hash(found)
    assert "1,312,000" in found._repr_html_()


def test_weights_agree_with_transformers(tiny_llama: Path):
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama)
    assert checkpoint(tiny_llama).weights == sum(p.numel() for p in model.parameters())


def test_weights_of_a_tied_pair_stored_twice_count_once(broken: Path):
    once = checkpoint(broken).weights
    tensors = random_weights(json.loads((broken / "config.json").read_text()))
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    write_safetensors(broken / "model.safetensors", tensors)
    assert checkpoint(broken).weights == once


def test_untied_head_counts(make_llama):
    assert checkpoint(make_llama(tie_word_embeddings=False)).weights == 1_312_000 + 512 * 256


@pytest.mark.parametrize("text", NASTY)
def test_ids_agree_with_transformers(tiny_llama: Path, text: str):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(tiny_llama)
    ours = checkpoint(tiny_llama)
    assert ours.encode(text) == theirs(text, add_special_tokens=False)["input_ids"]
    assert ours.decode(ours.encode(text)) == text


def test_lookalikes_of_special_tokens_can_be_plain_text(tiny_llama: Path):
    found = checkpoint(tiny_llama)
    assert found.encode("<|im_end|>") == [2]
    plain = found.encode("<|im_end|>", special=False)
    assert len(plain) > 1 and 2 not in plain and found.decode(plain) == "<|im_end|>"
    assert found.encode("<|im_end|>") == [2]  # the other mode left no trace


def test_decode_can_hide_special_tokens_and_refuses_ids_out_of_range(tiny_llama: Path):
    found = checkpoint(tiny_llama)
    ids = [*found.encode("on"), 2]
    assert found.decode(ids) == "on<|im_end|>" and found.decode(ids, special=False) == "on"
    for wrong in (-1, 512):
        with pytest.raises(LabkitError, match=rf"{wrong} is out of range.*0 to 511"):
            found.decode([wrong])


def test_chat_agrees_with_transformers(tiny_llama: Path):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(tiny_llama)
    talk = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "olá <b>"}]
    for prompt in (True, False):
        expected = theirs.apply_chat_template(talk, tokenize=False, add_generation_prompt=prompt)
        assert checkpoint(tiny_llama).chat(talk, add_generation_prompt=prompt) == expected


def test_chat_template_may_live_in_tokenizer_config_and_raise(broken: Path):
    (broken / "chat_template.jinja").unlink()
    settings = json.loads((broken / "tokenizer_config.json").read_text())
    settings["chat_template"] = "{{ bos_token }}{{ raise_exception('roles must alternate') if messages|length > 1 }}"
    (broken / "tokenizer_config.json").write_text(json.dumps(settings))
    assert checkpoint(broken).chat([{"role": "user", "content": "x"}]) == "<|endoftext|>"
    with pytest.raises(LabkitError, match="roles must alternate"):
        checkpoint(broken).chat([{}, {}])


def test_chat_template_is_sandboxed(broken: Path):
    (broken / "chat_template.jinja").write_text("{{ messages.__class__.__base__.__subclasses__() }}")
    with pytest.raises(LabkitError, match="refuses"):
        checkpoint(broken).chat([{"role": "user", "content": "x"}])


def test_no_chat_template_is_said(broken: Path):
    (broken / "chat_template.jinja").unlink()
    with pytest.raises(LabkitError, match="no chat template"):
        checkpoint(broken).chat([])


# --- tensors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_tensors_agree_with_safetensors(make_llama, dtype: str):
    torch, stored = pytest.importorskip("torch"), pytest.importorskip("safetensors.torch")
    folder = make_llama(dtype=dtype)
    theirs = stored.load_file(folder / "model.safetensors")
    ours = open_tensors(folder)
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        view, expected = ours[name], tensor.to(torch.float32).numpy()
        assert view.dtype == dtype and view.shape == expected.shape
        assert view.float32().dtype == np.float32
        np.testing.assert_array_equal(view.float32(), expected)
        np.testing.assert_array_equal(view.rows(1, 5), expected[1:5])
        assert view.raw().tobytes() == tensor.contiguous().view(torch.uint8).numpy().tobytes()


def test_views_are_read_only_maps_and_rows_are_checked(tiny_llama: Path):
    view = checkpoint(tiny_llama).tensors()["model.embed_tokens.weight"]
    assert isinstance(view.raw(), np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        view.raw()[0] = 1
    assert view.rows(3, 3).shape == (0, 256)
    with pytest.raises(LabkitError, match=r"510:513.*512 rows"):
        view.rows(510, 513)
    with pytest.raises(LabkitError, match=r"nonsense\.weight"):
        checkpoint(tiny_llama).tensors()["nonsense.weight"]


def test_a_replaced_file_is_mapped_anew(broken: Path):
    before = open_tensors(broken)["model.norm.weight"].float32()
    tensors = random_weights(json.loads((broken / "config.json").read_text()), seed=5)
    write_safetensors(broken / "new", tensors)
    (broken / "new").replace(broken / "model.safetensors")
    after = open_tensors(broken)["model.norm.weight"].float32()
    assert not np.array_equal(before, after)
    np.testing.assert_array_equal(after, tensors["model.norm.weight"])


@pytest.fixture
def sharded(broken: Path) -> Path:
    tensors = random_weights(json.loads((broken / "config.json").read_text()))
    names = sorted(tensors)
    halves = {"model-00001-of-00002.safetensors": names[:7], "model-00002-of-00002.safetensors": names[7:]}
    for file, part in halves.items():
        write_safetensors(broken / file, {name: tensors[name] for name in part})
    index = {"metadata": {}, "weight_map": {name: file for file, part in halves.items() for name in part}}
    (broken / "model.safetensors.index.json").write_text(json.dumps(index))
    (broken / "model.safetensors").unlink()
    return broken


def test_shards(sharded: Path, tiny_llama: Path):
    whole, parts = checkpoint(tiny_llama), checkpoint(sharded)
    assert parts.weights == whole.weights
    for name, view in whole.tensors().items():
        np.testing.assert_array_equal(parts.tensors()[name].float32(), view.float32())


def test_a_missing_shard_and_a_lying_index_are_said(sharded: Path):
    index = sharded / "model.safetensors.index.json"
    good = index.read_text()
    index.write_text(good.replace('"model.norm.weight": "model-00002', '"model.norm.weight": "model-00001'))
    with pytest.raises(LabkitError, match=r"places tensor 'model\.norm\.weight'"):
        checkpoint(sharded)
    index.write_text(good.replace("model-00001-of", "../model-00001-of"))
    with pytest.raises(LabkitError, match="of that folder only"):
        checkpoint(sharded)
    index.write_text(good)
    (sharded / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(LabkitError, match=r"model-00002-of-00002\.safetensors is missing"):
        checkpoint(sharded)


# --- identity --------------------------------------------------------------------------------------------------------


def test_fingerprint_follows_the_contents_not_the_place(tiny_llama: Path, broken: Path):
    assert checkpoint(broken).fingerprint == checkpoint(tiny_llama).fingerprint
    data = bytearray((broken / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (broken / "model.safetensors").write_bytes(data)
    one_bit = checkpoint(broken).fingerprint
    assert one_bit != checkpoint(tiny_llama).fingerprint
    edit_config(broken, rope_theta=5.0)
    assert checkpoint(broken).fingerprint != one_bit


# --- what can be wrong: one sentence each ----------------------------------------------------------------------------


def test_unknown_name():
    with pytest.raises(LabkitError, match="No checkpoint 'edgehouse'; expected edgehome"):
        checkpoint("edgehouse")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_missing_file(broken: Path, name: str):
    (broken / name).unlink()
    with pytest.raises(LabkitError, match=f"{name} is missing"):
        checkpoint(broken)


def test_pickled_weights_are_named_and_not_opened(broken: Path):
    (broken / "model.safetensors").rename(broken / "pytorch_model.bin")
    with pytest.raises(LabkitError, match=r"pytorch_model\.bin; pickled weights are never opened"):
        checkpoint(broken)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_damaged_json(broken: Path, name: str):
    (broken / name).write_text('{"cut": ')
    with pytest.raises(LabkitError, match=f"{name} is damaged"):
        checkpoint(broken)


@pytest.mark.parametrize("keep", [0, 5, 100, 0.5, -1])
def test_truncated_safetensors(broken: Path, keep: float):
    file = broken / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: int(keep * len(data)) if 0 < keep < 1 else int(keep)])
    with pytest.raises(LabkitError, match="truncated"):
        checkpoint(broken)


def test_corrupt_header(broken: Path):
    file = broken / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[8:20] = b"\xff" * 12
    file.write_bytes(data)
    with pytest.raises(LabkitError, match="corrupt header"):
        checkpoint(broken)


@pytest.mark.parametrize("offsets", [[0, 8], [-4, 1020], "no", [0, 4 * 256, 9]])
def test_offsets_that_do_not_fit(broken: Path, offsets: object):
    edit_header(broken / "model.safetensors", lambda h: h["model.norm.weight"].update(data_offsets=offsets))
    with pytest.raises(LabkitError, match="corrupt header"):
        checkpoint(broken)


def test_overlapping_tensors(broken: Path):
    def overlap(header: dict) -> None:
        other = header["model.layers.0.input_layernorm.weight"]["data_offsets"]
        header["model.norm.weight"]["data_offsets"] = [other[0], other[1]]

    edit_header(broken / "model.safetensors", overlap)
    with pytest.raises(LabkitError, match="overlaps"):
        checkpoint(broken)


@pytest.mark.parametrize("dtype", ["I8", "F8_E4M3", "F64"])
def test_wrong_dtype(broken: Path, dtype: str):
    edit_header(broken / "model.safetensors", lambda h: h["model.norm.weight"].update(dtype=dtype))
    with pytest.raises(LabkitError, match=f"stored as {dtype}; expected BF16, F16 or F32"):
        checkpoint(broken)


def test_missing_tensor(broken: Path):
    tensors = random_weights(json.loads((broken / "config.json").read_text()))
    del tensors["model.layers.1.mlp.up_proj.weight"]
    write_safetensors(broken / "model.safetensors", tensors)
    with pytest.raises(LabkitError, match=r"'model\.layers\.1\.mlp\.up_proj\.weight' is missing"):
        checkpoint(broken)


def test_wrong_shape(broken: Path):
    edit_config(broken, intermediate_size=768)
    with pytest.raises(LabkitError, match=r"\(512, 256\); config\.json says \(768, 256\)"):
        checkpoint(broken)


def test_config_that_lacks_a_number(broken: Path):
    config = json.loads((broken / "config.json").read_text())
    for missing in ("hidden_size", "vocab_size"):
        (broken / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != missing}))
        with pytest.raises(LabkitError, match=missing):
            checkpoint(broken)


def test_tokenizer_larger_than_the_embedding(broken: Path):
    tokenizer = json.loads((broken / "tokenizer.json").read_text())
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    tokenizer["added_tokens"].append({"id": 512, "content": "<|extra|>", **special})
    tokenizer["model"]["vocab"]["<|extra|>"] = 512
    (broken / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(LabkitError, match="ids up to 512, but the embedding has 512 rows"):
        checkpoint(broken)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_no_numbers(broken: Path, value: float):
    tensors = random_weights(json.loads((broken / "config.json").read_text()))
    tensors["model.layers.1.mlp.down_proj.weight"][200, 3] = value
    write_safetensors(broken / "model.safetensors", tensors, "BF16")
    found = checkpoint(broken)  # opening reads no weights
    with pytest.raises(LabkitError, match=r"down_proj.*NaN or infinite"):
        check_finite(found)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_every_dtype_and_slab_is_looked_at(make_llama, dtype: str):
    folder = make_llama(dtype=dtype)
    tensors = random_weights(json.loads((folder / "config.json").read_text()))
    tensors["model.embed_tokens.weight"][0, :3] = [65504.0, -65504.0, 6e-8]  # large and small, yet finite
    write_safetensors(folder / "model.safetensors", tensors, dtype)
    assert all(is_finite(view, slab=999) for view in open_tensors(folder).values())
    for value in (np.nan, -np.inf):
        tensors["model.embed_tokens.weight"][-1, -1] = value
        write_safetensors(folder / "model.safetensors", tensors, dtype)
        assert not is_finite(open_tensors(folder)["model.embed_tokens.weight"], slab=999)


def test_finite_weights_pass(tiny_llama: Path):
    check_finite(checkpoint(tiny_llama))


def test_unknown_architecture_opens_and_names_itself(broken: Path):
    edit_config(broken, architectures=["MambaForCausalLM"])
    found = checkpoint(broken)
    assert found.architecture == "MambaForCausalLM" and found.family is None


# --- shapes from a config alone --------------------------------------------------------------------------------------


def test_expected_tensors_agree_with_transformers():
    """For each family: the names and shapes that transformers itself makes from the same config."""
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    small = {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 128, "head_dim": 16, "pad_token_id": 0,
    }  # fmt: skip
    for architecture in _shapes.FAMILIES:
        model_class = getattr(transformers, architecture)
        for tied in (True, False):
            config = model_class.config_class(**small, tie_word_embeddings=tied)
            with torch.device("meta"):
                model = model_class(config)
            theirs = {name: tuple(p.shape) for name, p in model.named_parameters()}
            ours = _shapes.shapes({**config.to_dict(), "architectures": [architecture]})
            assert ours == theirs, architecture


def test_cache_formula():
    config = {"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 6, "num_attention_heads": 4,
              "num_key_value_heads": 2, "hidden_size": 256}  # fmt: skip
    assert _shapes.cache_bytes(config, 512) == 2 * 6 * 2 * 64 * 512 * 2
    windowed = {**config, "architectures": ["Gemma3ForCausalLM"], "head_dim": 64, "sliding_window": 128}
    assert _shapes.cache_bytes(windowed, 512) == 2 * 2 * 64 * 2 * (5 * 128 + 512)


@pytest.mark.parametrize(("kind", "dtype"), [(np.float32, "F32"), (np.float16, "F16")])
def test_bits_tell_what_is_finite(kind, dtype):
    largest = np.finfo(kind).max
    for good in ([], [0.0, -0.0], [-1.0], [1.0], [largest, -largest]):
        assert bits_are_finite(np.array(good, kind), dtype)
    for bad in (np.inf, -np.inf, np.nan, -np.nan):
        assert not bits_are_finite(np.array([1.0, bad, -1.0], kind), dtype)


def test_bits_of_bfloat16_tell_what_is_finite():
    assert bits_are_finite(np.array([0x7F7F, 0xFF7F], np.uint16), "BF16")
    assert not any(bits_are_finite(np.array([1, bits], np.uint16), "BF16") for bits in (0x7F80, 0xFF80, 0x7FC0, 0xFFC0))

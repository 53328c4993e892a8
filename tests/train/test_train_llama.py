"""Our Llama against transformers, and a folder that comes back byte for byte."""

from __future__ import annotations

import json

import numpy as np
import pytest
from tiny_checkpoint import TINY

import labkit
from labkit.types import LabkitError

torch = pytest.importorskip("torch")

SHAPE = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 24,
         "vocab_size": 300, "max_position_embeddings": 256, "num_hidden_layers": 2}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}  # fmt: skip
KINDS = {
    "llama": {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "llama untied, rope of Llama 3": {"tie_word_embeddings": False, "rope_parameters": LLAMA3},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"tie_word_embeddings": False},
}


@pytest.mark.parametrize("name", KINDS)
def test_our_models_equal_those_of_transformers(tmp_path, name):
    transformers = pytest.importorskip("transformers")
    from labkit.train.folder import load

    kind = {"l": "Llama", "2": "Qwen2", "3": "Qwen3"}[name[-1] if name[0] == "q" else "l"]
    sizes = {k: v for k, v in SHAPE.items() if k != "head_dim" or kind != "Qwen2"}
    torch.manual_seed(1)
    theirs = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**sizes, **KINDS[name])).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    theirs.save_pretrained(tmp_path)
    ours, ids = load(tmp_path), torch.randint(0, 300, (2, 90))
    with torch.no_grad():
        want = theirs(ids, output_hidden_states=True)
        assert (ours(ids) - want.logits).abs().max() < 2e-5 * want.logits.abs().max()
        for mine, other in zip(ours.states(ids), want.hidden_states, strict=True):
            assert (mine - other).abs().max() < 2e-5 * other.abs().max()


def test_models_of_other_kinds_are_refused_in_a_sentence():
    from labkit.train.llama import Shape

    with pytest.raises(LabkitError, match=r"Phi3ForCausalLM given; .*llama, mistral"):
        Shape.of({**TINY, "architectures": ["Phi3ForCausalLM"]})
    with pytest.raises(LabkitError, match="sliding window of 64 tokens"):
        Shape.of({**TINY, "architectures": ["MistralForCausalLM"], "sliding_window": 64})
    with pytest.raises(LabkitError, match="Rope of type 'yarn'"):
        Shape.of({**TINY, "rope_scaling": {"rope_type": "yarn", "factor": 2.0}})


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
def test_a_folder_comes_back_byte_for_byte(make_llama, tmp_path, dtype):
    from labkit.train.folder import load, save

    source = labkit.checkpoint(make_llama(dtype=dtype))
    made = save(load(source), tmp_path / "out", like=source)
    for name, view in source.tensors().items():
        other = made.tensors()[name]
        assert other.dtype == view.dtype and np.array_equal(other.raw(), view.raw())
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (made.path / file).read_bytes() == (source.path / file).read_bytes()
    assert not list(tmp_path.glob(".partial*"))


def test_the_house_model_is_written_as_the_file_it_came_from(tmp_path):
    from labkit.train.folder import load, save

    source = labkit.checkpoint("edgehome")
    made = save(load(source), tmp_path / "copy", like=source)
    assert (made.path / "model.safetensors").read_bytes() == (source.path / "model.safetensors").read_bytes()


def test_another_type_is_named_in_the_config_and_wrong_folders_are_refused(make_llama, tmp_path):
    from labkit.train.folder import load, save

    source = labkit.checkpoint(make_llama(dtype="BF16"))
    model = load(source)
    made = save(model, tmp_path / "wide", like=source, dtype=torch.float32)
    assert json.loads((made.path / "config.json").read_text())["dtype"] == "float32"
    assert {v.dtype for v in made.tensors().values()} == {"F32"}
    with pytest.raises(LabkitError, match="holds the checkpoint that was loaded"):
        save(model, source.path, like=source)
    tensors = dict(model.state_dict())
    tensors.pop("model.norm.weight")
    with pytest.raises(LabkitError, match=r"'model\.norm\.weight' is not in both"):
        save(tensors, tmp_path / "less", like=source)
    assert not (tmp_path / "less").exists()


def test_drawn_answers_are_seeded_and_cold_ones_greedy(make_llama):
    from labkit.train.folder import load
    from labkit.train.generate import complete

    model = load(make_llama())
    prompts = [[5, 6, 7], [9]]
    greedy = complete(model, prompts, stop=2, max_new=8)
    assert complete(model, prompts, stop=2, max_new=8, temperature=1e-4, seed=3) == greedy
    warm = [complete(model, prompts, stop=2, max_new=8, temperature=1.5, seed=s) for s in (1, 1, 2)]
    assert warm[0] == warm[1] != warm[2]

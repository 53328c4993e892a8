"""Stand-ins: published shapes, random weights, little memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from labkit import LabkitError, _shapes, checkpoint, host, standin
from labkit.checkpoint import house_folder

module = sys.modules["labkit.standin"]
REQUIRED = [
    "smollm2-135m", "smollm2-360m", "smollm2-1.7b", "qwen2.5-0.5b", "qwen2.5-1.5b", "qwen3-0.6b", "qwen3-1.7b",
    "qwen3-4b",
    "llama-3.2-1b", "llama-3.2-3b", "gemma-3-270m", "gemma-3-1b", "phi-3.5-mini", "phi-4-mini", "phi-4",
]  # fmt: skip
needs_house = pytest.mark.skipif(not (house_folder() / "tokenizer.json").exists(), reason="no house tokenizer yet")


def test_the_table_is_complete_and_sourced():
    assert set(REQUIRED) <= set(module.shapes())
    for entry in module.shapes().values():
        assert entry["source"] == f"https://huggingface.co/{entry['hub']}/blob/main/config.json"
        assert entry["licence"] and entry["context"] >= entry["config"]["max_position_embeddings"]


@pytest.mark.parametrize("name", REQUIRED)
def test_parameters_computed_from_the_shape_are_the_published_ones(name: str):
    entry = module.shapes()[name]
    assert _shapes.parameters(entry["config"]) == entry["published_parameters"]


@pytest.mark.parametrize("name", REQUIRED)
def test_transformers_makes_the_same_tensors_from_the_same_config(name: str):
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    config = module.standin_config(name, layers=1) if (house_folder() / "tokenizer.json").exists() else None
    config = config or {**module.shapes()[name]["config"], "num_hidden_layers": 1}
    model_class = getattr(transformers, config["architectures"][0])
    with torch.device("meta"):
        model = model_class(model_class.config_class(**config))
    assert {n: tuple(p.shape) for n, p in model.named_parameters()} == _shapes.shapes(config)


@needs_house
def test_a_small_one_is_a_whole_checkpoint(home: Path):
    made = standin("smollm2-135m", layers=2)
    assert made.name == "standin-smollm2-135m-2-layers" and made.path.parent == home / "checkpoints"
    assert not made.trained and made.vocab_size == 49152 and made.family == "llama"
    assert made.weights == 49152 * 576 + 576 + 2 * (134_515_008 - 49152 * 576 - 576) // 30
    ids = made.encode("turn on the light <|im_end|>")
    assert made.decode(ids) == "turn on the light <|im_end|>" and max(ids) < made.vocab_size
    assert made.eos_ids and made.eos_ids[0] == ids[-1]
    assert "user" in made.chat([{"role": "user", "content": "hello"}])
    view = made.tensors()["model.layers.1.mlp.down_proj.weight"]
    values = view.float32()
    assert view.dtype == "BF16" and abs(values.std() - 0.02) < 0.001 and abs(values.mean()) < 1e-4
    assert (made.tensors()["model.norm.weight"].float32() == 1).all()
    assert not np.array_equal(values, made.tensors()["model.layers.0.mlp.down_proj.weight"].float32())


@needs_house
def test_found_again_and_named_in_one_word(home: Path):
    made = standin("smollm2-135m", layers=1)
    stamp = (made.path / "model.safetensors").stat().st_mtime_ns
    assert checkpoint("standin:smollm2-135m:1") == made and standin("SmolLM2-135M", layers=1) == made
    assert (made.path / "model.safetensors").stat().st_mtime_ns == stamp
    other = standin("smollm2-135m", layers=1, seed=1)
    assert other.path != made.path and other.fingerprint != made.fingerprint


def test_norms_start_neutral():
    rng = np.random.default_rng(0)
    for name, neutral in [("gemma-3-270m", 0.0), ("llama-3.2-1b", 1.0)]:  # Gemma multiplies by 1 + weight
        config = module.shapes()[name]["config"]
        (norm,) = module._slabs("model.layers.0.input_layernorm.weight", (8,), config, rng)
        assert (norm == neutral).all()
        pieces = list(module._slabs("model.layers.0.mlp.up_proj.weight", (3, 1_000_000), config, rng))
        assert [len(piece) for piece in pieces] == [2_000_000, 1_000_000]


@needs_house
def test_transformers_runs_one(home: Path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    made = standin("smollm2-135m", layers=1)
    model = transformers.AutoModelForCausalLM.from_pretrained(made.path, dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.tensor([made.encode("the light")])).logits
    assert logits.shape[-1] == 49152 and torch.isfinite(logits).all()


@needs_house
@pytest.mark.skipif(sys.platform != "linux", reason="reads VmHWM")
def test_memory_stays_far_below_the_file(home: Path):
    code = (
        "import labkit, labkit.standin, numpy, tokenizers, tqdm.auto\n"
        "from labkit._tensors import is_finite\n"
        "peak = lambda: int(next(l for l in open('/proc/self/status') if l.startswith('VmHWM')).split()[1]) * 1024\n"
        "before = peak()\n"
        "made = labkit.standin('smollm2-360m', layers=1)\n"
        "after = peak()\n"
        "for view in made.tensors().values():\n"
        "    assert is_finite(view)\n"
        "    for row in range(0, view.shape[0], 4096): view.rows(row, min(row + 4096, view.shape[0]))\n"
        "print(after - before, peak() - after, (made.path / 'model.safetensors').stat().st_size)\n"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent), "LABKIT_HOME": str(home)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    writing, reading, written = map(int, done.stdout.split())
    assert written > 100_000_000 and writing < written / 2
    assert reading < written / 2  # reading by rows does not map the file into memory


def test_rounding_to_bfloat16_is_to_nearest_even():
    torch = pytest.importorskip("torch")
    values = np.concatenate([
        np.random.default_rng(0).standard_normal(10_000).astype(np.float32),
        np.array([0.0, -0.0, 1.00390625, 1.01171875, 3.3e38, -1e-40], np.float32),
    ])  # fmt: skip
    expected = torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(module.to_bfloat16(values), expected)


def test_wrong_requests():
    with pytest.raises(LabkitError, match="No published shape is known for 'gpt-9'; expected one of smollm2-135m"):
        standin("gpt-9")
    with pytest.raises(LabkitError, match="phi-4-mini has 32 layers; 33 were asked for"):
        standin("phi-4-mini", layers=33)
    with pytest.raises(LabkitError, match="NAME:LAYERS"):
        checkpoint("standin:phi-4-mini:few")


@needs_house
def test_too_little_disk_is_said_first(home: Path, monkeypatch):
    monkeypatch.setattr(host, "free_disk", lambda folder=None: 1_000_000_000)
    with pytest.raises(LabkitError, match=r"stand-in standin-phi-4 needs about 29\.3 GB of disk.* 1 GB free"):
        standin("phi-4")
    assert not list(home.rglob("*.safetensors"))


@needs_house
def test_an_interrupted_writing_leaves_nothing(home: Path, monkeypatch):
    def stop(*_: object):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "to_bfloat16", stop)
    with pytest.raises(KeyboardInterrupt):
        standin("smollm2-135m", layers=1)
    assert not list(home.rglob("*.json")) and not list(home.rglob("*.safetensors"))


def test_size_classes_and_their_gaps():
    expected = {5e6: "below micro", 135e6: "micro", 1.4e9: "micro", 1.45e9: "between micro and small", 3.8e9: "small",
                13.95e9: "between small and medium", 14.7e9: "medium", 70e9: "large"}  # fmt: skip
    assert {n: module.size_class(n) for n in expected} == expected


def test_models_table():
    rows = {row["name"]: row for row in module.models(context=1000)}
    phi = rows["standin:phi-4-mini"]
    assert phi["class"] == "small" and phi["parameters"] == 3_836_021_760
    assert phi["cache_bytes"] == 2 * 32 * 8 * 128 * 1000 * 2
    assert phi["memory"]["f16"] == 2 * 3_836_021_760 + phi["cache_bytes"]
    assert phi["memory"]["4 bit"] < phi["memory"]["8 bit"] < phi["memory"]["f16"]
    assert json.loads(json.dumps(list(rows.values()))) == list(rows.values())

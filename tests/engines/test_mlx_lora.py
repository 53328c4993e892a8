"""An adapter by mlx-lm's trainer on the tiny Llama: it lowers the loss, and the fused weights say the same."""

from __future__ import annotations

import json

import numpy as np
import pytest

import labkit
from labkit import LabkitError
from labkit.engines import mlx as engine

CHAT = [{"role": "user", "content": "vacuum the hall"}, {"role": "assistant", "content": '{"intent":"vacuum"}'}]


def test_data_folder_holds_one_conversation_a_line(tmp_path):
    folder = engine.write_data(tmp_path / "data", {"train": [CHAT, CHAT], "valid": [CHAT]})
    lines = (folder / "train.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [{"messages": CHAT}] * 2 and (folder / "valid.jsonl").exists()
    for bad in ({"train": []}, {"dev": [CHAT]}):
        with pytest.raises(LabkitError, match="expected conversations for train, valid, test"):
            engine.write_data(tmp_path / "bad", bad)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """The house model, an adapter of four steps on one sentence, and its history."""
    pytest.importorskip("mlx_lm")
    root = tmp_path_factory.mktemp("lora")
    base = engine.convert_mlx(labkit.checkpoint("edgehome"), root / "base", "f32")
    data = engine.write_data(root / "data", {"train": [CHAT] * 2, "valid": [CHAT] * 2, "test": [CHAT] * 2})
    history = engine.tune_mlx(base, data, root / "adapter", iters=4, batch_size=2, layers=2, learning_rate=1e-3, report=1)
    return root, base, history


def test_training_lowers_the_loss_of_what_is_shown(tuned):
    root, _, history = tuned
    losses = [row["loss"] for row in history if row["of"] == "train"]
    assert len(losses) == 4 and losses[-1] < 0.8 * losses[0]
    assert {row["of"] for row in history} == {"train", "valid"}
    assert json.loads((root / "adapter" / "adapter_config.json").read_text())["num_layers"] == 2


def test_fused_weights_are_base_plus_scaled_product(tuned):
    root, base, _ = tuned
    mx = pytest.importorskip("mlx.core")
    folder = engine.fuse_mlx(base, root / "adapter", root / "fused", gguf=True)
    thin = {k: np.array(v) for k, v in mx.load(str(root / "adapter" / "adapters.safetensors")).items()}
    before, after = engine.restored_weights(base), engine.restored_weights(folder)
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed == {name.removesuffix("lora_a") + "weight" for name in thin if name.endswith("lora_a")}
    for name in changed:
        a, b = (thin[name.removesuffix("weight") + part] for part in ("lora_a", "lora_b"))
        assert np.allclose(after[name], before[name] + 4.0 * (a @ b).T, atol=1e-6)
    assert (folder / engine.GGUF).read_bytes()[:4] == b"GGUF"
    assert labkit.checkpoint(folder).encode("vacuum") == labkit.checkpoint("edgehome").encode("vacuum")


def test_a_quantized_base_is_not_fused(tuned):
    root, base, _ = tuned
    small = engine.quantize_mlx(base, root / "small", "q4")
    with pytest.raises(LabkitError, match="is quantized; fuse"):
        engine.fuse_mlx(small, root / "adapter", root / "never")
    assert not (root / "never").exists()

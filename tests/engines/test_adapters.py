"""Several adapters on one base: each engine against PEFT itself, the base untouched, and the files Olive and llama.cpp expect."""

from __future__ import annotations

import json
import statistics
import time

import numpy as np
import pytest

import labkit
from labkit import adapters
from labkit.types import LabkitError, Recipe

BASES = {"llamacpp": ("llama_cpp", "f32", "q4_0"), "onnxruntime": ("onnxruntime_genai", "fp32", "int4"), "mlx": ("mlx_lm", "f32", "q4")}
KINDS = {  # name -> rank, alpha, which matrices, and rank-stabilized or not
    "wide": (8, 16, ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], False),
    "narrow": (2, 4, ["v_proj", "down_proj"], True),
}


@pytest.fixture(scope="module")
def trained(family, tmp_path_factory):
    """`trained(family) -> (checkpoint, {name: PEFT folder}, ids, {name or None: logits by PEFT})`."""
    made: dict[str, tuple] = {}

    def make(name: str) -> tuple:
        if name not in made:
            torch, transformers, peft = (pytest.importorskip(n) for n in ("torch", "transformers", "peft"))
            folder, root = family(name), tmp_path_factory.mktemp(name)
            ids = np.random.default_rng(5).integers(3, 500, 20).tolist()
            folders, expected = {}, {}
            for seed, (kind, (rank, alpha, targets, stable)) in enumerate(KINDS.items()):
                model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
                with torch.no_grad():
                    expected[None] = model(torch.tensor([ids])).logits[0].numpy()
                config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, use_rslora=stable, task_type="CAUSAL_LM")
                model = peft.get_peft_model(model, config).eval()
                torch.manual_seed(seed)
                with torch.no_grad():
                    for path, weight in model.named_parameters():
                        if "lora_B" in path:
                            weight.normal_(std=0.1)
                    expected[kind] = model(torch.tensor([ids])).logits[0].numpy()
                model.save_pretrained(root / kind)
                folders[kind] = root / kind
            made[name] = labkit.checkpoint(folder), folders, ids, expected
        return made[name]

    return make


@pytest.mark.parametrize("engine", BASES)
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_each_adapter_answers_as_peft_does_and_the_base_stays(trained, engine, name):
    pytest.importorskip(BASES[engine][0])
    checkpoint, folders, ids, expected = trained(name)
    artifact = labkit.build(checkpoint, Recipe(engine, BASES[engine][1]))
    with labkit.load(artifact, exact=True) as plain:
        alone = plain.logits(ids)
    with adapters.load(artifact, folders, exact=True) as runner:
        for which in (None, "wide", "narrow", "wide", None):
            runner.use(which)
            found = runner.logits(ids)
            assert np.abs(found - expected[which]).max() < 2e-3 * np.abs(expected[which]).max()
            if which is None:
                assert np.array_equal(found, alone)  # not close: the same
            else:
                assert np.abs(found - expected[None]).max() > 0.05  # an adapter that does nothing would pass the rest
        runner.use("narrow")
        one = list(runner.generate(ids, 6))
        assert one == [int(i) for i in _greedy(runner, ids, 6)]


def _greedy(runner, ids, count):
    ids = list(ids)
    for _ in range(count):
        ids.append(int(runner.logits(ids)[-1].argmax()))
        yield ids[-1]


@pytest.mark.parametrize("engine", BASES)
def test_a_quantized_base_keeps_its_blocks_and_takes_the_same_adapters(trained, engine):
    """The stored weights are the base's own; the adapters move it as they move the float model."""
    pytest.importorskip(BASES[engine][0])
    checkpoint, folders, ids, expected = trained("llama")
    artifact = labkit.build(checkpoint, Recipe(engine, BASES[engine][2]))
    with labkit.load(artifact, exact=True) as plain, adapters.load(artifact, folders, exact=True) as runner:
        alone = plain.logits(ids)
        assert np.array_equal(runner.logits(ids), alone)
        runner.use("wide")
        moved, wanted = runner.logits(ids) - alone, expected["wide"] - expected[None]
    assert np.corrcoef(moved.ravel(), wanted.ravel())[0, 1] > 0.9


@pytest.mark.parametrize("engine", BASES)
def test_a_switch_takes_less_than_50_ms(trained, engine):
    pytest.importorskip(BASES[engine][0])
    checkpoint, folders, ids, _ = trained("llama")
    with adapters.load(labkit.build(checkpoint, Recipe(engine, BASES[engine][1])), folders) as runner:
        runner.logits(ids)
        took = []
        for number in range(31):
            began = time.perf_counter()
            runner.use(("wide", "narrow", None)[number % 3])
            took.append(time.perf_counter() - began)
    assert statistics.median(took) < 0.05


def test_olive_converts_an_adapter_to_the_same_file_and_makes_the_same_inputs(trained, tmp_path):
    """`olive convert-adapters` on the adapter, and `olive generate-adapter` on a graph that holds it, as the builder writes it."""
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("olive")
    from labkit.engines import _genai, olive

    checkpoint, folders, *_ = trained("llama")
    artifact = labkit.build(checkpoint, Recipe("onnxruntime", "fp32"))
    adapter = adapters.read(folders["wide"])
    holding = adapters.adaptable(artifact, tmp_path / "holding", folders["wide"], stored=True)
    with olive.Shell(tmp_path / "shell") as shell:
        shell.run("convert-adapters", "-a", folders["wide"], "-o", tmp_path / "theirs.onnx_adapter")
        shell.run("generate-adapter", "-m", holding / "model.onnx", "-o", tmp_path / "generated")
    ours = adapters.write_onnx(folders["wide"], tmp_path / "ours.onnx_adapter")
    files = [ours, tmp_path / "theirs.onnx_adapter", tmp_path / "generated" / "adapter_weights.onnx_adapter"]
    opened = [onnxruntime.AdapterFormat.read_adapter(str(file)) for file in files]  # the arrays live as long as these
    mine, *others = ({name: value.numpy() for name, value in one.get_parameters().items()} for one in opened)
    for other in others:
        assert mine.keys() == other.keys() and all(np.array_equal(mine[k], other[k]) for k in mine)
    adapters.adaptable(artifact, tmp_path / "ours", folders["wide"])
    inputs = [_lora_inputs(_genai.read_graph(tmp_path / f / "model.onnx")) for f in ("generated", "ours")]
    assert inputs[0] == inputs[1] and len(inputs[0]) == 2 * len(adapter.layers)


def _lora_inputs(model):
    shapes = {i.name: [d.dim_param or d.dim_value for d in i.type.tensor_type.shape.dim] for i in model.graph.input}
    return {name: shape for name, shape in shapes.items() if "lora" in name}


def test_mlx_lm_itself_reads_the_folder(trained, tmp_path):
    mx = pytest.importorskip("mlx.core")
    from mlx_lm.utils import load

    checkpoint, folders, ids, expected = trained("llama")
    artifact = labkit.build(checkpoint, Recipe("mlx", "f32"))
    model, *_ = load(str(artifact.path), adapter_path=str(adapters.write_mlx(folders["wide"], checkpoint, tmp_path / "made")))
    found = np.array(model(mx.array([ids]))[0])
    assert np.abs(found - expected["wide"]).max() < 2e-3 * np.abs(expected["wide"]).max()


def test_the_gguf_says_what_it_is(trained, tmp_path):
    pytest.importorskip("llama_cpp")
    from labkit.engines import llamacpp

    checkpoint, folders, *_ = trained("llama")
    made = adapters.write_gguf(folders["narrow"], checkpoint, tmp_path / "narrow.gguf")
    facts, adapter = llamacpp.metadata(made), adapters.read(folders["narrow"])
    assert (facts["general.type"], facts["adapter.type"]) == ("adapter", "lora")
    assert facts["adapter.lora.alpha"] / adapter.rank == pytest.approx(adapter.scale)
    assert {t["shape"] for t in llamacpp.tensors(made)} == {m.shape for pair in adapter.layers.values() for m in pair}
    assert adapter.weights == sum(a.size + b.size for a, b in adapter.layers.values())


def test_what_cannot_be_switched_is_said(trained, tmp_path, make_llama):
    pytest.importorskip("llama_cpp")
    checkpoint, folders, *_ = trained("llama")
    artifact = labkit.build(checkpoint, Recipe("llamacpp", "f32"))
    with adapters.load(artifact, folders) as runner, pytest.raises(LabkitError, match=r"'deep'.*wide, narrow"):
        runner.use("deep")
    with pytest.raises(LabkitError, match="No adapters"):
        adapters.load(artifact, {})
    with pytest.raises(LabkitError, match="only ONNX Runtime"):
        adapters.adaptable(artifact, tmp_path / "x", folders["wide"])
    changed = tmp_path / "dora"
    changed.mkdir()
    (changed / "adapter_model.safetensors").write_bytes((folders["wide"] / "adapter_model.safetensors").read_bytes())
    config = json.loads((folders["wide"] / "adapter_config.json").read_text())
    for wrong in ({"use_dora": True}, {"bias": "all"}, {"peft_type": "IA3"}):
        (changed / "adapter_config.json").write_text(json.dumps({**config, **wrong}))
        with pytest.raises(LabkitError, match="plain LoRA"):
            adapters.read(changed)
    (changed / "adapter_config.json").write_text(json.dumps({**config, "r": 3}))
    with pytest.raises(LabkitError, match=r"expected A \(3, in\)"):
        adapters.read(changed)
    (changed / "adapter_model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    with pytest.raises(LabkitError, match="adapter"):
        adapters.read(changed)
    other = labkit.checkpoint(make_llama("other", num_hidden_layers=1))
    with pytest.raises(LabkitError, match="has no such matrix"):
        adapters.write_gguf(folders["wide"], other, tmp_path / "wrong.gguf")
    assert not list(tmp_path.glob("*.gguf")) and not list(tmp_path.glob(".*.new"))


def test_openvino_has_no_switch_here(trained):
    pytest.importorskip("openvino")
    checkpoint, folders, *_ = trained("llama")
    with pytest.raises(LabkitError, match="merge them for openvino"):
        adapters.load(labkit.build(checkpoint, Recipe("openvino", "f32")), folders)

"""ONNX Runtime: what the graphs hold and compute, the builder's options, what is refused."""

from __future__ import annotations

import json
import shutil
from functools import cache
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest

import labkit
from labkit import LabkitError, Recipe
from labkit.engines import _genai
from labkit.engines import onnxruntime as engine

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxruntime_genai")

IDS = [5, 300, 17, 42, 301, 8, 99, 250, 3, 77]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    """GenAI folder of the tiny Llama in float32; the head's matrix is stored once and turned for the embedding."""
    checkpoint = labkit.checkpoint(tiny_llama)
    return engine.write_genai(checkpoint, tmp_path_factory.mktemp("genai") / "fp32", "fp32", shared=True)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path):
    """`artifact("int4", algorithm="rtn")`: the tiny Llama, built once a module for each recipe."""
    root = tmp_path_factory.mktemp("artifacts")

    @cache
    def get(precision: str, **options: object):
        recipe = Recipe("onnxruntime", precision, **options)
        return labkit.build(labkit.checkpoint(tiny_llama), recipe, out=root / str(recipe))

    return get


def run_graph(model, ids=IDS) -> np.ndarray:
    """Logits (T, V) of a graph, by a plain session on the CPU."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    feed = {"input_ids": np.array([ids], dtype=np.int64), "attention_mask": np.ones((1, len(ids)), dtype=np.int64)}
    for item in session.get_inputs():
        if item.name.startswith("past"):
            feed[item.name] = np.zeros((1, item.shape[1], 0, item.shape[3]), dtype=np.float32)
    return session.run(["logits"], feed)[0][0]


def unpack(packed: np.ndarray, bits: int) -> np.ndarray:
    """Unsigned values from bytes, lowest bits first, along the last axis."""
    shifts = np.arange(0, 8, bits)
    return ((packed[..., None] >> shifts) & ((1 << bits) - 1)).reshape(*packed.shape[:-1], -1)


def blocks_to_float(weight, scales, zeros, bits: int, block: int, columns: int) -> np.ndarray:
    """(rows, columns) float32 from packed rows: (value - zero) * scale for each block."""
    rows = len(weight)
    values = unpack(weight.reshape(rows, -1), bits).astype(np.float32)
    per_row = values.shape[1] // block
    if zeros is None:
        middle = np.full((rows, per_row), 1 << (bits - 1), dtype=np.float32)
    elif zeros.dtype == np.uint8:
        middle = unpack(zeros.reshape(rows, -1), bits)[:, :per_row].astype(np.float32)
    else:
        middle = zeros.reshape(rows, per_row)
    values = (values.reshape(rows, per_row, block) - middle[..., None]) * scales.reshape(rows, per_row)[..., None]
    return values.reshape(rows, -1)[:, :columns]


def dequantized(path: Path):
    """The graph with every MatMulNBits and GatherBlockQuantized replaced by MatMul and Gather on float32 weights."""
    model = onnx.load(str(path))
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    produced = {node.output[0]: node for node in model.graph.node}
    nodes = []
    for number, node in enumerate(model.graph.node):
        facts = {a.name: a.i for a in node.attribute}
        name = f"dequantized_{number}"
        if node.op_type == "MatMulNBits":
            weight, scales, *zeros = (stored[i] for i in node.input[1:] if i)
            shape = facts["bits"], facts["block_size"], facts["K"]
            table = blocks_to_float(weight, scales, zeros[0] if zeros else None, *shape)
            node = onnx.helper.make_node("MatMul", [node.input[0], name], list(node.output), name=name)
            model.graph.initializer.append(onnx.numpy_helper.from_array(np.ascontiguousarray(table.T), name))
        elif node.op_type == "GatherBlockQuantized":
            source = node.input[0] if node.input[0] in stored else produced[node.input[0]].input[0]
            weight, scales = stored[source], stored[node.input[2]]
            zeros = stored[node.input[3]] if len(node.input) > 3 else None
            bits = facts.get("bits", 4)
            if weight.dtype != np.uint8:  # onnx's own int4: signed values around zero
                table = weight.astype(np.float32).reshape(*scales.shape, -1) * scales[..., None]
                table = table.reshape(len(weight), -1)
            else:
                table = blocks_to_float(weight, scales, zeros, bits, facts["block_size"], 10**9)
            node = onnx.helper.make_node("Gather", [name, node.input[1]], list(node.output), name=name)
            model.graph.initializer.append(onnx.numpy_helper.from_array(table, name))
        nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model


def assert_computes_its_weights(folder: Path) -> None:
    """The kernels compute what the stored weights say: exact logits equal those of the dequantized graph."""
    expected = run_graph(dequantized(folder / "model.onnx"))
    with _genai.GenaiRunner(folder, exact=True) as run:
        found = run.logits(IDS)
    assert np.abs(found - expected).max() < 1e-4 * max(1.0, np.abs(expected).max())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_quantize_matmul_stores_what_it_computes(base, tmp_path, bits, symmetric):
    folder = shutil.copytree(base, tmp_path / "q")
    share = bits > 2
    engine.quantize_matmul(base / "model.onnx", folder / "model.onnx", bits, symmetric=symmetric, share=share)
    assert engine.write_exact(folder)
    summary = engine.graph_summary(folder / "model.onnx")
    assert set(summary["bits"]) == {str(bits)} and summary["accuracy_levels"] == [4]
    assert ("GatherBlockQuantized" in summary["operators"]) == share
    assert_computes_its_weights(folder)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"algorithm": "rtn_last", "symmetric": False, "block_size": 64},
        {"algorithm": "k_quant_mixed"},
        {"algorithm": "k_quant"},
        {"algorithm": "hqq"},
        {"algorithm": "default", "embedding": "int4"},
    ],
    ids=lambda options: options.get("algorithm", "usual"),
)
def test_int4_stores_what_it_computes(artifact, options):
    """Guards against model builder options that give a graph which runs and answers nonsense."""
    built = artifact("int4", **options)
    assert_computes_its_weights(built.path)
    if options.get("algorithm") == "k_quant":
        assert built.settings["algorithm"] == "k_quant_last" and any("k_quant_last" in note for note in built.notes)
    floats = any("embedding stays float32" in note for note in built.notes)
    assert floats == (options.get("algorithm") == "hqq")


def test_exact_opens_the_same_weights_in_float32(artifact):
    built = artifact("int4")
    assert (built.path / "exact.onnx").stat().st_size < 100_000 < built.weight_bytes
    with labkit.load(built, exact=True) as literal, labkit.load(built) as usual:
        assert literal.settings["activations"] == "f32" and usual.settings["activations"] == "int8"
        assert usual.settings["accuracy_levels"] == [4]
        difference = np.abs(literal.logits(IDS) - usual.logits(IDS)).max()
    assert 0 < difference < 1


def test_fp16_is_half_the_file_and_float32_arithmetic(base, tmp_path):
    folder = shutil.copytree(base, tmp_path / "half")
    engine.store_half(base / "model.onnx", folder / "model.onnx")
    tables = engine.graph_summary(base / "model.onnx")["bytes_by_part"]
    kept = tables["rotary tables"] + tables["norms"]
    whole = engine.weight_bytes(base / "model.onnx")
    assert engine.weight_bytes(folder / "model.onnx") == kept + (whole - kept) // 2
    with _genai.GenaiRunner(folder) as run, _genai.GenaiRunner(base) as float32:
        assert run.settings["activations"] == "f32"
        assert 0 < np.abs(run.logits(IDS) - float32.logits(IDS)).max() < 0.05
        assert len(list(run.generate(IDS, 4))) == 4


def test_weight_bytes_are_those_in_the_file(base):
    stored = (base / "model.onnx.data").stat().st_size
    whole = engine.weight_bytes(base / "model.onnx")
    assert stored - 4096 * 64 <= whole <= stored  # tensors are aligned in the file
    summary = engine.graph_summary(base / "model.onnx")
    assert sum(summary["bytes_by_part"].values()) == sum(summary["bytes_by_type"].values()) == whole
    assert summary["bytes_by_part"]["rotary tables"] == 2 * 4 * 512 * 32  # cosine, sine: positions x half a head


def test_genai_reads_the_tokenizer_too(base, tiny_llama):
    """labkit never uses it, but applications that open the folder do."""
    import onnxruntime_genai as genai

    text = "turn on the light in the kitchen<|im_end|>"
    tokenizer = genai.Tokenizer(genai.Model(str(base)))
    assert tokenizer.encode(text).tolist() == labkit.checkpoint(tiny_llama).encode(text)


@pytest.mark.parametrize(
    ("precision", "options", "says"),
    [
        ("fp32", {"block_size": 32}, "one of writer"),
        ("fp32", {"writer": "me"}, "labkit, builder"),
        ("int4", {"colour": 1}, "algorithm, block_size"),
        ("int4", {"algorithm": "awq"}, "k_quant_mixed"),
        ("int8", {"algorithm": "hqq"}, "rtn"),
        ("int4", {"block_size": 48}, "16, 32, 64"),
        ("int4", {"accuracy_level": 2}, "1, 4"),
        ("int4", {"algorithm": "k_quant_last", "symmetric": True}, "zero points"),
        ("int4", {"algorithm": "hqq", "embedding": "shared"}, "float"),
        ("int4", {"algorithm": "rtn_last", "embedding": "int4"}, "'default' or 'rtn'"),
        ("int4", {"symmetric": False, "block_size": 256, "writer": "builder"}, "odd number"),
        ("int2", {"embedding": "shared"}, "4 and 8 bits"),
    ],
)
def test_options_that_cannot_be_had(tiny_llama, tmp_path, precision, options, says):
    with pytest.raises(LabkitError, match=says) as error:
        labkit.build(tiny_llama, Recipe("onnxruntime", precision, **options), out=tmp_path / "out")
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_a_head_of_its_own_is_not_shared(make_llama, tmp_path):
    folder = make_llama(tie_word_embeddings=False)
    with pytest.raises(LabkitError, match="head of its own"):
        labkit.build(folder, Recipe("onnxruntime", "int8", embedding="shared"), out=tmp_path / "out")


def test_a_failing_child_says_why(make_llama, tmp_path):
    checkpoint = labkit.checkpoint(make_llama())
    (checkpoint.path / "model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(LabkitError, match="build step failed"):
        engine.build_genai(checkpoint, tmp_path / "out", "fp32")
    assert "Traceback" in (tmp_path / "out" / "build.log").read_text()


def test_damaged_folders_get_one_sentence(base, tmp_path):
    with pytest.raises(LabkitError, match="not a GenAI folder"):
        _genai.GenaiRunner(tmp_path)
    broken = shutil.copytree(base, tmp_path / "broken")
    (broken / "model.onnx").write_bytes(b"\xff" * 1000)
    with pytest.raises(LabkitError, match="cannot open"):
        _genai.GenaiRunner(broken)
    with pytest.raises(LabkitError, match="build it again"):
        engine.weight_bytes(broken / "model.onnx")


def test_threads_reach_the_session(base):
    with pytest.raises(LabkitError, match="1 or more"):
        _genai.GenaiRunner(base, threads=0)
    with _genai.GenaiRunner(base, threads=1) as run:
        assert run.settings["threads"] == 1
        assert json.dumps(dict(run.settings))


def test_a_matrix_that_looks_like_the_head_is_refused_by_the_builder_only(make_llama, tmp_path):
    folder = make_llama(intermediate_size=512)
    with pytest.raises(LabkitError, match=r"gate_proj.weight has as many rows \(512\)"):
        labkit.build(folder, Recipe("onnxruntime", "fp32", writer="builder"), out=tmp_path / "out")
    with labkit.load(labkit.build(folder, Recipe("onnxruntime", "fp32"), out=tmp_path / "out"), exact=True) as run:
        assert run.logits(IDS).shape == (len(IDS), 512)


@pytest.mark.parametrize("algorithm", ["k_quant", "hqq"])
def test_without_torch_its_algorithms_say_what_to_install(tiny_llama, tmp_path, monkeypatch, algorithm):
    def version(name: str) -> str:
        if name == "torch":
            raise metadata.PackageNotFoundError(name)
        return "1"

    monkeypatch.setattr(metadata, "version", version)
    with pytest.raises(LabkitError, match=r"needs torch. Try:  pip install .labkit\[train\]"):
        labkit.build(tiny_llama, Recipe("onnxruntime", "int4", algorithm=algorithm), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_a_build_needs_depends_on_who_writes():
    assert engine.build_needs(Recipe("onnxruntime", "int4")) == (0.0, 0.0)
    for options in ({"algorithm": "k_quant"}, {"algorithm": "hqq"}, {"embedding": "int4"}, {"writer": "builder"}):
        memory, disk = engine.build_needs(Recipe("onnxruntime", "int4", **options))
        assert memory > 0 and disk > 0


def test_the_tiny_llama_agrees_with_llamacpp(tiny_llama, tmp_path):
    pytest.importorskip("llama_cpp")
    ids = list(range(5, 25))
    found = {}
    for name, precision in (("llamacpp", "f32"), ("onnxruntime", "fp32")):
        built = labkit.build(tiny_llama, Recipe(name, precision), out=tmp_path / name)
        with labkit.load(built, exact=True) as run:
            found[name] = run.logits(ids)
    assert np.abs(found["llamacpp"] - found["onnxruntime"]).max() < 1e-3

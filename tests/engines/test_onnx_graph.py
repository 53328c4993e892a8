"""The ONNX graphs labkit writes itself: equal to the model builder's, right in their logits, made without torch."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
from functools import cache
from pathlib import Path

import numpy as np
import pytest

import labkit
from labkit import LabkitError, Recipe
from labkit.engines import _genai, _genai_writer
from labkit.engines import onnxruntime as engine
from labkit.engines._onnx_weights import Blocks, round_to_nearest

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime_genai")

NAMES = (
    "llama", "llama-3", "llama-bias", "mistral", "mistral-window", "qwen2", "qwen3", "phi3", "phi3-long", "gemma3",
)  # fmt: skip
TABLE = 1.2e-7  # cosines are correctly rounded here, torch's stray by a unit in the last place; numbers up to 2


WORKER = """
import json, runpy, sys, traceback
steps, answers = runpy.run_path(sys.argv[1]), sys.stdout
sys.stdout = sys.stderr
for line in sys.stdin:
    job = json.loads(line)
    try:
        steps[job.pop("step")](**job)
        reply = ""
    except Exception:
        reply = traceback.format_exc()
    print(json.dumps(reply), file=answers, flush=True)
"""


@pytest.fixture(scope="module")
def one_builder(tmp_path_factory: pytest.TempPathFactory):
    """The builder's child process, started once for all of its jobs: importing torch is most of the time of each."""
    pytest.importorskip("torch")
    command = [sys.executable, "-P", "-c", WORKER, str(_genai.CHILD)]
    log = (tmp_path_factory.mktemp("worker") / "log").open("w")
    child = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env={**os.environ, **_genai.OFFLINE}
    )

    def run(step: str, log: Path, **job: object) -> None:
        child.stdin.write(json.dumps({"step": step, **job}, default=str) + "\n")
        child.stdin.flush()
        assert not (problem := json.loads(child.stdout.readline())), problem
        log.touch()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_genai, "run_child", run)
        yield run
    child.stdin.close()
    child.wait()
    log.close()


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory, family, one_builder):
    """`both("qwen3", "int4", block_size=64) -> (labkit's folder, the builder's)`, made once a module."""
    root = tmp_path_factory.mktemp("both")

    @cache
    def make(name: str, precision: str, **options: object) -> tuple[Path, Path]:
        folders = []
        for writer in engine.WRITERS:
            recipe = Recipe("onnxruntime", precision, writer=writer, **options)
            folders.append(labkit.build(family(name), recipe, out=root / f"{name} {recipe}").path)
        return folders[0], folders[1]

    return make


def described(node) -> tuple:
    """A node without its name: operator, inputs, outputs, attributes, constants by value and graphs by their nodes."""
    facts = {}
    for attribute in node.attribute:
        value = onnx.helper.get_attribute_value(attribute)
        if attribute.type == onnx.AttributeProto.GRAPH:
            value = [(n.op_type, list(n.output), n.attribute[0].t.dims) for n in value.node]
        elif attribute.type == onnx.AttributeProto.TENSOR:
            value = (value.data_type, list(value.dims), value.raw_data)
        facts[attribute.name] = value
    return node.op_type, node.domain, list(node.input), list(node.output), facts


def arrays(graph) -> dict[str, np.ndarray]:
    """Every stored array by name, those inside the branches of an If included."""
    found = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    for branch in (a.g for n in graph.node for a in n.attribute if a.type == onnx.AttributeProto.GRAPH):
        found |= {n.output[0]: onnx.numpy_helper.to_array(n.attribute[0].t) for n in branch.node}
    return found


def assert_same(ours: Path, theirs: Path) -> None:
    """Same operators, wiring, attributes, stored bytes, inputs, outputs; cosines to a unit in the last place."""
    found, expected = (onnx.load(str(folder / "model.onnx")) for folder in (ours, theirs))
    nodes = [{node.name: described(node) for node in model.graph.node} for model in (found, expected)]
    assert nodes[0] == nodes[1]
    ends = [[(v.name, v.type.SerializeToString()) for v in (*m.graph.input, *m.graph.output)] for m in (found, expected)]
    assert ends[0] == ends[1]
    types = [{v.name: v.type.SerializeToString() for v in model.graph.value_info} for model in (found, expected)]
    flows = {name for name in types[0] if not name.startswith("/model/constants")}  # those the builder calls scalars
    assert {name: types[0][name] for name in flows} == {name: types[1].get(name) for name in flows}
    assert found.ir_version == expected.ir_version
    assert {(o.domain, o.version) for o in found.opset_import} == {(o.domain, o.version) for o in expected.opset_import}
    stored, wanted = arrays(found.graph), arrays(expected.graph)
    assert stored.keys() == wanted.keys()
    for name, array in stored.items():
        assert (array.dtype, array.shape) == (wanted[name].dtype, wanted[name].shape), name
        if "_cache" in name:
            assert np.abs(array - wanted[name]).max() <= TABLE, name
        else:
            assert array.tobytes() == wanted[name].tobytes(), name


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_every_family_is_the_builders_graph(both, name, precision):
    ours, theirs = both(name, precision)
    assert_same(ours, theirs)
    settings = [json.loads((folder / "genai_config.json").read_text()) for folder in (ours, theirs)]
    assert settings[0] == settings[1]


@pytest.mark.parametrize(
    ("precision", "options"),
    [
        ("int4", {"block_size": 16}),
        ("int4", {"block_size": 64, "symmetric": False, "accuracy_level": 1}),
        ("int4", {"block_size": 256}),  # longer than the rows, which are filled up with zeros
        ("int4", {"algorithm": "rtn_last", "symmetric": False}),
        ("int4", {"algorithm": "default"}),
        ("int4", {"algorithm": "default", "symmetric": False, "block_size": 128}),
        ("int4", {"embedding": "float"}),
        ("int8", {}),
        ("int8", {"block_size": 64, "symmetric": False}),
        ("int2", {"symmetric": False}),
        ("int8_dynamic", {}),
        ("fp16", {}),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["llama", "llama-bias"])  # a tied head and one of its own
def test_every_way_of_storing_is_the_builders(both, name, precision, options):
    assert_same(*both(name, precision, **options))


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_narrow_checkpoints_give_the_builders_bytes(make_llama, one_builder, tmp_path, dtype):
    checkpoint = labkit.checkpoint(make_llama(dtype=dtype))
    recipe = Recipe("onnxruntime", "int4")
    ours = labkit.build(checkpoint, recipe, out=tmp_path / "ours").path
    theirs = labkit.build(checkpoint, Recipe("onnxruntime", "int4", writer="builder"), out=tmp_path / "theirs").path
    assert_same(ours, theirs)


@pytest.mark.parametrize("name", NAMES)
def test_logits_and_greedy_ids_are_those_of_transformers(name, family, reference, tmp_path):
    folder = family(name)
    ids, logits, greedy = reference(folder)
    built = labkit.build(folder, Recipe("onnxruntime", "fp32"), out=tmp_path / "fp32")
    assert built.settings["writer"] == "labkit" and not any("model builder" in note for note in built.notes)
    with labkit.load(built, exact=True) as run:
        assert np.abs(run.logits(ids) - logits).max() < 1e-3
        assert list(run.generate(ids[:20], len(greedy))) == greedy


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_rounding_of_strange_rows_is_the_tools(bits, symmetric):
    """Zeros, constants, one sign only, huge and tiny: where scales and zero points have corner cases."""
    tool = pytest.importorskip("onnxruntime.quantization.neural_compressor.weight_only").quant_tensor
    rng = np.random.default_rng(5)
    rows = rng.normal(size=(64, 96)).astype(np.float32)
    rows[0], rows[1], rows[2], rows[3] = 0, 0.25, np.abs(rows[2]), -np.abs(rows[3])
    rows[4] *= 1e30
    rows[5] *= 1e-38
    rows[6, 7] = 500
    codes, scales, zeros = round_to_nearest(rows, Blocks(bits, 32, symmetric, 4))
    expected, scale, zero = tool(rows, bits, 32, "sym" if symmetric else "asym", "uint")
    assert scales.ravel().tobytes() == scale.astype(np.float32).tobytes()
    wide = np.stack([codes & 15, codes >> 4], -1) if bits == 4 else codes
    assert np.array_equal(wide.reshape(64, 96), expected.reshape(64, 96).astype(np.uint8))
    if not symmetric and bits == 8:
        assert np.array_equal(zeros.ravel(), zero.ravel())


def run_without_torch(script: str, *arguments: object) -> str:
    """Run Python code in a process where importing torch or transformers fails; what it printed."""
    blocked = "import sys; sys.modules.update(torch=None, transformers=None)\n" + textwrap.dedent(script)
    done = subprocess.run([sys.executable, "-c", blocked, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "int8_dynamic", "int4"])
def test_no_torch_is_needed(tiny_llama, tmp_path, precision):
    """From checkpoint to answer. int8_dynamic has a child of its own, which is not blocked: it imports no torch."""
    script = """
        import labkit
        built = labkit.build(sys.argv[1], labkit.Recipe("onnxruntime", sys.argv[2]), out=sys.argv[3])
        with labkit.load(built) as run:
            print(len(list(run.generate([5, 6, 7], 4))))
    """
    assert run_without_torch(script, tiny_llama, precision, tmp_path / "out").split() == ["4"]


@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_memory_stays_far_below_the_model(make_llama, tmp_path, precision):
    """100 MB of weights: the highest resident size grows by less than a third of that."""
    resource = pytest.importorskip("resource")
    folder = make_llama(hidden_size=768, intermediate_size=3072, num_hidden_layers=3, num_attention_heads=12,
                        num_key_value_heads=12, vocab_size=512)  # fmt: skip
    assert (folder / "model.safetensors").stat().st_size > 100e6
    script = """
        import resource, labkit, onnx, pathlib
        from labkit.engines import onnxruntime as engine
        import onnxruntime.capi._pybind_state
        peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        checkpoint = labkit.checkpoint(sys.argv[1])
        checkpoint.tensors(), onnx.helper.make_node("Add", ["a", "b"], ["c"])
        before = peak()
        engine.write_genai(checkpoint, pathlib.Path(sys.argv[3]), sys.argv[2])
        print(peak() - before)
    """
    grown = int(run_without_torch(script, folder, precision, tmp_path / "out"))
    assert grown * (1 if sys.platform == "darwin" else 1024) < 33e6
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > 0


def test_generation_settings_and_missing_ids_are_read_as_transformers_reads_them(family):
    config = json.loads((family("phi3") / "config.json").read_text())
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        del config[name]
    generation = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [7, 9], "top_k": None}
    made = _genai_writer.genai_config(config, generation)
    assert made["model"]["eos_token_id"] == [7, 9] and made["model"]["pad_token_id"] == 32000
    assert made["search"]["do_sample"] and made["search"]["temperature"] == 0.6 and made["search"]["top_k"] == 50
    transformers = pytest.importorskip("transformers")
    for kind, class_name in (("llama", "LlamaConfig"), ("mistral", "MistralConfig"), ("qwen2", "Qwen2Config"),
                             ("qwen3", "Qwen3Config"), ("phi3", "Phi3Config"), ("gemma3", "Gemma3TextConfig")):  # fmt: skip
        empty = getattr(transformers, class_name)()
        assert _genai_writer.IDS[kind] == (empty.bos_token_id, empty.eos_token_id, empty.pad_token_id), kind


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3"])
def test_genai_reads_the_checkpoints_own_tokenizer(both, family, name):
    """The builder lets transformers rewrite the tokenizer by the model's family, which changes ids of unusual ones."""
    import onnxruntime_genai as genai

    ours, theirs = both(name, "fp32")
    first, second = (genai.Tokenizer(genai.Model(str(folder))) for folder in (ours, theirs))
    text = 'Boa noite<|im_end|>\n{"b": 12}  é'
    assert first.encode(text).tolist() == labkit.checkpoint(family(name)).encode(text)
    talk = json.dumps([{"role": "user", "content": "hello"}])
    assert first.apply_chat_template(messages=talk, add_generation_prompt=True) == second.apply_chat_template(
        messages=talk, add_generation_prompt=True
    )


def test_what_only_the_builder_can_do_is_noted_or_refused(tiny_llama, tmp_path):
    built = labkit.build(tiny_llama, Recipe("onnxruntime", "int4", algorithm="k_quant_last"), out=tmp_path / "k")
    assert built.settings["writer"] == "builder"
    assert any("model builder: k_quant_last" in note for note in built.notes)
    with pytest.raises(LabkitError, match="cannot write this graph itself: k_quant_last"):
        labkit.build(tiny_llama, Recipe("onnxruntime", "int4", algorithm="k_quant_last", writer="labkit"), out=tmp_path / "l")
    with pytest.raises(LabkitError, match="labkit writes fp32"):
        engine.write_genai(labkit.checkpoint(tiny_llama), tmp_path / "m", "int3")


@pytest.mark.parametrize("name", ["llama-3", "phi3-long", "gemma3"])
def test_older_spellings_of_the_rotary_settings_give_the_same_folder(family, tmp_path, name):
    """Most published checkpoints say rope_theta and rope_scaling; newer transformers write rope_parameters."""
    config = json.loads((family(name) / "config.json").read_text())
    rope = config.pop("rope_parameters")
    if name == "gemma3":
        config |= {"rope_theta": rope["full_attention"]["rope_theta"], "rope_scaling": None}
        config["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        del config["layer_types"]
        config["sliding_window_pattern"] = 6
    else:
        config |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    older = shutil.copytree(family(name), tmp_path / "older")
    (older / "config.json").write_text(json.dumps(config))
    folders = [
        engine.write_genai(labkit.checkpoint(source), tmp_path / f"made{n}") for n, source in enumerate((family(name), older))
    ]
    for file in ("model.onnx", "model.onnx.data", "genai_config.json"):
        assert (folders[0] / file).read_bytes() == (folders[1] / file).read_bytes(), file


def test_soft_capped_logits_are_left_to_the_builder(tiny_llama):
    from labkit.engines._onnx_graph import unsupported

    config = labkit.checkpoint(tiny_llama).config
    assert unsupported(config) is None
    assert "soft-capped" in unsupported({**config, "final_logit_softcapping": 30.0})
    assert "relu" in unsupported({**config, "hidden_act": "relu"})
    assert "yarn" in unsupported({**config, "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}})
    assert "family" in unsupported({**config, "architectures": ["GPT2LMHeadModel"]})


def test_weights_beyond_float16_are_refused(make_llama, tmp_path):
    import tiny_checkpoint

    folder = make_llama()
    weights = tiny_checkpoint.random_weights(json.loads((folder / "config.json").read_text()))
    weights["model.layers.0.mlp.up_proj.weight"][3, 3] = 1e5
    tiny_checkpoint.write_safetensors(folder / "model.safetensors", weights)
    with pytest.raises(LabkitError, match="beyond 65504"):
        labkit.build(folder, Recipe("onnxruntime", "fp16"), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()

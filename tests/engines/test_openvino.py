"""OpenVINO: the graph against transformers, what the files hold, NNCF's options, GenAI's stream."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

import labkit
from labkit import LabkitError, Recipe
from labkit.engines import _nncf, _openvino_runner
from labkit.engines import openvino as engine

pytest.importorskip("openvino_genai")
pytest.importorskip("nncf")

NAMES = ("llama", "llama-3", "llama-bias", "mistral", "mistral-window", "qwen2", "qwen3", "phi3", "phi3-long", "gemma3")


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path):
    """`artifact("int4_sym", group_size=64)`: the tiny Llama, built once a module for each recipe."""
    root, made = tmp_path_factory.mktemp("openvino"), {}

    def get(precision: str, **options: object):
        recipe = Recipe("openvino", precision, **options)
        if str(recipe) not in made:
            made[str(recipe)] = labkit.build(labkit.checkpoint(tiny_llama), recipe, out=root / str(recipe))
        return made[str(recipe)]

    return get


@pytest.mark.parametrize("name", NAMES)
def test_every_family_agrees_with_transformers(name, family, reference, tmp_path):
    folder = family(name)
    ids, logits, greedy = reference(folder)
    built = labkit.build(labkit.checkpoint(folder), Recipe("openvino", "f32"), out=tmp_path / name)
    with labkit.load(built, exact=True) as run:
        found = run.logits(ids)
        assert found.shape == logits.shape and found.dtype == np.float32
        assert np.abs(found - logits).max() < 1e-4
        assert list(run.generate(ids[:20], len(greedy))) == greedy


@pytest.mark.parametrize("name", ["qwen3", "mistral-window", "gemma3"])
def test_paged_attention_reads_the_graph_too(name, family, reference, tmp_path):
    """GenAI's default backend rewrites attention and drops its mask: windows must survive that."""
    import openvino
    import openvino_genai as genai

    folder = family(name)
    ids, _, greedy = reference(folder)
    source = labkit.checkpoint(folder)
    engine.convert_ir(source, tmp_path, "f32")
    pipe = _openvino_runner.open_pipeline(tmp_path, _openvino_runner.EXACT, "PA")
    row = np.array([ids[:20]])
    prompt = genai.TokenizedInputs(openvino.Tensor(row), openvino.Tensor(np.ones_like(row)))
    config = genai.GenerationConfig(max_new_tokens=len(greedy), ignore_eos=True, eos_token_id=0)
    assert pipe.generate(prompt, config).tokens[0] == greedy


def test_unknown_family_is_refused_in_one_sentence(make_llama):
    folder = make_llama()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["MambaForCausalLM"]}))
    with pytest.raises(LabkitError, match="MambaForCausalLM"):
        engine.convert_ir(labkit.checkpoint(folder), folder / "ir")


def test_the_plugin_recognises_the_graph(artifact):
    """Norms, rotary positions and attention with its cache run as the plugin's own fused kernels."""
    compiled = _openvino_runner.core().compile_model(artifact("f32").path / engine.MODEL, "CPU")
    kinds = [str(op.get_rt_info()["layerType"].astype(str)) for op in compiled.get_runtime_model().get_ops()]
    assert kinds.count("RMS") == 5 and kinds.count("RoPE") == 4 and kinds.count("ScaledDotProductAttention") == 2
    assert kinds.count("Broadcast") == 1  # the empty first state; KV heads are not copied


@pytest.mark.parametrize("precision", list(engine.PRECISIONS))
def test_every_precision_builds_runs_and_keeps_its_bounds(precision, artifact):
    built = artifact(precision)
    low, high = engine.PRECISIONS[precision]
    assert low <= built.bits_per_weight <= high
    with labkit.load(built, exact=True) as run:
        logits = run.logits([5, 6, 7, 8])
        assert logits.shape == (4, 512) and np.isfinite(logits).all()
        assert len(list(run.generate([5, 6, 7], 5))) == 5
    assert sum(built.settings["bytes_by_type"].values()) == built.weight_bytes


def test_fewer_bits_err_more(artifact):
    ids = list(range(5, 105))
    with labkit.load(artifact("f32"), exact=True) as run:
        truth = run.logits(ids)
    errors = []
    for precision in ("bf16", "int8_asym", "int4_asym", "int3_sym", "int2_sym"):
        with labkit.load(artifact(precision), exact=True) as run:
            errors.append(float(np.abs(run.logits(ids) - truth).mean()))
    assert errors == sorted(errors) and errors[0] > 0


def test_bf16_checkpoint_is_stored_bit_for_bit(make_llama, tmp_path):
    source = labkit.checkpoint(make_llama(dtype="BF16"))
    path = engine.convert_ir(source, tmp_path / "ir", "bf16")
    stored = {c.name: c for c in engine.ir_constants(path)}
    data = path.with_suffix(".bin").read_bytes()
    for name, view in source.tensors().items():
        c = stored[name]
        assert (c.dtype, c.shape) == ("bf16", view.shape)
        assert data[c.offset : c.offset + c.bytes] == view.raw().tobytes()
    assert engine.weight_bytes(list(stored.values())) == pytest.approx(2 * source.weights, abs=200)


def test_exact_means_float32_and_is_read_back(artifact):
    with labkit.load(artifact("f32"), exact=True, threads=1) as run:
        assert run.settings["inference_precision"] == "f32" and run.settings["kv_cache"] == "f32"
        assert run.settings["dynamic_quantization_group_size"] == 0 and run.settings["threads"] == 1
        compiled = run._request.get_compiled_model()
        assert compiled.get_property("KV_CACHE_PRECISION").get_type_name() == "f32"
        assert compiled.get_property("INFERENCE_NUM_THREADS") == 1
    with labkit.load(artifact("f32")) as run:  # the plugin's own choice, as the probe told it
        run.logits([1])
        compiled = run._request.get_compiled_model()
        assert compiled.get_property("KV_CACHE_PRECISION").get_type_name() == run.settings["kv_cache"]
        assert compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name() == run.settings["inference_precision"]


SIGNAL = """
import faulthandler, signal, sys
import labkit
from labkit.build import read
from labkit.engines import openvino

faulthandler.enable()  # as Jupyter's kernel does: signals get a stack of their own
signal.signal(signal.SIGTERM, lambda *_: print("delivered"))
artifact, kept = read(sys.argv[1]), None
for i in range(2):
    with labkit.load(artifact, exact=True) as run:
        run.logits([1, 2])
        list(run.generate([1, 2], 2))
        kept = run._request.get_compiled_model()  # the first model ends after the second has begun
    openvino.compress_ir(artifact.path / openvino.MODEL, sys.argv[2] + str(i), "int8_sym")
del run, kept
signal.raise_signal(signal.SIGTERM)
"""


def test_signals_arrive_after_models_have_gone(artifact, tmp_path):
    """An interrupt in a notebook must not end its kernel (see `signal_stack_kept`)."""
    command = [sys.executable, "-c", SIGNAL, str(artifact("f32").path), str(tmp_path / "int8-")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0 and done.stdout.endswith("delivered\n"), done.stderr


def test_every_call_starts_from_nothing(artifact):
    with labkit.load(artifact("f32"), exact=True) as run:
        first, text = run.logits([9, 8, 7]), list(run.generate([9, 8, 7], 6))
        run.logits([100, 200, 300, 400])
        assert list(islice(run.generate([4, 4, 4], 50), 3))  # left early
        assert np.array_equal(run.logits([9, 8, 7]), first)
        assert list(run.generate([9, 8, 7], 6)) == text
        assert list(run.generate([9, 8, 7], 0)) == []


def test_the_end_of_text_does_not_stop_generation(make_llama, tmp_path):
    folder = make_llama(eos_token_id=None)
    (folder / "generation_config.json").unlink()
    with labkit.load(labkit.build(labkit.checkpoint(folder), Recipe("openvino", "f32"), out=tmp_path / "a")) as run:
        first = next(iter(run.generate([3, 4, 5], 1)))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": first}))
    with labkit.load(labkit.build(labkit.checkpoint(folder), Recipe("openvino", "f32"), out=tmp_path / "b")) as run:
        assert len(list(run.generate([3, 4, 5], 12))) == 12


@pytest.mark.parametrize(("tokens", "said"), [([], "No tokens"), ([3, 512], "512 is out"), ([-1], "-1 is out")])
def test_bad_tokens_get_a_sentence(tokens, said, artifact):
    with labkit.load(artifact("f32"), exact=True) as run:
        for call in (lambda: run.logits(tokens), lambda: run.generate(tokens, 3)):
            with pytest.raises(LabkitError, match=said):
                call()
    with pytest.raises(LabkitError, match="closed"):
        run.logits([1])
    run.close()


def test_group_size_shows_in_the_bytes(artifact):
    small, large = artifact("int4_sym", group_size=32), artifact("int4_sym", group_size=128)
    assert small.bits_per_weight > large.bits_per_weight
    assert artifact("int4_sym").settings["group_size"] == 128
    assert any("all_layers" in note for note in large.notes)
    assert artifact("int4_sym", group_size=128, all_layers=True).bits_per_weight < large.bits_per_weight


def test_ratio_and_backup_mode_move_weights_between_types(artifact):
    half = artifact("int4_sym", ratio=0.5, backup_mode="int8_sym").settings["bytes_by_type"]
    full = artifact("int4_sym").settings["bytes_by_type"]
    assert 0 < half["i4"] < full["i4"] and half["i8"] > 0 and "u8" not in half


@pytest.mark.parametrize("option", ["awq", "scale_estimation", "gptq"])
def test_data_aware_options_use_the_calibration_text(option, make_llama, tmp_path):
    source = labkit.checkpoint(make_llama(num_hidden_layers=1, intermediate_size=256))
    text = tmp_path / "calibration.txt"
    text.write_text("turn on the light in the kitchen and set a timer for 5 minutes. " * 60)
    options = {"group_size": 64, "calibration": str(text), "samples": 4, "window": 64, option: True}
    recipe = Recipe("openvino", "int4_asym", **options)
    built = labkit.build(source, recipe, out=tmp_path / "built")
    assert built.settings[option] is True and built.settings["calibration"]["windows"] == 4
    plainly = labkit.build(source, Recipe("openvino", "int4_asym", group_size=64), out=tmp_path / "plain")
    with labkit.load(built, exact=True) as tuned, labkit.load(plainly, exact=True) as plain:
        assert not np.array_equal(tuned.logits([5, 6, 7]), plain.logits([5, 6, 7]))


@pytest.mark.parametrize(
    ("precision", "options", "said"),
    [
        ("f32", {"group_size": 64}, "takes no options"),
        ("int8_sym", {"group_size": 64}, "no option 'group_size'"),
        ("int4_sym", {"group_size": 48}, "do not divide into groups of 48"),
        ("mxfp4", {"group_size": 64}, "groups of 32"),
        ("int4_sym", {"backup_mode": "int9"}, "expected one of"),
        ("int4_sym", {"ratio": 1.5}, "NNCF refuses"),
        ("int4_sym", {"gptq": True, "calibration": "/nowhere.txt"}, "is not a file"),
    ],
)
def test_bad_options_get_a_sentence(precision, options, said, tiny_llama, tmp_path):
    with pytest.raises(LabkitError, match=said):
        labkit.build(labkit.checkpoint(tiny_llama), Recipe("openvino", precision, **options), out=tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_short_calibration_text_is_refused(tiny_llama):
    with pytest.raises(LabkitError, match="at least one window"):
        _nncf._samples(labkit.checkpoint(tiny_llama), "too short", 4, 128)


def test_rows_that_do_not_divide_are_noted(make_llama, tmp_path):
    source = labkit.checkpoint(make_llama(hidden_size=192, head_dim=48, intermediate_size=320))
    built = labkit.build(source, Recipe("openvino", "int4_sym"), out=tmp_path / "x")
    assert built.settings["group_size"] == 64 and any("do not divide" in note for note in built.notes)


def test_steps_one_by_one_equal_the_build(tiny_llama, artifact, tmp_path):
    source = labkit.checkpoint(tiny_llama)
    plain = engine.convert_ir(source, tmp_path / "plain", "f32")
    small = engine.compress_ir(plain, tmp_path / "small", "int8_sym")
    assert engine.weight_bytes(engine.ir_constants(small)) == artifact("int8_sym").weight_bytes
    with pytest.raises(LabkitError, match="another folder"):
        engine.compress_ir(plain, tmp_path / "plain", "int8_sym")
    with pytest.raises(LabkitError, match="converted at"):
        engine.convert_ir(source, tmp_path / "no", "int8_sym")


def test_values_too_large_for_f16_are_refused(make_llama, tmp_path):
    from safetensors.numpy import load_file, save_file

    folder = make_llama()
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][0, 0] = 1e6
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(LabkitError, match="65504"):
        labkit.build(labkit.checkpoint(folder), Recipe("openvino", "f16"), out=tmp_path / "x")


def test_text_pipeline_agrees_with_the_runner(artifact):
    pytest.importorskip("transformers")
    built = artifact("f32")
    source = built.checkpoint
    prompt = "turn on the light"
    with labkit.load(built, exact=True) as run:
        expected = list(run.generate(source.encode(prompt), 8))
    pipe = engine.pipeline(built, exact=True)
    config = pipe.get_generation_config()
    config.max_new_tokens, config.ignore_eos, config.apply_chat_template = 8, True, False
    tokenizer = pipe.get_tokenizer()
    assert tokenizer.encode(prompt).input_ids.data[0].tolist() == source.encode(prompt)
    assert pipe.generate(tokenizer.encode(prompt), config).tokens[0] == expected
    assert isinstance(pipe.generate(prompt, config), str)

"""MLX: mlx-lm against transformers, sizes on disk, options, and what mlx-lm would get wrong in silence."""

from __future__ import annotations

import json
import subprocess
import sys
from ctypes.util import find_library
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

import labkit
from labkit import LabkitError, Recipe
from labkit.engines import _mlx_config
from labkit.engines import mlx as engine

mx = pytest.importorskip("mlx.core")
pytest.importorskip("mlx_lm")


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path):
    """`artifact("q4", group_size=64)`: the tiny Llama, built once a module for each recipe."""
    root, made = tmp_path_factory.mktemp("mlx"), {}

    def get(precision: str, **options: object):
        recipe = Recipe("mlx", precision, **options)
        if str(recipe) not in made:
            made[str(recipe)] = labkit.build(labkit.checkpoint(tiny_llama), recipe, out=root / str(recipe))
        return made[str(recipe)]

    return get


@pytest.mark.parametrize("name", ["llama", "llama-3", "llama-bias", "mistral", "qwen2", "qwen3", "phi3", "gemma3"])
def test_every_family_agrees_with_transformers(name, family, reference, tmp_path):
    folder = family(name)
    ids, logits, greedy = reference(folder)
    built = labkit.build(labkit.checkpoint(folder), Recipe("mlx", "f32"), out=tmp_path / name)
    with labkit.load(built, exact=True) as run:
        found = run.logits(ids)
        assert found.shape == logits.shape and found.dtype == np.float32
        # mlx-lm rounds Gemma's embedding factor sqrt(hidden) to bfloat16, transformers keeps it in float32
        assert np.abs(found - logits).max() < (1e-3 if name == "gemma3" else 1e-4)
        assert list(run.generate(ids[:20], len(greedy))) == greedy


@pytest.mark.parametrize(("name", "longest"), [("phi3-long", 48), ("mistral-window", 16)])
def test_what_mlx_lm_cannot_do_is_refused_and_the_rest_is_right(name, longest, family, reference, tmp_path):
    folder = family(name)
    ids, logits, _ = reference(folder)
    built = labkit.build(labkit.checkpoint(folder), Recipe("mlx", "f32"), out=tmp_path / name)
    assert any(str(longest) in note for note in built.notes)
    with labkit.load(built, exact=True) as run:
        with pytest.raises(LabkitError, match=f"right up to {longest} tokens"):
            run.logits(ids)
        with pytest.raises(LabkitError, match=f"right up to {longest} tokens"):
            run.generate(ids[:10], longest)
        if name == "mistral-window":  # the long reference used the other LongRoPE factors from its first token on
            assert np.abs(run.logits(ids[:longest]) - logits[:longest]).max() < 1e-4


def test_longrope_is_right_up_to_its_original_length(family, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    folder = family("phi3-long")
    ids = list(range(5, 45))
    with torch.no_grad():
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        truth = model(torch.tensor([ids])).logits[0].numpy()
    built = labkit.build(labkit.checkpoint(folder), Recipe("mlx", "f32"), out=tmp_path / "x")
    with labkit.load(built, exact=True) as run:
        assert np.abs(run.logits(ids) - truth).max() < 1e-4


def test_rotary_settings_reach_mlx_lm_from_either_spelling():
    old = {
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "num_attention_heads": 2,
        "max_position_embeddings": 512,
        "rope_theta": 5e5,
        "rope_scaling": {"type": "linear", "factor": 4.0},
    }
    new = {k: v for k, v in old.items() if not k.startswith("rope")}
    new["rope_parameters"] = {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5}
    for config in (old, new):
        laid, longest, _ = _mlx_config.overrides(config)
        assert laid["rope_theta"] == 5e5 and laid["rope_scaling"]["factor"] == 4.0
        assert laid["rope_scaling"]["type"] == "linear" and longest is None


@pytest.mark.parametrize("precision", list(engine.PRECISIONS))
def test_every_precision_builds_runs_and_keeps_its_bounds(precision, artifact):
    built = artifact(precision)
    low, high = engine.PRECISIONS[precision]
    assert low <= built.bits_per_weight <= high
    with labkit.load(built, exact=True) as run:
        logits = run.logits([5, 6, 7, 8])
        assert logits.shape == (4, 512) and logits.dtype == np.float32 and np.isfinite(logits).all()
        assert len(list(run.generate([5, 6, 7], 5))) == 5


@pytest.mark.parametrize("precision", ["q4", "mixed_3_6", "mxfp4", "nvfp4", "mxfp8"])
def test_opened_weights_answer_as_the_packed_ones(precision, artifact):
    """Exact runs open the weights once; the packed kernels must say the same."""
    ids = [5, 6, 7, 8, 9, 10]
    with labkit.load(artifact(precision), exact=True) as opened, labkit.load(artifact(precision)) as packed:
        assert np.abs(opened.logits(ids) - packed.logits(ids)).max() < 1e-4
        assert opened.settings["weights"] != packed.settings["weights"]


def test_fewer_bits_err_more(artifact):
    ids = list(range(5, 65))
    with labkit.load(artifact("f32"), exact=True) as run:
        truth = run.logits(ids)
    errors = []
    for precision in ("bf16", "q8", "q6", "q4", "q3", "q2"):
        with labkit.load(artifact(precision), exact=True) as run:
            errors.append(float(np.abs(run.logits(ids) - truth).mean()))
    assert errors == sorted(errors) and errors[0] > 0


def test_affine_values_are_scale_times_code_plus_offset(artifact, tiny_llama):
    """The stored q4 of one tensor, opened by hand: half a step off at most, one where MLX moved the range to hold 0."""
    built = artifact("q4")
    stored = mx.load(str(built.path / "model.safetensors"))
    name = "model.layers.0.mlp.up_proj"
    packed, scales, offsets = (np.array(stored[f"{name}.{part}"]) for part in ("weight", "scales", "biases"))
    codes = (packed[..., None] >> np.arange(0, 32, 4, dtype=np.uint32) & 15).reshape(packed.shape[0], -1)
    values = codes.reshape(packed.shape[0], -1, 64) * scales[..., None] + offsets[..., None]
    truth = labkit.checkpoint(tiny_llama).tensors()[f"{name}.weight"].float32().reshape(values.shape)
    steps = np.abs(values - truth) / np.abs(scales[..., None])
    assert steps.max() <= 1 and (steps > 0.501).mean() < 0.01


def test_group_and_scale_types_show_in_the_bytes(artifact):
    bits = {g: artifact("q4", group_size=g, dtype="float16").bits_per_weight for g in (32, 64, 128)}
    assert bits[32] == pytest.approx(5.0, abs=0.05) and bits[64] == pytest.approx(4.5, abs=0.05)
    assert bits[128] == pytest.approx(4.25, abs=0.05)
    assert artifact("q4", group_size=64).bits_per_weight == pytest.approx(5.0, abs=0.05)  # float32 scales, as stored


def test_every_call_starts_from_nothing(artifact):
    with labkit.load(artifact("f32"), exact=True) as run:
        first, text = run.logits([9, 8, 7]), list(run.generate([9, 8, 7], 6))
        run.logits([100, 200, 300, 400])
        assert len(list(islice(run.generate([4, 4, 4], 50), 3))) == 3  # left early
        assert np.array_equal(run.logits([9, 8, 7]), first)
        assert list(run.generate([9, 8, 7], 6)) == text
        assert list(run.generate([9], 1)) == [int(run.logits([9])[-1].argmax())]
        assert list(run.generate([9, 8, 7], 0)) == []


def test_settings_say_where_and_how(artifact):
    with labkit.load(artifact("bf16"), threads=2) as run:
        cpu = mx.default_device().type == mx.DeviceType.cpu
        assert (run.settings["device"] == "cpu") == cpu == run.settings["reference_path"]
        assert run.settings["inference_precision"] == ("float32" if cpu else "bfloat16")
        assert run.settings["threads_asked"] == 2


@pytest.mark.parametrize(("tokens", "said"), [([], "No tokens"), ([3, 512], "512 is out"), ([-1], "-1 is out")])
def test_bad_tokens_get_a_sentence(tokens, said, artifact):
    with labkit.load(artifact("f32"), exact=True) as run:
        for call in (lambda: run.logits(tokens), lambda: run.generate(tokens, 3)):
            with pytest.raises(LabkitError, match=said):
                call()
    with pytest.raises(LabkitError, match="closed"):
        run.logits([1])
    run.close()


@pytest.mark.parametrize(
    ("precision", "options", "said"),
    [
        ("f32", {"group_size": 64}, "it takes none"),
        ("mxfp4", {"group_size": 64}, "no option 'group_size'"),
        ("q4", {"group_size": 48}, "groups of 32, 64 and 128"),
        ("q4", {"dtype": "float64"}, "float64"),
        ("q4", {"bits": 3}, "no option 'bits'"),
    ],
)
def test_bad_options_get_a_sentence(precision, options, said, tiny_llama, tmp_path):
    with pytest.raises(LabkitError, match=said):
        labkit.build(labkit.checkpoint(tiny_llama), Recipe("mlx", precision, **options), out=tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_rows_that_do_not_divide(make_llama, tmp_path):
    source = labkit.checkpoint(make_llama(hidden_size=96, head_dim=24, intermediate_size=160))
    built = labkit.build(source, Recipe("mlx", "q4"), out=tmp_path / "x")
    assert built.settings["group_size"] == 32 and any("do not divide" in note for note in built.notes)
    with pytest.raises(LabkitError, match="do not divide into groups of 64"):
        labkit.build(source, Recipe("mlx", "q4", group_size=64), out=tmp_path / "y")


def test_unknown_architecture_is_one_sentence(make_llama, tmp_path):
    folder = make_llama()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["NoSuchForCausalLM"]}))
    with pytest.raises(LabkitError, match="NoSuchForCausalLM"):
        engine.convert_mlx(labkit.checkpoint(folder), tmp_path / "x")


def test_steps_one_by_one_equal_the_build(tiny_llama, artifact, tmp_path):
    plain = engine.convert_mlx(labkit.checkpoint(tiny_llama), tmp_path / "plain", "f32")
    small = engine.quantize_mlx(plain, tmp_path / "small", "q4", group_size=64, dtype="float16")
    built = artifact("q4", group_size=64, dtype="float16")
    assert sum(size for *_, size in engine.stored_tensors(small).values()) == built.weight_bytes
    for bad, said in ((small, "quantized already"), (plain, "another folder")):
        with pytest.raises(LabkitError, match=said):
            engine.quantize_mlx(bad, plain, "q4")


FRESH = """
import sys
from pathlib import Path
import numpy as np
import labkit
from labkit.build import read
with labkit.load(read(Path(sys.argv[1])), exact=True) as run:
    np.save(sys.argv[2], run.logits([1, 5, 7, 9]))
    print(run.settings["blas"])
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere MLX brings a fast BLAS")
def test_the_systems_openblas_is_used_where_there_is_one(artifact, tmp_path):
    """In fresh processes: which BLAS was taken is settled when MLX is first imported."""
    q8, said = artifact("q8", group_size=32), {}
    for name, before in (("found", ""), ("late", "import mlx.core\n")):
        command = [sys.executable, "-c", before + FRESH, str(q8.path), str(tmp_path / f"{name}.npy")]
        said[name] = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1]
    assert said["late"] == "bundled"
    assert said["found"] == ("openblas" if find_library("openblas") else "bundled")
    np.testing.assert_allclose(np.load(tmp_path / "found.npy"), np.load(tmp_path / "late.npy"), atol=1e-4)

"""The failure museum: each maker breaks what it says and nothing else, and what can be repaired is repaired."""

from __future__ import annotations

import numpy as np
import pytest

from labkit import museum
from labkit.course import exercises
from labkit.engines import require
from labkit.types import LabkitError

SEEDS = (0, 1, 7)


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory):
    """One home for all tests here: the good files are built once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LABKIT_HOME", str(tmp_path_factory.mktemp("home")))
        yield


def engine(name):
    try:
        return require(name)
    except LabkitError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def llamacpp():
    return engine("llamacpp")


@pytest.fixture(scope="module")
def hall(llamacpp, tmp_path_factory):
    return museum.hang(tmp_path_factory.mktemp("hall"), seed=1)


def good(kind):
    return museum.good(museum.GOOD[kind]).path / "model.gguf"


def file(hall, kind, seed=1):
    return hall[museum.plan(seed).number(kind)].path / "model.gguf"


def stored(path):
    import gguf

    return {t.name: (t.tensor_type.name, np.array(t.data)) for t in gguf.GGUFReader(path).tensors}


def changed(good_path, path):
    """Names of the tensors whose bytes differ."""
    before, after = stored(good_path), stored(path)
    assert list(before) == list(after)
    return {n for n in before if before[n][0] != after[n][0] or before[n][1].tobytes() != after[n][1].tobytes()}


def damage(kind, seed=1):
    names = stored(good(kind))
    return {
        "nibbles": {museum.plan(seed).nibbles},
        "scale": {museum.plan(seed).scale},
        "rope": {n for n in names if "attn_q" in n or "attn_k" in n},
        "norm": {n for n in names if "norm" in n},
        "embedding": {"token_embd.weight"},
    }.get(kind, set())


@pytest.mark.parametrize("kind", sorted(museum.GOOD))
def test_only_the_planned_tensors_and_keys_differ(hall, llamacpp, kind):
    path = file(hall, kind)
    assert changed(good(kind), path) == damage(kind)
    before, after = llamacpp.metadata(good(kind)), llamacpp.metadata(path)
    lost = {"template": {"tokenizer.chat_template"}, "pre": {"tokenizer.ggml.pre"}}.get(kind, set())
    assert set(before) - set(after) == lost and not set(after) - set(before)
    assert all(after[key] == before[key] for key in after)


def test_swapping_nibbles_keeps_every_block_s_scale_and_codes(hall):
    name = museum.plan(1).nibbles
    before, after = (stored(p)[name][1].reshape(-1, 18) for p in (good("nibbles"), file(hall, "nibbles")))
    assert (before[:, :2] == after[:, :2]).all()
    want, got = (museum.values(p)[name].reshape(-1, 32) for p in (good("nibbles"), file(hall, "nibbles")))
    assert np.array_equal(np.sort(want), np.sort(got)) and np.array_equal(np.roll(want, 16, axis=1), got)


def test_bf16_bits_round_to_nearest_even():
    formats = pytest.importorskip("ml_dtypes")
    x = np.concatenate([np.random.default_rng(0).normal(size=1000), [1 + 2**-8, 1 + 3 * 2**-8, 0.0]]).astype(np.float32)
    assert np.array_equal(museum.bf16_bits(x), x.astype(formats.bfloat16).view(np.uint16))


def test_scales_of_the_wrong_type_are_a_likely_scale_once_read_as_bfloat16(hall):
    name = museum.plan(1).scale
    before, after = (stored(p)[name][1].reshape(-1, 34) for p in (good("scale"), file(hall, "scale")))
    right = before[:, :2].copy().view("<f2").astype(np.float64)
    read = (after[:, :2].copy().view("<u2").astype("<u4") << 16).view("<f4")
    assert np.allclose(read, right, rtol=2**-8) and (before[:, 2:] == after[:, 2:]).all()
    assert np.abs(after[:, :2].copy().view("<f2").astype(np.float64)).max() > 50 * np.abs(right).max()


def test_unpermuted_rows_are_the_checkpoint_s_own(hall):
    from labkit.checkpoint import checkpoint

    rows = stored(file(hall, "rope"))["blk.2.attn_q.weight"][1]
    own = checkpoint("edgehome").tensors()["model.layers.2.self_attn.q_proj.weight"].float32()
    assert np.array_equal(rows, own.astype(np.float16))


def test_norms_are_one_too_large_and_the_embedding_has_two_bits(hall):
    for name in damage("norm"):
        difference = museum.values(file(hall, "norm"))[name] - museum.values(good("norm"))[name]
        assert np.allclose(difference, 1, atol=1e-6)
    assert stored(file(hall, "embedding"))["token_embd.weight"][0] == "Q2_K"


def test_without_its_key_llama_cpp_cuts_other_tokens(hall, llamacpp):
    text = ["hello house, 19 + 93.", "Excuse me, let's sketch"]
    assert llamacpp.gguf_encode(good("pre"), text) != llamacpp.gguf_encode(file(hall, "pre"), text)
    assert llamacpp.gguf_encode(good("pre"), text) == llamacpp.gguf_encode(file(hall, "template"), text)


def test_every_exhibit_but_the_two_of_metadata_is_far_from_the_good_file(hall):
    from labkit import load, measure

    with load(museum.good("f16"), exact=True) as reference:
        for number, artifact in hall.items():
            kind = museum.plan(1).order[number - 1]
            found = measure.summary(measure.divergence(artifact, reference, limit=1)).value
            assert found == 0 if kind in ("template", "pre") else found > 0.01, (kind, found)


def test_a_repair_puts_the_good_bytes_back(hall):
    name = museum.plan(1).nibbles
    number = museum.plan(1).number("nibbles")
    right = stored(good("nibbles"))[name][1]
    fixed = museum.mended(hall, {"exhibit": number, "data": {name: right}})
    assert changed(good("nibbles"), fixed.path / "model.gguf") == set()
    assert changed(good("nibbles"), file(hall, "nibbles")) == {name}, "the exhibit itself stays broken"
    assert museum.mended(hall, {"exhibit": ..., "data": ...}) is None
    with pytest.raises(LabkitError, match="no exhibit 99"):
        museum.mended(hall, {"exhibit": 99, "data": {}})


def test_a_patch_that_does_not_fit_leaves_no_file(llamacpp, tmp_path):
    for tensors in ({"blk.0.nothing": np.zeros(4)}, {"blk.0.attn_norm.weight": np.zeros(3, np.float32)}):
        with pytest.raises(LabkitError, match=f"given for {next(iter(tensors))}"):
            museum.patched(good("rope"), tmp_path / "x.gguf", tensors)
    with pytest.raises(LabkitError, match="expected q4_0"):
        museum.swapped_nibbles(good("rope"), tmp_path / "x.gguf", "blk.0.ffn_up.weight")
    with pytest.raises(LabkitError, match=r"no metadata 'a\.b'"):
        museum.without_key(good("rope"), tmp_path / "x.gguf", "a.b")
    with pytest.raises(LabkitError, match="has no 'moths'"):
        museum.break_gguf("moths", good("rope"), tmp_path / "x.gguf")
    assert list(tmp_path.iterdir()) == []


def test_the_museum_is_the_same_for_the_same_seed(hall, tmp_path):
    for kind in museum.GOOD:
        again = museum.break_gguf(kind, good(kind), tmp_path / "again.gguf", seed=1)
        assert again.read_bytes() == file(hall, kind).read_bytes(), kind
    plans = [museum.plan(seed) for seed in range(20)]
    assert len({plan.order for plan in plans}) > 15 and len({plan.nibbles for plan in plans}) > 5
    assert all(sorted(plan.order) == sorted(museum.GOOD) and plan.nibbles != plan.scale for plan in plans)


def test_a_transposed_matrix_in_an_ir_and_back(tmp_path):
    openvino = engine("openvino")
    from labkit import measure

    source, seed = museum.good("f32", "openvino"), 1
    broken = museum.hang_openvino(tmp_path / "broken", seed)
    name = museum.SQUARE.format(layer=museum.plan(seed).transposed)
    for one in (c.name for c in openvino.ir_constants(source.path / openvino.MODEL) if c.dtype == "f32" and c.bytes > 2048):
        before, after = (museum.ir_tensor(a.path / openvino.MODEL, one) for a in (source, broken))
        assert np.array_equal(after, before.T if one == name else before), one
    mended = museum.with_arrays(broken, tmp_path / "mended", {name: museum.ir_tensor(broken.path / openvino.MODEL, name).T})
    bins = [(a.path / openvino.MODEL).with_suffix(".bin").read_bytes() for a in (source, broken, mended)]
    assert bins[0] == bins[2] != bins[1]
    far, near = (measure.summary(measure.divergence(a, source, limit=1)).value for a in (broken, mended))
    assert far > 1e-3 > near
    with pytest.raises(LabkitError, match="shape"):
        museum.with_arrays(source, tmp_path / "no", {name: np.zeros((2, 2))})
    assert not (tmp_path / "no").exists()


def test_the_wrong_axis_costs_more_than_eight_bits(tmp_path):
    engine("onnxruntime")
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    from labkit.checkpoint import checkpoint

    path, name = museum.hang_onnx(tmp_path / "layer.onnx", 1)
    weight = checkpoint("edgehome").tensors()[name].float32()
    graph = onnx.load(path)
    onnx.checker.check_model(graph)

    def rmse(model):
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        return float(np.sqrt(np.mean((session.run(None, {"x": np.eye(256, dtype=np.float32)})[0] - weight.T) ** 2)))

    wrong = rmse(graph)
    (attribute,) = graph.graph.node[0].attribute
    assert (attribute.name, attribute.i) == ("axis", 0)
    attribute.i = 1
    right = rmse(graph)
    assert right < 0.01 * weight.std() and wrong > 10 * right


@pytest.mark.parametrize("seed", SEEDS)
def test_the_planned_number_of_texts_leaked_and_half_of_them_in_disguise(seed):
    calibration, evaluation = museum.calibration_set(seed)
    planned = museum.plan(seed).leaked
    assert len(calibration) == len(evaluation) == len(set(evaluation)) == museum.CONVERSATIONS
    assert len(set(calibration) & set(evaluation)) == planned // 2
    normal = {" ".join(text.lower().split()) for text in calibration}
    assert sum(" ".join(text.lower().split()) in normal for text in evaluation) == planned


def test_the_stopwatch_keeps_the_moments_apart(llamacpp):
    record = museum.stopwatch(museum.good("q8_0"), [1, 5, 9, 13], new=5)
    moments = [0, record["loaded"], *record["stamps"]]
    assert len(record["stamps"]) == 5 and moments == sorted(moments)
    assert record["tokens_per_second"] == pytest.approx(5 / record["stamps"][-1])


def right_answers(seed):
    """A right diagnosis for every report that has a seed, from the plan and the good files."""
    plan = museum.plan(seed)
    halves = stored(good("scale"))[plan.scale][1].reshape(-1, 34).copy()
    scale = museum.bf16_bits(halves[:, :2].copy().view("<f2").astype(np.float32)).astype("<u4") << 16
    halves[:, :2] = scale.view("<f4").astype("<f2").view(np.uint8)
    pick = {kind: {n: stored(good(kind))[n][1] for n in damage(kind, seed)} for kind in ("nibbles", "rope", "norm")}
    name = museum.SQUARE.format(layer=plan.transposed)
    from labkit.checkpoint import checkpoint

    house = checkpoint("edgehome")
    said = [{"role": "user", "content": "Turn on the lights in the kitchen"}]
    right = stored(good("embedding"))["token_embd.weight"][1].nbytes
    return {
        "04.8.1": {"exhibit": plan.number("nibbles"), "data": pick["nibbles"]},
        "04.8.2": {"exhibit": plan.number("scale"), "data": {plan.scale: halves}},
        "04.8.3": {"exhibit": plan.number("rope"), "data": pick["rope"]},
        "04.8.4": {"exhibit": plan.number("norm"), "data": pick["norm"]},
        "04.8.5": {"exhibit": plan.number("embedding"), "tensor": "token_embd.weight", "bytes": right},
        "04.8.6": {
            "exhibit": plan.number("template"),
            "key": "tokenizer.chat_template",
            "ids": house.encode(house.chat(said)),
        },
        "04.8.8": {"tensor": name, "data": house.tensors()[name].float32()},
    }


@pytest.mark.parametrize("seed", SEEDS)
def test_a_diagnosis_passes_for_its_own_seed_only(llamacpp, seed):
    for name, diagnosis in right_answers(seed).items():
        assert exercises.judge(name, (seed, diagnosis)).state == "passed", exercises.judge(name, (seed, diagnosis))
        if "exhibit" in diagnosis:
            other = diagnosis | {"exhibit": diagnosis["exhibit"] % 7 + 1}
            verdict = exercises.judge(name, (seed, other))
            assert verdict.state == "not yet" and "does not fit" in verdict.message
        unfinished = dict.fromkeys(diagnosis, ...)
        assert exercises.judge(name, (seed, unfinished)).state == "not started"


def test_a_diagnosis_with_a_tensor_too_many_or_too_few_is_not_yet_right(llamacpp):
    answer = right_answers(0)["04.8.3"]
    names = list(answer["data"])
    fewer = answer | {"data": {n: answer["data"][n] for n in names[1:]}}
    more = answer | {"data": answer["data"] | {"blk.0.ffn_up.weight": np.zeros(3)}}
    other = answer | {"data": answer["data"] | {names[0]: answer["data"][names[0]][::-1]}}
    said = [exercises.judge("04.8.3", (0, a)).message for a in (fewer, more, other)]
    assert "1 damaged" in said[0] and "blk.0.ffn_up.weight is not damaged" in said[1] and names[0] in said[2]

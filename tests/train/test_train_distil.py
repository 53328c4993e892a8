"""Distillation: each loss and its gradient, transfer of hidden states and attention, data from a teacher, on-policy steps."""

from __future__ import annotations

import json

import pytest

import labkit
from labkit.train.data import house
from labkit.types import LabkitError

torch = pytest.importorskip("torch")

from labkit.train import distil  # noqa: E402
from labkit.train.folder import load  # noqa: E402
from labkit.train.llama import Llama, Shape  # noqa: E402
from labkit.train.loop import Settings, answer_loss, train  # noqa: E402
from labkit.train.rows import batches, encode_all, pack  # noqa: E402
from labkit.train.teacher import OnPolicy, json_object, on_policy_loss, synthesize  # noqa: E402

QUICK = {"progress": False}


@pytest.fixture(scope="module")
def base():
    return labkit.checkpoint("edgehome")


@pytest.fixture(scope="module")
def teacher(base):
    return load(base).requires_grad_(False)


@pytest.fixture(scope="module")
def rows(base):
    return pack(encode_all(base, house("train", 16, intents=["light", "dim"]), 128), 128)


def small(seed: int = 0) -> Llama:
    torch.manual_seed(seed)
    return Llama(Shape(hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1))


@pytest.fixture(scope="module")
def some():
    """Logits of a student and a teacher, targets, weights: (2, 3, 7)."""
    draws = torch.Generator().manual_seed(0)
    student, teacher = (2 * torch.randn(2, 3, 7, generator=draws, dtype=torch.float64) for _ in "12")
    return student, teacher, torch.randint(7, (2, 3), generator=draws), torch.tensor([[1.0, 0, 1], [0.5, 1, 0]])


# --- losses ----------------------------------------------------------------------------------------------------------


def test_losses_are_what_they_say(some):
    student, teacher, targets, weights = some
    p, q = torch.softmax(teacher / 3, -1), torch.softmax(student / 3, -1)
    kl = lambda a, b: ((a * (a / b).log()).sum(-1) * weights).sum().item()  # noqa: E731
    assert distil.soft(student, teacher, weights, 3.0).item() == pytest.approx(9 * kl(p, q), rel=1e-5)
    assert distil.reverse(student, teacher, weights, 3.0).item() == pytest.approx(9 * kl(q, p), rel=1e-5)
    mix = 0.3 * p + 0.7 * q
    assert distil.jensen(student, teacher, weights, 3.0, 0.3).item() == pytest.approx(
        9 * (0.3 * kl(p, mix) + 0.7 * kl(q, mix)), rel=1e-5
    )
    nll = -(torch.log_softmax(student, -1).gather(-1, targets[..., None])[..., 0] * weights).sum()
    assert distil.hard(student, targets, weights).item() == pytest.approx(nll.item(), rel=1e-5)
    for loss in distil.DIVERGENCES.values():
        assert abs(loss(teacher, teacher, weights, 2.0).item()) < 1e-5
    with pytest.raises(LabkitError, match="temperature=0"):
        distil.soft(student, teacher, weights, 0)


def test_the_gradient_is_t_times_the_difference_of_probabilities(some):
    """d(T^2 KL)/d(student) = T (q - p): the closed form; and near T = infinity it no longer depends on T, which T^2 is for."""
    student, teacher, _, weights = some
    for T in (1.0, 4.0):
        z = student.clone().requires_grad_()
        distil.soft(z, teacher, weights, T).backward()
        wanted = T * (torch.softmax(student / T, -1) - torch.softmax(teacher / T, -1)) * weights[..., None]
        assert torch.allclose(z.grad, wanted, atol=1e-5)
    sizes = []
    for T in (50.0, 100.0):
        z = student.clone().requires_grad_()
        distil.soft(z, teacher, weights, T).backward()
        sizes.append(z.grad.norm().item())
        centred = [x - x.mean(-1, keepdim=True) for x in (student, teacher)]
        limit = (centred[0] - centred[1]) / 7 * weights[..., None]  # Hinton's limit: matching logits, divided by their number
        assert (z.grad - limit).norm() < 0.05 * limit.norm()
    assert sizes[0] == pytest.approx(sizes[1], rel=0.05)


def test_several_teachers_count_as_their_mean_probability(some):
    student, teacher, _, _ = some
    both = torch.softmax(distil.mean_logits([student, teacher], 2.0) / 2.0, -1)
    mean = (torch.softmax(student / 2, -1) + torch.softmax(teacher / 2, -1)) / 2
    assert torch.allclose(both.double(), mean, atol=1e-6)
    assert torch.equal(distil.mean_logits([teacher], 2.0), teacher)


# --- training with them ----------------------------------------------------------------------------------------------


def test_losses_are_torchs_and_trls(some):
    """One number from three programs: ours, plain torch's kl_div, and TRL's loss for GKD, whose beta 0 is forward, 1 reverse."""
    student, teacher, _, weights = (x.float() for x in some)
    kept = weights > 0
    ones = kept.float()
    plain = torch.nn.functional.kl_div(
        (student[kept] / 2).log_softmax(-1), (teacher[kept] / 2).softmax(-1), reduction="sum"
    ).item()
    assert distil.soft(student, teacher, ones, 2.0).item() == pytest.approx(4 * plain, rel=1e-5)
    gkd = pytest.importorskip("trl.experimental.gkd").GKDTrainer.generalized_jsd_loss
    labels = torch.where(kept, 0, -100)
    for ours, beta in ((distil.soft, 0.0), (distil.reverse, 1.0), (lambda *a: distil.jensen(*a, 0.3), 0.3)):
        theirs = gkd(student, teacher, labels, beta=beta, temperature=2.0, reduction="sum").item()
        assert ours(student, teacher, ones, 2.0).item() == pytest.approx(4 * theirs, rel=1e-5)  # theirs has no T squared


def test_what_a_teacher_said_is_remembered(teacher, rows):
    """The same loss and gradient as with the teacher running, for one and for several; rows and logits are drawn together."""
    model, other = small(), small(7)
    for guide in (teacher, [teacher, other]):
        kept = distil.remember(guide, rows, temperature=2.0, size=3)
        grads = []
        for loss, given in ((distil.response(guide, 2.0, 1.0), rows), (distil.response(None, 2.0, 1.0), kept)):
            model.zero_grad()
            loss(model, given[2:5]).backward()
            grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        assert (grads[0] - grads[1]).norm() < 2e-3 * grads[0].norm()
    some = kept[torch.tensor([4, 1])]
    assert torch.equal(some.ids, rows.ids[[4, 1]]) and torch.equal(some.logits, kept.logits[[4, 1]]) and len(some) == 2
    run = train(small(), batches(kept, 2), Settings(steps=3, rate=1e-3), loss=distil.response(None), **QUICK)
    assert len(run.curves) == 3
    assert answer_loss(model, kept).item() == answer_loss(model, rows).item()
    with pytest.raises(LabkitError, match=r"no teacher; expected one of both"):
        distil.response(None)(model, rows)


def test_a_student_comes_nearer_to_its_teacher(teacher, rows):
    with torch.no_grad():
        theirs = teacher(rows.ids, documents=rows.documents)
        apart = lambda m: distil.soft(m(rows.ids, documents=rows.documents), theirs, rows.weights, 1.0).item()  # noqa: E731
    for divergence in distil.DIVERGENCES:
        model = small()
        with torch.no_grad():
            before = apart(model)
        loss = distil.response(teacher, temperature=2.0, share=1.0, divergence=divergence)
        train(model, batches(rows, 2), Settings(steps=20, rate=1e-2, warmup=2), loss=loss, **QUICK)
        with torch.no_grad():
            assert apart(model) < 0.7 * before, divergence
    with torch.no_grad():
        only_hard = distil.response(teacher, share=0.0)(model, rows)
        assert only_hard.item() == pytest.approx(answer_loss(model, rows).item(), rel=1e-5)
    with pytest.raises(LabkitError, match="divergence='l2'"):
        distil.response(teacher, divergence="l2")


def test_hidden_states_and_attention_are_transferred_through_trained_maps(teacher, rows, tmp_path):
    model = small()
    loss = distil.Transfer(model, teacher, distil.response(teacher, share=0.5), [(1, 3), (2, 6)], hidden=1.0, attention=0.5)
    assert {n for n, _ in loss.named_parameters()} == {"maps.0.weight", "maps.1.weight"}
    with torch.no_grad():
        inner, whole = loss.inner(model, rows).item(), loss(model, rows).item()
        loss.attention = 0.0
        without = loss(model, rows).item()
        loss.attention = 0.5
    assert inner < without < whole
    kept = loss.maps[0].weight.detach().clone()
    run = train(model, batches(rows, 2), Settings(steps=20, rate=1e-2, warmup=2), loss=loss, work=tmp_path, **QUICK)
    assert run.curves[-1]["loss"] < 0.8 * run.curves[0]["loss"] and not torch.equal(loss.maps[0].weight, kept)
    assert "loss.maps.0.weight" in torch.load(tmp_path / "state.pt", weights_only=True)["weights"]
    assert all(layer.self_attn.watch is None for layer in [*model.model.layers, *teacher.model.layers])
    with pytest.raises(LabkitError, match=r"expected pairs from \(0, 0\) to \(2, 6\)"):
        distil.Transfer(model, teacher, answer_loss, [(3, 1)])


def test_attention_shares_add_up_and_equal_those_of_transformers(teacher, base):
    transformers = pytest.importorskip("transformers")
    ids = torch.arange(3, 40)[None]
    with torch.no_grad(), distil.watched(teacher) as found:
        teacher(ids)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        want = theirs(ids, output_attentions=True).attentions
    assert len(found) == 6
    for mine, other in zip(found, want, strict=True):
        assert mine.shape == (1, 4, 37, 37) and (mine - other).abs().max() < 1e-4
        assert torch.allclose(mine.sum(-1), torch.ones(1, 4, 37), atol=1e-5)


def test_other_tokenizers_are_refused(base, make_llama):
    distil.check_same_tokens(base, base)
    with pytest.raises(LabkitError, match="number tokens differently"):
        distil.check_same_tokens(base, labkit.checkpoint(make_llama()))


# --- data from a teacher ---------------------------------------------------------------------------------------------


def questions(n: int = 12) -> list:
    return [e.messages[:-1] for e in house("train", n, seed=4, intents=["light", "dim"])]


def test_a_teachers_answers_are_filtered_and_not_repeated(teacher, base):
    asked = questions()
    asked += [
        [{**asked[0][0], "content": asked[0][0]["content"].upper() + "!!"}],
        [{"role": "user", "content": "tell me a story"}],
    ]
    schema = json.loads((base.path / "schema.json").read_text())
    made = synthesize(teacher, base, asked, json_object(schema))
    assert made.counts["repeated question"] == 1 and sum(made.counts.values()) == len(asked)
    assert made.counts["kept"] == len(made.examples) >= 11
    assert all(json.loads(e.answer)["intent"] for e in made.examples)
    wanted = {e.asked: e.answer for e in house("train", 12, seed=4, intents=["light", "dim"])}
    right = sum(wanted.get(e.asked) == e.answer for e in made.examples)
    assert right >= 10  # a trained teacher
    assert made.examples[0].source == "answers of edgehome, question 1"
    assert synthesize(teacher, base, asked[:3], max_new=4).counts == {"unfinished": 3}
    strict = synthesize(teacher, base, asked[:3], lambda messages, text: "too bright" if "on" in text else None)
    assert set(strict.counts) <= {"kept", "too bright"}


def test_answers_on_which_tries_do_not_agree_are_dropped(base):
    model = small()  # untrained: hot answers never agree
    made = synthesize(model, base, questions(4), samples=3, agree=2, temperature=3.0, max_new=12)
    assert made.examples == [] and set(made.counts) <= {"no agreement", "unfinished"}
    with pytest.raises(LabkitError, match="temperature above 0 for several samples"):
        synthesize(model, base, questions(2), samples=3)


def test_judges_tell_json_from_the_rest():
    judge = json_object({"type": "object", "required": ["intent"]})
    assert [judge([], text) for text in ('{"intent": 1}', "{}", "[1]", "{oops")] == [
        None,
        "not by the schema",
        "not an object",
        "not JSON",
    ]


# --- on-policy -------------------------------------------------------------------------------------------------------


def test_on_policy_rows_are_the_students_own_answers(base):
    model = small()
    batch = OnPolicy(model, base, questions(), size=4, length=200, max_new=16)
    rows, again, other = batch(3), batch(3), batch(4)
    assert torch.equal(rows.ids, again.ids) and not torch.equal(rows.ids[:1], other.ids[:1])
    assert 4 <= rows.weights.sum() <= 4 * 17
    with torch.no_grad():
        model.model.norm.weight.mul_(3)
    assert (
        not torch.equal(batch(3).ids, rows.ids)
        and batch.digest == OnPolicy(model, base, questions(), size=4, length=200, max_new=16).digest
    )
    with pytest.raises(LabkitError, match="raise the length"):
        OnPolicy(model, base, questions(), length=20)


def test_on_policy_steps_lower_reverse_kl_and_resume_bit_for_bit(teacher, base, rows, tmp_path):
    warm = small()
    train(warm, batches(rows, 2), Settings(steps=60, rate=1e-2), **QUICK)
    start = {k: v.clone() for k, v in warm.state_dict().items()}

    def student() -> Llama:
        model = small()
        model.load_state_dict(start)
        return model

    settings = Settings(steps=8, rate=2e-3, schedule="constant", save_every=2)
    make = lambda m: OnPolicy(m, base, questions(), size=4, length=160, max_new=32)  # noqa: E731
    whole = student()
    probe = make(whole)(100)
    with torch.no_grad():
        before = on_policy_loss(teacher)(whole, probe).item()
    train(whole, make(whole), settings, loss=on_policy_loss(teacher), work=tmp_path / "a", **QUICK)
    with torch.no_grad():
        assert on_policy_loss(teacher)(whole, probe).item() < before

    def stop(step, row):
        if step == 5:
            raise KeyboardInterrupt

    parts = student()
    with pytest.raises(KeyboardInterrupt):
        train(parts, make(parts), settings, loss=on_policy_loss(teacher), work=tmp_path / "b", log=stop, **QUICK)
    again = student()
    train(again, make(again), settings, loss=on_policy_loss(teacher), work=tmp_path / "b", **QUICK)
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values(), strict=True))

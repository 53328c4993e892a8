"""The loop: it learns, its schedule and accumulation are right, and a killed run ends bit for bit like a whole one."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

import labkit
from labkit.train.data import house
from labkit.types import LabkitError

torch = pytest.importorskip("torch")

from labkit.train.folder import load  # noqa: E402
from labkit.train.loop import Settings, answer_loss, train, validation  # noqa: E402
from labkit.train.rows import batches, encode_all, pack  # noqa: E402

QUICK = {"progress": False}


@pytest.fixture(scope="module")
def rows():
    return pack(encode_all(labkit.checkpoint("edgehome"), house("train", 80), 256), 256)


def small(seed: int = 0):
    from labkit.train.llama import Llama, Shape

    torch.manual_seed(seed)
    return Llama(Shape(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1))


def weights(model) -> dict:
    return {name: w.detach().clone() for name, w in model.state_dict().items()}


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("bf16", [False, True])
def test_the_loss_falls_and_the_curves_say_so(rows, bf16):
    model = small()
    run = train(model, batches(rows, 4), Settings(steps=30, rate=1e-2, warmup=3, bf16=bf16), **QUICK)
    frame = run.frame()
    assert list(frame["step"]) == list(range(1, 31)) and not run.stopped_early and not model.training
    assert frame["loss"].iloc[-5:].mean() < frame["loss"].iloc[0] - 2
    assert {"rate", "norm", "tokens", "seconds"} <= set(frame.columns) and frame["seconds"].is_monotonic_increasing
    assert next(model.parameters()).dtype == torch.float32


def test_rates_are_those_of_transformers():
    transformers = pytest.importorskip("transformers")
    for name in ("constant", "linear", "cosine"):
        wanted = "constant_with_warmup" if name == "constant" else name
        stepper = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
        schedule = transformers.get_scheduler(wanted, stepper, num_warmup_steps=4, num_training_steps=20)
        settings = Settings(steps=20, rate=0.5, schedule=name, warmup=4)
        for step in range(20):
            assert settings.rate_at(step) == pytest.approx(stepper.param_groups[0]["lr"], rel=1e-12)
            stepper.step()
            schedule.step()


def test_accumulating_and_recomputing_change_nothing_but_rounding(rows):
    ends = []
    for changes in ({}, {"micro": 2}, {"recompute": True}):
        model = small()
        run = train(
            model, batches(rows, 6, seed=None), replace(Settings(steps=4, rate=1e-2, schedule="constant"), **changes), **QUICK
        )
        ends.append((weights(model), [row["loss"] for row in run.curves]))
    assert same(ends[0][0], ends[2][0])
    assert ends[1][1] == pytest.approx(ends[0][1], rel=1e-4)
    first = small()
    whole, parts = small(), small()
    (answer_loss(whole, rows[:6]) / rows[:6].weights.sum()).backward()
    for i in range(0, 6, 2):
        (answer_loss(parts, rows[i : min(i + 2, 6)]) / rows[:6].weights.sum()).backward()
    for (name, p), q in zip(whole.named_parameters(), parts.parameters(), strict=True):
        assert (p.grad - q.grad).abs().max() <= 1e-5 * p.grad.abs().max(), name
    assert same(weights(first), weights(whole))


def test_clipping_limits_the_step_and_decay_leaves_norms_alone(rows):
    from labkit.train.loop import adamw

    model = small()
    groups = adamw(dict(model.named_parameters()), Settings(steps=1, weight_decay=0.1)).param_groups
    assert [g["weight_decay"] for g in groups] == [0.1, 0.0] and all(p.ndim == 1 for p in groups[1]["params"])
    # The norm is taken before clipping; with it clipped to nearly nothing, epsilon keeps AdamW from moving.
    before = weights(model)
    run = train(model, batches(rows, 4), Settings(steps=1, rate=1e-2, schedule="constant", clip=1e-12), **QUICK)
    assert run.curves[0]["norm"] > 0.1
    moved = max((w - before[k]).abs().max().item() for k, w in weights(model).items())
    assert 0 < moved < 1e-5


def test_patience_ends_a_run_that_no_longer_improves(rows):
    losses = iter([3.0, 2.0, 2.5, 2.2, 9.0])
    settings = Settings(steps=50, evaluate_every=2, patience=2)
    run = train(small(), batches(rows, 2), settings, evaluate=lambda m: {"validation_loss": next(losses)}, **QUICK)
    assert run.stopped_early and run.curves[-1]["step"] == 8 and run.kept_step == 4
    check = validation(rows, size=3)(small().eval())
    whole = answer_loss(small().eval(), rows) / rows.weights.sum()
    assert check["validation_loss"] == pytest.approx(whole.item(), rel=1e-5)


def test_patience_leaves_the_best_weights_also_without_an_early_end_and_after_a_resume(rows, tmp_path):
    """As transformers' load_best_model_at_end: stopping early is of no use when the overfitted weights stay."""
    settings = Settings(steps=7, rate=1e-2, evaluate_every=1, patience=4, save_every=1)
    curve, seen = [9.0, 4.0, 5.0, 3.0, 8.0, 7.0, 6.0], {}

    def evaluate_from(step):
        at = iter(range(step, 7))

        def evaluate(model):
            n = next(at)
            seen.setdefault(n + 1, weights(model))
            return {"validation_loss": curve[n]}

        return evaluate

    def stop(step, row):
        if step == 5:
            raise KeyboardInterrupt

    whole, parts = small(), small()
    run = train(whole, batches(rows, 2), settings, evaluate=evaluate_from(0), **QUICK)
    assert run.kept_step == 4 and not run.stopped_early and len(run.curves) == 7
    assert same(weights(whole), seen[4]) and not same(seen[4], seen[7])
    with pytest.raises(KeyboardInterrupt):
        train(parts, batches(rows, 2), settings, evaluate=evaluate_from(0), work=tmp_path, log=stop, **QUICK)
    for start in (5, 7):  # resumed, and asked again when it is finished
        again = small(seed=9)
        assert train(again, batches(rows, 2), settings, evaluate=evaluate_from(start), work=tmp_path, **QUICK).kept_step == 4
        assert same(weights(again), seen[4])
    plain = train(small(), batches(rows, 2), replace(settings, patience=0), evaluate=evaluate_from(0), **QUICK)
    assert plain.kept_step == 7
    with pytest.raises(LabkitError, match="patience=2 given, but nothing is evaluated"):
        train(small(), batches(rows, 2), Settings(steps=2, patience=2), **QUICK)


def test_evaluation_does_not_touch_the_training(rows):
    ends = []
    for every in (0, 1):
        model = small()
        look = lambda m: {"validation_loss": torch.rand(1).item()}  # noqa: E731
        train(model, batches(rows, 2), Settings(steps=3, evaluate_every=every), loss=noisy, evaluate=look, **QUICK)
        ends.append(weights(model))
    assert same(*ends)


def noisy(model, rows):
    """A loss that uses torch's generator, as dropout does."""
    return answer_loss(model, rows) * (1 + 0.3 * torch.rand(1))[0]


def test_senseless_runs_get_a_sentence(rows, tmp_path):
    cases = {
        "at least one step": Settings(steps=0),
        "schedule='step' given": Settings(steps=3, schedule="step"),
    }
    for said, settings in cases.items():
        with pytest.raises(LabkitError, match=said):
            train(small(), batches(rows, 2), settings, **QUICK)
    frozen = small().requires_grad_(False)
    with pytest.raises(LabkitError, match="asks for a gradient"):
        train(frozen, batches(rows, 2), Settings(steps=1), **QUICK)
    with pytest.raises(LabkitError, match="loss is nan at step 0"):
        train(
            small(), batches(rows, 2), Settings(steps=1), loss=lambda m, r: answer_loss(m, r) * torch.nan, work=tmp_path, **QUICK
        )
    assert not (tmp_path / "state.pt").exists()
    nothing = replace(rows, weights=rows.weights * 0)
    with pytest.raises(LabkitError, match="nothing to learn"):
        train(small(), batches(nothing, 2), Settings(steps=1), **QUICK)


# --- resuming --------------------------------------------------------------------------------------------------------


def test_a_stopped_run_resumes_bit_for_bit_and_refuses_another_ones_state(rows, tmp_path):
    settings = Settings(steps=9, rate=1e-2, warmup=2, save_every=2, weight_decay=0.01)
    whole = small()
    expected = train(whole, batches(rows, 3), settings, loss=noisy, work=tmp_path / "whole", **QUICK)

    def stop(step, row):
        if step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(small(), batches(rows, 3), settings, loss=noisy, work=tmp_path / "parts", log=stop, **QUICK)
    parts = small(seed=7)  # what the model held before does not matter
    again = train(parts, batches(rows, 3), settings, loss=noisy, work=tmp_path / "parts", **QUICK)
    assert same(weights(whole), weights(parts))
    done = small(seed=8)  # a finished run is not run again, but its weights are put back
    assert train(done, batches(rows, 3), settings, loss=noisy, work=tmp_path / "parts", **QUICK).curves == again.curves
    assert same(weights(done), weights(whole))
    assert [{**r, "seconds": 0} for r in again.curves] == [{**r, "seconds": 0} for r in expected.curves]

    with pytest.raises(LabkitError, match=r"rate=0\.01, now rate=0\.02"):
        train(small(), batches(rows, 3), replace(settings, rate=2e-2), work=tmp_path / "parts", **QUICK)
    with pytest.raises(LabkitError, match="other data"):
        train(small(), batches(rows, 3, seed=5), settings, work=tmp_path / "parts", **QUICK)
    (tmp_path / "parts" / "state.pt").write_bytes(b"oops")
    with pytest.raises(LabkitError, match="is damaged"):
        train(small(), batches(rows, 3), settings, work=tmp_path / "parts", **QUICK)


CHILD = """
import sys, torch
torch.set_num_threads(1)
sys.path.insert(0, {tests!r})
from test_train_loop import KILLED, noisy, small
from labkit.train.loop import train
from labkit.train.rows import Rows, batches
rows = Rows(**torch.load({rows!r}))
train(small(), batches(rows, 2), KILLED, loss=noisy, work={work!r}, progress=False)
"""
KILLED = Settings(steps=14, rate=1e-2, warmup=2, save_every=1, bf16=True)


def test_a_killed_process_resumes_bit_for_bit(rows, tmp_path):
    """Killed with a signal no program can catch, twice, while it saves after every step."""
    few, work = rows[:6], tmp_path / "killed"
    torch.save({k: getattr(few, k) for k in ("ids", "targets", "weights", "documents")}, tmp_path / "rows.pt")
    code = CHILD.format(tests=str(Path(__file__).parent), rows=str(tmp_path / "rows.pt"), work=str(work))
    for at in (2, 6, None):
        child = subprocess.Popen([sys.executable, "-c", code])
        while at is not None and child.poll() is None and _step(work) < at:
            time.sleep(0.02)
        if at is not None:
            assert child.poll() is None, "the child ended before it could be killed"
            child.kill()
        assert (child.wait(timeout=120) == 0) == (at is None)
    killed = torch.load(work / "state.pt", weights_only=True)
    whole = small()
    run = train(whole, batches(few, 2), KILLED, loss=noisy, **QUICK)
    assert killed["step"] == 14 and same(killed["weights"], dict(whole.named_parameters()))
    assert [row["loss"] for row in killed["curves"]] == [row["loss"] for row in run.curves]


def _step(work: Path) -> int:
    try:
        return torch.load(work / "state.pt", weights_only=True)["step"]
    except (FileNotFoundError, RuntimeError, EOFError):
        return 0


def test_the_house_model_goes_on_learning_from_its_folder(rows):
    model = load(labkit.checkpoint("edgehome"))
    model.requires_grad_(False).model.norm.weight.requires_grad_(True)
    before = weights(model)
    run = train(model, batches(rows, 2), Settings(steps=2, rate=1e-4, schedule="constant"), **QUICK)
    changed = [k for k, w in weights(model).items() if not torch.equal(w, before[k])]
    assert changed == ["model.norm.weight"] and run.curves[0]["loss"] < 0.5

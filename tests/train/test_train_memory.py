"""Memory of a training step: the estimate beside what torch really held; bottleneck adapters."""

from __future__ import annotations

import pytest

import labkit
from labkit.types import LabkitError

torch = pytest.importorskip("torch")

from labkit.train import bottleneck, lora, memory, qlora  # noqa: E402
from labkit.train.data import house, vacuum  # noqa: E402
from labkit.train.folder import load  # noqa: E402
from labkit.train.loop import Settings, adamw, answer_loss, train  # noqa: E402
from labkit.train.rows import batches, encode_all, pack  # noqa: E402


@pytest.fixture(scope="module")
def base():
    return labkit.checkpoint("edgehome")


@pytest.fixture(scope="module")
def rows(base):
    return pack(encode_all(base, house("train", 40), 192), 192)[:4]


def test_the_peak_of_known_tensors_is_counted():
    def work():
        a = torch.ones(250_000)
        del a
        return torch.ones(100_000)

    assert 1_000_000 <= memory.peak(work) < 1_100_000


@pytest.mark.parametrize("recompute", [False, True])
def test_activations_are_estimated_within_a_fifth(base, rows, recompute):
    model = load(base)
    if recompute:
        lora.add(model, rank=4)  # with all weights trained, gradients pile up while the layers are computed again
    model.recompute = recompute
    model.train()
    seen = memory.peak(lambda: answer_loss(model, rows).backward())
    assert memory.activations(base.config, *rows.ids.shape, recompute=recompute) == pytest.approx(seen, rel=0.2)


def test_weights_gradients_and_moments_are_those_counted(base, rows):
    for kind in ("full", "lora", "qlora"):
        model, bits = load(base), 32.0
        if kind == "qlora":
            qlora.quantize_base(model)
            bits = memory.NF4_BITS
        if kind != "full":
            lora.add(model, rank=4)
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        optimizer = adamw(trained, Settings(steps=1))
        answer_loss(model.train(), rows[:1]).backward()
        optimizer.step()
        want = memory.estimate(base.config, sum(p.numel() for p in trained.values()), 1, 192, bits=bits).row()
        for part, size in memory.held(model, optimizer).items():
            assert size == pytest.approx(want[part], rel=0.03), (kind, part)


def test_the_planners_example_of_eight_billion():
    """Claim C162's planner: 8.03 billion weights in NF4 with double quantization."""
    gigabytes = 8.03 * memory.NF4_BITS / 8
    assert gigabytes == pytest.approx(4.14, rel=2e-3)


def test_bottleneck_adapters_begin_as_the_base_and_alone_are_trained(base, rows):
    model = load(base)
    with torch.no_grad():
        before = model(rows.ids)
    assert len(bottleneck.add(model, width=4)) == 12
    with torch.no_grad():
        assert torch.equal(model(rows.ids), before)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in trained.values()) == 12 * (2 * 4 * 256 + 4 + 256)
    new = pack(encode_all(base, vacuum("train", 8), 192), 192)
    run = train(model, batches(new, 2), Settings(steps=6, rate=5e-3, schedule="constant"), progress=False)
    assert run.curves[-1]["loss"] < run.curves[0]["loss"] and not torch.equal(model(rows.ids), before)
    for wrong, said in ((0, "width=0"), (2, "already")):
        with pytest.raises(LabkitError, match=said):
            bottleneck.add(model if wrong else load(base), width=wrong)

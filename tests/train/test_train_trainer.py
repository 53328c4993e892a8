"""The same run in transformers' Trainer, and in TRL: equal losses, step by step."""

from __future__ import annotations

from dataclasses import replace

import pytest

import labkit
from labkit.train.data import house

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from labkit.train.folder import load, save  # noqa: E402
from labkit.train.loop import Settings, train  # noqa: E402
from labkit.train.rows import batches, encode_all, pack  # noqa: E402

SETTINGS = Settings(steps=6, rate=1e-3, schedule="cosine", warmup=2, weight_decay=0.1, betas=(0.9, 0.95))
SIZE = 4


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The house model with noise in its weights, so that there is something to learn again."""
    source = labkit.checkpoint("edgehome")
    model = load(source)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return save(model, tmp_path_factory.mktemp("noisy") / "noisy", like=source, dtype=torch.float32)


@pytest.fixture(scope="module")
def encoded(base):
    return encode_all(base, house("train", 6 * SIZE), 160, answers="last")


def run_of_ours(base, encoded):
    """Rows, curves and the trained weights by our loop."""
    rows, model = pack(encoded, 160, alone=True), load(base)
    curves = train(model, batches(rows, SIZE, seed=None), SETTINGS, progress=False).curves
    return rows, curves, model.state_dict()


def arguments(kind, folder, **more):
    """Our settings in transformers' words."""
    return kind(
        output_dir=str(folder), max_steps=SETTINGS.steps, per_device_train_batch_size=SIZE, learning_rate=SETTINGS.rate,
        lr_scheduler_type=SETTINGS.schedule, warmup_steps=SETTINGS.warmup, weight_decay=SETTINGS.weight_decay,
        adam_beta1=SETTINGS.betas[0], adam_beta2=SETTINGS.betas[1], adam_epsilon=SETTINGS.eps, max_grad_norm=SETTINGS.clip,
        optim="adamw_torch", logging_steps=1, save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True, bf16=False,
        train_sampling_strategy="sequential", **more,
    )  # fmt: skip


def compare(history, model, curves, weights):
    steps = [entry for entry in history if "loss" in entry]
    assert len(steps) == SETTINGS.steps
    # Equal to float32's last digits at first; AdamW divides by the gradient's size, so where that is nearly nothing a last digit
    # decides a whole step, and the runs drift apart from there, slowly.
    assert curves[0]["loss"] == pytest.approx(steps[0]["loss"], rel=2e-6)
    for mine, theirs in zip(curves, steps, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=2e-3)
        assert mine["norm"] == pytest.approx(theirs["grad_norm"], rel=2e-2)
        assert mine["rate"] == pytest.approx(theirs["learning_rate"], rel=1e-9)
    assert curves[-1]["loss"] < 0.8 * curves[0]["loss"]  # something was learned on the way
    theirs = model.state_dict()
    apart = torch.cat([(theirs[name].float() - w).abs().flatten() for name, w in weights.items()])
    assert apart.mean() < 2e-6 and apart.max() < 3 * SETTINGS.rate  # of weights that moved by up to 3 rates


def test_transformers_trainer_gives_the_same_losses(base, encoded, tmp_path):
    rows, curves, weights = run_of_ours(base, encoded)
    labels = torch.full_like(rows.ids, -100)
    labels[:, 1:][rows.weights[:, :-1] > 0] = rows.targets[:, :-1][rows.weights[:, :-1] > 0]
    features = [
        {"input_ids": i, "attention_mask": (d > 0).long(), "labels": n}
        for i, d, n in zip(rows.ids, rows.documents, labels, strict=True)
    ]
    model = transformers.AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32)
    trainer = transformers.Trainer(model, arguments(transformers.TrainingArguments, tmp_path), train_dataset=features)
    trainer.train()
    compare(trainer.state.log_history, model, curves, weights)


def test_trl_gives_the_same_losses(base, encoded, tmp_path):
    """TRL reads the messages themselves: its own rendering, masking of the prompt and padding agree with ours.

    One difference: TRL also learns the newline that the template writes after the end of the turn; here we do too.
    """
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    with_newline = [replace(e, weights=[max(e.weights[: i + 1]) for i in range(len(e.ids))]) for e in encoded]
    _, curves, weights = run_of_ours(base, with_newline)
    some = [e.messages for e in house("train", 6 * SIZE)]
    data = datasets.Dataset.from_list([{"prompt": list(m[:-1]), "completion": [m[-1]]} for m in some])
    model = transformers.AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(base.path)
    trainer = trl.SFTTrainer(
        model, arguments(trl.SFTConfig, tmp_path, max_length=160), train_dataset=data, processing_class=tokenizer
    )
    trainer.train()
    compare(trainer.state.log_history, model, curves, weights)

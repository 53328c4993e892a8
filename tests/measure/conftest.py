"""A checkpoint without weights and an artifact without a model; the runners are in fakes.py."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from fakes import CORPUS, VOCAB
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from labkit.types import Artifact, Recipe


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=["<|im_end|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture
def fake_checkpoint(tokenizer_folder):
    tokenizer = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    config = {
        "vocab_size": VOCAB, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }  # fmt: skip
    return SimpleNamespace(
        path=tokenizer_folder, name="fake", revision="r0", config=config, trained=True, vocab_size=VOCAB, context=512,
        bos_id=None, eos_ids=(0,), tied=True, weights=100_000,
        encode=lambda text: tokenizer.encode(text, add_special_tokens=False).ids,
        decode=lambda ids: tokenizer.decode(ids, skip_special_tokens=False),
        chat=lambda messages: "".join(m["content"] for m in messages),
    )  # fmt: skip


@pytest.fixture
def artifact(fake_checkpoint, tmp_path):
    (tmp_path / "model.bin").write_bytes(b"x" * 60_000)
    return Artifact(
        path=tmp_path, recipe=Recipe("fakeengine", "q4"), checkpoint=fake_checkpoint, weight_bytes=50_000,
        weights=100_000, bits_per_weight=4.0, seconds=0.1, engine_version="1.0",
    )  # fmt: skip


@pytest.fixture
def text():
    return " ".join(CORPUS) * 12

"""Tokenizers in GGUF: llama.cpp, reading the file, must give the ids of the checkpoint's own tokenizer."""

from __future__ import annotations

import json
import random

import pytest

pytest.importorskip("llama_cpp")
from labkit.checkpoint import open_checkpoint
from labkit.engines import llamacpp
from labkit.engines._gguf_tokenizer import EXPRESSIONS, PROBE, differences, gguf_encode, pre_tokenizer
from labkit.types import LabkitError

LLAMA3, QWEN2, GPT4O = EXPRESSIONS
TEXT = ["turn on the light in the kitchen", "Boa noite, apaga a luz da sala, por favor.", 'a { "b": 12 } \n\n c',
        "The quick brown fox jumps over the lazy dog 0123456789 times."]  # fmt: skip
NASTY = [
    *PROBE, *TEXT, "", " ", "  ", "\n", "\r\n", "\t \n \t", "a", "\u00a0\u2003\u3000x", "ab\u0000cd",
    "\ufeffbom", "é", "e\u0301\u0327",
    "1", "12", "123", "1234567890", "٣٤٥ ४५ ² ½ Ⅷ", "3.14e-10",
    "x" * 300, "=" * 77, "'s 't 're 'S 'T 'RE ''''", "I'm you'll we'VE",
    "…—–“”‘’", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢", "日本語テキスト、混ぜてEnglishと123", "привет мир", "שלום עולם", "สวัสดี",
    "\U0001f3f3\ufe0f\u200d\U0001f308", "\ud7ff\ue000",
    "<|im_start|>user\nhello<|im_end|>\n", "<|endoftext|>", "<|im_start|", "<unk>", "<0x0A>",
    "<|im_end|>  <|im_end|>\n\n",
    "def f(x):\n\treturn x  # comment\r\n\r\n", '{"on": true, "rooms": ["kitchen", "hall"]}', "▁ ▁▁ a▁b",
]  # fmt: skip


def fuzz(count: int = 150) -> list[str]:
    """Seeded strings from characters that tokenizers treat differently."""
    rng = random.Random(5)
    alphabet = [*"aZ éß'.,!?-_/\\\"#0123456789  \n\n\r\t"]
    alphabet += ["'s", "'LL", " \n", "\r\n", "中", "あ", "ह", "ि", "а", "ع", "🙂", "\u200d", "\u0301"]
    return ["".join(rng.choice(alphabet) for _ in range(rng.randint(1, 40))) for _ in range(count)]


def byte_level(kind: str):
    """A tokenizer learned on the spot, cut into words the way `kind` does."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    def split(expression):
        level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(expression), "isolated"), level])

    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    steps = {
        "gpt-2": words, "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), words]),
        "llama-bpe": split(LLAMA3), "dbrx": split(LLAMA3), "qwen2": split(QWEN2),
        "granite-embed-multi-97m": split(GPT4O),
    }  # fmt: skip
    tokenizer = Tokenizer(models.BPE(ignore_merges=kind == "llama-bpe"))
    tokenizer.pre_tokenizer, tokenizer.decoder = steps[kind], decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    )  # fmt: skip
    tokenizer.train_from_iterator([*TEXT, *NASTY, "12345 67890 1234"], trainer)
    tokenizer.add_tokens([AddedToken("<tool_call>", normalized=False)])  # not special: found even in plain text
    return tokenizer


def pieces(prefix: bool):
    """A SentencePiece BPE as transformers turns it into a tokenizer.json (Llama 2: prefix; Gemma: none)."""
    import io

    sentencepiece = pytest.importorskip("sentencepiece")
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    made = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([t for t in [*TEXT, *NASTY[:-9]] * 3 if t.strip() and "\0" not in t]), model_writer=made,
        model_type="bpe", vocab_size=640, byte_fallback=True, hard_vocab_limit=False,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False, allow_whitespace_only_pieces=True, character_coverage=1.0, minloglevel=2,
        max_sentence_length=4192,
    )  # fmt: skip
    model = sentencepiece.SentencePieceProcessor(model_proto=made.getvalue())
    vocab = {model.id_to_piece(i): i for i in range(len(model))}
    splits = [(p[:cut], p[cut:], i) for p, i in vocab.items() for cut in range(1, len(p))]
    found = [(left, right, i) for left, right, i in splits if left in vocab and right in vocab]
    merges = [(left, right) for left, right, i in sorted(found, key=lambda m: (m[2], vocab[m[0]], vocab[m[1]]))]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    spaces = normalizers.Replace(" ", "\u2581")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), spaces]) if prefix else spaces
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in ("<unk>", "<s>", "</s>")])
    return tokenizer


@pytest.fixture
def with_tokenizer(make_llama):
    """`with_tokenizer(tokenizer, **settings) -> (checkpoint, gguf path)`: a tiny Llama that speaks it."""

    def make(tokenizer, name="spoken", **settings):
        folder = make_llama(name, vocab_size=768, num_hidden_layers=1)
        tokenizer.save(str(folder / "tokenizer.json"))
        if settings:
            (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        checkpoint = open_checkpoint(folder)
        path = folder.parent / "model.gguf"
        llamacpp.write_gguf(checkpoint, path, "f32")
        return checkpoint, path

    return make


def unequal(checkpoint, path, texts, special):
    theirs = gguf_encode(path, texts, special=special)
    return [t for t, ids in zip(texts, theirs, strict=True) if ids != checkpoint.encode(t, special=special)]


@pytest.mark.parametrize("kind", ["gpt-2", "smollm", "llama-bpe", "dbrx", "qwen2", "granite-embed-multi-97m"])
def test_byte_level_ids_are_equal(with_tokenizer, kind):
    checkpoint, path = with_tokenizer(byte_level(kind))
    assert llamacpp.metadata(path)["tokenizer.ggml.pre"] == kind
    texts = NASTY + fuzz()
    for special in (True, False):
        assert unequal(checkpoint, path, texts, special) == []
    assert differences(checkpoint, path) == []


@pytest.mark.parametrize("prefix", [True, False], ids=["llama-2", "gemma"])
def test_sentencepiece_ids_are_equal(with_tokenizer, prefix):
    checkpoint, path = with_tokenizer(pieces(prefix), bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    assert llamacpp.metadata(path)["tokenizer.ggml.model"] == "llama"
    texts = [t for t in NASTY + fuzz() if t]  # of "" transformers makes nothing, llama.cpp nothing
    for special in (True, False):
        assert unequal(checkpoint, path, texts, special) == []


def test_an_edited_vocabulary_is_noticed(with_tokenizer):
    """The comparison that every build makes must be able to fail."""
    other, _ = with_tokenizer(byte_level("smollm"), name="other")
    _, path = with_tokenizer(byte_level("gpt-2"), name="again")
    assert "splits some texts differently" in differences(other, path)[0]


def test_special_ids_and_template(tiny_llama, tmp_path):
    llamacpp.write_gguf(open_checkpoint(tiny_llama), tmp_path / "m.gguf", "f16")
    found = llamacpp.metadata(tmp_path / "m.gguf")
    ids = {key: found[f"tokenizer.ggml.{key}_token_id"] for key in ("bos", "eos", "padding")}
    assert ids == {"bos": 0, "eos": 2, "padding": 0}
    assert found["tokenizer.ggml.add_bos_token"] is False
    assert found["tokenizer.chat_template"] == (tiny_llama / "chat_template.jinja").read_text()
    assert len(found["tokenizer.ggml.tokens"]) == open_checkpoint(tiny_llama).vocab_size


def test_the_tokenizer_that_adds_bos_says_so(with_tokenizer):
    from tokenizers import processors

    tokenizer = byte_level("llama-bpe")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", pair="<|im_start|> $A $B", special_tokens=[("<|im_start|>", 1)]
    )
    _, path = with_tokenizer(tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>")
    found = llamacpp.metadata(path)
    assert found["tokenizer.ggml.add_bos_token"] is True and found["tokenizer.ggml.bos_token_id"] == 1


def test_unknown_pre_tokenizers_are_refused(with_tokenizer):
    from tokenizers import Regex, pre_tokenizers

    tokenizer = byte_level("gpt-2")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\w+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    with pytest.raises(LabkitError, match="no name for"):
        with_tokenizer(tokenizer)
    with pytest.raises(LabkitError, match="no name for"):
        pre_tokenizer({"pre_tokenizer": {"type": "Whitespace"}, "model": {}})


def test_other_tokenizer_models_are_refused(with_tokenizer):
    from tokenizers import Tokenizer, models

    with pytest.raises(LabkitError, match="Unigram"):
        with_tokenizer(Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], 0, False)))


def test_a_phi_3_name_on_another_tokenizer_does_not_stop_llama_cpp(make_llama, tmp_path):
    """llama.cpp takes "phi-3" in the name as a promise of Phi-3's special tokens, and fails without them."""
    checkpoint = open_checkpoint(make_llama("my-phi-3-clone"))
    llamacpp.write_gguf(checkpoint, tmp_path / "m.gguf", "f16")
    assert unequal(checkpoint, tmp_path / "m.gguf", NASTY, True) == []

"""The tokenizer: byte-level BPE of 2,048 tokens with the GPT-2 pre-tokenizer, in which every digit is a token of its own.

Sums, codes and comparisons need single digits. They cost nothing at run time: merges are *learned* on text whose digits stand
alone, so no merge contains a digit, and the shipped pre-tokenizer can stay the plain GPT-2 one that every engine knows.
"""

from __future__ import annotations

import json
from pathlib import Path

from labkit.house.language import chatml
from labkit.house.tasks import INTENTS, stream

VOCABULARY = 2048
CONTEXT = 512
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # ids 0, 1, 2
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def train_tokenizer(seed: int = 1, count: int = 60_000):
    """Learn the merges from `count` training conversations. Returns a `tokenizers.Tokenizer`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), plain])
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    source = stream(seed, dict.fromkeys(INTENTS, 1.0))
    tokenizer.train_from_iterator((_bare(chatml(next(source).conversation())) for _ in range(count)), trainer)
    tokenizer.pre_tokenizer = plain
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer


def _bare(text: str) -> str:
    """Without the special tokens, which are never split or merged."""
    for token in SPECIAL:
        text = text.replace(token, "")
    return text


def save_tokenizer(tokenizer, folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and the chat template the way transformers reads them."""
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": CONTEXT,
        "clean_up_tokenization_spaces": False,
        "add_bos_token": False,
        "add_prefix_space": False,
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "additional_special_tokens": list(SPECIAL),
        "chat_template": CHAT_TEMPLATE,
        "added_tokens_decoder": {
            str(i): {
                "content": token,
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": True,
            }
            for i, token in enumerate(SPECIAL)
        },
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")

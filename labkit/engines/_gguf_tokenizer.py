"""A checkpoint's tokenizer as GGUF metadata, and llama.cpp's reading of it, so that the two can be compared.

llama.cpp's converter knows byte-level tokenizers by a hash of a test text and refuses all others. Here the kind is
read from tokenizer.json itself: which pre-tokenizer, with which expression. Sources: src/llama-vocab.cpp.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

from labkit import _chat
from labkit.engines import _ggml
from labkit.types import LabkitError

# The expressions that published tokenizers split by -> llama.cpp's names, merges first and whole words first.
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_CASES = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+" + _CONTRACTIONS + "?",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*" + _CONTRACTIONS + "?",
)
_TAIL = (r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+")
_WORDS = (_CONTRACTIONS, r"[^\r\n\p{L}\p{N}]?\p{L}+")
# llama.cpp's "gpt-4o" forgets combining marks (café with a loose accent splits elsewhere); this name has them.
_GPT4O = "granite-embed-multi-97m"
EXPRESSIONS = {
    "|".join((*_WORDS, r"\p{N}{1,3}", r" ?[^\s\p{L}\p{N}]+[\r\n]*", *_TAIL)): ("dbrx", "llama-bpe"),
    "|".join((*_WORDS, r"\p{N}", r" ?[^\s\p{L}\p{N}]+[\r\n]*", *_TAIL)): ("qwen2", None),
    "|".join((*_CASES, r"\p{N}{1,3}", r" ?[^\s\p{L}\p{N}]+[\r\n/]*", *_TAIL)): (_GPT4O, _GPT4O),
}
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

# Texts on which llama.cpp and the checkpoint's tokenizer are compared after every conversion.
PROBE = (
    "Turn on the kitchen lights, please!",
    " leading, two  spaces,   three\t\ttabs\n\n\nand lines \r\n and CRLF\r\n",
    "123 4567 3.14 -20\u00b0C 1,000,000 x86_64",
    "caf\u00e9 cafe\u0301 na\u00efve S\u00e3o Paulo \u00e0s 8h",
    "\u4f60\u597d \u3053\u3093\u306b \ud55c\uad6d\uc5b4 \u0939\u093f\u0928\u094d\u0926\u0940 \u0639\u0631\u0628\u064a",
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e7\U0001f1f7 \u2713",
    "it's WE'LL they'RE don't I'M x='y' {\"on\": true}",
    "<|im_start|> <s> </s> <0x41> [INST]",
)


def add_tokenizer(writer: Any, checkpoint: Any) -> list[str]:
    """Write vocabulary, merges or scores, special ids and chat template. Raises LabkitError for an unknown kind."""
    data = json.loads((checkpoint.path / "tokenizer.json").read_text(encoding="utf-8"))
    model = data["model"]
    if model.get("type") != "BPE":
        raise LabkitError(
            f"{checkpoint.name} has a {model.get('type')} tokenizer; labkit's GGUF writer knows byte-level BPE and "
            "SentencePiece BPE."
        )
    pieces = bool(model.get("byte_fallback"))
    tokens, types = _tokens(checkpoint, data, pieces)
    if pieces:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores(_scores(tokens, types, _merges(model)))
        writer.add_add_space_prefix(_prefix_space(data))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre_tokenizer(data, checkpoint.name))
        # llama.cpp cuts a merge at its first space: one inside a part is written as GPT-2's stand-in
        writer.add_token_merges([" ".join(part.replace(" ", "\u0120") for part in pair) for pair in _merges(model)])
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_name(_model_name(checkpoint.name, data, tokens))
    _add_special(writer, checkpoint)
    return []


def pre_tokenizer(data: dict[str, Any], name: str = "this checkpoint") -> str:
    """llama.cpp's word for how a byte-level tokenizer.json cuts text into words before merging."""
    steps = data.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers", [steps])
    last, before = steps[-1], steps[:-1]
    if last.get("type") == "ByteLevel" and not last.get("add_prefix_space"):
        kinds = [step.get("type") for step in before]
        own_expression = last.get("use_regex", True)
        if not before and own_expression:
            return "gpt-2"
        if kinds == ["Digits"] and before[0].get("individual_digits") and own_expression:
            return "smollm"
        if kinds == ["Split"] and not own_expression and before[0].get("behavior") == "Isolated":
            found = EXPRESSIONS.get(before[0]["pattern"].get("Regex"))
            found = found and found[bool(data["model"].get("ignore_merges"))]
            if found:
                return found
    raise LabkitError(
        f"{name} splits words in a way llama.cpp has no name for ({json.dumps(steps)[:160]}); "
        "expected the pre-tokenizer of GPT-2, Llama 3, Qwen 2, SmolLM or GPT-4o."
    )


def _merges(model: dict[str, Any]) -> list[tuple[str, str]]:
    return [tuple(m.split(" ", 1)) if isinstance(m, str) else (m[0], m[1]) for m in model.get("merges", [])]


def _tokens(checkpoint: Any, data: dict[str, Any], pieces: bool) -> tuple[list[str], list[int]]:
    """Text and type of every id; ids the tokenizer does not use become unused fillers."""
    tokens = [f"[PAD{i}]" for i in range(checkpoint.vocab_size)]
    types = [UNUSED] * checkpoint.vocab_size
    for text, i in data["model"]["vocab"].items():
        tokens[i], types[i] = text, BYTE if pieces and _is_byte(text) else NORMAL
    for added in data.get("added_tokens", []):
        # llama.cpp looks for added tokens in the raw text, before spaces become \u2581
        text = added["content"].replace("\u2581", " ") if pieces and not added["special"] else added["content"]
        tokens[added["id"]], types[added["id"]] = text, CONTROL if added["special"] else USER_DEFINED
    unknown = data["model"].get("unk_token")
    if pieces and unknown in tokens:
        types[tokens.index(unknown)] = UNKNOWN
    if len(set(tokens)) != len(tokens):  # llama.cpp would abort the whole process
        twice = next(text for i, text in enumerate(tokens) if text in tokens[:i])
        raise LabkitError(f"The tokenizer of {checkpoint.name} has {twice!r} twice; GGUF needs every token once.")
    return tokens, types


def _model_name(name: str, data: dict[str, Any], tokens: list[str]) -> str:
    """The model's name, which llama.cpp reads for more than show: with "phi-3" in it, special tokens eat what follows.

    It then expects Phi-3's own tokens and fails without them; and a renamed Phi-3 would lose the behaviour.
    """
    has = {"</s>", "<unk>", "<s>", "<|endoftext|>"} <= set(tokens)
    eats = any(added.get("rstrip") for added in data.get("added_tokens", []))
    named = "phi-3" in name.lower() or "phi3" in name.lower()
    if named and not (has and eats):
        return re.sub("phi-?3", "Phi_3", name, flags=re.IGNORECASE)
    return f"{name} (phi-3)" if has and eats and not named else name


def _is_byte(text: str) -> bool:
    return len(text) == 6 and text.startswith("<0x") and text.endswith(">")


def _scores(tokens: list[str], types: list[int], merges: Iterable[tuple[str, str]]) -> list[float]:
    """SentencePiece scores from the order of the merges: what is merged earlier scores higher."""
    rank: dict[str, int] = {}
    for order, (left, right) in enumerate(merges):
        rank.setdefault(left + right, order)
    lowest = -float(len(rank) + len(tokens))
    return [
        0.0 if kind in (BYTE, UNKNOWN, CONTROL) else -float(rank[text]) if text in rank else lowest
        for text, kind in zip(tokens, types, strict=True)
    ]


def _prefix_space(data: dict[str, Any]) -> bool:
    """Whether a space is put before the text, as Llama 2 does and Gemma does not."""
    normalizer, pre = data.get("normalizer") or {}, data.get("pre_tokenizer") or {}
    for step in normalizer.get("normalizers", [normalizer]) + pre.get("pretokenizers", [pre]):
        if step.get("type") == "Prepend" or step.get("prepend_scheme") in ("always", "first"):
            return True
        if step.get("type") == "Metaspace" and "prepend_scheme" not in step and step.get("add_prefix_space", True):
            return True
    return False


def _add_special(writer: Any, checkpoint: Any) -> None:
    """Ids of begin, end, padding; whether begin and end are added; every id that ends an answer; the template."""
    named = _chat.special_tokens(checkpoint.path)
    ids = {key: checkpoint.tokenizer.token_to_id(text) for key, text in named.items()}
    around = checkpoint.tokenizer.encode("", add_special_tokens=True).ids
    bos = around[0] if around else ids.get("bos_token", checkpoint.config.get("bos_token_id"))
    ends = [i for i in (ids.get("eos_token"), *checkpoint.eos_ids) if i is not None]
    if isinstance(bos, int):
        writer.add_bos_token_id(bos)
    if ends:
        writer.add_eos_token_id(ends[0])
    other = [i for i in ends[1:] if i != ends[0]]
    if other:
        writer.add_eot_token_id(other[0])
    for key, add in (("pad_token", writer.add_pad_token_id), ("unk_token", writer.add_unk_token_id)):
        if ids.get(key) is not None:
            add(ids[key])
    writer.add_add_bos_token(bool(around))
    writer.add_add_eos_token(len(around) > 1 and bool(ends) and around[-1] in ends)
    template = _chat.template(checkpoint.path)
    if template:
        writer.add_chat_template(template)


def gguf_encode(path: str | Path, texts: Sequence[str], *, special: bool = True) -> list[list[int]]:
    """Token ids llama.cpp itself gives, from the vocabulary in a GGUF file; no begin-of-text id is added."""
    with _vocabulary(path) as encode:
        return [encode(text, special) for text in texts]


@contextmanager
def _vocabulary(path: str | Path) -> Iterator[Callable[[str, bool], list[int]]]:
    """llama.cpp's tokenizer for the vocabulary of a GGUF file: (text, read special tokens) -> ids."""
    llama = _ggml.library()
    params = llama.llama_model_default_params()
    params.vocab_only = True
    with _ggml.logged() as log:
        model = llama.llama_model_load_from_file(str(path).encode(), params)
    if not model:
        raise LabkitError(f"llama.cpp cannot read the vocabulary of {path}: {_ggml.reason(log)}")
    try:
        vocab = llama.llama_model_get_vocab(model)
        yield lambda text, special: _encode(llama, vocab, text.encode(), special)
    finally:
        llama.llama_model_free(model)


def _encode(llama: Any, vocab: Any, text: bytes, special: bool) -> list[int]:
    room = len(text) + 16
    ids = (llama.llama_token * room)()
    count = llama.llama_tokenize(vocab, text, len(text), ids, room, False, special)
    return list(ids[:count])


def differences(checkpoint: Any, path: str | Path, texts: Sequence[str] = PROBE) -> list[str]:
    """A sentence when llama.cpp's tokenizer and the checkpoint's disagree on a probe text, special tokens on or off."""
    with _vocabulary(path) as encode:
        for special, text in product((True, False), texts):
            if encode(text, special) != checkpoint.encode(text, special=special):
                return [
                    f"llama.cpp's own tokenizer splits some texts differently (for one, {text[:40]!r}); "
                    "labkit feeds it the checkpoint's token ids."
                ]
    return []

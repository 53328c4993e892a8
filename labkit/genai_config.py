"""genai_config.json, the file an ONNX Runtime GenAI folder is opened by: what its search block may say, and what is wrong in it.

    faults(folder, checkpoint)           # a sentence each; none means that it agrees with the folder and the checkpoint
    with_search(folder, temperature=0.7) # write generation defaults

onnxruntime-genai refuses a key it does not know when it opens the folder, and a value out of range only at the first request;
some it never refuses and quietly corrects. Sources of keys: src/config.cpp (Search_Element) of microsoft/onnxruntime-genai.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from labkit._files import write_json
from labkit.checkpoint import Checkpoint
from labkit.i18n import tr
from labkit.types import LabkitError

FILE = "genai_config.json"
# key -> type, smallest and largest value that make sense
SEARCH: Mapping[str, tuple[type, float, float]] = {
    "do_sample": (bool, 0, 1), "early_stopping": (bool, 0, 1), "past_present_share_buffer": (bool, 0, 1),
    "max_length": (int, 1, 2**31 - 1), "min_length": (int, 0, 2**31 - 1), "num_beams": (int, 1, 1024),
    "num_return_sequences": (int, 1, 1024), "top_k": (int, 0, 2**31 - 1), "no_repeat_ngram_size": (int, 0, 2**31 - 1),
    "random_seed": (int, -1, 2**31 - 1), "batch_size": (int, 1, 4096), "chunk_size": (int, 1, 2**31 - 1),
    "temperature": (float, 0, 2), "top_p": (float, 0, 1), "repetition_penalty": (float, 0.1, 10),
    "diversity_penalty": (float, 0, 100), "length_penalty": (float, -100, 100),
}  # fmt: skip
DRAWN = ("temperature", "top_p", "top_k")  # without do_sample they do nothing
NEUTRAL = {"temperature": 1.0, "top_p": 1.0, "top_k": (0, 50)}  # what the builder writes when nobody asked
ELSEWHERE = {
    "max_new_tokens": "max_length, which counts the prompt too", "max_tokens": "max_length, which counts the prompt too",
    "max_output_tokens": "max_length, which counts the prompt too", "repeat_penalty": "repetition_penalty", "temp": "temperature",
    "seed": "random_seed", "top-p": "top_p", "top-k": "top_k", "sample": "do_sample",
}  # fmt: skip


def read(folder: Path | str) -> dict[str, Any]:
    """The parsed file. LabkitError when there is none, or when it is no JSON object."""
    file = Path(folder) / FILE
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise LabkitError(tr("{folder} has no {file}; expected a GenAI folder: build it again.", folder=folder, file=FILE)) from None
    except ValueError as error:
        raise LabkitError(tr("{file} is not JSON ({error}); build the folder again.", file=file, error=error)) from None
    if not isinstance(document, dict):
        raise LabkitError(tr("{file} holds a {kind}; expected an object.", file=file, kind=type(document).__name__))
    return document


def with_search(folder: Path | str, **defaults: Any) -> dict[str, Any]:
    """Write generation defaults into the search block; LabkitError, and nothing written, when one of them is wrong."""
    document = read(folder)
    search = {**document.get("search", {}), **defaults}
    if wrong := search_faults(search, document.get("model", {}).get("context_length")):
        raise LabkitError(" ".join(wrong))
    document["search"] = search
    write_json(Path(folder) / FILE, document)
    return document


def faults(folder: Path | str, checkpoint: Checkpoint | None = None) -> list[str]:
    """What is wrong in a folder's configuration, a sentence each: search block, files named, and the checkpoint's own facts."""
    document = read(folder)
    model, folder = document.get("model", {}), Path(folder)
    found = search_faults(document.get("search", {}), model.get("context_length"))
    graph = model.get("decoder", {}).get("filename", "model.onnx")
    for name in (graph, "tokenizer.json", "tokenizer_config.json"):
        if not (folder / name).is_file():
            found.append(tr("{name} is not in the folder.", name=name))
    vocabulary, ends = model.get("vocab_size", 0), _ids(model.get("eos_token_id"))
    if not ends:
        found.append(tr("model.eos_token_id is missing: no answer would end by itself."))
    found += [tr("model.eos_token_id {id} is no id of a vocabulary of {size}.", id=one, size=vocabulary) for one in ends if not 0 <= one < vocabulary]
    return found + (_against(model, ends, checkpoint) if checkpoint else [])


def search_faults(search: Mapping[str, Any], context: int | None = None) -> list[str]:
    """What is wrong in a search block: unknown keys, wrong types, values out of range, settings that cannot act."""
    found = []
    for name, value in search.items():
        if name not in SEARCH:
            found.append(tr("search.{name} is unknown to the runtime, which will not open the folder; {instead}.",
                            name=name, instead=ELSEWHERE.get(name, tr("leave it out"))))  # fmt: skip
            continue
        kind, low, high = SEARCH[name]
        right = isinstance(value, bool) if kind is bool else isinstance(value, (int, float) if kind is float else int) and not isinstance(value, bool)
        if not right or not low <= value <= high:
            said = "true or false" if kind is bool else f"{kind.__name__} from {low:g} to {high:g}"
            found.append(tr("search.{name} is {value!r}; expected {said}.", name=name, value=value, said=said))
    longest = search.get("max_length")
    if context and isinstance(longest, int) and longest > context:
        found.append(tr("search.max_length is {longest}, the model's context {context}.", longest=longest, context=context))
    if isinstance(longest, int) and isinstance(search.get("min_length"), int) and search["min_length"] > longest:
        found.append(tr("search.min_length is above max_length."))
    if not search.get("do_sample"):
        idle = [name for name in DRAWN if name in search and not _neutral(name, search[name])]
        found += [tr("search.{name} does nothing while do_sample is false.", name=name) for name in idle]
    return found


def _neutral(name: str, value: Any) -> bool:
    return value in NEUTRAL[name] if isinstance(NEUTRAL[name], tuple) else value == NEUTRAL[name]


def _against(model: Mapping[str, Any], ends: list[int], checkpoint: Checkpoint) -> list[str]:
    found = []
    if model.get("context_length") != checkpoint.context:
        found.append(tr("model.context_length is {given}, the checkpoint's context {expected}.",
                        given=model.get("context_length"), expected=checkpoint.context))  # fmt: skip
    if model.get("vocab_size") != checkpoint.vocab_size:
        found.append(tr("model.vocab_size is {given}, the checkpoint's {expected}.", given=model.get("vocab_size"), expected=checkpoint.vocab_size))
    if not set(ends) & set(checkpoint.eos_ids):
        found.append(tr("model.eos_token_id is {given}; the checkpoint ends with {expected}, so answers would run on.",
                        given=ends, expected=list(checkpoint.eos_ids)))  # fmt: skip
    return found


def _ids(value: Any) -> list[int]:
    return [] if value is None else [value] if isinstance(value, int) else list(value)

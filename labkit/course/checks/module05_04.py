"""Lab module05/04, deployment: a builder pass, sizes, a search block, two templates, budgets, streams, leaks, checksums."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from labkit import prompt_templates
from labkit.course.compare import NotYet, function, same, unfinished
from labkit.course.exercises import exercise
from labkit.i18n import tr

PASS = {"precision": "int4", "int4_block_size": 128, "int4_is_symmetric": False, "int4_accuracy_level": 4}
ALIASES = {"type"}  # says which pass it is; the notebook adds it


@exercise(
    "05.4.1",
    "A pass that does what it says",
    hints=(
        "The pass has a field for each choice, and its name begins with int4_; quantization_config is none of them.",
        "Asymmetric means that symmetric is false.",
        "int4_block_size, int4_is_symmetric and int4_accuracy_level, beside precision",
    ),
)
def _(answer: Any) -> None:
    unfinished(answer)
    if not isinstance(answer, dict):
        raise NotYet(tr("expected a dict of the pass's fields, got {got}", got=type(answer).__name__))
    if unknown := sorted(set(answer) - set(PASS) - ALIASES):
        raise NotYet(tr("{name} is not a field this exercise asks for; Olive would drop an unknown one in silence", name=unknown[0]))
    same({name: value for name, value in answer.items() if name not in ALIASES}, PASS)


@exercise(
    "05.4.2",
    "Bytes of a quantized matrix",
    hints=(
        "Count bits for one weight: its own code, and its share of what the block stores once.",
        "A block stores 32 bits of scale, and `bits` more when it is asymmetric; divide by the block's length.",
        "rows * columns * (bits + (32 + bits * asymmetric) / block) / 8",
    ),
)
def _(answer: Any) -> None:
    def reference(rows: int, columns: int, bits: int, block: int, symmetric: bool) -> float:
        return rows * columns * (bits + (32 + (0 if symmetric else bits)) / block) / 8

    cases = [(256, 768, 4, 32, True), (256, 768, 4, 128, False), (2048, 256, 8, 32, False), (3072, 3072, 8, 128, True)]
    function(answer, reference, cases)


@exercise(
    "05.4.3",
    "What is wrong in a search block",
    hints=(
        "Two kinds of fault: a name that `known` does not hold, and a max_length above the context.",
        "search.get('max_length', 0) is 0 where nobody set it.",
        "a set of the unknown names, with 'max_length' added when it is too long; sorted",
    ),
)
def _(answer: Any) -> None:
    def reference(search: dict[str, Any], known: list[str], context: int) -> list[str]:
        found = {name for name in search if name not in known}
        return sorted(found | ({"max_length"} if search.get("max_length", 0) > context else set()))

    known = ["do_sample", "temperature", "top_p", "max_length"]
    cases = [
        ({"temperature": 0.7, "max_length": 512}, known, 512), ({"temprature": 0.7, "max_length": 2048}, known, 512), ({}, known, 8),
        ({"top-p": 0.9, "seed": 1, "do_sample": True}, known, 4096), ({"max_length": 513, "temperature": 1}, known, 512),
    ]  # fmt: skip
    function(answer, reference, cases, compare=_list)


def _list(got: Any, expected: list[str], *, what: str) -> None:
    unfinished(got)
    if isinstance(got, (set, tuple)):
        raise NotYet(tr("{what}: expected a sorted list, got {got}", what=what, got=type(got).__name__))
    same(got, expected, what)


TALKS = (
    [{"role": "user", "content": "vacuum the hall"}],
    [{"role": "system", "content": "Answer in JSON."}, {"role": "user", "content": "aspire a cozinha"}],
    [{"role": "user", "content": "one"}, {"role": "assistant", "content": "1"}, {"role": "user", "content": "  two \n"}],
)


def _text(got: Any, expected: str, *, what: str) -> None:
    unfinished(got)
    same(got, expected, what)


@exercise(
    "05.4.4",
    "ChatML, as Qwen has it",
    hints=(
        "A turn is <|im_start|>, the role, a line feed, the content, <|im_end|>, a line feed.",
        "At the end the assistant's turn is opened, and not closed: the model goes on from there.",
        'f"<|im_start|>{role}\\n{content}<|im_end|>\\n" for each message, then "<|im_start|>assistant\\n"',
    ),
)
def _(answer: Any) -> None:
    function(answer, lambda talk: prompt_templates.render(prompt_templates.PARTS["qwen"], talk), [(talk,) for talk in TALKS], compare=_text)


@exercise(
    "05.4.5",
    "Llama 3's template",
    hints=(
        "The begin-of-text mark stands once, before the first turn.",
        "A header is <|start_header_id|>, the role, <|end_header_id|> and two line feeds; the content is stripped of white space around it.",
        'header + content.strip() + "<|eot_id|>" for each message, then the header of the assistant',
    ),
)
def _(answer: Any) -> None:
    function(answer, lambda talk: prompt_templates.render_jinja("llama-3", talk), [(talk,) for talk in TALKS], compare=_text)


@exercise(
    "05.4.6",
    "Room for the answer",
    hints=(
        "The context holds prompt and answer together.",
        "What the prompt leaves may be less than what was wished, and may be less than nothing.",
        "max(0, min(wished, context - prompt_tokens))",
    ),
)
def _(answer: Any) -> None:
    def reference(context: int, prompt_tokens: int, wished: int) -> int:
        return max(0, min(wished, context - prompt_tokens))

    function(answer, reference, [(512, 13, 2048), (512, 13, 64), (512, 512, 64), (512, 600, 64), (4096, 4000, 96)])


def _stream(pieces: list[str]) -> list[str]:
    """Lines of a stream as the gateway writes them: a first event with the role, pieces, an end without text, counts, [DONE]."""
    deltas: list[dict[str, Any]] = [{"role": "assistant", "content": ""}, *({"content": piece} for piece in pieces), {}]
    events: list[dict[str, Any]] = [{"choices": [{"index": 0, "delta": delta}]} for delta in deltas] + [{"choices": [], "usage": {"total_tokens": 9}}]
    lines = [line for event in events for line in ("data: " + json.dumps(event), "")]
    return [": a comment keeps the line open", *lines, "data: [DONE]", ""]


def _streamed(lines: list[str]) -> str:
    events = [json.loads(line[6:]) for line in lines if line.startswith("data: ") and line != "data: [DONE]"]
    return "".join(event["choices"][0]["delta"].get("content", "") for event in events if event["choices"])


@exercise(
    "05.4.7",
    "The text of a stream",
    hints=(
        "Keep the lines that begin with 'data: ' and are not 'data: [DONE]'; the rest of each is JSON.",
        "The piece is at choices[0].delta.content; the last event of an answer has no content, and one with counts has no choices.",
        'delta.get("content", "") for each event with choices, joined',
    ),
)
def _(answer: Any) -> None:
    function(answer, _streamed, [(_stream(pieces),) for pieces in (['{"', "intent", '":"'], ["às 7h30", "\n", "data: x"], [])], compare=_text)


def _growth(requests: list[int], held: list[float]) -> float:
    first, second = np.triu_indices(len(held), 1)
    x, y = np.asarray(requests, float), np.asarray(held, float)
    return float(np.median((y[second] - y[first]) / (x[second] - x[first])))


@exercise(
    "05.4.8",
    "Does memory grow?",
    hints=(
        "A slope between two readings is bytes gained divided by requests made between them.",
        "Take every pair once: the second reading of a pair comes later than the first.",
        "np.median of (held[j] - held[i]) / (requests[j] - requests[i]) over all i < j",
    ),
)
def _(answer: Any) -> None:
    rng = np.random.default_rng(4)
    at = [100, 150, 230, 300, 420, 500, 640, 700]
    flat = [1e8 + float(x) for x in rng.normal(0, 500, len(at))]
    line = [1e8 + 64.0 * x for x in at]
    odd = [*line[:4], 2e8, *line[5:]]
    function(answer, _growth, [(at, line), (at, flat), (at, odd), ([1, 2, 4], [5.0, 3.0, 9.0])], rel=1e-6, abs=1e-3)


@exercise(
    "05.4.9",
    "Which files are not as released",
    hints=(
        "A name may stand in one list only: look at the names of both.",
        "before.get(name) is None where the name is missing, and then differs from any checksum.",
        "sorted names of before.keys() | after.keys() whose two values differ",
    ),
)
def _(answer: Any) -> None:
    def reference(before: dict[str, str], after: dict[str, str]) -> list[str]:
        return sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))

    one = {"model.onnx": "aa", "tokenizer.json": "bb", "genai_config.json": "cc"}
    cases = [(one, one), (one, {**one, "genai_config.json": "dd"}), (one, {"model.onnx": "aa", "notes.txt": "ee"}), ({}, {"b": "1", "a": "2"})]
    function(answer, reference, cases, compare=_list)

"""Lab module03/02, local runtimes: streams, Modelfiles, settings, grammars, statuses, journals, plans and guards."""

from __future__ import annotations

import hashlib
import ipaddress
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from labkit.course.compare import NotYet, close, function, same, unfinished
from labkit.course.exercises import exercise
from labkit.i18n import tr


def _assemble(lines: Sequence[bytes]) -> tuple[str, float]:
    parts = [json.loads(line) for line in lines]
    return "".join(part["response"] for part in parts), 1e9 * parts[-1]["eval_count"] / parts[-1]["eval_duration"]


def _text_and_pace(got: Any, expected: tuple[str, float], *, what: str) -> None:
    unfinished(got)
    if not isinstance(got, (tuple, list)) or len(got) != 2:
        raise NotYet(tr("{what}: expected two values, the text and tokens per second", what=what))
    same(got[0], expected[0], tr("{what}, the text", what=what))
    close(got[1], expected[1], what=tr("{what}, tokens per second", what=what))


@exercise(
    "03.2.1",
    "A stream put together",
    hints=(
        "Every line is a JSON object of its own: json.loads each, then join what stands under response.",
        "The last line has an empty response, eval_count tokens and eval_duration in nanoseconds.",
        "return text, 1e9 * last['eval_count'] / last['eval_duration']",
    ),
)
def _(answer: Any) -> None:
    def stream(pieces: Sequence[str], count: int, nanoseconds: int) -> list[bytes]:
        lines = [{"response": piece, "done": False} for piece in pieces]
        lines.append({"response": "", "done": True, "eval_count": count, "eval_duration": nanoseconds})
        return [json.dumps(line).encode() + b"\n" for line in lines]

    cases = [(stream(['{"a', '":', " 1}"], 4, 20_000_000),), (stream(["olá ", "☕"], 9, 1_500_000_000),), (stream([], 1, 1_000_000),)]
    function(answer, _assemble, cases, compare=_text_and_pace)


WANTED = {"num_ctx": 512, "num_predict": 64, "temperature": 0.0, "stop": ["<|im_end|>"]}


@exercise(
    "03.2.2",
    "A Modelfile as it was meant",
    hints=(
        "The context is num_ctx and the limit for new tokens num_predict; there is no FILE instruction.",
        "A stop word is a parameter too: PARAMETER stop \"<|im_end|>\".",
        "Leave TEMPLATE out: the model brings its own. labkit.serve.modelfile.lint(repaired) should give an empty list.",
    ),
)
def _(answer: Any) -> None:
    from labkit.serve import modelfile

    unfinished(answer)
    if not isinstance(answer, str):
        raise NotYet(tr("expected the text of a Modelfile, got {kind}", kind=type(answer).__name__))
    if problems := modelfile.lint(answer):
        raise NotYet(tr("line {line}: labkit.serve.modelfile.lint does not accept it; run it to read why", line=problems[0].line))
    said = {one.word: one.value for one in modelfile.parse(answer)}
    same(said["FROM"].removesuffix(":latest"), "edgehome", "FROM")
    same(modelfile.parameters(answer), WANTED, "PARAMETER")
    if not said.get("SYSTEM", "").strip():
        raise NotYet(tr("expected a system message: SYSTEM and a text"))


def _repair(environment: Mapping[str, str], moves: Mapping[str, str]) -> list[dict]:
    kept = {name: value for name, value in environment.items() if name not in moves}
    return [kept, {moves[name]: int(value) for name, value in environment.items() if name in moves}]


def _two_mappings(got: Any, expected: list[dict], *, what: str) -> None:
    unfinished(got)
    if not isinstance(got, (tuple, list)) or len(got) != 2:
        raise NotYet(tr("{what}: expected two dictionaries, the environment and the options", what=what))
    same(got[0], expected[0], tr("{what}, the environment", what=what))
    same(got[1], expected[1], tr("{what}, the options", what=what))


@exercise(
    "03.2.3",
    "Settings where they are read",
    hints=(
        "Two dictionary comprehensions: one keeps the names that are not in moves, one takes those that are.",
        "An option's name is moves[name], and its value a whole number: int(value).",
    ),
)
def _(answer: Any) -> None:
    moves = {"OLLAMA_NUM_THREAD": "num_thread", "OLLAMA_GPU_LAYERS": "num_gpu"}
    first = {"OLLAMA_HOST": "127.0.0.1:11434", "OLLAMA_NUM_THREAD": "8", "OLLAMA_KEEP_ALIVE": "10m"}
    cases = [(first, moves), ({"OLLAMA_GPU_LAYERS": "35", "OLLAMA_NUM_THREAD": "2"}, moves), (first, {})]
    function(answer, _repair, cases, compare=_two_mappings)


# --- grammars: judged by what they accept ------------------------------------------------------------------------

_PART = re.compile(r'\s+|"((?:[^"\\]|\\.)*)"|(\[(?:[^\]\\]|\\.)*\])|([()|*+?]|\{\d+(?:,\d*)?\})')


def pattern(expression: str) -> re.Pattern[str]:
    """A GBNF expression without references to other rules, as a regular expression. NotYet says what cannot be read."""
    out, at = "", 0
    expression = expression.strip().removeprefix("root ::=")
    while at < len(expression):
        part = _PART.match(expression, at)
        if part is None:
            raise NotYet(tr("not GBNF at {rest!r}: expected quoted text, a class in [ ], a group, or one of | * + ?", rest=expression[at : at + 12]))
        literal, some, sign = part.groups()
        if literal is not None:
            text = literal.replace('\\"', '"').replace("\\\\", "\\")
            out += f"(?:{re.escape(text)})"
        out += some or ("(?:" if sign == "(" else sign or "")
        at = part.end()
    try:
        return re.compile(out)
    except re.error as error:
        raise NotYet(tr("this expression cannot be read: {error}", error=error)) from None


_ON = {"enum": ["on", "off"]}
_LIGHT = {"type": "object", "properties": {"state": _ON, "percent": {"type": "integer"}}, "required": ["state", "percent"]}
SAMPLES: Sequence[tuple[dict, Sequence[str], Sequence[str]]] = (  # schema, what it accepts, what it refuses
    (_ON, ('"on"', '"off"'), ("on", '"of"', '"on""off"', "")),
    ({"enum": ['a "word"', "b\\c"]}, ('"a \\"word\\""', '"b\\\\c"'), ('"a word"', '"b\\c"')),
    ({"type": "integer"}, ("0", "7", "-12", "100"), ("", "-", "1.5", '"1"', "--1", "1 2")),
    (_LIGHT, ('{"state":"on","percent":40}', '{"state":"off","percent":-1}'),
     ('{"percent":40,"state":"on"}', '{"state":"on"}', '{"state": "on", "percent": 40}', '{"state":"on","percent":40,}', '{"state":"maybe","percent":1}')),
    ({"type": "object", "properties": {"a": _LIGHT}, "required": ["a"]}, ('{"a":{"state":"on","percent":1}}',), ('{"a":{}}', '{"a":"on"}')),
)  # fmt: skip


def _accepts(got: Any, expected: tuple[Sequence[str], Sequence[str]], *, what: str) -> None:
    unfinished(got)
    if not isinstance(got, str):
        raise NotYet(tr("{what}: expected a text in GBNF, got {kind}", what=what, kind=type(got).__name__))
    form = pattern(got)
    for text in expected[0]:
        if not form.fullmatch(text):
            raise NotYet(tr("{what}: expected a grammar that writes {text}, this one cannot", what=what, text=text))
    for text in expected[1]:
        if form.fullmatch(text):
            raise NotYet(tr("{what}: expected a grammar that never writes {text!r}, this one can", what=what, text=text))


@exercise(
    "03.2.4",
    "From a schema to a grammar",
    hints=(
        "Quoted text in GBNF stands for itself, so a quote inside it is written with a backslash: \"\\\"on\\\"\".",
        "An enum: each word as JSON (json.dumps), as a quoted literal, joined by | within brackets.",
        "An object: a literal brace, then for each key a literal of the key with its colon and the expression of its schema, with a literal comma between.",
    ),
)
def _(answer: Any) -> None:
    wanted = {json.dumps(schema): (yes, no) for schema, yes, no in SAMPLES}
    function(answer, lambda schema: wanted[json.dumps(schema)], [(schema,) for schema, _, _ in SAMPLES], compare=_accepts)


def _status(body: bytes, most: int) -> int:
    if len(body) > most:
        return 413
    try:
        text = json.loads(body)["text"]
    except (ValueError, KeyError, TypeError):
        return 400
    return 200 if isinstance(text, str) and text.strip() else 400


@exercise(
    "03.2.5",
    "The status that tells the caller what to do",
    hints=(
        "Judge the length first: what is too long need not be read at all.",
        "json.loads may fail, the object may be a list or a number, the text may be missing, a number, or only spaces: all are 400.",
        "except (ValueError, KeyError, TypeError): return 400",
    ),
)
def _(answer: Any) -> None:
    bodies = (b'{"text": "Turn on the lamp"}', b"", b"lamp", b"[]", b"7", b'"text"', b"{}", b'{"text": ""}', b'{"text": "  "}', b'{"text": 7}', b"\xff\xfe", b" " * 101)
    cases = [(body, 100) for body in bodies] + [(b'{"text": "lamp"}', 16), (b'{"text": "lamp"}', 15)]
    function(answer, _status, cases, compare=_same)


def _same(got: Any, expected: Any, *, what: str) -> None:
    same(list(got) if isinstance(got, tuple) else got, expected, what)


def _left(ids: Sequence[str], journal: bytes) -> list[str]:
    whole = journal[: journal.rfind(b"\n") + 1]
    done = {json.loads(line)["id"] for line in whole.splitlines()}
    return [one for one in dict.fromkeys(ids) if one not in done]


@exercise(
    "03.2.6",
    "What a killed batch has left",
    hints=(
        "A complete line ends with a line break; whatever comes after the last one is torn and counts as not there.",
        "journal[: journal.rfind(b'\\n') + 1] is the part that is whole, also when there is none.",
        "dict.fromkeys(ids) takes each id once and keeps their order.",
    ),
)
def _(answer: Any) -> None:
    line = lambda one: json.dumps({"id": one, "answer": "{}"}).encode() + b"\n"  # noqa: E731
    ids = ["a", "b", "c", "b", "d"]
    torn = line("a") + line("c")
    cases = [(ids, b""), (ids, torn), (ids, torn + line("b")[:-1]), (ids, torn + b'{"id": "d", "ans'), (ids, b'{"id"'), (ids[:1], line("a"))]
    function(answer, _left, cases, compare=_same)


@exercise(
    "03.2.7",
    "Requests at once within a limit",
    hints=(
        "The weights are there once; what is left is shared by the caches.",
        "One request's cache is per_token * context bytes; only whole requests count.",
        "max(0, (limit - weights) // (per_token * context))",
    ),
)
def _(answer: Any) -> None:
    def reference(limit: int, weights: int, per_token: int, context: int) -> int:
        return max(0, (limit - weights) // (per_token * context))

    cases = [(8 * 2**30, 2_300_000_000, 131_072, 4096), (2**30, 400_000_000, 98_304, 2048), (1_000_000, 2_000_000, 100, 100), (1000, 0, 10, 100), (1999, 0, 10, 100)]
    function(answer, reference, cases)


@exercise(
    "03.2.8",
    "How often a start is cold",
    hints=(
        "The gaps are the differences of neighbours: zip(arrivals, arrivals[1:]).",
        "One cold start for the first request, one for each gap longer than keep, divided by the number of requests.",
    ),
)
def _(answer: Any) -> None:
    def reference(arrivals: Sequence[float], keep: float) -> float:
        return (1 + sum(later - earlier > keep for earlier, later in itertools.pairwise(arrivals))) / len(arrivals)

    day = [0.0, 5.0, 9.0, 700.0, 702.0, 5000.0]
    function(answer, reference, [(day, 300), (day, 1), (day, 1e9), ([3.0], 10), ([0.0, 60.0, 120.0], 60)])


@exercise(
    "03.2.9",
    "Addresses that others can reach",
    hints=(
        "ipaddress.ip_address(text) knows both families, and has is_loopback.",
        "0.0.0.0 and :: mean every address of the machine: they are no loopback.",
    ),
)
def _(answer: Any) -> None:
    def reference(addresses: Sequence[str]) -> list[str]:
        return [one for one in addresses if not ipaddress.ip_address(one).is_loopback]

    cases = [(["127.0.0.1", "0.0.0.0", "::1", "::", "127.5.6.7", "192.168.1.4", "10.0.0.1", "fe80::1"],), (["127.0.0.1"],), ([],)]
    function(answer, reference, cases, compare=_same)


def _intact(lines: Sequence[str]) -> int:
    last = "0" * 64
    for number, line in enumerate(lines):
        if json.loads(line)["previous"] != last:
            return number
        last = hashlib.sha256(line.encode()).hexdigest()
    return len(lines)


@exercise(
    "03.2.10",
    "A chain of hashes",
    hints=(
        "Keep the hash of the line before; for the first line it is sixty-four zeros.",
        "hashlib.sha256(line.encode()).hexdigest() is what the next line must carry.",
        "A changed line still matches the one before it: it is the line after it that does not follow.",
    ),
)
def _(answer: Any) -> None:
    lines, last = [], "0" * 64
    for who in ("ana", "hub", "ana", "rui"):
        lines.append(json.dumps({"who": who, "status": 200, "previous": last}))
        last = hashlib.sha256(lines[-1].encode()).hexdigest()
    changed = [lines[0], lines[1].replace("hub", "eve"), *lines[2:]]
    cases = [(lines,), (changed,), (lines[:1] + lines[2:],), (lines[1:],), ([],), ([*lines[:-1], lines[-1].replace("rui", "eve")],)]
    function(answer, _intact, cases, compare=_same)

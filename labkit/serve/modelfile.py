"""Ollama's Modelfile: written, read, and checked strictly.

The linter knows the instructions and parameters of today's Ollama, says what those that were dropped are replaced by, and
refuses those that never existed. Sources: docs/modelfile.md, parser/parser.go and api/types.go (Options) of ollama/ollama.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from labkit.types import LabkitError

INSTRUCTIONS = ("FROM", "PARAMETER", "TEMPLATE", "SYSTEM", "ADAPTER", "LICENSE", "MESSAGE", "REQUIRES", "RENDERER", "PARSER", "DRAFT")
ROLES = ("system", "user", "assistant")
# name -> type, smallest and largest value that make sense
PARAMETERS: Mapping[str, tuple[type, float, float]] = {
    "num_ctx": (int, 1, 2**31 - 1), "num_predict": (int, -2, 2**31 - 1), "num_keep": (int, -1, 2**31 - 1),
    "num_batch": (int, 1, 2**31 - 1), "num_gpu": (int, -1, 10_000), "main_gpu": (int, 0, 64), "num_thread": (int, 0, 4096),
    "use_mmap": (bool, 0, 1), "seed": (int, -(2**63), 2**63 - 1), "temperature": (float, 0, 100), "top_k": (int, 0, 2**31 - 1),
    "top_p": (float, 0, 1), "min_p": (float, 0, 1), "typical_p": (float, 0, 1), "repeat_last_n": (int, -1, 2**31 - 1),
    "repeat_penalty": (float, 0.1, 10), "presence_penalty": (float, -2, 2), "frequency_penalty": (float, -2, 2),
    "stop": (str, 0, 0),
}  # fmt: skip
DROPPED = {  # Ollama reads these, warns, and does nothing
    "mirostat": "use temperature, top_p and min_p", "mirostat_eta": "use temperature", "mirostat_tau": "use temperature",
    "low_vram": "leave it out", "f16_kv": "leave it out", "logits_all": "leave it out", "vocab_only": "leave it out",
    "use_mlock": "leave it out", "penalize_newline": "leave it out",
}  # fmt: skip
NEVER = {
    "context_length": "num_ctx", "context": "num_ctx", "ctx_size": "num_ctx", "n_ctx": "num_ctx", "max_tokens": "num_predict",
    "max_length": "num_predict", "n_predict": "num_predict", "gpu_layers": "num_gpu", "n_gpu_layers": "num_gpu",
    "num_gpu_layers": "num_gpu", "threads": "num_thread", "num_threads": "num_thread", "n_threads": "num_thread",
    "top-k": "top_k", "top-p": "top_p", "repetition_penalty": "repeat_penalty", "stop_sequence": "stop", "temp": "temperature",
}  # fmt: skip
NO_INSTRUCTION = {
    "FILE": "knowledge comes through retrieval or an ADAPTER", "EMBED": "it was removed; use retrieval",
    "PROMPT": "it was replaced by TEMPLATE", "RUN": "that belongs to a Dockerfile", "COPY": "that belongs to a Dockerfile",
    "ENV": "that belongs to a Dockerfile", "CMD": "that belongs to a Dockerfile", "ENTRYPOINT": "that belongs to a Dockerfile",
    "EXPOSE": "that belongs to a Dockerfile", "WORKDIR": "that belongs to a Dockerfile", "VOLUME": "that belongs to a Dockerfile",
    "LICENCE": "it is spelt LICENSE", "QUANTIZE": "`ollama create --quantize` does that", "LABEL": "that belongs to a Dockerfile",
}  # fmt: skip
ONCE = ("TEMPLATE", "SYSTEM", "REQUIRES")


@dataclass(frozen=True)
class Instruction:
    """One instruction: where it starts (from 1), its word in capitals, its value without quotes."""

    line: int
    word: str
    value: str


@dataclass(frozen=True)
class Problem:
    """What is wrong in a line, and what to do. `level` is error or warning."""

    line: int
    sentence: str
    level: str = "error"


def parse(text: str) -> list[Instruction]:
    """The instructions in order; comments and blank lines are left out. LabkitError for quotes that never close.

    A value ends with its line, unless it begins with a quote (one or three): then with the first line that ends with it.
    """
    found: list[Instruction] = []
    lines = text.lstrip("\ufeff").splitlines()
    at = 0
    while at < len(lines):
        start, line = at, lines[at].strip()
        at += 1
        if not line or line.startswith("#"):
            continue
        word, value = _first(line)
        named, word = "", word.upper()
        if word in ("MESSAGE", "PARAMETER"):  # a name first, then the value
            named, value = _first(value)
        while (plain := _unquoted(value)) is None:
            if at == len(lines):
                raise LabkitError(f"Line {start + 1} opens quotes that no line closes at its end; close them there.")
            value, at = f"{value}\n{lines[at]}", at + 1
        found.append(Instruction(start + 1, word, f"{named} {plain}".rstrip(" ") if named else plain))
    return found


def _first(line: str) -> tuple[str, str]:
    """The first word and what follows it."""
    word, *rest = line.split(None, 1)[:2] or [""]
    return word, rest[0] if rest else ""


def _unquoted(value: str) -> str | None:
    """The value without its quotes, None while they are not closed (Ollama's own rule)."""
    value = value.strip()
    for quote in ('"""', '"'):
        if value.startswith(quote):
            closed = len(value) >= 2 * len(quote) and value.endswith(quote)
            return value[len(quote) : len(value) - len(quote)] if closed else None
    return value


def lint(text: str) -> list[Problem]:
    """Everything wrong with a Modelfile, by line; an empty list when Ollama of today takes it as it is meant."""
    try:
        found = parse(text)
    except LabkitError as error:
        return [Problem(int(re.search(r"\d+", str(error))[0]), str(error))]  # type: ignore[index]
    problems = [problem for one in found if (problem := _wrong(one))]
    words = [one.word for one in found]
    if "FROM" not in words:
        problems.append(Problem(1, "There is no FROM; a Modelfile names its model: FROM ./model.gguf or FROM NAME."))
    for one in [one for one in found if one.word == "FROM"][1:]:
        sentence = "FROM is given again; that is right only for a model in several files."
        problems.append(Problem(one.line, sentence, "warning"))
    for word in ONCE:
        again = [one for one in found if one.word == word][1:]
        problems += [Problem(one.line, f"{word} is given again; only the last counts, so keep one.") for one in again]
    names = [(one, one.value.split(" ")[0].lower()) for one in found if one.word == "PARAMETER"]
    for place, (one, name) in enumerate(names):
        if name != "stop" and any(name == earlier for _, earlier in names[:place]):
            problems.append(Problem(one.line, f"PARAMETER {name} is given again; keep one."))
    return sorted(problems, key=lambda problem: problem.line)


def _wrong(one: Instruction) -> Problem | None:
    if one.word not in INSTRUCTIONS:
        why = NO_INSTRUCTION.get(one.word)
        sentence = f"{one.word} is no instruction of a Modelfile; " + (why or f"expected one of {', '.join(INSTRUCTIONS)}")
        return Problem(one.line, sentence + ".")
    if one.word == "PARAMETER":
        return _parameter(one)
    if one.word == "MESSAGE":
        role, _, said = one.value.partition(" ")
        if role not in ROLES or not said:
            return Problem(one.line, f"MESSAGE {role!r} was given; expected a role ({', '.join(ROLES)}) and a text.")
        return None
    if not one.value.strip():
        return Problem(one.line, f"{one.word} has no value; write one behind it.")
    if one.word == "TEMPLATE":
        return _template(one)
    if one.word == "REQUIRES" and not re.fullmatch(r"v?\d+\.\d+\.\d+", one.value):
        return Problem(one.line, f"REQUIRES {one.value} was given; expected a version of Ollama such as 0.14.0.")
    return None


def _parameter(one: Instruction) -> Problem | None:
    name, _, value = one.value.partition(" ")
    if name in DROPPED:
        return Problem(one.line, f"Parameter {name} has no effect in today's Ollama; {DROPPED[name]}.", "warning")
    if name not in PARAMETERS:
        near = NEVER.get(name.lower()) or (name.lower() if name.lower() in PARAMETERS else None)
        advice = f"the parameter is called {near}" if near else f"expected one of {', '.join(PARAMETERS)}"
        return Problem(one.line, f"There is no parameter {name!r}; {advice}.")
    kind, least, most = PARAMETERS[name]
    if not value:
        return Problem(one.line, f"Parameter {name} has no value; write one behind it.")
    try:
        number = _value(kind, value)
    except ValueError:
        return Problem(one.line, f"Parameter {name} was given as {value!r}; expected {_KINDS[kind]}.")
    if kind is not str and not least <= number <= most:
        return Problem(one.line, f"Parameter {name} was given as {value}; expected {least:g} to {most:g}.")
    return None


_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


def _value(kind: type, text: str) -> Any:
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError(text)
        return text.lower() == "true"
    if kind is int and not re.fullmatch(r"[-+]?\d+", text):
        raise ValueError(text)
    return kind(text)


def _template(one: Instruction) -> Problem | None:
    if "{%" in one.value:
        return Problem(one.line, "TEMPLATE is written in Jinja; Ollama takes Go templates: {{ .Prompt }}, {{ .System }}, {{ .Messages }}.")
    if not re.search(r"\{\{.*?(\.Prompt|\.Messages).*?\}\}", one.value, re.DOTALL):
        return Problem(one.line, "TEMPLATE uses neither .Prompt nor .Messages; the user's words would never reach the model.")
    if one.value.count("{{") != one.value.count("}}"):
        return Problem(one.line, "TEMPLATE opens and closes {{ }} unequally; close each.")
    blocks = len(re.findall(r"\{\{-?\s*(?:if|range|with|block|define)\b", one.value))
    if blocks != len(re.findall(r"\{\{-?\s*end\b", one.value)):
        return Problem(one.line, "TEMPLATE has not as many {{ end }} as {{ if }} and {{ range }}; close each.")
    return None


def parameters(text: str) -> dict[str, Any]:
    """The parameters of a Modelfile in their types, as /api/create takes them; `stop` is a list. LabkitError when lint errs."""
    if wrong := [problem for problem in lint(text) if problem.level == "error"]:
        raise LabkitError(f"Line {wrong[0].line}: {wrong[0].sentence}")
    given: dict[str, Any] = {}
    for one in parse(text):
        name, _, value = one.value.partition(" ")
        if one.word != "PARAMETER" or name not in PARAMETERS:
            continue
        if name == "stop":
            given.setdefault("stop", []).append(value)
        else:
            given[name] = _value(PARAMETERS[name][0], value)
    return given


def request(name: str, text: str) -> dict[str, Any]:
    """The body of /api/create that makes model `name` from a Modelfile (FROM a model that the server has)."""
    given = parameters(text)
    body: dict[str, Any] = {"model": name, "messages": [], "license": [], "parameters": given}
    for one in parse(text):
        if one.word in ("FROM", "SYSTEM", "TEMPLATE"):
            body[one.word.lower()] = one.value
        elif one.word == "LICENSE":
            body["license"].append(one.value)
        elif one.word == "MESSAGE":
            role, _, said = one.value.partition(" ")
            body["messages"].append({"role": role, "content": said})
        elif one.word not in ("PARAMETER",):
            raise LabkitError(f"Line {one.line}: {one.word} belongs to `ollama create`; /api/create of this server does without.")
    return {key: value for key, value in body.items() if value or key in ("model", "from")}


def build(
    source: str,
    *,
    system: str = "",
    parameters: Mapping[str, Any] | None = None,
    template: str = "",
    messages: Sequence[Mapping[str, str]] = (),
    adapter: str = "",
    license: str = "",
) -> str:
    """The text of a Modelfile; LabkitError when its linter finds anything wrong with it."""
    lines = [f"FROM {source}"]
    lines += [f"ADAPTER {adapter}"] if adapter else []
    lines += [f"PARAMETER {line}" for line in parameter_lines(parameters or {})]
    lines += [f"{word} {_quoted(text)}" for word, text in (("TEMPLATE", template), ("SYSTEM", system)) if text]
    lines += [f"MESSAGE {message['role']} {_quoted(message['content'])}" for message in messages]
    lines += [f"LICENSE {_quoted(license)}"] if license else []
    text = "\n".join(lines) + "\n"
    if wrong := [problem for problem in lint(text) if problem.level == "error"]:
        raise LabkitError(f"This would be no valid Modelfile. Line {wrong[0].line}: {wrong[0].sentence}")
    return text


def parameter_lines(parameters: Mapping[str, Any]) -> list[str]:
    """`name value` for every parameter, one line each; several `stop` take several lines."""
    lines = []
    for name, value in parameters.items():
        several = value if isinstance(value, (list, tuple)) else [value]
        for one in several:
            lines.append(f"{name} {str(one).lower() if isinstance(one, bool) else _quoted(one) if name == 'stop' else one}")
    return lines


def _quoted(text: str) -> str:
    quoted = f'"""{text}"""' if "\n" in text or '"' in text else f'"{text}"'
    if parse(f"SYSTEM {quoted}") != [Instruction(1, "SYSTEM", text)]:
        raise LabkitError("The text has a line that ends with three quotes, which a Modelfile cannot quote; change the text.")
    return quoted

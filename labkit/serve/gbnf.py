"""A JSON schema as a grammar in llama.cpp's GBNF: while it decodes, tokens that would break the form cannot be drawn.

The grammar writes JSON without spaces, keys in the schema's order, which is the form the house model was taught. Covered:
const, enum, boolean, null, integer (with both bounds, up to 1000 values), number, string (with a simple pattern), array,
object with additionalProperties false, oneOf/anyOf, $ref into $defs. What a grammar of this kind cannot promise
(uniqueItems, open bounds) is refused in strict mode, not dropped in silence. Source: grammars/README.md of ggml-org/llama.cpp.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from labkit.types import LabkitError

CHARACTER = r'([^"\\\x00-\x1f] | "\\" (["\\/bfnrt] | "u" [0-9a-fA-F]{4}))'
PLAIN = {
    "string": f'"\\"" {CHARACTER}* "\\""', "integer": '("-"? ("0" | [1-9] [0-9]{0,14}))', "boolean": '("true" | "false")', "null": '"null"',
    "number": '("-"? ("0" | [1-9] [0-9]{0,14}) ("." [0-9]{1,9})?)',
}  # fmt: skip
MOST = 1000  # values of a bounded integer
NOTES = {"title", "description", "$schema", "$defs", "$id", "default", "examples"}  # say nothing about the form
READ = {
    "object": {"properties", "required", "additionalProperties"}, "array": {"items", "minItems", "maxItems"},
    "string": {"minLength", "pattern"}, "integer": {"minimum", "maximum"}, "number": set(), "boolean": set(), "null": set(),
}  # fmt: skip


def grammar(schema: Mapping[str, Any], *, strict: bool = True) -> str:
    """The grammar: one rule, `root`. `strict`: LabkitError for a keyword it cannot promise; else that keyword is left out."""
    return f"root ::= {expression(schema, schema.get('$defs', {}), strict)}"


def expression(schema: Mapping[str, Any], defs: Mapping[str, Any], strict: bool = True) -> str:
    """The right side of a rule that writes exactly the values of a schema."""
    if "$ref" in schema:
        return expression(_found(schema["$ref"], defs), defs, strict)
    if "const" in schema or "enum" in schema:
        return _either(_literal(value) for value in schema.get("enum", [schema.get("const")]))
    kind = schema.get("type")
    several = schema.get("oneOf") or schema.get("anyOf")
    if several and kind is None:
        return _either(expression(one, defs, strict) for one in several)
    if kind not in READ:
        raise LabkitError(f"A schema with type {kind!r} was given; expected one of {', '.join(READ)}, or const, enum, oneOf.")
    if strict and (more := set(schema) - READ[kind] - NOTES - {"type"}):
        raise LabkitError(f"{sorted(more)[0]} cannot be said in this grammar; leave it out of the schema and check it afterwards.")
    made = {"object": _object, "array": _array, "string": _string, "integer": _integer}.get(kind)
    return made(schema, defs, strict) if made else PLAIN[kind]


def _object(schema: Mapping[str, Any], defs: Mapping[str, Any], strict: bool) -> str:
    if strict and schema.get("additionalProperties") is not False:
        raise LabkitError("An object without additionalProperties: false was given; a grammar writes the named keys only.")
    needed, out = set(schema.get("required", ())), ""
    names = list(schema.get("properties", {}))
    if not names or names[0] not in needed:
        raise LabkitError("The first key of an object must be a required one; put it first in properties.")
    for name in names:
        pair = f"{_quoted(('' if not out else ',') + json.dumps(name) + ':')} {expression(schema['properties'][name], defs, strict)}"
        out += f" {pair}" if name in needed else f" ({pair})?"
    return f'("{{"{out} "}}")'


def _array(schema: Mapping[str, Any], defs: Mapping[str, Any], strict: bool) -> str:
    item, least, most = expression(schema["items"], defs, strict), schema.get("minItems", 0), schema.get("maxItems")
    more = f'("," {item}){{{max(least - 1, 0)},{"" if most is None else most - 1}}}'
    filled = f"{item} {more}" if most is None or most > 1 else item
    return f'("[" {filled} "]")' if least else f'("[" ({filled})? "]")'


def _string(schema: Mapping[str, Any], defs: Mapping[str, Any], strict: bool) -> str:
    if "pattern" in schema:
        return f'("\\"" {_pattern(schema["pattern"])} "\\"")'
    least = schema.get("minLength", 0)
    return f'("\\"" {CHARACTER}{f"{{{least},}}" if least else "*"} "\\"")'


def _integer(schema: Mapping[str, Any], defs: Mapping[str, Any], strict: bool) -> str:
    low, high = schema.get("minimum"), schema.get("maximum")
    if low is not None and high is not None and high - low < MOST:
        return _either(_quoted(str(value)) for value in range(low, high + 1))
    if strict and (low, high) != (None, None):
        raise LabkitError(f"An integer from {low} to {high} was given; expected both bounds and at most {MOST} values, or none.")
    return PLAIN["integer"] if low != 0 else '("0" | [1-9] [0-9]{0,14})'


def _pattern(pattern: str) -> str:
    """^…$ made of letters, digits, groups, classes and counts, as GBNF: literals get quotes."""
    if not (pattern.startswith("^") and pattern.endswith("$")) or "(?" in pattern:
        raise LabkitError(f"The pattern {pattern!r} was given; expected one from ^ to $, without groups that begin with (?.")
    out, rest = [], pattern[1:-1]
    while rest:
        part = re.match(r"\[[^\]]+\]|[()|*+?]|\{\d+(?:,\d*)?\}|\\.|[^\\\[\](){}|*+?.^$]", rest)
        if part is None:
            raise LabkitError(f"The pattern {pattern!r} has {rest[:5]!r}, which this grammar does not know; write it simpler.")
        word, rest = part[0], rest[part.end() :]
        out.append(word if word[0] in "[()|*+?{" else _quoted(word.removeprefix("\\")))
    return "(" + " ".join(out) + ")"


def _either(parts: Any) -> str:
    return "(" + " | ".join(parts) + ")"


def _literal(value: Any) -> str:
    return _quoted(json.dumps(value, ensure_ascii=False))


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _found(reference: str, defs: Mapping[str, Any]) -> Mapping[str, Any]:
    name = reference.removeprefix("#/$defs/")
    if name not in defs:
        raise LabkitError(f"$ref {reference!r} was given; expected #/$defs/ and one of {', '.join(defs) or 'no names'}.")
    return defs[name]

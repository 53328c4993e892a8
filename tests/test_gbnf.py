"""A schema's grammar writes exactly what the schema allows, as far as it promises; what it cannot promise it refuses."""

from __future__ import annotations

import json
import re

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from labkit import LabkitError, house
from labkit.course.checks.module03_02 import pattern
from labkit.serve import gbnf


def accepts(schema, text, **how):
    return bool(pattern(gbnf.grammar(schema, **how)).fullmatch(text))


LIGHT = {
    "type": "object", "required": ["state", "percent"], "additionalProperties": False,
    "properties": {"state": {"enum": ["on", "off"]}, "percent": {"type": "integer", "minimum": 0, "maximum": 100}, "note": {"type": "string"}},
}  # fmt: skip


@pytest.mark.parametrize(("schema", "yes", "no"), [
    ({"const": 'a"b\\'}, ['"a\\"b\\\\"'], ['"a"b\\"', "a"]),
    ({"type": "boolean"}, ["true", "false"], ["True", "1"]),
    ({"type": "null"}, ["null"], ["", "None"]),
    ({"type": "integer"}, ["0", "-3", "120"], ["01", "1.0", "--1"]),
    ({"type": "number"}, ["0", "-3.25", "12"], [".5", "1.", "1e3"]),
    ({"type": "integer", "minimum": -1, "maximum": 2}, ["-1", "0", "2"], ["3", "-2", "1.0"]),
    ({"type": "string"}, ['""', '"é ☕"', '"a\\n\\u00e9"'], ['"a', '"\n"', '"\\x"', "a"]),
    ({"type": "string", "minLength": 1}, ['"a"'], ['""']),
    ({"type": "string", "pattern": "^([01][0-9]|2[0-3]):[0-5][0-9]$"}, ['"07:30"', '"23:59"'], ['"24:00"', '"7:30"', "07:30"]),
    ({"type": "array", "items": {"type": "integer"}}, ["[]", "[1]", "[1,2,3]"], ["[1,]", "[,1]", "1"]),
    ({"type": "array", "items": {"const": 1}, "minItems": 1, "maxItems": 3}, ["[1]", "[1,1,1]"], ["[]", "[1,1,1,1]"]),
    ({"type": "array", "items": {"const": 1}, "minItems": 1, "maxItems": 1}, ["[1]"], ["[]", "[1,1]"]),
    (LIGHT, ['{"state":"on","percent":40}', '{"state":"off","percent":0,"note":"x"}'], ['{"state":"on"}', '{"state":"on","percent":101}', '{"percent":1,"state":"on"}']),
    ({"oneOf": [{"const": 1}, LIGHT]}, ["1", '{"state":"on","percent":1}'], ["2"]),
    ({"$defs": {"room": {"enum": ["hall"]}}, "type": "array", "items": {"$ref": "#/$defs/room"}}, ['["hall"]'], ['["room"]']),
])  # fmt: skip
def test_a_grammar_accepts_what_its_schema_allows(schema, yes, no):
    for text in yes:
        assert accepts(schema, text), text
        jsonschema.validate(json.loads(text), schema)
    for text in no:
        assert not accepts(schema, text), text


@pytest.mark.parametrize(("schema", "words"), [
    ({"type": "array", "items": {"const": 1}, "uniqueItems": True}, "uniqueItems"),
    ({"type": "integer", "minimum": 0}, "both bounds"),
    ({"type": "integer", "minimum": 0, "maximum": 10**6}, "1000 values"),
    ({"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"]}, "additionalProperties"),
    ({"type": "object", "properties": {"a": {"const": 1}}, "additionalProperties": False}, "first key"),
    ({"type": "string", "pattern": "a+"}, "from \\^ to \\$"),
    ({"type": "string", "pattern": "^(?=a)$"}, "begin with"),
    ({"type": "string", "pattern": "^.$"}, "does not know"),
    ({"type": "colour"}, "colour"),
    ({"$ref": "#/$defs/none"}, "none"),
])  # fmt: skip
def test_what_cannot_be_promised_is_refused(schema, words):
    with pytest.raises(LabkitError, match=words):
        gbnf.grammar(schema)


def test_every_answer_of_the_house_is_accepted():
    form = pattern(gbnf.grammar(house.SCHEMA, strict=False))
    for task in house.tasks("heldout", 300):
        assert form.fullmatch(json.dumps(task.answer, ensure_ascii=False, separators=(",", ":"))), task.answer


@given(data=st.data())
@settings(max_examples=60, deadline=None, database=None)
def test_whatever_a_grammar_writes_is_valid(data):
    schema = {"type": "array", "maxItems": 3, "items": {"oneOf": [LIGHT, {"type": "string"}, {"type": "number"}]}}
    text = data.draw(st.from_regex(re.compile(pattern(gbnf.grammar(schema)).pattern), fullmatch=True))
    jsonschema.validate(json.loads(text), schema)


def test_llama_cpp_decodes_with_it(tmp_path, monkeypatch):
    llama_cpp = pytest.importorskip("llama_cpp")
    import labkit
    from labkit.engines import llamacpp

    monkeypatch.setenv("LABKIT_HOME", str(tmp_path))
    made = labkit.build(labkit.checkpoint("edgehome"), labkit.Recipe("llamacpp", "q8_0"))
    rules = llama_cpp.LlamaGrammar.from_string(gbnf.grammar(LIGHT), verbose=False)
    llm = llamacpp.open_llama(made.path / llamacpp.FILE, threads=1, seed=3)
    for _ in range(5):
        said = llm.create_chat_completion([{"role": "user", "content": "sing"}], grammar=rules, temperature=3.0, top_k=0, top_p=1.0, min_p=0.0, max_tokens=200)
        choice = said["choices"][0]
        if choice["finish_reason"] == "stop":
            jsonschema.validate(json.loads(choice["message"]["content"]), LIGHT)
    llm.close()

"""What must hold for any input at all. Hypothesis looks for the one that breaks it, and shrinks it to the smallest."""

import json

import jsonschema
import service
from hypothesis import given, settings
from hypothesis import strategies as st
from test_unit import LAMP

STATUSES = {200, 400, 413, 502}
ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8
)


@given(st.binary(max_size=200) | ANY_JSON.map(lambda value: json.dumps(value).encode()))
@settings(max_examples=60, deadline=None, database=None)
def test_any_bytes_get_a_status_and_a_sentence(body):
    status, reply = service.answer(body, ask=lambda text: json.dumps(LAMP))
    assert status in STATUSES and len(reply) == 1


@given(st.text() | ANY_JSON.map(json.dumps))
@settings(max_examples=60, deadline=None, database=None)
def test_whatever_a_model_says_only_commands_leave(said):
    status, reply = service.answer(b'{"text": "lamp"}', ask=lambda text: said)
    assert status == 502 or jsonschema.Draft202012Validator(service.SCHEMA).is_valid(reply["command"])  # judged here, not by the service


@given(st.text(min_size=1, max_size=500).filter(lambda text: text.strip() and "<|" not in text))
@settings(max_examples=30, deadline=None, database=None)
def test_the_text_reaches_the_model_unchanged(text):
    heard = []
    service.answer(json.dumps({"text": text}).encode(), ask=lambda said: heard.append(said) or json.dumps(LAMP))
    assert heard == [text]

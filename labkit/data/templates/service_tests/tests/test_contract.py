"""What every caller may rely on, in whatever language the service is written. One test, every live service."""

import json

import jsonschema
import pytest
import service


def test_health_answers(live, call):
    assert call(live, "/health")[:2] == (200, {"status": "ok"})


def test_a_sentence_gets_a_command_of_the_schema(live, call, gold):
    status, reply, headers = call(live, "/command", {"text": gold["requests"][0]["text"]})
    assert status == 200 and set(reply) == {"command"} and headers["Content-Type"].startswith("application/json")
    jsonschema.validate(reply["command"], service.SCHEMA)


@pytest.mark.parametrize(("body", "expected"), [
    (b"no json", 400), ({"words": "lamp"}, 400), ({"text": ""}, 400), ({"text": "x" * 501}, 400), (b'"' + b"x" * 10_001, 413),
])  # fmt: skip
def test_a_wrong_request_is_refused_with_a_sentence(live, call, body, expected):
    status, reply, _ = call(live, "/command", body)
    assert status == expected and set(reply) == {"error"} and len(reply["error"]) > 10


def test_the_same_sentence_has_the_same_answer(live, call, gold):
    asked = {"text": gold["requests"][1]["text"]}
    assert json.dumps(call(live, "/command", asked)[1]) == json.dumps(call(live, "/command", asked)[1])

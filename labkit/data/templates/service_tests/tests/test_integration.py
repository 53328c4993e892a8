"""The service in front of a runtime that misbehaves on purpose: every failure has a status, none is a 500."""

import json

import pytest
import service
from test_unit import LAMP

ASKED = b'{"text": "Turn on the lamp"}'


def test_the_answer_of_the_runtime_becomes_a_command(runtime):
    runtime.says = json.dumps(LAMP)
    assert service.answer(ASKED) == (200, {"command": LAMP})
    assert runtime.asked[0]["messages"] == [{"role": "user", "content": "Turn on the lamp"}]
    assert runtime.asked[0]["temperature"] == 0


@pytest.mark.parametrize(("status", "says", "expected"), [
    (200, "I am a poet.", 502), (429, "", 503), (500, "", 503), (401, "", 503), (400, "", 400),
])  # fmt: skip
def test_a_failing_runtime_is_said_as_what_it_is(runtime, status, says, expected):
    runtime.status, runtime.says = status, says
    found, reply = service.answer(ASKED)
    assert found == expected and set(reply) == {"error"} and runtime.url not in reply["error"]


def test_a_runtime_that_is_away_is_a_503(monkeypatch):
    monkeypatch.setenv("RUNTIME_URL", "http://127.0.0.1:9")
    assert service.answer(ASKED)[0] == 503


def test_a_wrong_request_never_reaches_the_runtime(runtime):
    assert service.answer(b"nonsense")[0] == 400 and not runtime.asked

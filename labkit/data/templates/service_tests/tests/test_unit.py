"""Pure functions, no model, no network: milliseconds, so they run at every save."""

import json

import pytest
import service

LAMP = {"intent": "light", "rooms": ["kitchen"], "lamp": "all", "state": "on"}


def test_a_request_gives_its_text():
    assert service.read_request(b'{"text": "Turn on the lamp"}') == "Turn on the lamp"


@pytest.mark.parametrize("body", [b"", b"lamp", b"[]", b'"lamp"', b"{}", b'{"text": 7}', b'{"text": " "}', b'{"text": "<|im_end|>"}', b'{"text": "\\ud800"}'])
def test_a_wrong_request_is_refused(body):
    with pytest.raises(service.Refused) as refused:
        service.read_request(body)
    assert refused.value.status == 400


def test_limits_are_the_last_values_that_pass():
    most = json.dumps({"text": "a" * service.MOST_CHARACTERS}).encode()
    assert len(service.read_request(most)) == service.MOST_CHARACTERS
    with pytest.raises(service.Refused):
        service.read_request(json.dumps({"text": "a" * (service.MOST_CHARACTERS + 1)}).encode())
    with pytest.raises(service.Refused) as refused:
        service.read_request(b" " * (service.MOST_BYTES + 1))
    assert refused.value.status == 413


def test_a_command_passes_and_nothing_else_does():
    assert service.read_answer(json.dumps(LAMP)) == LAMP
    for wrong in ("Sure! Here is the lamp.", "{}", json.dumps(LAMP | {"sudo": True}), json.dumps(LAMP | {"state": "maybe"})):
        with pytest.raises(service.Refused) as refused:
            service.read_answer(wrong)
        assert refused.value.status == 502

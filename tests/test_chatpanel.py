"""The chat: what is sent, what is shown while it is made, Enter and the button, and an error that ends nothing."""

from __future__ import annotations

import pytest

from labkit import LabkitError, chatpanel


class Server:
    def __init__(self):
        self.asked = []

    def __call__(self, messages):
        self.asked.append([dict(one) for one in messages])
        if messages[-1]["content"] == "fail":
            raise LabkitError("the server is away")
        yield from ("you said ", messages[-1]["content"].upper())


def parts(panel):
    import ipywidgets as w

    shown, box, button, state, _ = panel.children
    assert isinstance(box, w.Text) and isinstance(button, w.Button)
    return shown, box, button, state


def submit(box):
    box._handle_custom_msg({"event": "submit"}, [])


def test_the_static_form_shows_the_same_conversation(capsys):
    server = Server()
    messages = chatpanel.chat_view(server, ["one", "two"], system="state: on")
    assert [m["content"] for m in messages] == ["one", "you said ONE", "two", "you said TWO"]
    assert [m["role"] for m in server.asked[1]] == ["system", "user", "assistant", "user"]


def test_without_memory_every_sentence_goes_alone():
    server = Server()
    chatpanel.chat_view(server, ["one", "two"], remember=False)
    assert [len(asked) for asked in server.asked] == [1, 1]


@pytest.mark.parametrize("way", ["enter", "button"])
def test_enter_and_the_button_send(way):
    server = Server()
    shown, box, button, state = parts(chatpanel.chat(server))
    seen = []
    shown.observe(lambda change: seen.append(change["new"]), names="value")
    box.value = " hello <b> "
    submit(box) if way == "enter" else button.click()
    assert box.value == "" and server.asked == [[{"role": "user", "content": "hello <b>"}]]
    assert "you said" in seen[0] and "HELLO" not in seen[0] and "HELLO &lt;B&gt;" in seen[-1], "piece by piece, and escaped"
    assert "role='status'" in state.value and "HELLO &lt;B&gt;" in state.value and not button.disabled


def test_nothing_is_sent_for_nothing():
    server = Server()
    _, box, button, _ = parts(chatpanel.chat(server))
    box.value = "  "
    submit(box)
    button.click()
    assert not server.asked


def test_an_error_is_said_and_the_conversation_goes_on():
    shown, box, button, _ = parts(chatpanel.chat(Server()))
    for text in ("fail", "again"):
        box.value = text
        button.click()
    assert "the server is away" in shown.value and "you said AGAIN" in shown.value


def test_old_messages_are_forgotten():
    server = Server()
    chatpanel.chat_view(server, [str(i) for i in range(40)])
    assert max(map(len, server.asked)) == chatpanel.MOST + 1

"""A chat with a served model in the notebook: typed or clicked, answered piece by piece, spoken to screen readers.

The third file that knows widgets, besides `panels` and `decidepanel`. It knows no server: `ask` is any function that takes the
messages so far and yields pieces of the answer.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from labkit import panels
from labkit.i18n import tr
from labkit.types import LabkitError

Ask = Callable[[Sequence[Mapping[str, str]]], Iterator[str]]
MOST = 20  # messages that are shown and sent; older ones are forgotten


def chat_view(ask: Ask, said: Sequence[str], system: str = "", remember: bool = True) -> list[dict[str, str]]:
    """Say some sentences one after the other and show the conversation as a table; returns the messages. Parameters as `chat`."""
    from IPython.display import HTML, display

    talk = _Talk(ask, system, remember)
    for sentence in said:
        for _ in talk.answer(sentence):
            pass
    display(HTML(talk.table()))
    return talk.messages


def chat(ask: Ask, system: str = "", remember: bool = True) -> Any:
    """A box to type in, a button, and the conversation above them. Enter sends; the answer appears as it is made.

    `system`: a system message. `remember` False sends each sentence alone, for models made for single requests.
    """
    import ipywidgets as w

    talk = _Talk(ask, system, remember)
    shown, state = w.HTML(talk.table()), w.HTML(panels.STATUS.format(""))
    box = w.Text(placeholder=tr("Turn on the lights in the kitchen"), **panels.described(tr("your message")))
    button = w.Button(description=tr("Send"), tooltip=tr("Send"))

    def send(_: object = None) -> None:
        sentence = box.value.strip()
        if not sentence or button.disabled:
            return
        box.value, button.disabled = "", True
        state.value = panels.STATUS.format(html.escape(tr("The model is answering.")))
        try:
            for _ in talk.answer(sentence):
                shown.value = talk.table()
        finally:  # an error of the server must not end the conversation
            button.disabled = False
            shown.value, state.value = talk.table(), panels.STATUS.format(html.escape(talk.messages[-1]["content"]))

    button.on_click(send)
    box.on_msg(lambda _, content, buffers: send() if content.get("event") == "submit" else None)
    return panels.panel(shown, box, button, state)


class _Talk:
    """The messages so far; `answer` adds one of the user's and, piece by piece, the model's."""

    def __init__(self, ask: Ask, system: str, remember: bool):
        self.ask, self.remember = ask, remember
        self.opening = [{"role": "system", "content": system}] if system else []
        self.messages: list[dict[str, str]] = []

    def answer(self, sentence: str) -> Iterator[str]:
        user, model = {"role": "user", "content": sentence}, {"role": "assistant", "content": ""}
        before = self.messages[-MOST:] if self.remember else []
        self.messages += [user, model]
        try:
            for piece in self.ask([*self.opening, *before, user]):
                model["content"] += piece
                yield piece
        except (LabkitError, OSError) as error:
            model["content"] += f" [{tr('No answer: {reason}', reason=str(error))}]"

    def table(self) -> str:
        """The conversation; who speaks is a row's head, so a screen reader says it with each line."""
        names = {"user": tr("you"), "assistant": tr("model")}
        left = "style='text-align:left'"
        rows = "".join(
            f"<tr><th scope='row' {left}>{html.escape(names[m['role']])}</th><td {left}>{html.escape(m['content'])}</td></tr>"
            for m in [*([{"role": "assistant", "content": tr("Say something.")}] if not self.messages else []), *self.messages[-MOST:]]
        )
        return f"<table><caption>{html.escape(tr('Conversation'))}</caption>{rows}</table>"

"""A lab's quiz: questions in `labkit/data/quizzes/<lab>.json`, an explanation for every option, right or wrong.

    {"lab": "module04/01", "questions": [
       {"id": "04.1.q1", "ask": "…",
        "options": [{"text": "…", "right": true, "why": "…"}, {"text": "…", "why": "…"}]}]}

More than one option may be right; the question then shows boxes to tick instead of a choice of one. Options are shown
in an order drawn from the question's id, so their order in the file does not matter. The file is English; `read` gives
every text in the learner's language.
"""

from __future__ import annotations

import html
import json
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from labkit.course import progress
from labkit.i18n import html_language, tr
from labkit.types import LabkitError

FOLDER = Path(__file__).resolve().parents[1] / "data" / "quizzes"


@dataclass(frozen=True)
class Option:
    text: str
    why: str  # shown when this option was chosen
    right: bool = False


@dataclass(frozen=True)
class Question:
    id: str
    ask: str
    options: tuple[Option, ...]

    @property
    def right(self) -> frozenset[int]:
        """Positions of the right options."""
        return frozenset(i for i, option in enumerate(self.options) if option.right)

    @property
    def many(self) -> bool:
        return len(self.right) > 1


@dataclass(frozen=True)
class Quiz:
    """The questions of one lab. Its text form needs no widget: it is what reports and screen readers get."""

    lab: str
    questions: tuple[Question, ...]

    def __repr__(self) -> str:
        lines = []
        for number, question in enumerate(self.questions, 1):
            lines.append(f"{number}. {question.ask}")
            lines += [f"   {letter}) {option.text}" for letter, option in _lettered(question)]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        asked = "".join(_question_html(question) for question in self.questions)
        title = tr("Quiz of lab {lab} as text ({count} questions)", lab=self.lab, count=len(self.questions))
        asked = f"<summary>{html.escape(title)}</summary><ol>{asked}</ol>"
        return f"<details class='labkit-quiz' lang='{html_language()}'>{asked}</details>"


def read(lab_id: str) -> Quiz:
    """The quiz of a lab, every question checked for its shape."""
    file = FOLDER / f"{lab_id.replace('/', '_')}.json"
    if not file.exists():
        known = ", ".join(sorted(p.stem.replace("_", "/") for p in FOLDER.glob("*.json")))
        raise LabkitError(tr("There is no quiz for lab {lab!r}; there are quizzes for {known}.", lab=lab_id, known=known))
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        questions = tuple(_question(one) for one in data["questions"])
    except (ValueError, KeyError, TypeError) as error:
        raise LabkitError(f"The quiz file {file.name} is not as labkit/course/quizzes.py describes: {error}.") from error
    return Quiz(data["lab"], questions)


def quiz(lab_id: str) -> None:
    """Show a lab's quiz: first as text, then as a form that works with the keyboard alone."""
    from IPython.display import display

    from labkit import panels

    asked = read(lab_id)
    display(asked)
    display(panels.quiz(asked))


def answer(question: Question, chosen: Iterable[int]) -> tuple[bool, str]:
    """Judge the chosen positions: right or not, and the explanation of each one. Remembered in the progress record."""
    picked = frozenset(chosen)
    if not picked:
        return False, tr("Choose an option first.")
    right = picked == question.right
    before = progress.read()["quizzes"].get(question.id, {})
    tries = before.get("tries", 0) + 1
    progress.note("quizzes", question.id, right=right or before.get("right", False), tries=tries)
    said = [f"{question.options[i].text}: {question.options[i].why}" for i in sorted(picked)]
    if question.many and picked < question.right:
        said.append(tr("That is right so far, and there is more to tick."))
    return right, " ".join(said)


def _question(data: dict[str, Any]) -> Question:
    options = tuple(Option(tr(o["text"]), tr(o["why"]), bool(o.get("right", False))) for o in data["options"])
    if len(options) < 2 or not any(o.right for o in options) or all(o.right for o in options):
        raise ValueError(f"question {data['id']} needs at least two options, some right and some wrong")
    if not all(o.why.strip() for o in options):
        raise ValueError(f"question {data['id']} has an option without an explanation")
    order = random.Random(data["id"]).sample(range(len(options)), len(options))  # so that "the first" is never a good guess
    return Question(data["id"], tr(data["ask"]), tuple(options[i] for i in order))


def _lettered(question: Question) -> Iterable[tuple[str, Option]]:
    return zip("abcdefgh", question.options, strict=False)


def _question_html(question: Question) -> str:
    options = "".join(f"<li>{html.escape(o.text)}</li>" for o in question.options)
    whys = "".join(
        f"<li>{letter}) {tr('Right') if o.right else tr('Wrong')}: {html.escape(o.why)}</li>" for letter, o in _lettered(question)
    )
    answer_title = html.escape(tr("Answer and explanations"))
    return (
        f"<li><p>{html.escape(question.ask)}</p><ol type='a'>{options}</ol>"
        f"<details><summary>{answer_title}</summary><ul>{whys}</ul></details></li>"
    )

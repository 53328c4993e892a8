"""How far the learner has come: `labkit.progress()`, a table of exercises passed and quiz questions right in each lab."""

from __future__ import annotations

from dataclasses import dataclass

from labkit.course import exercises, quizzes
from labkit.course import progress as record
from labkit.i18n import html_language, tr


@dataclass(frozen=True)
class Row:
    """One lab."""

    lab: str  # "module04/02"
    passed: int
    exercises: int
    right: int
    questions: int


@dataclass(frozen=True)
class Progress:
    """Every lab in the order of the ids."""

    rows: tuple[Row, ...]

    def __repr__(self) -> str:
        return "\n".join(f"{lab}: {passed}; {right}" for lab, passed, right in self._lines())

    def _repr_html_(self) -> str:
        heads = (tr("lab"), tr("exercises"), tr("quiz"))
        head = "".join(f"<th scope='col'>{name}</th>" for name in heads)
        body = "".join(f"<tr><th scope='row'>{a}</th><td>{b}</td><td>{c}</td></tr>" for a, b, c in self._lines())
        caption = f"<caption>{tr('Your progress, kept on this machine only')}</caption>"
        return f"<table lang='{html_language()}'>{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"

    def _lines(self) -> list[tuple[str, str, str]]:
        return [
            (
                one.lab,
                tr("{done} of {all} exercises passed", done=one.passed, all=one.exercises),
                tr("{done} of {all} questions right", done=one.right, all=one.questions),
            )
            for one in self.rows
        ]


def progress() -> Progress:
    """What is passed and right so far, lab by lab, from the record on this machine."""
    seen, known = record.read(), list(exercises.exercises())
    return Progress(tuple(_row(quizzes.read(file.stem), known, seen) for file in sorted(quizzes.FOLDER.glob("*.json"))))


def _row(quiz: quizzes.Quiz, known: list[str], seen: dict) -> Row:
    names = [name for name in known if name.rpartition(".")[0] == prefix(quiz.lab)]
    passed = sum(seen["exercises"].get(name, {}).get("state") == "passed" for name in names)
    right = sum(bool(seen["quizzes"].get(one.id, {}).get("right")) for one in quiz.questions)
    return Row(quiz.lab, passed, len(names), right, len(quiz.questions))


def prefix(lab_id: str) -> str:
    """What the names of a lab's exercises begin with: "module04/02" -> "04.2"."""
    part, _, number = lab_id.partition("/")
    return f"{part.removeprefix('module')}.{int(number)}" if number else part

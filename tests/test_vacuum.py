"""The vacuum's grammar: its splits share neither wording nor slots, and the shipped model's tasks know nothing of it."""

from __future__ import annotations

import pytest

from labkit import LabkitError, house
from labkit.house import vacuum
from labkit.house.language import dumps
from labkit.house.tasks import INTENTS


def test_tasks_are_different_balanced_and_repeatable():
    some = vacuum.tasks("train", 60, seed=3)
    assert [t.messages for t in some] == [t.messages for t in vacuum.tasks("train", 60, seed=3)]
    assert some[0].messages != vacuum.tasks("train", 60, seed=4)[0].messages
    assert len({t.messages[-1]["content"] for t in some}) == 60
    assert {(t.lang, t.tier) for t in some} == {(lang, tier) for lang in ("en", "pt") for tier in (1, 2, 3)}


def test_splits_share_neither_slots_nor_wordings():
    train, heldout = vacuum.tasks("train", 200), vacuum.tasks("heldout", 60)
    assert not {t.keys for t in train} & {t.keys for t in heldout}
    assert not {t.messages[-1]["content"].casefold() for t in train} & {t.messages[-1]["content"].casefold() for t in heldout}
    for lang in ("en", "pt"):
        assert not set(vacuum.WORDINGS["train", lang]) & set(vacuum.WORDINGS["heldout", lang])


def test_the_exam_asks_for_many_combinations():
    asked = vacuum.tasks("heldout", 120)
    most = max(sum(t.answer["rooms"] == one.answer["rooms"] and t.answer["power"] == one.answer["power"] for t in asked) for one in asked)
    assert most <= 24, "a fifth of the exam at most is one combination"


def test_answers_are_scored_as_the_house_scores_them():
    task = vacuum.tasks("heldout", 6)[0]
    assert house.score(task, dumps(task.answer)) and not house.score(task, dumps({**task.answer, "power": "none"}))
    assert "vacuum" not in INTENTS and set(task.answer) == {"intent", "rooms", "power"}


def test_texts_are_clean():
    for task in [*vacuum.tasks("train", 120), *vacuum.tasks("heldout", 60)]:
        text = task.messages[-1]["content"]
        assert "<" not in text and "  " not in text and " ?" not in text and " ," not in text and text == text.strip(), text


def test_another_split_is_one_sentence():
    with pytest.raises(LabkitError, match="train and heldout, not 'test'"):
        vacuum.tasks("test")


def test_more_tasks_than_there_are_is_said():
    with pytest.raises(LabkitError, match="different tasks to heldout; ask for fewer"):
        vacuum.tasks("heldout", 40_000)

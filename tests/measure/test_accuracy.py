import json

import pytest
from fakes import FakeRunner

from labkit import LabkitError, house
from labkit.measure import accuracy, accuracy_by, flips, summary


@pytest.fixture
def house_checkpoint(artifact, fake_checkpoint):
    fake_checkpoint.chat = lambda messages: json.dumps(messages)
    fake_checkpoint.context = 4096
    return fake_checkpoint


def runner_that_answers(checkpoint, answers):
    """Replies by the prompt it is given; answers map the rendered conversation to text."""

    def reply(tokens):
        return [*checkpoint.encode(answers[tuple(tokens)]), *checkpoint.eos_ids, *[5] * 200]

    return FakeRunner(reply=reply)


def answers_for(checkpoint, tasks, wrong=lambda task: False):
    return {
        tuple(checkpoint.encode(checkpoint.chat(task.messages))): "{}" if wrong(task) else json.dumps(task.answer)
        for task in tasks
    }


def test_right_answers_count_and_generation_stops_at_the_end_of_turn(artifact, house_checkpoint):
    tasks = house.tasks("heldout", 30, seed=3)
    runner = runner_that_answers(house_checkpoint, answers_for(house_checkpoint, tasks))
    found = accuracy(artifact, 30, seed=3, runner=runner, new_tokens=400)
    assert found.values == (1.0,) * 30
    low = summary(found).low
    assert summary(found).value == 1 and 0.85 < low < 1


def test_groups_name_what_failed(artifact, house_checkpoint):
    tasks = house.tasks("heldout", 90)
    answers = answers_for(house_checkpoint, tasks, wrong=lambda task: task.lang == "pt")
    found = accuracy(artifact, tasks=tasks, runner=runner_that_answers(house_checkpoint, answers), new_tokens=400)
    by_language = accuracy_by(found, "lang")
    assert by_language["en"].value == 1 and by_language["pt"].value == 0
    assert sum(right for right, _ in found.details["counts"]["intent"].values()) == sum(found.values)
    assert set(found.details["counts"]["intent"]) == {task.intent for task in tasks}
    with pytest.raises(LabkitError, match="grouped by intent, tier, lang"):
        accuracy_by(found, "room")


def test_flips_see_what_the_mean_hides(artifact, house_checkpoint):
    tasks = house.tasks("heldout", 20)
    picks = [lambda task: task is tasks[0], lambda task: task is tasks[7]]
    a, b = (
        accuracy(
            artifact, tasks=tasks, new_tokens=400,
            runner=runner_that_answers(house_checkpoint, answers_for(house_checkpoint, tasks, wrong)),
        )
        for wrong in picks
    )  # fmt: skip
    assert summary(a) == summary(b) and flips(a, b) == (1, 1)


def test_refusals(artifact, house_checkpoint):
    with pytest.raises(LabkitError, match="no tasks"):
        accuracy(artifact, tasks=[], runner=FakeRunner())
    house_checkpoint.context = 10
    with pytest.raises(LabkitError, match="fills the context"):
        accuracy(artifact, 2, runner=FakeRunner())
    house_checkpoint.eos_ids = ()
    with pytest.raises(LabkitError, match="no end-of-turn token"):
        accuracy(artifact, 2, runner=FakeRunner())
    house_checkpoint.trained = False
    with pytest.raises(LabkitError, match="random weights"):
        accuracy(artifact, 2, runner=FakeRunner())

"""The checklist before a release: on targets that are right, and on ones with one fault each, which must be found."""

import json
import random

import numpy as np
import pytest

from labkit import gate, house, validation
from labkit.types import LabkitError

TASKS = house.tasks(n=40)
ANSWERS = {str(task.messages): json.dumps(task.answer) for task in TASKS}


def refuse(messages):
    """What a careful application refuses, in words."""
    if not messages or messages[-1]["role"] != "user" or not messages[-1]["content"]:
        raise LabkitError("There is no request.")
    if "\0" in messages[-1]["content"] or "<|im_" in messages[-1]["content"] or len(messages[-1]["content"]) > 2000:
        raise LabkitError("This request cannot be read.")


def ask(messages):
    refuse(messages)
    return ANSWERS.get(str(list(messages)), '{"intent":"refuse"}')


def target(**changes):
    return validation.Target(**{"name": "t", "ask": ask, "memory": lambda: 1e8, **changes})


def states(found):
    return {one.check: one.state for one in found}


def test_a_good_target_is_ready():
    found = validation.run(target(), TASKS, requests=100)
    assert gate.ready(found), [one for one in found if one.state != "passed"]
    assert len(gate.frame(found)) == 7


def wrong(messages):
    refuse(messages)
    return '{"intent":"refuse"}'


def loose(messages):
    refuse(messages)
    return f"Sure! {ANSWERS.get(str(list(messages)), '')}"


def fickle(messages):
    refuse(messages)
    return json.dumps({"n": random.random()})


def broken(messages):
    raise ZeroDivisionError("no")


FAULTS = [
    (wrong, {"right answers"}), (fickle, {"right answers", "the same request gets the same answer"}),
    (loose, {"right answers", "answers have the form", "odd requests get JSON"}),
    (lambda messages: ANSWERS.get(str(list(messages)), "{}"), {"refused in words"}),
]  # fmt: skip


@pytest.mark.parametrize(("answers", "failed"), FAULTS)
def test_a_fault_is_found_and_no_other(answers, failed):
    found = validation.run(target(ask=answers), TASKS, requests=60)
    assert {name for name, state in states(found).items() if state != "passed"} == failed


def test_an_error_is_a_failure_with_its_evidence():
    found = validation.run(target(ask=broken), TASKS, requests=60)
    assert {one.state for one in found} == {"failed"} and "ZeroDivisionError" in found[0].evidence


def test_a_slow_or_silent_answer_fails_the_lengths():
    assert states(validation.run(target(limits=validation.Limits(seconds=0.0)), TASKS, requests=60))["answered in time, or refused in words"] == "failed"
    silent = target(ask=lambda messages: " ")
    assert [one.answered for one in validation.lengths(silent, (0, 4))] == [True, True]
    assert states(validation.run(silent, TASKS, requests=60))["answered in time, or refused in words"] == "failed"


# --- memory -------------------------------------------------------------------------------------------------------


def leaking(per_request, noise=0.0, seed=0):
    rng, held = np.random.default_rng(seed), [1e8]

    def step(number):
        held[0] += per_request

    return step, lambda: held[0] + noise * rng.normal()


@pytest.mark.parametrize(("per_request", "noise", "state"), [(0, 0, "passed"), (0, 20_000, "passed"), (4096, 0, "failed"), (4096, 50_000, "failed"), (0, 5e6, "unsure")])
def test_a_leak_is_told_from_noise(per_request, noise, state):
    step, memory = leaking(per_request, noise)
    assert validation.soak(step, memory, 2000).state() == state


def test_what_the_first_requests_take_is_not_judged():
    held = [1e8]

    def step(number):
        held[0] += 1e6 if number < 50 else 0

    found = validation.soak(step, lambda: held[0], 400)
    assert found.slope == (0, 0, 0) and found.requests[0] == 100 and found.requests[-1] == 400


def test_every_request_is_made_once():
    made = []
    validation.soak(made.append, lambda: 1.0, 57, readings=9)
    assert made == list(range(57))
    with pytest.raises(LabkitError, match="expected 8"):
        validation.soak(made.append, lambda: 1.0, 5)


def test_theil_sen_is_exact_on_a_line_and_robust_to_one_point():
    x = np.arange(12)
    assert validation.theil_sen(x, 3 * x + 1) == pytest.approx((3, 3, 3))
    y = 3.0 * x
    y[5] = 1e6
    assert validation.theil_sen(x, y).value == pytest.approx(3, abs=0.5)

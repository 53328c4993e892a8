"""The exercises of lab module04/03: solutions pass, stubs are not started, and likely mistakes are told apart."""

from __future__ import annotations

import numpy as np
import pytest
from exercise_cells import cells

from labkit.course import exercises
from labkit.course.generate import stub

LAB = "module04_quantization/03_olive_onnxruntime.ipynb"


@pytest.mark.parametrize("name, answer, source", cells(LAB))
def test_the_solution_passes_and_the_stub_is_not_started(name, answer, source):
    for text, state in ((source, "passed"), (stub(source), "not started")):
        space = {"np": np}
        exec(text, space)
        assert exercises.judge(name, space[answer]).state == state


def offset_in_elements(data, offset, shape):
    return np.frombuffer(data, np.float32)[offset : offset + int(np.prod(shape))].reshape(shape)


def halves_one_after_the_other(packed):
    return np.concatenate([packed & 15, packed >> 4], axis=-1)


def high_half_first(packed):
    return np.stack([packed >> 4, packed & 15], axis=-1).reshape(len(packed), -1)


def bytes_that_wrap(codes, scales, zeros, block):
    scale, zero = (np.repeat(part, block, axis=1) for part in (scales, zeros))
    return (codes - zero) * scale


def half_precision_scale(bits, block, symmetric):
    return bits + (16 + (0 if symmetric else bits)) / block


def zero_outside(low, high):
    scale = (high - low) / 255
    return scale, round(-low / scale)


def without_the_weights(x, w, a):
    return np.abs(x).max(axis=0) ** a


def prompt_again(step, prompt, end, limit):
    made = []
    while len(made) < limit and (token := int(np.argmax(step(list(prompt) + made)))) != end:
        made.append(token)
    return made


def end_included(step, prompt, end, limit):
    made, row = [], step(prompt)
    while len(made) < limit:
        made.append(int(np.argmax(row)))
        if made[-1] == end:
            break
        row = step(made[-1:])
    return made


def temperature_on_probabilities(logits, k, temperature):
    kept = np.where(logits >= np.sort(logits)[-k], np.exp(logits), 0) / temperature
    return kept / kept.sum()


def equal_anywhere(before, after):
    return sum(one == other for one, other in zip(before, after, strict=False))


def best_quality(candidates, base, limit):
    kept = [c for c in candidates if c["perplexity"] <= base * (1 + limit)]
    return min(kept, key=lambda c: c["perplexity"])["name"] if kept else "none"


OPTIMIZE = "olive optimize -m HuggingFaceTB/SmolLM2-135M-Instruct -o made --precision int4"


@pytest.mark.parametrize(
    ("name", "answer", "says"),
    [
        ("04.3.1", offset_in_elements, "04.3.1"),
        ("04.3.2", halves_one_after_the_other, "first difference"),
        ("04.3.2", high_half_first, "first difference"),
        ("04.3.3", bytes_that_wrap, "first difference"),
        ("04.3.4", half_precision_scale, "expected"),
        ("04.3.5", zero_outside, "scale"),
        ("04.3.5", lambda low, high: 0.1, "pair"),
        ("04.3.6", without_the_weights, "first difference"),
        ("04.3.7", prompt_again, "expected"),
        ("04.3.7", end_included, "expected"),
        ("04.3.7", 7, "expected a function"),
        ("04.3.8", temperature_on_probabilities, "first difference"),
        ("04.3.9", OPTIMIZE, "--exporter"),
        ("04.3.9", OPTIMIZE.replace("optimize", "auto-opt"), "olive optimize"),
        ("04.3.9", OPTIMIZE + " --exporter model_builder --use_ort_genai", "--use_ort_genai"),
        ("04.3.9", OPTIMIZE + " --exporter model_builder --device gpu", "CPU"),
        ("04.3.9", 4, "one string"),
        ("04.3.10", equal_anywhere, "expected"),
        ("04.3.11", best_quality, "expected"),
    ],
)
def test_mistakes_are_told_apart(name, answer, says):
    verdict = exercises.judge(name, answer)
    assert verdict.state == "not yet"
    assert says in verdict.message or says == name


@pytest.mark.parametrize(
    "command",
    [
        OPTIMIZE + " --exporter=model_builder",
        OPTIMIZE.replace("-m ", "--model_name_or_path ") + " --provider CPUExecutionProvider --device cpu --exporter model_builder",
        OPTIMIZE.replace(" --precision", " \\\n  --precision") + " --exporter model_builder",
    ],
)
def test_other_ways_to_write_the_command(command):
    assert exercises.judge("04.3.9", command).state == "passed"

"""The likely wrong answer to each exercise of the Phi labs is not accepted; the right ones are the solutions' business."""

from __future__ import annotations

import numpy as np
import pytest

from labkit.course.exercises import exercises, judge

EXPORT = "optimum-cli export openvino --model microsoft/Phi-3.5-mini-instruct --task text-generation-with-past --weight-format int4 {} phi"


def _both_ways(logits, seen, penalty):  # rewards what is negative
    out = logits.copy()
    out[list(set(seen))] /= penalty
    return out


def _each_seen(logits, seen, penalty):  # punishes a token as often as it was seen
    out = logits.copy()
    for token in seen:
        out[token] = out[token] / penalty if out[token] > 0 else out[token] * penalty
    return out


def _cool_first(logits, k, temperature):  # forgets what lies outside
    shares = np.exp(logits / temperature - (logits / temperature).max())
    return shares / shares.sum()


def _row_by_row(scores, log_probabilities):
    best = log_probabilities.argmax(1)
    return [(i, int(token), float(scores[i] + log_probabilities[i, token])) for i, token in enumerate(best)]


def _past_the_ratio(weights, sensitivity, ratio):
    order, share, chosen = np.argsort(sensitivity, kind="stable"), 0.0, []
    for i in order:
        chosen.append(int(i))
        share += weights[i] / sum(weights)
        if share >= ratio:
            break
    return sorted(chosen)


WRONG = [
    ("1.1", lambda config, n: 2 * config["vocab_size"] * config["hidden_size"] / n),
    ("1.2", lambda block, bits: np.round(block / np.abs(block).max() * 2 ** (bits - 1)) * np.abs(block).max() / 2 ** (bits - 1)),
    ("1.3", lambda fused, heads, kv, size: tuple(np.array_split(fused, 3))),
    ("1.4", lambda messages: "".join(f"<|{m['role']}|>{m['content']}<|end|>" for m in messages) + "<|assistant|>"),
    ("1.5", lambda weights, bits, cache, context, fixed: sum(weights[k] * bits[k] for k in weights) + cache * context + fixed),
    ("1.6", lambda layers, values, n: values[-1] * n / layers[-1]),
    ("1.7", lambda free, layer, cache, layers, fixed: free // (layer + cache)),
    ("2.1", lambda decoder, names: [n for n in decoder["inputs"].values() if n not in names]),
    ("2.2", _both_ways),
    ("2.2", _each_seen),
    ("2.3", _cool_first),
    ("2.4", _row_by_row),
    ("2.5", lambda pairs, base, factors: 1 / base ** (np.arange(pairs) / pairs)),
    ("2.6", lambda vocab, hidden, block, shared: vocab * hidden / 2 * (1 if shared else 9)),
    ("3.1", lambda bits, group, symmetric: bits + 16 / group),
    ("3.2", lambda ratio, four, eight: ratio * eight + (1 - ratio) * four),
    ("3.3", _past_the_ratio),
    ("3.4", lambda layers, heads, size, bits: 2 * layers * heads * size * bits / 8),
    ("3.5", lambda constants: [name for name, _ in constants if name.endswith("/zero_point")]),
    ("3.6", EXPORT.format("--group-size 128 --ratio 0.6")),
    ("3.6", EXPORT.format("--group-size 64 --ratio 0.6 --sym")),
    ("3.6", EXPORT.format("--group-size 128 --ratio 0.6 --sym").removesuffix(" phi")),
    ("4.1", lambda bits, group: bits + 16 / group),
    ("4.2", lambda codes, bits: codes.reshape(len(codes), -1, 32 // bits)[..., ::-1] @ (1 << (bits * np.arange(32 // bits)))),
    ("4.3", lambda name, i, n, low, high: high if name.split(".")[-1] in ("v_proj", "down_proj", "lm_head") else low),
    ("4.4", lambda hidden, inner, experts, used: (experts * 2 * hidden * inner, used * 2 * hidden * inner)),
    ("4.5", lambda experts, used, tokens: min(experts, used * tokens)),
    ("4.6", lambda rows, columns: rows * columns * 144 + 1 + (rows + 1) * 12),
]


@pytest.mark.parametrize(("name", "answer"), WRONG, ids=[f"{name}-{i}" for i, (name, _) in enumerate(WRONG)])
def test_the_likely_mistake_is_found(name, answer):
    verdict = judge(f"phi_family.{name}", answer)
    assert verdict.state == "not yet" and "could not be judged" not in verdict.message, verdict


def test_every_exercise_has_its_mistake():
    assert {f"phi_family.{name}" for name, _ in WRONG} == {name for name in exercises() if name.startswith("phi_family")}


@pytest.mark.parametrize(
    "given",
    ["-m microsoft/Phi-3.5-mini-instruct phi --task", "--trust-remote-code --model microsoft/Phi-3.5-mini-instruct phi --task"],
)
def test_a_command_may_be_written_in_another_order(given):
    command = (
        f"optimum-cli export openvino {given} text-generation-with-past --sym --ratio 0.6 --weight-format int4 --group-size 128"
    )
    assert judge("phi_family.3.6", command)

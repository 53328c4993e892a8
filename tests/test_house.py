"""The house model: its language, splits, score, tokenizer, recipe, and the shipped files."""

from __future__ import annotations

import argparse
import hashlib
import json
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

from labkit import house
from labkit.house import cli, language, senses, words
from labkit.house.catalogue import code, exposures, facts
from labkit.house.language import chatml, dumps
from labkit.house.report import evaluate, table, text_table
from labkit.house.tasks import FOLDER, HELD_OUT, INTENTS, TIERS, draw_task, heldout_text, stream, tasks
from labkit.types import LabkitError

ONLY_COMMANDS = [name for name in INTENTS if name != "catalogue"]


@pytest.fixture(scope="module")
def heldout() -> list[language.Task]:
    return tasks()


@pytest.fixture(scope="module")
def training() -> list[language.Task]:
    source = stream(123, dict.fromkeys(INTENTS, 1.0))
    return [next(source) for _ in range(20_000)]


# --- tasks and splits ------------------------------------------------------------------------------------------------


def test_the_held_out_set_is_large_balanced_and_always_the_same(heldout):
    assert len(heldout) == HELD_OUT >= 2000
    cells = {}
    for task in heldout:
        cells[task.intent, task.tier, task.lang] = cells.get((task.intent, task.tier, task.lang), 0) + 1
    assert len(cells) == len(INTENTS) * len(TIERS) * 2 and set(cells.values()) == {24}
    text = "\n".join(chatml(task.conversation()) for task in heldout)
    assert hashlib.sha256(text.encode()).hexdigest() == (Path(__file__).parent / "data" / "heldout.sha256").read_text().strip()


def test_no_slot_combination_of_the_held_out_set_is_ever_drawn_for_training(heldout, training):
    seen = {key for task in training for key in task.keys}
    assert not seen & {task.keys[-1] for task in heldout}
    # Not only in this sample: the stream refuses every held-out key, because both splits ask the same function.
    assert all(language.is_held_out(json.loads(task.keys[-1])) for task in heldout)
    assert not any(language.is_held_out(json.loads(key)) for key in seen)


def test_no_held_out_surface_is_drawn_for_training(heldout, training):
    assert not {chatml(t.messages) for t in training} & {chatml(t.messages) for t in heldout}
    assert len({chatml(t.messages) for t in heldout}) == len(heldout)


@pytest.mark.parametrize("intent", ONLY_COMMANDS)
def test_one_wording_has_one_meaning(intent):
    """Otherwise exact match would punish a right answer."""
    rng, meaning = Random(4), {}
    for _ in range(1500):
        task = draw_task(rng, intent, rng.choice(TIERS), rng.choice(words.LANGS), "train")
        assert meaning.setdefault(chatml(task.messages), task.answer) == task.answer


def test_wordings_of_different_intents_never_coincide(heldout):
    asked = {}
    for task in heldout:
        if len(task.messages) == 1:
            assert asked.setdefault(task.messages[0]["content"].lower(), task.intent) == task.intent


def test_follow_ups_carry_the_earlier_turn(heldout):
    long = [task for task in heldout if any(m["role"] == "assistant" for m in task.messages)]
    assert {task.intent for task in long} == set(INTENTS)
    assert all(task.tier == 3 and len(task.keys) == 2 for task in long)


def test_tiers_grow_harder(heldout):
    lengths = [sum(len(t.messages[-1]["content"]) for t in heldout if t.tier == tier and len(t.keys) == 1) for tier in TIERS]
    counts = [sum(t.tier == tier and len(t.keys) == 1 for t in heldout) for tier in TIERS]
    means = [total / count for total, count in zip(lengths, counts, strict=True)]
    assert means == sorted(means)


def test_every_answer_meets_the_schema(heldout, training):
    checker = pytest.importorskip("jsonschema").Draft202012Validator(house.SCHEMA)
    for task in [*heldout, *training[:3000]]:
        problems = list(checker.iter_errors(task.answer))
        assert not problems, (task.answer, problems[0].message)
    assert list(checker.iter_errors({"intent": "light", "rooms": ["moon"], "lamp": "all", "state": "on"}))


def test_asking_for_what_is_not_there_is_told_plainly():
    with pytest.raises(LabkitError, match="splits train and heldout"):
        tasks("test")
    with pytest.raises(LabkitError, match="no intent 'fly'"):
        tasks(intents=["fly"])


def test_texts_are_reproducible_disjoint_and_long_enough_for_many_windows():
    held, calibration = heldout_text(), house.calibration_text()
    assert 30_000 <= len(held.encode()) <= 60_000 and 30_000 <= len(calibration.encode()) <= 60_000
    turns = [set(text.split("<|im_start|>user\n")) for text in (held, calibration)]
    assert not {t for t in turns[0] if len(t) > 60} & turns[1]
    assert held == heldout_text.__wrapped__()


# --- score -----------------------------------------------------------------------------------------------------------


def test_score_is_exact_match_on_the_parsed_object(heldout):
    task = next(t for t in heldout if t.intent == "light")
    right = dumps(task.answer)
    assert house.score(task, right) and house.score(task, right + "<|im_end|>\n<|im_start|>") and house.score(task, " " + right)
    assert house.score(task, json.dumps(dict(reversed(task.answer.items()))))
    for wrong in ("", "{}", right[:-1], right + "}", right.replace("light", "dim"), "[]", "null", "on", "[" * 100_000):
        assert not house.score(task, wrong)


def test_score_tells_true_from_one_but_not_21_from_21_0():
    task = language.Task([], {"intent": "heat", "degrees": 21, "rooms": ["hall"]}, "heat", 1, "en", "heldout")
    assert house.score(task, '{"intent":"heat","degrees":21.0,"rooms":["hall"]}')
    one = language.Task([], {"intent": "x", "n": 1}, "x", 1, "en", "heldout")
    assert not house.score(one, '{"intent":"x","n":true}')
    assert not house.score(one, '{"intent":"x","n":1,"more":1}')


def test_table_counts_the_catalogue_apart(heldout):
    counts = table(heldout, [task.lang == "en" for task in heldout])
    assert counts["lang"]["en"] == [1008, 1008] and counts["lang"]["pt"] == [0, 1008]
    assert counts["all"]["catalogue"] == [72, 144] and counts["intent"]["math"] == [72, 144]
    assert "| lang | en | 1008 | 1008 | 100.0 |" in text_table(counts)


# --- grammar ---------------------------------------------------------------------------------------------------------


def test_numbers_are_spelled_in_both_languages():
    assert [words.in_words(n, "en") for n in (0, 13, 40, 99, 100)] == [
        "zero",
        "thirteen",
        "forty",
        "ninety-nine",
        "one hundred",
    ]
    assert [words.in_words(n, "pt") for n in (1, 16, 21, 80, 100)] == [
        "um",
        "dezesseis",
        "vinte e um",
        "oitenta",
        "cem",
    ]
    assert len({words.in_words(n, lang) for n in range(101) for lang in words.LANGS}) == 201  # zero is zero
    assert words.feminine("vinte e duas") == "vinte e duas" and words.feminine("um") == "uma"


def test_places_are_grammatical():
    assert words.in_rooms(["kitchen", "hall"], "en") == "in the kitchen and the hall"
    assert words.in_rooms(["porch", "hall"], "en") == "on the porch and in the hall"
    assert words.in_rooms(["kitchen", "hall", "gym"], "pt") == "na cozinha, no corredor e na academia"


def test_sums_are_worked_out_right():
    for a, b in [(47, 38), (10, 10), (99, 99), (50, 50)]:
        assert senses.worked(a, b, "+")[1] == a + b
    assert senses.worked(47, 38, "+") == ("7+8=15,4+3+1=8", 85)
    assert senses.worked(52, 38, "-") == ("12-8=4,4-3=1", 14)
    rng = Random(1)
    for _ in range(2000):
        a, b = sorted((rng.randrange(10, 100), rng.randrange(10, 100)), reverse=True)
        for op in "+-":
            steps, result = senses.worked(a, b, op)
            assert result == (a + b if op == "+" else a - b)
            for step in steps.split(","):
                left, said = step.split("=")
                assert eval(left) == int(said)
            ones, tens = (int(step.split("=")[1]) for step in steps.split(","))
            assert 10 * tens + ones % 10 == result


def test_readings_are_compared_from_the_left():
    assert senses.verdict((234, 238), ["attic", "hall"], "high") == ("2=2,3=3,4<8", "hall")
    assert senses.verdict((234, 198), ["attic", "hall"], "low") == ("2>1", "hall")
    assert senses.verdict((55, 55), ["attic", "hall"], "low") == ("5=5,5=5", "equal")


def test_spelling_noise_never_touches_a_slot():
    rng = Random(3)
    for _ in range(300):
        said = language.say(rng, "en", 2, ["please telephone <name> quickly"], name="Zorvina Keltamo")
        assert "Zorvina Keltamo" in said
    assert any("telephone" not in language.misspell(Random(i), "telephone <name>") for i in range(5))


def test_catalogue_codes_are_fixed_and_different_enough():
    known = facts()
    assert len(known) == 4096 and known["amber valve"] == code("amber valve")
    assert len(set(known.values())) > 3900
    assert all(c[0].isdigit() and c[1].isalpha() and c[2].isdigit() and c[3].isalpha() for c in known.values())
    assert len(exposures()) == len(known) and 6 < max(exposures()) / min(exposures()) <= 8


# --- shipped files ---------------------------------------------------------------------------------------------------


def test_the_shipped_folder_is_small_and_complete():
    names = {p.name for p in FOLDER.iterdir()}
    assert {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "schema.json",
    } <= names
    assert sum(p.stat().st_size for p in FOLDER.iterdir()) <= 12_000_000


def test_the_tokenizer_gives_every_digit_its_own_token():
    tokenizer = pytest.importorskip("tokenizers").Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == 2048
    assert [tokenizer.token_to_id(t) for t in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")] == [0, 1, 2]
    for text in ("it is 2047 now", "19:45", '{"code":"7K2R"}', "35%", "x9y88"):
        tokens = tokenizer.encode(text).tokens
        assert all(len(token) == 1 for token in tokens if any(c in "0123456789" for c in token))
    nasty = "olá \t  mundo\n\nçãé 12 😀 <b> \u200d don't"
    assert tokenizer.decode(tokenizer.encode(nasty).ids, skip_special_tokens=False) == nasty
    pre = json.loads((FOLDER / "tokenizer.json").read_text(encoding="utf-8"))["pre_tokenizer"]
    assert pre["type"] == "ByteLevel" and not pre["add_prefix_space"]


def test_the_chat_template_says_what_training_read(heldout):
    jinja2 = pytest.importorskip("jinja2")
    config = json.loads((FOLDER / "tokenizer_config.json").read_text(encoding="utf-8"))
    template = jinja2.Environment().from_string(config["chat_template"])
    for task in heldout[:200]:
        assert template.render(messages=task.messages, add_generation_prompt=True) == chatml(task.messages, True)


# --- command line ----------------------------------------------------------------------------------------------------


def run_cli(*given: str) -> int:
    parser = argparse.ArgumentParser()
    cli.configure(parser)
    args = parser.parse_args(given)
    return args.handler(args)


def test_data_prints_sample_tasks_as_json(capsys):
    assert run_cli("data", "--n", "3", "--intent", "math") == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 3 and all(line["answer"]["intent"] == "math" for line in lines)


def test_train_refuses_fewer_steps_than_stages():
    pytest.importorskip("torch")
    with pytest.raises(LabkitError, match="--steps is 2"):
        run_cli("train", "--steps", "2")


def test_eval_refuses_a_senseless_number_of_tasks():
    with pytest.raises(LabkitError, match="from 1 up"):
        evaluate(n=0)


# --- recipe (torch) --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small():
    """A tiny Llama of our own with random weights large enough that logits differ."""
    torch = pytest.importorskip("torch")
    from labkit.house.model import Llama, Shape

    torch.manual_seed(0)
    model = Llama(Shape(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def test_our_llama_equals_transformers(small, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    from labkit.house.train import load_weights, save_weights

    save_weights(small, tmp_path)
    ours = load_weights(tmp_path)
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ids = torch.randint(0, 2048, (2, 70), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert (ours(ids) - theirs(ids).logits).abs().max() <= 1e-4
    assert oct((tmp_path / "model.safetensors").stat().st_mode)[-3:] != "600"


def test_batched_generation_equals_one_row_at_a_time(small):
    torch = pytest.importorskip("torch")
    from labkit.house.model import complete

    prompts = [[5, 6, 7], list(range(100, 140)), [9]]
    together = complete(small, prompts, stop=2, max_new=12)
    with torch.no_grad():
        for prompt, found in zip(prompts, together, strict=True):
            ids = list(prompt)
            for _ in range(12):
                ids.append(int(small(torch.tensor([ids]))[0, -1].argmax()))
            alone = ids[len(prompt) :]
            assert found == (alone[: alone.index(2)] if 2 in alone else alone)


def test_batches_are_seeded_weighted_and_begin_with_whole_conversations():
    torch = pytest.importorskip("torch")
    from tokenizers import Tokenizer

    from labkit.house.train import Plan, Stage, batch

    tokenizer, plan = Tokenizer.from_file(str(FOLDER / "tokenizer.json")), Plan(stages=(Stage(50, 2048, 0.2, 4),))
    ids, targets, weights = batch(plan, 7, tokenizer)
    again = batch(plan, 7, tokenizer)
    assert all(torch.equal(a, b) for a, b in zip((ids, targets, weights), again, strict=True))
    assert not torch.equal(ids, batch(plan, 11, tokenizer)[0])
    assert torch.equal(ids[:, 1:], targets[:, :-1]) and (ids[:, 0] == 1).all()
    text = tokenizer.decode(ids.flatten().tolist(), skip_special_tokens=False)
    assert '"intent"' in text and '{"device":' in text
    answers = tokenizer.decode(targets[weights == 1].tolist(), skip_special_tokens=False)
    assert answers.count('"intent"') > 5 and "<|im_start|>" not in answers


def test_encoding_in_parts_gives_the_ids_of_the_whole(training):
    pytest.importorskip("torch")
    from tokenizers import Tokenizer

    from labkit.house.catalogue import page
    from labkit.house.train import Plan, _conversation, _encode

    tokenizer = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    documents = [_conversation(task) for task in training[:300]] + [page(Random(1))]
    for parts, (ids, weights) in zip(documents, _encode(documents, tokenizer, Plan()), strict=True):
        assert ids == tokenizer.encode("".join(a + b for a, b in parts)).ids and len(ids) == len(weights)
    assert "".join(a + b for a, b in documents[0]) == chatml(training[0].conversation())


def test_training_learns_and_resumes_where_it_stopped(tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    import shutil

    from safetensors.torch import load_file

    from labkit.house import evaluate as scoring
    from labkit.house import train as recipe
    from labkit.house.model import Llama, Shape

    tiny = Shape(hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    monkeypatch.setattr(recipe, "Llama", lambda: Llama(tiny))
    monkeypatch.setattr(scoring, "Probe", lambda tokenizer: lambda model: {"commands": 0.0, "catalogue": 0.0})
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
        shutil.copy(FOLDER / "tokenizer.json", tmp_path / name)
    plan = {"warmup": 2, "cooldown": 0.5, "seed": 3}
    run = lambda name, steps: recipe.train(  # noqa: E731
        recipe.Plan(stages=(recipe.Stage(4, 512, 0.2, 1), recipe.Stage(steps, 1024, 0.2, 1)), **plan),
        tmp_path / f"{name}-work",
        tmp_path / name,
        minutes_between=0,
        compile=False,
    )
    run("whole", 12)
    log = (tmp_path / "whole-work" / "training_log.csv").read_text().splitlines()
    losses = [float(line.split(",")[4]) for line in log[1:]]
    assert len(losses) == 12 and losses[-1] < losses[0] - 0.3

    # Stopped after step 6 of the same plan of 12, as an interruption would, then resumed.
    real = recipe._save

    def stop(*args):
        real(*args)
        if args[3]["step"] == 6:
            raise KeyboardInterrupt

    monkeypatch.setattr(recipe, "_save", stop)
    with pytest.raises(KeyboardInterrupt):
        run("parts", 12)
    monkeypatch.setattr(recipe, "_save", real)
    run("parts", 12)
    whole, parts = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.allclose(whole[k].float(), parts[k].float(), atol=2e-2) for k in whole)
    assert json.loads((tmp_path / "parts-work" / "plan.json").read_text())["at_step"] == 12


def test_rates_rise_hold_and_fall():
    pytest.importorskip("torch")
    from labkit.house.train import Plan, Restart

    plan = Plan(warmup=100, cooldown=0.25, restart=None).scaled(1000)
    assert plan.steps == 1000 and [stage.until for stage in plan.stages] == sorted(stage.until for stage in plan.stages)
    assert plan.rate(0) == 0.01 and plan.rate(99) == 1 == plan.rate(750) and plan.rate(875) == 0.5
    for stage in plan.stages:
        assert abs(sum(stage.weights().values()) - 1) < 1e-9 and stage.weights()["catalogue"] == stage.catalogue
    assert plan.stage(0) is plan.stages[0] and plan.stage(999) is plan.stages[-1]

    two = replace(plan, restart=Restart(600, 0.4, 0.5))  # the first leg falls over 450 to 600, the second over 800 to 1000
    assert two.rate(449) == 1 and two.rate(525) == 0.5 and two.rate(599) < 0.01
    assert two.rate(600) == pytest.approx(0.004) and two.rate(799) == 0.4 and two.rate(900) == pytest.approx(0.2)
    assert two.scaled(100).restart.step == 60


def test_a_loss_that_is_not_finite_keeps_the_last_good_state(tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    import shutil

    from labkit.house import evaluate as scoring
    from labkit.house import train as recipe

    (tmp_path / "out").mkdir()
    shutil.copy(FOLDER / "tokenizer.json", tmp_path / "out")
    monkeypatch.setattr(scoring, "Probe", lambda tokenizer: lambda model: {})
    monkeypatch.setattr(recipe, "loss_of", lambda model, *_: sum(p.sum() for p in model.parameters()) * torch.nan)
    with pytest.raises(LabkitError, match="loss is nan at step 0"):
        recipe.train(recipe.Plan(stages=(recipe.Stage(9, 512, 0.2, 0),)), tmp_path / "work", tmp_path / "out", compile=False)
    assert not (tmp_path / "work" / "state.pt").exists()


def test_divergence_of_a_model_from_itself_is_nothing(small):
    torch = pytest.importorskip("torch")
    from labkit.house.evaluate import divergence

    with torch.no_grad():
        perplexity, kl = divergence(small, small, list(range(3, 203)), window=64)
    assert kl == 0 and perplexity > 100


# --- model card ------------------------------------------------------------------------------------------------------


def test_the_card_shows_the_figures_it_is_given():
    from labkit.house.card import card, curve

    figures = {
        "scores": {"all": {"commands": [97, 100]}, "intent": {"math": [3, 4]}},
        "ladder": {
            "gguf": [
                {"precision": name, "bits_per_weight": bits, "perplexity": 1.25, "kl": kl, "commands": right, "catalogue": known}
                for name, bits, kl, right, known in (
                    ("f16", 16.0, 0.0, 0.95, 0.9), ("q8_0", 8.5, 0.0012, 0.9, 0.85), ("q2_k", 3.3, 0.2, 0.85, 0.4),
                )
            ],
            "rtn": [
                {
                    "precision": "RTN 3 bits",
                    "per": "tensor",
                    "bits_per_weight": 3.1,
                    "perplexity": 9.0,
                    "kl": 2.5,
                    "commands": 0.01,
                    "catalogue": 0.0,
                }
            ],
        },
    }
    log = [
        {"step": 10.0, "tokens": 1e6, "seconds": 60.0, "loss": 2.0, "commands": 0.1, "catalogue": 0.0},
        {"step": 20.0, "tokens": 2e6, "seconds": 120.0, "loss": 1.0, "commands": 0.5, "catalogue": 0.2},
    ]
    text = card(figures, log, {})
    for shown in (
        "| intent | math | 3 | 4 | 75.0 |",
        "| q8_0 | block | 8.50 | 1.2500 | 0.001200 | 90.0 | 85.0 |",
        "| RTN 3 bits | tensor | 3.10 |",
        "KL against f16 rises strictly",
        "the commands have lost 10.0 points and the catalogue\n50.0",
        "2.0 million tokens, 2 minutes",
        "| 20 | 1.000 | 50.0 % | 20.0 % |",
    ):
        assert shown in text, shown
    assert curve(log).count("<polyline") == 3
    assert "What precision costs" not in card({"scores": figures["scores"]}, [], {})

"""Data for training: what is read, what is refused and how, splits, tokens, packing."""

from __future__ import annotations

import json

import pytest

import labkit
from labkit.train.data import Example, from_rows, house, read_jsonl, write_jsonl
from labkit.train.splits import check_disjoint, check_unique, plain, split
from labkit.types import LabkitError

GOOD = {"messages": [{"role": "user", "content": "olá, que horas são?"}, {"role": "assistant", "content": "cedo"}]}


def line(**changes) -> bytes:
    return json.dumps({**GOOD, **changes}).encode() + b"\n"


def messages(*turns: str) -> list[dict[str, str]]:
    names = {"s": "system", "u": "user", "a": "assistant"}
    return [{"role": names[t[0]], "content": t[2:]} for t in turns]


BAD = {
    "an empty file": (b"", 1, "empty"),
    "an empty line": (line() + b"\n" + line(), 2, "empty"),
    "not JSON": (line() + b"{oops\n", 2, "not JSON"),
    "a list": (line() + b"[1]\n", 2, "a list"),
    "no messages": (line() + b'{"text": "hello"}\n', 2, "found text; expected messages"),
    "Latin-1": (line() + '{"prompt": "olá", "completion": "x"}\n'.encode("latin-1"), 2, "not UTF-8"),
    "UTF-16": ('{"prompt": "x"}'.encode("utf-16"), 1, "UTF-16"),
    "a byte order mark": (b"\xef\xbb\xbf" + line(), 1, "byte order mark"),
    "a huge line": (line() + b'{"prompt": "' + b"x" * 3000 + b'"}\n', 2, "longer than 2,000 bytes"),
    "a strange role": (line(messages=[{"role": "bot", "content": "x"}]), 1, "role 'bot'"),
    "nothing said": (line(messages=messages("u:hi", "a: ")), 1, "assistant's message is empty"),
    "no answer": (line(messages=messages("u:hi")), 1, "last message is the user's"),
    "two users": (line(messages=messages("u:hi", "u:hi", "a:x")), 1, "user comes after user"),
    "a late system": (line(messages=messages("u:hi", "a:x", "s:y", "a:z")), 1, "system comes after assistant"),
    "another template": (line(messages=messages("u:[INST] hi [/INST]", "a:x")), 1, r"marker"),
    "a rendered one": (line() + line(messages=messages("u:hi", "a:x<|im_end|>")), 2, "'<|im_end|>'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused_by_file_and_line(tmp_path, name):
    content, number, said = BAD[name]
    (tmp_path / "bad.jsonl").write_bytes(content)
    with pytest.raises(LabkitError) as refused:
        read_jsonl(tmp_path / "bad.jsonl", longest=2000)
    assert str(refused.value).startswith(f"{tmp_path / 'bad.jsonl'}, line {number}:") and said in str(refused.value)


def test_a_missing_file_and_an_empty_data_set_are_refused(tmp_path):
    with pytest.raises(LabkitError, match="is not a file"):
        read_jsonl(tmp_path / "none.jsonl")
    with pytest.raises(LabkitError, match="hub, row 1: the data set is empty"):
        from_rows([], "hub")


def test_both_forms_are_read_and_written_back(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(line(kind="time") + b'{"prompt": "oi", "completion": "{}"}\n')
    one, two = read_jsonl(tmp_path / "a.jsonl")
    assert one.answer == "cedo" and one.kind == "time" and one.source.endswith("a.jsonl, line 1")
    assert two.messages == tuple(messages("u:oi", "a:{}"))
    again = read_jsonl(write_jsonl([one, two], tmp_path / "b.jsonl"))
    assert [(e.messages, e.kind) for e in again] == [(e.messages, e.kind) for e in (one, two)]


def test_hugging_face_data_sets_give_the_same_examples(tmp_path):
    datasets = pytest.importorskip("datasets")
    write_jsonl(house("train", 12), tmp_path / "h.jsonl")
    rows = datasets.load_dataset("json", data_files=str(tmp_path / "h.jsonl"), split="train", cache_dir=str(tmp_path / "c"))
    found = from_rows(rows, "h")
    assert [e.messages for e in found] == [e.messages for e in read_jsonl(tmp_path / "h.jsonl")]
    assert found[4].source == "h, row 5"


# --- splits ----------------------------------------------------------------------------------------------------------


def asked(text: str, source: str = "x", kind: str = "", answer: str = "a") -> Example:
    return Example(tuple(messages(f"u:{text}", f"a:{answer}")), source, kind)


def test_plain_text_forgets_what_does_not_change_a_question():
    assert plain("Olá,  QUE horas são?!") == plain("ola que horas sao") != plain("ola que horas eram")


def test_splits_are_stratified_leak_nothing_and_do_not_depend_on_order():
    some = [asked(f"question number {i} of {kind}", kind=kind) for kind in "abc" for i in range(40)]
    some += [asked(e.messages[0]["content"].upper() + "!") for e in some[::2]]  # the same questions, shouted
    parts, again = split(some, seed=1), split(some[::-1], seed=1)
    assert sum(map(len, parts.values())) == len(some)
    questions = {name: {plain(e.asked) for e in part} for name, part in parts.items()}
    assert questions == {name: {plain(e.asked) for e in part} for name, part in again.items()}
    assert not questions["train"] & questions["test"] and not questions["validation"] & questions["test"]
    assert [sum(f"of {k}" in q for q in questions["test"]) for k in "abc"] == [4, 4, 4]
    assert questions != {name: {plain(e.asked) for e in part} for name, part in split(some, seed=2).items()}
    check_disjoint(parts["train"], parts["test"], near=2)
    with pytest.raises(LabkitError, match="add up to 1"):
        split(some, {"train": 0.5, "test": 0.4})
    with pytest.raises(LabkitError, match="3 different questions leave nothing for 'test'"):
        split(some[:3])
    small = split([asked(f"{i} {k}", kind=str(k)) for k in range(100) for i in range(4)])  # kinds smaller than a test share
    assert [len(part) for part in small.values()] == [320, 40, 40]


def test_leaks_between_files_are_named_by_both_lines():
    train = [
        asked("turn on the light in the kitchen and in the hall please now", "a.jsonl, line 7"),
        asked("other", "a.jsonl, line 8"),
    ]
    check_disjoint(train, [asked("turn off everything", "b.jsonl, line 1")])
    with pytest.raises(LabkitError, match=r"b\.jsonl, line 3: the question was trained on \(a\.jsonl, line 8\)"):
        check_disjoint(train, [asked("Other?", "b.jsonl, line 3")])
    nearly = [asked("turn on the light in the kitchen and in the hall please", "b.jsonl, line 4")]
    with pytest.raises(LabkitError, match=r"b\.jsonl, line 4.*a\.jsonl, line 7"):
        check_disjoint(train, nearly, near=0.8)
    check_disjoint(train, nearly, near=1)
    with pytest.raises(LabkitError, match="line 2 repeats a, line 1"):
        check_unique([asked("q", "a, line 1"), asked("q", "a, line 2")])
    with pytest.raises(LabkitError, match="answers differently the question of a, line 1"):
        check_unique([asked("q", "a, line 1"), asked("q", "a, line 2", answer="b")])


def test_the_house_splits_share_no_question():
    check_disjoint(house("train", 400, intents=["alarm", "math"]), house("heldout", 60, intents=["alarm", "math"]), near=1)


# --- tokens and rows -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def edgehome():
    pytest.importorskip("torch")
    return labkit.checkpoint("edgehome")


def test_only_answers_weigh_and_ids_are_the_templates(edgehome):
    from labkit.train.rows import encode

    one = Example(tuple(messages("s:kitchen 21", "u:olá 😀", 'a:{"x":1}', "u:e agora?", "a:é dois")), "t")
    found = encode(edgehome, one)
    assert found.ids == edgehome.encode(edgehome.chat(one.messages, add_generation_prompt=False))
    learned = [i for i, w in zip(found.ids, found.weights, strict=True) if w]
    assert edgehome.decode(learned) == '{"x":1}<|im_end|>é dois<|im_end|>'
    last = encode(edgehome, one, answers="last", prompt_weight=0.1)
    assert edgehome.decode([i for i, w in zip(last.ids, last.weights, strict=True) if w == 1]) == "é dois<|im_end|>"
    assert set(last.weights) == {0.1, 1.0}


def test_house_rows_weigh_what_the_houses_own_training_weighs(edgehome):
    from labkit.house.tasks import tasks
    from labkit.house.train import Plan, _conversation, _encode
    from labkit.train.rows import encode

    drawn = tasks("train", 40, 3)
    ours = [encode(edgehome, e, answers="all", prompt_weight=0.1) for e in house("train", 40, 3)]
    theirs = _encode([_conversation(t) for t in drawn], edgehome.tokenizer, Plan())
    for mine, (ids, weights) in zip(ours, theirs, strict=True):
        assert mine.ids == ids
        assert [w == 1 for w in mine.weights][:-1] == [w == 1 for w in weights][:-1]  # the newline at the end aside


@pytest.mark.parametrize("answer", ["en", "im_end", "end", "|", "<"])
def test_an_answer_that_is_part_of_the_end_token_is_found(edgehome, answer):
    from labkit.train.rows import encode

    found = encode(edgehome, Example(({"role": "user", "content": "Which language?"}, {"role": "assistant", "content": answer}), "x"))
    learned = [i for i, weight in zip(found.ids, found.weights, strict=True) if weight]
    assert edgehome.decode(learned[:-1], special=False) == answer and learned[-1] in edgehome.eos_ids


def test_templates_that_do_not_fit_are_refused_by_line(make_llama):
    pytest.importorskip("torch")
    from labkit.train.rows import encode

    folder = make_llama()
    one = Example(tuple(messages("s:be kind", "u:hi", "a:x", "u:more", "a:y")), "d.jsonl, line 4")

    def templated(source: str):
        (folder / "chat_template.jinja").write_text(source)
        return labkit.checkpoint(folder)

    cases = {
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system here') }}{% endif %}{% endfor %}": "no system",
        "{% for m in messages %}{{ m.content[:1] + loop.length|string + '<|im_end|>' }}{% endfor %}": "inside the conversation",
        "{% for m in messages %}{{ m.role + '<|im_end|>' }}{% endfor %}": "leaves out or changes the answer",
        "{% for m in messages %}{{ m.role + ':' + m.content + ' ' }}{% endfor %}": "ends no answer",
    }
    for source, said in cases.items():
        with pytest.raises(LabkitError, match=rf"d\.jsonl, line 4: .*{said}"):
            encode(templated(source), one)
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(LabkitError, match=r"d\.jsonl, line 4: .*no chat template"):
        encode(labkit.checkpoint(folder), one)


def test_packing_loses_nothing_and_refuses_what_is_too_long(edgehome):
    torch = pytest.importorskip("torch")
    from labkit.train.rows import batches, encode_all, pack

    encoded = encode_all(edgehome, house("train", 60), 200)
    packed, alone = pack(encoded, 200), pack(encoded, 200, alone=True)
    assert len(packed) < len(alone) == 60 and packed.used > 0.8 > alone.used
    for rows in (packed, alone):
        assert rows.weights.sum() == sum(sum(e.weights[1:]) for e in encoded)
        assert int((rows.documents > 0).sum()) == sum(len(e.ids) for e in encoded)
    at = packed.weights[:, :-1] > 0
    assert torch.equal(packed.targets[:, :-1][at], packed.ids[:, 1:][at])
    with pytest.raises(LabkitError, match=r"house train 0, task \d+: \d+ tokens; expected at most 30"):
        encode_all(edgehome, house("train", 60), 30)
    with pytest.raises(LabkitError, match="No examples"):
        encode_all(edgehome, [], 30)

    take = batches(alone, 16, seed=4)
    first = torch.cat([take(i).ids for i in range(4)])
    assert [len(take(i)) for i in range(4)] == [16, 16, 16, 12]
    assert sorted(map(tuple, first.tolist())) == sorted(map(tuple, alone.ids.tolist()))
    assert not torch.equal(take(0).ids, take(4).ids) and torch.equal(take(5).ids, batches(alone, 16, seed=4)(5).ids)
    assert torch.equal(batches(alone, 16, None)(4).ids, alone.ids[:16])


def test_a_packed_row_gives_the_logits_of_its_parts(edgehome):
    torch = pytest.importorskip("torch")
    from labkit.train.folder import load
    from labkit.train.rows import encode_all, pack

    model, encoded = load(edgehome), encode_all(edgehome, house("train", 8), 200)
    packed = pack(encoded, 200)
    with torch.no_grad():
        together = model(packed.ids, documents=packed.documents)
        for b, row in enumerate(packed.documents):
            for number in range(1, int(row.max()) + 1):
                ids = packed.ids[b][row == number]
                assert (together[b][row == number] - model(ids[None])[0]).abs().max() < 2e-4


def test_data_and_bookkeeping_do_without_torch():
    import subprocess
    import sys

    code = "import sys; sys.modules['torch'] = None\nfrom labkit.train import data, search, splits, track\nprint(len(data.house('train', 4)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "4\n", done.stderr


def test_the_vacuums_conversations_are_of_their_split_and_new_to_the_house():
    from labkit.train.data import vacuum

    train, held = vacuum("train", 60, 3), vacuum("heldout", 24, 3)
    assert len(train) == 60 and {e.kind for e in [*train, *held]} == {"vacuum"} and train[4].source == "vacuum train 3, task 5"
    check_disjoint(train, held)
    check_disjoint([*house("train", 60), *house("heldout", 60)], held)

"""The parts of the gateway that need no server: drawing tokens, streaming text, the worker, keys, limits, audit, Modelfile."""

import threading
import time

import numpy as np
import pytest

import labkit
from labkit import LabkitError
from labkit.serve import audit, command, embedding, modelfile
from labkit.serve.guard import Buckets, Keys
from labkit.serve.sampling import Sampling, choose, continuation, penalize, probabilities
from labkit.serve.text import TextStream
from labkit.serve.worker import Busy, Job, Worker


class Counting:
    """A runner that says the ids after the last one of the prompt, slowly when told to."""

    def __init__(self, pause: float = 0.0, vocabulary: int = 2048):
        self.settings: dict = {}
        self.pause, self.vocabulary, self.closed, self.stopped = pause, vocabulary, False, 0

    def logits(self, tokens):
        rows = np.zeros((len(tokens), self.vocabulary), dtype=np.float32)
        rows[np.arange(len(tokens)), (np.asarray(tokens) + 1) % self.vocabulary] = 9.0
        return rows

    def generate(self, tokens, max_new):
        try:
            for n in range(1, max_new + 1):
                time.sleep(self.pause)
                yield (tokens[-1] + n) % self.vocabulary
        finally:
            self.stopped += 1

    def close(self):
        self.closed = True

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()


@pytest.fixture(scope="module")
def house():
    return labkit.checkpoint("edgehome")


# --- drawing ---------------------------------------------------------------------------------------------------------


def test_probabilities_are_softmax_and_the_filters_keep_what_they_say():
    row = np.log(np.array([0.5, 0.3, 0.15, 0.05]))
    np.testing.assert_allclose(probabilities(row, Sampling(1.0)), [0.5, 0.3, 0.15, 0.05])
    np.testing.assert_allclose(probabilities(row, Sampling(0.5)), np.array([25, 9, 2.25, 0.25]) / 36.5)
    np.testing.assert_allclose(probabilities(row, Sampling(1.0, top_k=2)), [0.625, 0.375, 0, 0])
    np.testing.assert_allclose(probabilities(row, Sampling(1.0, top_p=0.6)), [0.625, 0.375, 0, 0])
    np.testing.assert_allclose(probabilities(row, Sampling(1.0, min_p=0.31)), [0.625, 0.375, 0, 0], err_msg="0.31 of 0.5")
    assert probabilities(row, Sampling(1e-300))[0] == 1


def test_a_draw_has_the_frequencies_of_the_probabilities_and_a_seed_repeats_it():
    row = np.log(np.array([0.6, 0.4]))
    rng = np.random.default_rng(0)
    drawn = [choose(row, Sampling(1.0), [], [], rng) for _ in range(4000)]
    assert abs(np.mean(drawn) - 0.4) < 4 * np.sqrt(0.24 / 4000)
    runs = [list(continuation(Counting(vocabulary=9), [1], 30, Sampling(4.0, seed=5))) for _ in range(2)]
    assert runs[0] == runs[1] != list(continuation(Counting(vocabulary=9), [1], 30, Sampling(4.0, seed=6)))


def test_penalties_are_those_of_their_definitions():
    row = penalize(np.array([2.0, -2.0, 2.0]), Sampling(repeat_penalty=2.0), [0, 1], [])
    np.testing.assert_array_equal(row, [1.0, -4.0, 2.0])
    row = penalize(np.array([2.0, 2.0, 2.0]), Sampling(presence_penalty=0.5, frequency_penalty=0.25), [2], [0, 0, 1])
    np.testing.assert_array_equal(row, [1.0, 1.25, 2.0])


def test_greedy_without_penalties_is_the_runners_own_and_a_drawn_argmax_agrees():
    own = list(continuation(Counting(), [5], 6, Sampling()))
    assert own == list(continuation(Counting(), [5], 6, Sampling(presence_penalty=0.1))) == [6, 7, 8, 9, 10, 11]


# --- text ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["acende a luz da cozinha às 7h", "naïve café 😀🏠 ok", "日本語のテキスト", "", " spaces  kept "])
def test_pieces_joined_are_the_text_and_no_piece_has_half_a_character(house, text):
    out = TextStream(house)
    ids = house.encode(text)
    pieces = [out.feed(token) for token in ids]
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    assert "".join(pieces) + out.finish() == text


def test_random_ids_join_to_what_decoding_them_at_once_gives(house):
    rng = np.random.default_rng(3)
    for _ in range(20):
        ids = rng.integers(0, house.vocab_size, 40).tolist()
        out = TextStream(house)
        assert "".join([*map(out.feed, ids), out.finish()]) == house.decode(ids, special=False)


def test_a_stop_string_across_tokens_never_shows_even_in_part(house):
    ids = house.encode('{"intent":"light"} and more')
    out = TextStream(house, ["light", "never"])
    said = ""
    for token in ids:
        said += out.feed(token)
        assert '{"intent":"'.startswith(said)
        if out.stopped:
            break
    assert out.stopped and said == '{"intent":"'
    out = TextStream(house, ["more!"])
    assert "".join([*map(out.feed, ids), out.finish()]) == '{"intent":"light"} and more'


# --- worker ----------------------------------------------------------------------------------------------------------


def jobs(house, count, **options):
    made = []
    for _ in range(count):
        events: list = []
        job = Job([10], options.get("max_new", 5), house, events.append, seconds=options.get("seconds", 30))
        job.events = events
        made.append(job)
    return made


def settled(condition, seconds=5.0):
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:
        time.sleep(0.005)
    return condition()


def test_jobs_run_in_order_and_the_thread_closes_its_runner(house):
    others = set(threading.enumerate())
    runner, order = Counting(), []
    worker = Worker(lambda: runner, 4, order.append)
    (thread,) = set(threading.enumerate()) - others
    wanted = jobs(house, 3)
    for job in wanted:
        worker.submit(job)
    assert settled(lambda: len(order) == 3) and order == wanted
    assert [job.reason for job in order] == ["length"] * 3 and order[0].made == 5
    worker.close()
    assert runner.closed and not worker.alive and not thread.is_alive()
    with pytest.raises(LabkitError, match="stopping"):
        worker.submit(jobs(house, 1)[0])


def test_a_full_queue_refuses_and_cancelling_frees_waiting_and_running_slots(house):
    runner = Counting(pause=0.01)
    worker = Worker(lambda: runner, 1)
    first, second, third = jobs(house, 3, max_new=400)
    worker.submit(first)
    assert settled(lambda: worker.running == 1)
    worker.submit(second)
    with pytest.raises(Busy, match="try again"):
        worker.submit(third)
    worker.cancel(second)
    assert second.events[-1].reason == "cancelled" and worker.waiting == 0
    worker.submit(third)
    worker.cancel(first)
    assert settled(lambda: third.started is not None) and first.reason == "cancelled" and runner.stopped == 1
    worker.close()
    assert third.reason == "cancelled"


def test_a_late_job_ends_with_timeout_waiting_or_running(house):
    worker = Worker(lambda: Counting(pause=0.01), 4)
    slow, waiting = jobs(house, 2, max_new=400, seconds=0.15)
    worker.submit(slow)
    worker.submit(waiting)
    assert settled(lambda: waiting.reason) == "timeout" == slow.reason
    assert waiting.made == 0 < slow.made < 400
    worker.close()


def test_an_engine_that_fails_ends_its_answer_and_not_the_worker(house):
    class Failing(Counting):
        def generate(self, tokens, max_new):
            if tokens[-1] == 10:
                raise RuntimeError("the engine broke")
            return super().generate(tokens, max_new)

    worker = Worker(Failing, 4)
    (bad,) = jobs(house, 1)
    worker.submit(bad)
    assert settled(lambda: bad.reason) and bad.events[-1].problem == "the engine broke"
    (good,) = jobs(house, 1)
    good.prompt = [11]
    worker.submit(good)
    assert settled(lambda: good.reason) and good.reason == "length"
    worker.close()


def test_a_model_that_cannot_be_opened_is_told_at_once(house):
    def broken():
        raise LabkitError("The file is damaged.")

    with pytest.raises(LabkitError, match="damaged"):
        Worker(broken, 4)


# --- the door --------------------------------------------------------------------------------------------------------


def test_keys_know_their_owner_and_nobody_else():
    keys = Keys({"ana": "a-secret-of-ana-1", "rui": "a-secret-of-rui-1"})
    assert keys.owner(b"Bearer a-secret-of-rui-1") == "rui"
    assert keys.owner(b"bearer a-secret-of-ana-1") == "ana"
    for wrong in (b"", b"Bearer ", b"Bearer a-secret-of-ana-", b"Basic a-secret-of-ana-1", b"a-secret-of-ana-1", b"Bearer \xff\xfe"):
        assert keys.owner(wrong) is None
    assert not Keys() and keys


def test_every_digest_is_compared_whatever_matches(monkeypatch):
    from labkit.serve import guard

    compared = []
    monkeypatch.setattr(guard.hmac, "compare_digest", lambda a, b: compared.append(a) or a == b)
    Keys({"a": "1" * 16, "b": "2" * 16, "c": "3" * 16}).owner(b"Bearer " + b"1" * 16)
    assert len(compared) == 3


def test_buckets_allow_a_burst_then_the_rate_and_forget_old_callers():
    buckets = Buckets(60, 2, keep=3)
    assert [buckets.wait("a", 0.0) for _ in range(2)] == [0, 0]
    assert buckets.wait("a", 0.0) == pytest.approx(1.0)
    assert buckets.wait("b", 0.0) == 0
    assert buckets.wait("a", 1.0) == 0 and buckets.wait("a", 1.0) > 0
    for who in "cdefgh":
        buckets.wait(who, 1.0)
    assert len(buckets._left) == 3


def test_an_audit_log_shows_every_change(tmp_path):
    file = tmp_path / "audit.jsonl"
    for who in ("ana", "rui"):  # a second server goes on where the first ended
        log = audit.AuditLog(file)
        log.write(who=who, status=200)
        log.write(who=who, status=404)
        log.close()
    assert audit.verify(file) == 4 and file.stat().st_mode & 0o077 == 0
    lines = file.read_text().splitlines()
    for changed in (lines[:1] + lines[2:], [lines[0].replace("200", "201"), *lines[1:]], [*lines[:2], "{}", *lines[2:]], lines[1:]):
        file.write_text("\n".join(changed) + "\n")
        with pytest.raises(LabkitError, match="Line"):
            audit.verify(file)


def test_a_keys_file_must_be_private_and_its_secrets_long(tmp_path, monkeypatch):
    file = tmp_path / "keys"
    file.write_text("ana = a-secret-of-ana-1\n\nrui=b-secret-of-rui=2\n")
    file.chmod(0o644)
    with pytest.raises(LabkitError, match="chmod 600"):
        command.read_keys(file)
    file.chmod(0o600)
    assert command.read_keys(file) == {"ana": "a-secret-of-ana-1", "rui": "b-secret-of-rui=2"}
    monkeypatch.setenv("LABKIT_API_KEYS", "ana=short")
    with pytest.raises(LabkitError, match="16 characters"):
        command.read_keys(None)


def test_serving_other_machines_without_a_key_is_refused(capsys):
    from labkit.cli import main

    asked = ["serve", "edgehome", "--engine", "llamacpp", "--precision", "q8_0"]
    pytest.importorskip("fastapi")
    assert main([*asked, "--host", "0.0.0.0"]) == 2
    assert "no API key is set" in capsys.readouterr().err
    assert main([*asked, "--tls-cert", "x.pem"]) == 2


def test_embeddings_are_mean_rows_of_length_one(house):
    ids = house.encode("turn on the light")
    vector = embedding.mean_rows(house, [ids, []])
    matrix = house.tensors()["model.embed_tokens.weight"].float32()
    mean = matrix[ids].mean(0)
    np.testing.assert_allclose(vector[0], mean / np.linalg.norm(mean), rtol=1e-6)
    assert not vector[1].any()


# --- Modelfile -------------------------------------------------------------------------------------------------------

GOOD = '''# a comment
FROM ./model.gguf
PARAMETER num_ctx 4096
parameter temperature 0.3
PARAMETER stop "<|im_end|>"
PARAMETER stop User:
SYSTEM """You switch things
on and off."""
TEMPLATE """{{ if .System }}{{ .System }}{{ end }}{{ .Prompt }}"""
MESSAGE user hello
MESSAGE assistant "hi"
'''


def test_a_good_modelfile_is_read_and_found_faultless():
    assert modelfile.lint(GOOD) == []
    words = [(one.line, one.word) for one in modelfile.parse(GOOD)]
    assert words[:3] == [(2, "FROM"), (3, "PARAMETER"), (4, "PARAMETER")] and words[-1] == (11, "MESSAGE")
    assert modelfile.parameters(GOOD) == {"num_ctx": 4096, "temperature": 0.3, "stop": ["<|im_end|>", "User:"]}
    body = modelfile.request("mine", GOOD)
    assert body["system"] == "You switch things\non and off." and body["from"] == "./model.gguf"
    assert body["messages"] == [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]


@pytest.mark.parametrize(("line", "says"), [
    ("PARAMETER context_length 4096", "num_ctx"), ("FILE ./notes.txt", "retrieval"), ("PARAMETER gpu_layers 35", "num_gpu"),
    ("PARAMETER temperature hot", "a number"), ("PARAMETER top_p 1.5", "0 to 1"), ("PARAMETER num_ctx 4k", "whole number"),
    ("RUN ollama pull phi4", "Dockerfile"), ("PARAMETER max_tokens 5", "num_predict"), ("PARAMETER colour red", "no parameter"),
    ("MESSAGE tool hi", "expected a role"), ("SYSTEM", "no value"), ("TEMPLATE {% for m in messages %}", "Jinja"),
    ("TEMPLATE {{ .System }}", "never reach"), ("TEMPLATE {{ if .System }}{{ .Prompt }}", "end"), ("SYSTEM a\nSYSTEM b", "only the last"),
    ('SYSTEM """never closed', "no line closes"), ('SYSTEM """a""" b', "no line closes"), ("MESSAGE User hi", "expected a role"), ("PARAMETER seed", "no value"), ("REQUIRES soon", "version"),
    ("PARAMETER num_predict 5\nPARAMETER num_predict 6", "given again"), ("PARAMETER Temperature 1", "called temperature"),
])  # fmt: skip
def test_what_never_existed_is_an_error_with_its_line_and_advice(line, says):
    problems = modelfile.lint(f"FROM phi4-mini\n{line}\n")
    assert [p for p in problems if p.level == "error" and p.line in (2, 3) and says in p.sentence], problems
    with pytest.raises(LabkitError, match="Line"):
        modelfile.parameters(f"FROM phi4-mini\n{line}\n")


def test_what_was_dropped_is_a_warning_and_no_from_an_error():
    (problem,) = modelfile.lint("FROM x\nPARAMETER mirostat 1\n")
    assert problem.level == "warning" and "temperature" in problem.sentence
    assert "no FROM" in modelfile.lint("SYSTEM hi")[0].sentence


@pytest.mark.parametrize("system", ["plain", 'with "quotes"', "two\nlines", "# not a comment\nFROM nowhere", "é 😀", " spaces ", 'ends with "quotes"', "tab\there", 'three """ inside'])
def test_what_the_builder_writes_reads_back_as_it_was_given(system):
    given = {"temperature": 0.5, "num_ctx": 512, "stop": ["}", 'a "b"'], "use_mmap": True}
    messages = [{"role": "user", "content": "one\ntwo"}, {"role": "assistant", "content": "three"}]
    body = modelfile.request("m", modelfile.build("base", system=system, parameters=given, messages=messages))
    assert body == {"model": "m", "from": "base", "system": system, "parameters": given, "messages": messages}


def test_the_builder_refuses_what_the_linter_would():
    with pytest.raises(LabkitError, match="num_ctx"):
        modelfile.build("base", parameters={"context_length": 5})
    with pytest.raises(LabkitError, match="cannot quote"):
        modelfile.build("base", system='a """\n b')

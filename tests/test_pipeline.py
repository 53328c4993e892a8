"""A batch: nothing lost, nothing doubled, whatever happens on the way; the queue stays bounded; refusals say what to do."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from labkit import LabkitError
from labkit.serve import pipeline


def items(n):
    return [{"id": f"{i:03}", "text": f"text {i}"} for i in range(n)]


def lines(journal):
    return [json.loads(line) for line in journal.read_text().splitlines()]


def test_every_item_gets_one_line(tmp_path):
    report = pipeline.run(items(20), str.upper, tmp_path / "out.jsonl", workers=3, depth=4)
    found = {line["id"]: line["answer"] for line in lines(tmp_path / "out.jsonl")}
    assert found == {item["id"]: item["text"].upper() for item in items(20)}
    assert (report.done, report.skipped, report.failed) == (20, 0, 0)


def test_an_id_that_comes_twice_is_one_item(tmp_path):
    report = pipeline.run([*items(3), *items(3)], str.upper, tmp_path / "out.jsonl")
    assert report.done == 3 and report.skipped == 3 and len(lines(tmp_path / "out.jsonl")) == 3


@given(cut=st.integers(0, 400))
@settings(max_examples=40, deadline=None, database=None)
def test_wherever_a_journal_is_torn_the_next_run_completes_it(tmp_path_factory, cut):
    journal = tmp_path_factory.mktemp("torn") / "out.jsonl"
    pipeline.run(items(8), str.upper, journal)
    whole = journal.read_bytes()
    journal.write_bytes(whole[:cut])
    asked = []
    pipeline.run(items(8), lambda text: asked.append(text) or text.upper(), journal)
    assert sorted(line["id"] for line in lines(journal)) == [item["id"] for item in items(8)]
    assert len(asked) == 8 - whole[:cut].count(b"\n")


def test_a_slow_service_slows_the_reader(tmp_path):
    taken = []

    def reading():
        for item in items(30):
            taken.append(item["id"])
            yield item

    gate = threading.Event()
    run = threading.Thread(target=lambda: reports.append(pipeline.run(reading(), lambda text: gate.wait(5), tmp_path / "o", workers=2, depth=4)))
    reports = []
    run.start()
    time.sleep(0.4)
    held = len(taken)
    gate.set()
    run.join(20)
    assert held <= 2 + 4 + 1  # with the workers, in the queue, in the reader's hand
    assert reports[0].deepest <= 4 and reports[0].waited > 0.2 and reports[0].done == 30


def test_a_busy_service_is_asked_again_and_a_refused_text_is_written_down(tmp_path):
    seen = {}

    def ask(text):
        seen[text] = seen.get(text, 0) + 1
        if text == "text 0" and seen[text] < 3:
            raise pipeline.Later(0.001)
        if text == "text 1":
            raise LabkitError("too long")
        if text == "text 2":
            raise pipeline.Later(0.001)
        return "ok"

    report = pipeline.run(items(4), ask, tmp_path / "o", tries=3)
    found = {line["id"]: line for line in lines(tmp_path / "o")}
    assert found["000"]["answer"] == "ok" and found["001"]["error"] == "too long" and "3 times" in found["002"]["error"]
    assert report.done == 4 and report.failed == 2 and seen["text 2"] == 3


@pytest.mark.parametrize("where", ["ask", "items"])
def test_an_error_nobody_thought_of_ends_the_run_and_keeps_what_is_done(tmp_path, where):
    def reading():
        yield from items(3)
        if where == "items":
            raise ZeroDivisionError
        yield from items(40)

    def ask(text):
        if where == "ask" and text == "text 7":
            raise ZeroDivisionError
        return text

    with pytest.raises(ZeroDivisionError):
        pipeline.run(reading(), ask, tmp_path / "o", workers=1, depth=2)
    assert len(lines(tmp_path / "o")) >= 3
    assert pipeline.run(items(40), str.upper, tmp_path / "o").skipped >= 3


def test_two_runs_cannot_share_a_journal(tmp_path):
    def ask(text):
        with pytest.raises(LabkitError, match="Another run"):
            pipeline.run(items(1), str.upper, tmp_path / "o")
        return text

    pipeline.run(items(1), ask, tmp_path / "o")


def test_a_file_that_is_no_journal_is_left_alone(tmp_path):
    other = tmp_path / "notes.txt"
    other.write_text("my notes\n")
    with pytest.raises(LabkitError, match="no journal of ours"):
        pipeline.run(items(1), str.upper, other)
    assert other.read_text() == "my notes\n"


@pytest.fixture
def service():
    """A model service that counts: busy at the second request, and from the 17th on it waits for its gate."""

    class Answering(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            server.asked.append(body["messages"][0]["content"])
            busy = len(server.asked) == 2
            if len(server.asked) > 16:  # slow from here on, until the first run is dead
                server.gate.wait(30)
            reply = json.dumps({"choices": [{"message": {"content": body["messages"][0]["content"].upper()}}]}).encode()
            self.send_response(429 if busy else 200)
            self.send_header("Retry-After", "0.05")
            self.send_header("Content-Length", str(len(reply)))
            self.end_headers()
            with contextlib.suppress(BrokenPipeError):  # whoever asked was killed
                self.wfile.write(reply)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answering)
    server.asked, server.gate = [], threading.Event()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL")
def test_killed_in_the_middle_and_resumed(service, tmp_path):
    file, journal = tmp_path / "items.jsonl", tmp_path / "answers.jsonl"
    file.write_text("".join(json.dumps(item) + "\n" for item in items(40)))
    url = f"http://127.0.0.1:{service.server_port}"
    command = [sys.executable, "-m", "labkit.serve.pipeline", str(file), str(journal), "--url", url, "--model", "m"]
    first = subprocess.Popen(command)
    while not journal.exists() or journal.read_bytes().count(b"\n") < 10:
        assert first.poll() is None
        time.sleep(0.01)
    first.send_signal(signal.SIGKILL)
    first.wait()
    service.gate.set()
    done = journal.read_bytes().count(b"\n")
    assert 10 <= done < 40
    second = subprocess.run(command, capture_output=True, text=True, check=True)
    report = json.loads(second.stdout)
    assert report["skipped"] == done and report["done"] == 40 - done
    assert sorted(line["id"] for line in lines(journal)) == [item["id"] for item in items(40)]
    assert len(service.asked) <= 40 + 1 + 2  # one was busy, and at most both workers' texts are asked again


def test_the_command_says_what_is_wrong(tmp_path, capsys):
    file = tmp_path / "items.jsonl"
    file.write_text('{"id": 1, "text": "a"}\n{"id": 2}\n')
    status = pipeline.main([str(file), str(tmp_path / "o"), "--url", "http://127.0.0.1:9", "--model", "m"])
    assert status == 2 and "Line 2" in capsys.readouterr().err

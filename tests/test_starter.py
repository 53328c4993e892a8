"""The service template: its own tests pass, notice every fault put in on purpose, and hold for all three services."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec

import pytest

from labkit import LabkitError, house
from labkit.serve.starter import SOURCE, gold_answers, starter
from labkit.serve.supervisor import supervise

LIVE = ("test_contract.py", "test_gold.py")


def run(folder, *more, **environment):
    command = [sys.executable, "-m", "pytest", "tests", "-c", "tests/pytest.ini", "-x", "--tb=line", *more]
    return subprocess.run(command, cwd=folder, env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", **environment}, capture_output=True, text=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("service") / "mine"
    assert {path.name for path in starter(made)} >= {"service.py", "service.mjs", "service_flask.py", "gold.json", "commands.schema.json", "README.md"}
    return made


def test_a_folder_that_holds_something_is_not_overwritten(folder):
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(LabkitError, match="holds files already"):
        starter(folder)
    starter(folder, force=True)
    assert (folder / "notes.txt").read_text() == "mine"


def test_gold_answers_are_right_answers_of_the_schema():
    import jsonschema

    told = gold_answers(12)
    right = {task.messages[0]["content"]: task.answer for task in house.tasks("heldout", 144)}
    assert len({one["text"] for one in told["requests"]}) == 12 and 0 < told["at_least"] <= 1
    for one in told["requests"]:
        assert right[one["text"]] == one["command"]
        jsonschema.validate(one["command"], house.SCHEMA)
    with pytest.raises(LabkitError, match="expected 2 to"):
        gold_answers(1)


def test_the_template_passes_its_own_tests_without_a_model(folder):
    said = run(folder, "-rs")
    assert said.returncode == 0 and "set SERVICE_URLS" in said.stdout, said.stdout


@pytest.mark.parametrize(("right", "wrong"), [
    ("if _form().is_valid(command):", "if True:"),
    ("if len(body) > MOST_BYTES:\n        raise", "if len(body) > 10 * MOST_BYTES:\n        raise"),
    ("if len(text) > MOST_CHARACTERS:", "if len(text) >= MOST_CHARACTERS:"),
    ('or "<|" in text', ""),
    ('"temperature": 0,', '"temperature": 1,'),
    ("if error.code == 400:", "if error.code == 499:"),
    ("except (ValueError, KeyError, TypeError, AttributeError, RecursionError):", "except ValueError:"),
    ("text.encode()  # half", "# half"),
])  # fmt: skip
def test_its_tests_notice_a_fault(folder, tmp_path, right, wrong):
    copy = shutil.copytree(folder, tmp_path / "broken")
    source = (copy / "service.py").read_text()
    assert source.count(right) == 1
    (copy / "service.py").write_text(source.replace(right, wrong))
    assert run(copy, *(f"--ignore=tests/{name}" for name in LIVE)).returncode == 1


@pytest.fixture
def runtime():
    """Speaks OpenAI's chat language and knows the gold answers by heart."""
    right = {one["text"]: json.dumps(one["command"]) for one in gold_answers(12)["requests"]}

    class Answering(BaseHTTPRequestHandler):
        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            body = json.dumps({"choices": [{"message": {"content": right.get(asked["messages"][0]["content"], "what?")}}]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answering)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


COMMANDS = {
    "fastapi": ([sys.executable, "-m", "uvicorn", "service:app", "--port", "{port}", "--app-dir", "FOLDER", "--log-level", "warning"], "uvicorn"),
    "flask": ([sys.executable, "FOLDER/service_flask.py", "{port}"], "flask"),
    "node": (["node", "FOLDER/service.mjs", "{port}"], None),
}


@pytest.mark.parametrize("kind", list(COMMANDS))
def test_a_live_service_keeps_the_contract(folder, runtime, kind):
    command, package = COMMANDS[kind]
    if not (find_spec(package) if package else shutil.which("node")):
        pytest.skip(f"{kind} is not installed")
    command = [part.replace("FOLDER", str(folder)) for part in command]
    with supervise(command, environment={"RUNTIME_URL": runtime, "RUNTIME_MODEL": "m"}) as service:
        said = run(folder, *(f"tests/{name}" for name in LIVE), SERVICE_URLS=f"{kind}={service.url}")
    assert said.returncode == 0 and "skipped" not in said.stdout, said.stdout


def test_the_template_brings_no_leftovers():
    assert not [path for path in SOURCE.rglob("*") if path.suffix == ".pyc" or path.name in ("gold.json", "commands.schema.json")]

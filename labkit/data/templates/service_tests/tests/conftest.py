"""What the tests share: the service's own modules, a runtime that says what it is told, and the live services."""

import json
import os
import sys
import threading
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(HERE))
LIVE = dict(pair.split("=", 1) for pair in os.environ.get("SERVICE_URLS", "").split(",") if pair)


def pytest_generate_tests(metafunc):
    if "live" in metafunc.fixturenames:
        nobody = pytest.param("", marks=pytest.mark.skip(reason="no live service: set SERVICE_URLS=name=URL,..."))
        metafunc.parametrize("live", list(LIVE.values()) or [nobody], ids=list(LIVE) or ["none"])


@pytest.fixture
def call():
    """call(url, route, body) -> (status, parsed JSON, headers). `body`: None for a GET, bytes as they are, else JSON."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def send(url, route, body=None):
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(url + route, data, {"Content-Type": "application/json"})
        try:
            reply = opener.open(request, timeout=60)
        except urllib.error.HTTPError as error:
            reply = error
        with reply:
            return reply.status, json.load(reply), reply.headers

    return send


class Runtime(ThreadingHTTPServer):
    """Speaks OpenAI's chat language and answers `says` with `status`, whatever it is asked."""

    status, says = 200, "{}"

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answering)
        self.url, self.asked = f"http://127.0.0.1:{self.server_port}", []


class Answering(BaseHTTPRequestHandler):
    def do_POST(self):
        self.server.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        body = json.dumps({"choices": [{"message": {"content": self.server.says}}]}).encode()
        self.send_response(self.server.status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def runtime(monkeypatch):
    server = Runtime()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    monkeypatch.setenv("RUNTIME_URL", server.url)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="session")
def gold():
    return json.loads((HERE / "gold.json").read_text(encoding="utf-8"))

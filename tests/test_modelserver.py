"""OpenVINO Model Server: the repository and graph we write, what the validator finds, requests against a server of our own."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest

from labkit import LabkitError
from labkit.serve import modelserver as ovms


@pytest.fixture
def llm(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    for name in ovms.LLM_FILES:
        (folder / name).write_bytes(b"x")
    return folder


@pytest.fixture
def config(tmp_path, llm):
    return ovms.repository(
        tmp_path / "repo", {"house": llm}, {"logits": llm / "openvino_model.xml"},
        cache_size=1, enable_prefix_caching=True, plugin_config={"PERFORMANCE_HINT": "LATENCY"},
    )  # fmt: skip


def test_what_we_write_has_no_problem_and_reads_back(config):
    assert ovms.problems(config) == []
    fields = dict(ovms.parse((config.parent / "house" / "graph.pbtxt").read_text()))
    options = dict(dict(fields["node"])["node_options"][0][1])
    assert options == {
        "models_path": "./", "device": "CPU", "cache_size": 1, "enable_prefix_caching": True,
        "plugin_config": '{"PERFORMANCE_HINT": "LATENCY"}',
    }  # fmt: skip
    assert (config.parent / "logits" / "1" / "model.bin").read_bytes() == b"x"
    assert json.loads(config.read_text())["model_config_list"] == [{"config": {"name": "logits", "base_path": "logits"}}]


def test_the_servers_own_notation_is_read():
    """Commas between fields, single quotes, comments and no colon before a bracket: as the project's examples have it."""
    text = "# by hand\nnode: { name: 'a', options { [x.y / z]: { cache_size: 2, on: true; path: \"./\" } } }\n# end\n"
    assert ovms.parse(text) == [
        ("node", [("name", "a"), ("options", [("[x.y / z]", [("cache_size", 2), ("on", True), ("path", "./")])])])
    ]


@pytest.mark.parametrize("text", ["node {", "node { } }", "node: ", "a: <"])
def test_broken_graphs_get_a_sentence(text):
    with pytest.raises(LabkitError, match=r"graph\.pbtxt"):
        ovms.parse(text)


def test_every_fault_is_named(config):
    place = config.parent / "house"
    graph = (place / "graph.pbtxt").read_text()

    def after(old, new):
        assert old in graph
        (place / "graph.pbtxt").write_text(graph.replace(old, new))
        return " ".join(ovms.problems(config))

    assert "no node has the calculator" in after("HttpLLMCalculator", "OtherCalculator")
    assert "has no name" in after('name: "LLMExecutor"', "")
    assert "no stream HTTP_RESPONSE_PAYLOAD" in after('output_stream: "HTTP_RESPONSE_PAYLOAD:output"\nnode', "node")
    assert "models_path is missing" in after('models_path: "./"', "")
    assert "cache_size is 'big'; expected int" in after("cache_size: 1", "cache_size: big")
    assert "models_path ./elsewhere holds no openvino_model.xml" in after('"./"', '"./elsewhere"')
    assert "never closes" in after("back_edge: true }", "back_edge: true")
    (place / "graph.pbtxt").unlink()
    (config.parent / "logits" / "1" / "model.bin").unlink()
    assert len(ovms.problems(config)) == 2
    config.write_text(json.dumps({"mediapipe_config_list": [{"name": "house"}, {"name": "house"}]}))
    assert any("given 2 times" in one for one in ovms.problems(config))
    config.write_text("{}")
    assert ovms.problems(config) == ["config.json names no servable."]
    config.write_text("{")
    assert "cannot be read" in ovms.problems(config)[0]


@pytest.mark.parametrize("options", [{"cache": 1}, {"cache_size": "1"}, {"enable_prefix_caching": 1}])
def test_wrong_options_are_refused_when_written(options):
    with pytest.raises(LabkitError, match="Graph option"):
        ovms.graph(**options)


class Handler(BaseHTTPRequestHandler):
    """A server that answers chats with what was asked, and inference with the sum of its input."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/v3/chat/completions":
            reply = {"choices": [{"message": {"content": body["messages"][-1]["content"].upper()}}], "model": body["model"]}
        else:
            (one,) = body["inputs"]
            reply = {"outputs": [{"name": "sum", "shape": [1], "datatype": one["datatype"], "data": [sum(one["data"])]}]}
        self._send(200 if self.path.startswith(("/v3", "/v2/models/m/")) else 404, reply)

    def do_GET(self):
        self._send(200, None)

    def _send(self, status, reply):
        self.send_response(status)
        self.end_headers()
        self.wfile.write(b"" if reply is None else json.dumps(reply).encode())

    def log_message(self, *args):
        pass


@pytest.fixture
def url():
    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


def test_requests_go_out_and_come_back(url):
    answer = ovms.call(url, *ovms.chat_request("m", [{"role": "user", "content": "on"}], temperature=0))
    assert answer["choices"][0]["message"]["content"] == "ON" and answer["model"] == "m"
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    route, body = ovms.infer_request("m", {"x": array})
    assert body["inputs"] == [{"name": "x", "shape": [2, 3], "datatype": "FP32", "data": [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]}]
    found = ovms.read_infer(ovms.call(url, route, body))
    assert found["sum"].dtype == np.float32 and found["sum"].tolist() == [15.0]
    assert ovms.call(url, "/v2/health/ready") is None
    with pytest.raises(LabkitError, match="No answer from"):
        ovms.call(url, "/v2/models/other/infer", {"inputs": [{"datatype": "FP32", "data": []}]})
    with pytest.raises(LabkitError, match="complex128"):
        ovms.infer_request("m", {"x": np.zeros(1, complex)})

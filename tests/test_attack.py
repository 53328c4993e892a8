"""Every attempt against the real gateway fails, and every one succeeds against a server that is careless."""

from __future__ import annotations

import contextlib
import threading
import time

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("cryptography")

from live_gateway import artifact
from test_serve_parts import Counting

from labkit import cli
from labkit.deploy import attack_files
from labkit.deploy.attack import ATTEMPTS, SLOW, Target, attack
from labkit.deploy.attack_parts import ATTEMPTS as PARTS
from labkit.deploy.careless import believe_checksums, careless, open_anything
from labkit.serve.guard import Limits
from labkit.types import LabkitError

KEY = "a-secret-of-ana-1-0123456789"


@contextlib.contextmanager
def gateway(**options):
    """The gateway as `labkit serve` runs it, in this process: its own protocol with patience for one second."""
    import uvicorn

    from labkit.serve.gateway import gateway as application
    from labkit.serve.patience import patient
    from labkit.serve.supervisor import free_port

    port = free_port()
    app = application(artifact(), open_runner=Counting, limits=Limits(body_seconds=1.0), **options)
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error", http=patient(1.0), h11_max_incomplete_event_size=32_768, timeout_graceful_shutdown=2))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield Target(f"http://127.0.0.1:{port}", next(iter((options.get("keys") or {}).values()), ""), patience=1.0)
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def real():
    with gateway(keys={"ana": KEY}) as target:
        return attack(target)


@pytest.fixture(scope="module")
def control():
    with careless() as target:
        return attack(target, opener=open_anything, verifier=believe_checksums)


def test_nothing_gets_through_the_gateway(real):
    assert [one for one in real if not one.held] == []


def test_refusals_show_nothing_of_the_servers_inside(real):
    words = ("functools", "function-", "Traceback", "site-packages", "<object", "pydantic")
    assert not [one for one in real if one.group != "files" and any(word in one.happened for word in words)]


def test_the_control_shows_that_each_attempt_can_succeed(control):
    assert [one for one in control if one.held] == []


def test_both_saw_the_same_attempts_and_there_are_many(real, control):
    assert [one.name for one in sorted(real, key=lambda a: a.name)] == [one.name for one in sorted(control, key=lambda a: a.name)]
    assert len(real) == len(ATTEMPTS) + len(PARTS) + len(SLOW) + len(attack_files.OPENED) + len(attack_files.SIGNED) + 2 > 60
    assert len({(one.group, one.name) for one in real}) == len(real)


def test_a_gateway_without_keys_holds_all_but_what_keys_are_for():
    with gateway() as target:
        done = attack(target)
    assert [one for one in done if not one.held] == [] and not any(one.group == "key" for one in done)
    rebound = next(one for one in done if "rebinding" in one.name)
    assert rebound.happened.startswith("403")


def test_names_that_are_this_machine_are_taken():
    with gateway() as target:
        port = target.address[1]
        for host in (f"127.0.0.1:{port}", f"localhost:{port}", "localhost", "lab.localhost:80", "gateway:8000", f"[::1]:{port}", "192.168.1.5"):
            assert target.ask("GET", "/v1/models", headers={"Host": host}).status == 200, host
        for host in ("evil.example", f"evil.example:{port}", "localhost.evil.example", "127.0.0.1.evil.example"):
            assert target.ask("GET", "/v1/models", headers={"Host": host}).status == 403, host


def test_a_name_is_taken_from_those_who_bring_a_key():
    with gateway(keys={"ana": KEY}) as target:
        assert target.ask("GET", "/v1/models", headers={"Host": "models.example"}).status == 200


def test_a_patient_client_within_its_time_is_served():
    """The head in two pieces, the second after half of the patience."""
    import socket

    with gateway() as target, socket.create_connection(target.address, timeout=5) as line:
        line.sendall(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n")
        time.sleep(0.5)
        line.sendall(b"\r\n")
        assert _whole(line).startswith(b"HTTP/1.1 200")
        time.sleep(0.5)  # the same connection again: idle time is not counted as a slow head's
        line.sendall(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        assert _whole(line).startswith(b"HTTP/1.1 200")


def _whole(line):
    got = b""
    while b'"waiting"' not in got and (part := line.recv(4000)):
        got += part
    return got


def test_a_long_answer_is_no_slow_head():
    with gateway() as target:
        reply = target.ask("POST", "/v1/completions", {"model": "edgehome", "prompt": "a", "max_tokens": 400})
        assert reply.status == 200


def test_a_server_that_dies_has_not_held(monkeypatch):
    from labkit.deploy import attack as module

    with gateway() as target:
        monkeypatch.setattr(Target, "alive", lambda self: False)
        assert not module._try(target, "door", "x", lambda t: ("refused", True)).held


def test_only_this_machine_is_attacked():
    for url in ("http://192.0.2.7:80", "http://models.example", "https://127.0.0.1.example"):
        with pytest.raises(LabkitError, match="not on this machine"):
            Target(url)
    with pytest.raises(LabkitError, match="start the gateway first"):
        attack(Target("http://127.0.0.1:9"))


def test_the_careless_server_reads_only_its_own_invented_files():
    with careless() as target:
        text = target.chat(model="../../../../etc/passwd").text
        assert "invented for a lab" in text
        assert "invented" not in target.chat(model="../../../../../../../../../../etc/passwd").text


@pytest.mark.slow
def test_the_command_serves_attacks_and_stops(home, capsys):
    pytest.importorskip("llama_cpp")
    import json

    status = cli.main(["deploy", "attack", "--serve", "edgehome", "--json"])
    told = json.loads(capsys.readouterr().out)
    assert status == 0 and told["held"] == len(told["attempts"]) > 60

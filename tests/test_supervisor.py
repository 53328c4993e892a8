"""The supervisor: up, healthy, down; nothing is left behind by an end of any kind."""

import os
import signal
import subprocess
import sys
import textwrap
import time
import urllib.request
from pathlib import Path

import psutil
import pytest
from test_serve_parts import settled

from labkit import LabkitError
from labkit.serve import supervisor
from labkit.serve.supervisor import free_port, supervise, taken

SERVER = [sys.executable, "-u", "-m", "http.server", "--bind", "127.0.0.1", "{port}"]
STUBBORN = """
    import http.server, signal, subprocess, sys
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    child = subprocess.Popen([sys.executable, "-c", "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"])
    print("grandchild", child.pid, flush=True)
    http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), http.server.SimpleHTTPRequestHandler).serve_forever()
"""
HERE = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}  # a script elsewhere must find labkit, installed or not
posix = pytest.mark.skipif(os.name != "posix", reason="process groups and signals of POSIX")


def family(pid: int) -> list[psutil.Process]:
    try:
        top = psutil.Process(pid)
        return [top, *top.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def gone(processes) -> bool:
    return settled(lambda: not any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in processes), 10)


def test_it_is_up_inside_the_block_and_gone_after_it(tmp_path):
    with supervise(SERVER, health="/") as child:
        assert urllib.request.urlopen(child.url).status == 200 and child.status is None
        port, processes, log = child.port, family(child.pid), child.log
        assert len(processes) == 2 and "GET /" in child.said()
    assert gone(processes) and not taken(port) and not log.exists()
    child.stop()  # again: nothing happens


def test_an_error_in_the_block_stops_it_too():
    with pytest.raises(KeyboardInterrupt), supervise(SERVER, health="/") as child:
        processes = family(child.pid)
        raise KeyboardInterrupt
    assert gone(processes) and not taken(child.port)


def test_a_command_that_ends_is_told_with_its_status_and_last_words():
    with pytest.raises(LabkitError, match=r"status 3: I cannot"), supervise([sys.executable, "-c", "print('I cannot'); exit(3)"]):
        pass


def test_a_server_that_never_answers_is_stopped_at_the_deadline():
    began = time.monotonic()
    asleep = [sys.executable, "-c", "import time; time.sleep(600)"]
    with pytest.raises(LabkitError, match=r"did not answer /health within 0.5 s"), supervise(asleep, wait=0.5):
        pass
    assert time.monotonic() - began < 8 and not supervisor._running


def test_a_port_that_was_taken_meanwhile_is_replaced(monkeypatch):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as thief:
        ports = iter([thief.getsockname()[1], free_port()])
        monkeypatch.setattr(supervisor, "free_port", lambda: next(ports))
        with supervise([sys.executable, "-m", "http.server", "--bind", "127.0.0.1", "{port}"], health="/") as child:
            assert child.port != thief.getsockname()[1]


@posix
def test_a_server_that_ignores_the_request_to_end_is_killed_with_its_children(tmp_path):
    script = tmp_path / "stubborn.py"
    script.write_text(textwrap.dedent(STUBBORN))
    with supervise([sys.executable, str(script), "{port}"], health="/", grace=0.5) as child:
        processes = family(child.pid)
        assert len(processes) == 3
    assert gone(processes) and not taken(child.port)


@posix
@pytest.mark.parametrize(("how", "times"), [(signal.SIGINT, 1), (signal.SIGINT, 2), (signal.SIGKILL, 1)])
def test_the_end_of_the_parent_is_the_end_of_the_server(tmp_path, how, times):
    """Ctrl-C once, Ctrl-C by an impatient hand, and a kill that gives the parent no time for anything."""
    script = tmp_path / "parent.py"
    script.write_text(textwrap.dedent(f"""
        import time
        from labkit.serve.supervisor import supervise
        with supervise({SERVER!r}, health="/") as child:
            print(child.pid, child.port, flush=True)
            time.sleep(600)
    """))
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=HERE)
    pid, port = map(int, parent.stdout.readline().split())
    processes = family(pid)
    assert len(processes) == 2 and taken(port)
    for _ in range(times):
        parent.send_signal(how)
        time.sleep(0.05)
    assert parent.wait(15) != 0
    parent.stdout.close()
    assert gone(processes) and settled(lambda: not taken(port))


@posix
def test_leaving_without_the_block_is_caught_at_exit(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(textwrap.dedent(f"""
        from labkit.serve.supervisor import supervise
        held = supervise({SERVER!r}, health="/")
        child = held.__enter__()
        print(child.pid, child.port, flush=True)
    """))
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60, env=HERE)
    pid, port = map(int, done.stdout.split())
    assert settled(lambda: not taken(port)) and not psutil.pid_exists(pid)


@posix
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_labkit_serve_ends_politely_and_frees_its_port(tmp_path, how):
    pytest.importorskip("llama_cpp"), pytest.importorskip("fastapi")
    port = free_port()
    asked = ["serve", "edgehome", "--engine", "llamacpp", "--precision", "q8_0", "--threads", "1", "--port", str(port)]
    process = subprocess.Popen([sys.executable, "-m", "labkit", *asked], env={**HERE, "LABKIT_HOME": str(tmp_path)},
                               stderr=subprocess.PIPE, text=True)  # fmt: skip
    assert settled(lambda: taken(port), 60)
    process.send_signal(how)
    assert process.wait(20) in (0, 130, 143, -how) and "Traceback" not in process.stderr.read()
    assert not taken(port)

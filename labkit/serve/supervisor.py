"""Start a server in a child process, wait until it answers, and leave nothing behind: no process, no taken port.

    with supervise([sys.executable, "-m", "labkit", "serve", …, "--port", "{port}"]) as server:
        urllib.request.urlopen(server.url + "/health")

The child's group is ended on the way out of the block, by `atexit`, on Ctrl-C, and, through `_keeper`, when this process is
killed. Only loopback addresses are used.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from labkit.types import LabkitError

HOST = "127.0.0.1"
GRACE = 5.0  # seconds a child has to end politely
_running: weakref.WeakSet[Child] = weakref.WeakSet()


class Child:
    """A server in a process group of its own. `url` is where it listens, `log` the file with all it wrote."""

    def __init__(self, command: Sequence[str], port: int, log: Path, environment: Mapping[str, str] | None, grace: float, scheme: str = "http"):
        self.port, self.url, self.log, self._grace = port, f"{scheme}://{HOST}:{port}", log, grace
        given = [part.replace("{port}", str(port)) for part in command]
        keeper = [sys.executable, "-I", "-S", str(Path(__file__).with_name("_keeper.py")), str(grace), *given]
        flags = {"start_new_session": True} if os.name == "posix" else {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
        with log.open("ab") as sink:
            self._process = subprocess.Popen(
                keeper, stdin=subprocess.PIPE, stdout=sink, stderr=subprocess.STDOUT,
                env={**os.environ, **(environment or {})}, **flags,
            )  # fmt: skip
        _running.add(self)

    @property
    def pid(self) -> int:
        """Leader of the group."""
        return self._process.pid

    @property
    def status(self) -> int | None:
        """The exit status of the command, None while it runs."""
        return self._process.poll()

    def said(self, lines: int = 3) -> str:
        """The last lines of the log."""
        text = self.log.read_text(errors="replace").strip().splitlines() if self.log.exists() else []
        return " | ".join(text[-lines:]) or "it wrote nothing"

    def stop(self) -> None:
        """End the whole group: SIGTERM, then SIGKILL when the grace is over. Safe to call twice."""
        if self._process.stdin and not self._process.stdin.closed:
            with contextlib.suppress(OSError):
                self._process.stdin.close()  # tells the keeper
        self._signal("SIGTERM")
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(self._grace + 1)
        self._signal("SIGKILL")  # also what the command itself started and left
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        _running.discard(self)

    def _signal(self, name: str) -> None:
        if os.name == "posix":
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, getattr(signal, name))
        elif name == "SIGTERM":
            self._process.terminate()


@contextlib.contextmanager
def supervise(
    command: Sequence[str],
    *,
    health: str = "/health",
    wait: float = 90.0,
    port: int = 0,
    environment: Mapping[str, str] | None = None,
    grace: float = GRACE,
    attempts: int = 3,
    folder: Path | None = None,
    certificate: Path | str | None = None,
) -> Iterator[Child]:
    """Run `command`, in which {port} stands for the port, until the block ends.

    Ready means that `health` answers with a status below 400 within `wait` seconds. `port` 0 takes a free one; should another
    process be faster to take it, up to `attempts` others are tried. LabkitError, with the end of the log, when it does not come up.
    The log lies in `folder`, by default one that goes with the block. `certificate` (PEM) is that of a server which speaks https.
    """
    scheme = "https" if certificate else "http"
    with tempfile.TemporaryDirectory(prefix="labkit-child-", ignore_cleanup_errors=True) as own:
        child = None
        try:
            for attempt in range(attempts):
                child = Child(command, port or free_port(), (folder or Path(own)) / f"{attempt}.log", environment, grace, scheme)
                if _ready(child, health, wait, last=bool(port) or attempt == attempts - 1, certificate=certificate):
                    break
                child.stop()
            yield child  # type: ignore[misc]
        finally:
            if child is not None:
                _shielded(child.stop)


def free_port(host: str = HOST) -> int:
    """A port nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]


def taken(port: int, host: str = HOST) -> bool:
    """Whether somebody listens on a port."""
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex((host, port)) == 0


def _ready(child: Child, health: str, wait: float, last: bool, certificate: Path | str | None = None) -> bool:
    until = time.monotonic() + wait
    while time.monotonic() < until:
        if child.status is not None:
            if not last and "address already in use" in child.said(20).lower():
                return False
            raise LabkitError(f"The server stopped with status {child.status}: {child.said()}")
        if _answers(child.url + health, certificate):
            return True
        time.sleep(0.1)
    raise LabkitError(f"The server did not answer {health} within {wait:g} s: {child.said()}")


def _answers(url: str, certificate: Path | str | None) -> bool:
    trusted = [urllib.request.HTTPSHandler(context=ssl.create_default_context(cafile=certificate))] if certificate else []
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), *trusted)  # a proxy has no business with this machine's own ports
    try:
        with opener.open(url, timeout=2) as reply:
            return reply.status < 400
    except (OSError, urllib.error.URLError, ValueError):
        return False


def _shielded(action) -> None:
    """Do `action` to its end; a second Ctrl-C meanwhile is raised afterwards."""
    try:
        action()
    except KeyboardInterrupt:
        action()
        raise


@atexit.register
def _stop_all() -> None:
    for child in list(_running):
        child.stop()

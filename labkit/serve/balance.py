"""nginx in front of several servers: the configuration for each way of choosing one, the program, and what its log tells.

    with lights(3, prefill=0.02, decode=0.05) as servers, nginx(servers, "prefix") as balancer:
        load.run(balancer.url, bodies, due)
    balancer.entries()          # one row a request: which servers were tried, with which result

`lights` are stand-ins that sleep a measured time (`labkit/serve/_light.py`), so that three of them fit beside a notebook.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from labkit.serve.supervisor import HOST, Child, free_port, supervise
from labkit.types import LabkitError, NotInstalled

# What stands first in nginx's `upstream` block. Prefix: the body's first characters, read by nginx itself.
POLICIES = {
    "round robin": "",
    "least connections": "least_conn;",
    "session": "hash $http_x_session consistent;",
    "prefix": "hash $labkit_prefix consistent;",
}
HEALTH = "/balancer"

CONFIGURATION = """\
{user}worker_processes 1;
daemon off;
pid {folder}/nginx.pid;
error_log {folder}/error.log warn;
events {{ worker_connections 2048; }}
http {{
    log_format labkit escape=json '{{"when":$msec,"status":$status,"seconds":$request_time,'
        '"servers":"$upstream_addr","statuses":"$upstream_status","session":"$http_x_session"}}';
    access_log {folder}/access.log labkit;
    client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
    client_body_buffer_size 1m;  # the prefix is read from here
    client_max_body_size 1m;
    server_tokens off;
    map $request_body $labkit_prefix {{ default ""; "~^(?<head>.{{1,{prefix}}})" $head; }}
    upstream models {{
        {policy}
{servers}
        keepalive 32;
    }}
    server {{
        listen {host}:{port};
        location = {health} {{ access_log off; return 200 "ok"; }}
        location / {{
            proxy_pass http://models;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_set_header Host $host;
            proxy_buffering off;  # tokens are passed on as they come
            proxy_read_timeout 120s;
            proxy_next_upstream {retry};
            proxy_next_upstream_tries {tries};
        }}
    }}
}}
"""


def configuration(
    policy: str, ports: Sequence[int], port: int, folder: Path | str, *, repeat: bool = False, prefix: int = 120, rest: float = 2
) -> str:
    """nginx.conf for servers on loopback `ports`; errors of a policy that is unknown or of no servers.

    A server that failed is left alone for `rest` seconds. A POST that a server had already taken is not sent to another
    unless `repeat`: nginx cannot know whether doing it twice does harm. `prefix`: characters of the body that choose the server.
    """
    if policy not in POLICIES:
        raise LabkitError(f"There is no policy {policy!r}; expected one of {', '.join(POLICIES)}.")
    if not ports:
        raise LabkitError("No servers were given; a balancer needs at least one port.")
    lines = [f"        server {HOST}:{one} max_fails=1 fail_timeout={rest:g}s;" for one in ports]
    return CONFIGURATION.format(
        user="user root;\n" if hasattr(os, "geteuid") and os.geteuid() == 0 else "", folder=folder, prefix=prefix,
        policy=POLICIES[policy], servers="\n".join(lines), host=HOST, port=port, health=HEALTH, tries=len(ports),
        retry="error timeout http_502 http_503" + (" non_idempotent" if repeat else ""),
    )  # fmt: skip


class Balancer:
    """A running nginx: where it listens, its configuration, and its log."""

    def __init__(self, url: str, folder: Path, text: str):
        self.url, self.folder, self.text = url, folder, text
        self._kept: list[dict[str, Any]] = []

    def entries(self) -> list[dict[str, Any]]:
        """One row a request: when, status, seconds, `servers` and `statuses` tried in order (lists), session."""
        file = self.folder / "access.log"
        if file.exists():
            self._kept = [_entry(json.loads(line)) for line in file.read_text().splitlines()]
        return self._kept


def _entry(row: dict[str, Any]) -> dict[str, Any]:
    lists = {name: [part.strip() for part in row[name].split(",") if part.strip()] for name in ("servers", "statuses")}
    return {**row, **lists, "retries": max(0, len(lists["servers"]) - 1)}


@contextlib.contextmanager
def nginx(servers: Sequence[Child | int], policy: str = "round robin", **options: Any) -> Iterator[Balancer]:
    """nginx in front of `servers` (children or ports) until the block ends; its log can be read afterwards."""
    program = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    if program is None:
        raise NotInstalled("nginx is not installed. Try:  apt-get install nginx-light")
    ports, port = [one if isinstance(one, int) else one.port for one in servers], free_port()
    with tempfile.TemporaryDirectory(prefix="labkit-nginx-", ignore_cleanup_errors=True) as folder:
        text = configuration(policy, ports, port, folder, **options)
        (Path(folder) / "nginx.conf").write_text(text)
        command = [program, "-p", folder, "-c", f"{folder}/nginx.conf", "-e", f"{folder}/error.log"]
        with supervise(command, port=port, health=HEALTH, wait=20) as child:
            balancer = Balancer(child.url, Path(folder), text)
            yield balancer
        balancer.entries()


@contextlib.contextmanager
def lights(count: int, *, slow: Sequence[float] = (), **settings: Any) -> Iterator[list[Child]]:
    """`count` stand-ins named a, b, c …; `slow[i]` multiplies the times of server i; `settings` as in `_light.Light`."""
    program = str(Path(__file__).with_name("_light.py"))
    with contextlib.ExitStack() as stack:
        children = []
        for i in range(count):
            factor = slow[i] if i < len(slow) else 1.0
            own = {**settings, **{name: factor * settings[name] for name in ("prefill", "decode") if name in settings}}
            command = [sys.executable, "-I", "-S", program, "{port}", chr(ord("a") + i), json.dumps(own)]
            children.append(stack.enter_context(supervise(command, wait=20, grace=1)))
        yield children


def rendezvous(key: str, servers: Sequence[str]) -> str:
    """The server a key belongs to: the one whose hash together with the key is highest (Thaler and Ravishankar, 1996).

    When a server goes, only its own keys move.
    """
    return max(servers, key=lambda server: hashlib.sha256(f"{key} {server}".encode()).hexdigest())


def modulo(key: str, servers: Sequence[str]) -> str:
    """The server at the key's hash modulo their number: when the number changes, most keys move."""
    return servers[int(hashlib.sha256(key.encode()).hexdigest(), 16) % len(servers)]


def kill(child: Child) -> None:
    """End a server as a crash does: SIGKILL to its whole group, nothing said to anyone."""
    if os.name == "posix":
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
    else:
        child.stop()

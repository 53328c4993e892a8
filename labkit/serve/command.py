"""`labkit serve MODEL --engine E --precision P`: the gateway on the command line."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from labkit.serve.guard import Limits
from labkit.types import LabkitError, Recipe

KEYS = "LABKIT_API_KEYS"


def options(one: argparse.ArgumentParser) -> None:
    granted = Limits()
    one.epilog = f"API keys are NAME=SECRET, one a line in a file only you can read, or comma-separated in {KEYS}."
    one.add_argument("model", help="edgehome, a folder, a hub id, or standin:NAME")
    one.add_argument("--engine", required=True)
    one.add_argument("--precision", required=True, help="in the engine's own word: q4_k_m, int4 ...")
    one.add_argument("--name", help="what clients call the model (default: the checkpoint's name)")
    one.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    one.add_argument("--port", type=int, default=8000)
    one.add_argument("--adapter", action="append", default=[], metavar="NAME=FOLDER", help="a PEFT folder, asked for as MODEL:NAME")
    one.add_argument("--threads", type=int)
    one.add_argument("--queue", type=int, default=granted.queue, help=f"requests that may wait (default: {granted.queue})")
    one.add_argument("--seconds", type=float, default=granted.seconds, help=f"for one answer (default: {granted.seconds:g})")
    one.add_argument("--body-bytes", type=int, default=granted.body_bytes, help=f"of a request (default: {granted.body_bytes})")
    one.add_argument("--patience", type=float, default=granted.body_seconds, help=f"seconds for a request's head, and for its body (default: {granted.body_seconds:g})")
    one.add_argument("--per-minute", type=float, help="requests a key or an address may make (default: any number)")
    one.add_argument("--keys", type=Path, metavar="FILE", help="API keys; without any, no key is asked for")
    one.add_argument("--audit", type=Path, metavar="FILE", help="write an audit log")
    one.add_argument("--tls-cert", type=Path, metavar="FILE", help="certificate chain (PEM): serve https")
    one.add_argument("--tls-key", type=Path, metavar="FILE", help="its private key (PEM)")


def command(chosen: argparse.Namespace) -> int:
    """Serve a model with OpenAI's and Ollama's interfaces until Ctrl-C."""
    import labkit
    from labkit.serve.gateway import gateway, require

    require()
    keys = read_keys(chosen.keys)
    _check(chosen, keys)
    adapters = _adapters(chosen.adapter)
    made = labkit.build(labkit.checkpoint(chosen.model), Recipe(chosen.engine, chosen.precision))
    limits = Limits(chosen.queue, chosen.seconds, chosen.body_bytes, chosen.patience, per_minute=chosen.per_minute)
    app = gateway(
        made, name=chosen.name, limits=limits, keys=keys, audit=chosen.audit, threads=chosen.threads, adapters=adapters
    )
    scheme = "https" if chosen.tls_cert else "http"
    print(f"{made.name} at {scheme}://{chosen.host}:{chosen.port}/v1 and /api; Ctrl-C ends it.", file=sys.stderr, flush=True)
    return run(app, chosen.host, chosen.port, chosen.tls_cert, chosen.tls_key, chosen.patience)


def run(app, host: str, port: int, certificate: Path | None = None, key: Path | None = None, patience: float = 10.0) -> int:
    """Serve an application until it is told to stop; 0 when it was, 1 when it could not start (its log says why)."""
    import uvicorn

    from labkit.serve.patience import patient

    settings = uvicorn.Config(
        app, http=patient(patience), host=host, port=port, log_level="warning", access_log=False, server_header=False, timeout_keep_alive=30,
        timeout_graceful_shutdown=5, limit_concurrency=1000, h11_max_incomplete_event_size=32_768,
        ssl_certfile=certificate, ssl_keyfile=key,
    )  # fmt: skip
    server = uvicorn.Server(settings)
    try:
        server.run()
    except KeyboardInterrupt:
        raise
    finally:
        app.state.served.close()
    return 0 if server.started else 1


def read_keys(file: Path | None) -> dict[str, str]:
    """Names and secrets of a keys file, or of LABKIT_API_KEYS; none when neither is there."""
    if file is None:
        lines = os.environ.get(KEYS, "").split(",")
    else:
        if not file.is_file():
            raise LabkitError(f"There is no keys file {file}; write one: a line NAME=SECRET for every caller.")
        if os.name == "posix" and file.stat().st_mode & 0o077:
            raise LabkitError(f"Others can read {file}; keep it to yourself: chmod 600 {file}")
        lines = file.read_text(encoding="utf-8").splitlines()
    keys: dict[str, str] = {}
    for line in filter(None, (line.strip() for line in lines)):
        name, sign, secret = line.partition("=")
        if not sign or not name.strip() or len(secret.strip()) < 16:
            raise LabkitError(f"The key of {name.strip()[:20]!r} is not NAME=SECRET with a secret of 16 characters or more.")
        keys[name.strip()] = secret.strip()
    return keys


def _adapters(given: list[str]) -> dict[str, str]:
    pairs = [one.partition("=")[::2] for one in given]
    if wrong := [one for one, (name, folder) in zip(given, pairs, strict=True) if not (name and folder)]:
        raise LabkitError(f"--adapter {wrong[0]!r} was given; expected NAME=FOLDER, the folder as PEFT saves it.")
    return dict(pairs)


def _check(chosen: argparse.Namespace, keys: dict[str, str]) -> None:
    if bool(chosen.tls_cert) != bool(chosen.tls_key):
        raise LabkitError("A certificate and its key belong together; give both --tls-cert and --tls-key.")
    for file in filter(None, (chosen.tls_cert, chosen.tls_key)):
        if not file.is_file():
            raise LabkitError(f"There is no file {file}; expected one in PEM form.")
    if chosen.host not in ("127.0.0.1", "localhost", "::1") and not keys:
        raise LabkitError(f"{chosen.host} is open to other machines and no API key is set; give --keys FILE.")
    if min(chosen.queue, chosen.body_bytes) < 1 or min(chosen.seconds, chosen.patience) <= 0 or not 0 <= chosen.port <= 65535:
        raise LabkitError("A limit below 1 (or a port above 65535) was given; leave it out for the default.")

"""A gateway in this process on a free port, over a runner the test chooses, and an artifact that was never built."""

from __future__ import annotations

import contextlib
import threading
import time
from pathlib import Path

import labkit
from labkit.types import Artifact, Recipe


def artifact(**changes) -> Artifact:
    house = labkit.checkpoint("edgehome")
    facts = {"path": Path("nowhere"), "recipe": Recipe("fake", "f16"), "checkpoint": house, "weight_bytes": 2 * house.weights,
             "weights": house.weights, "bits_per_weight": 16.0, "seconds": 0.0, "engine_version": "1"}  # fmt: skip
    return Artifact(**{**facts, **changes})


@contextlib.contextmanager
def live(runner, certificate=None, key=None, **options):
    """Yields (url, app); the server runs in a thread and is stopped on the way out."""
    import uvicorn

    from labkit.serve.gateway import gateway
    from labkit.serve.supervisor import free_port

    app, port = gateway(artifact(), open_runner=lambda: runner, **options), free_port()
    config = uvicorn.Config(app, port=port, log_level="error", timeout_graceful_shutdown=2, ssl_certfile=certificate, ssl_keyfile=key)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield f"http{'s' if certificate else ''}://127.0.0.1:{port}", app
    finally:
        server.should_exit = True
        thread.join()

"""vLLM on a CPU, in the environment `labkit env vllm` made: its command, and the running server.

    with serve(checkpoint.path) as server:
        load.run(server.url, bodies, due)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from labkit import env, host
from labkit.serve.supervisor import Child, supervise


def command(folder: Path | str, *, context: int = 512, sequences: int = 64, name: str = "edgehome", cache_bytes: int = 2**27) -> list[str]:
    """The server's command for a Hugging Face folder; {port} stands for the port. NotInstalled without the environment."""
    return [
        str(env.require("vllm")), "-m", "vllm.entrypoints.cli.main", "serve", str(folder), "--served-model-name", name,
        "--host", "127.0.0.1", "--port", "{port}", "--dtype", "float32", "--max-model-len", str(context),
        "--max-num-seqs", str(sequences), "--kv-cache-memory-bytes", str(cache_bytes), "--enforce-eager",
    ]  # fmt: skip


@contextlib.contextmanager
def serve(folder: Path | str, *, wait: float = 300.0, **options: Any) -> Iterator[Child]:
    """vLLM for the folder until the block ends. It starts three processes, all ended with the block."""
    quiet = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    threads = {"OMP_NUM_THREADS": str(host.cpus())}
    with supervise(command(folder, **options), wait=wait, grace=20, environment={**quiet, **threads}) as child:
        yield child

"""llama-cpp-python's own class, `Llama`, opened with settings that suit this machine.

Its defaults are one thread on two cores and flash attention off. And on processors with Intel's AMX, the library it is
built from rearranges weights for instructions that then kill the process ("Illegal instruction"); rearranging is
switched off there, which the class itself has no parameter for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from labkit import host
from labkit.engines import _ggml
from labkit.engines._llamacpp_repack import broken_amx


def open_llama(path: str | Path, *, threads: int | None = None, n_ctx: int = 512, **settings: Any) -> Any:
    """A `llama_cpp.Llama` for a GGUF file: all usable cores (or `threads`), flash attention on, no chatter.

    Further settings are the class's own: https://llama-cpp-python.readthedocs.io/en/latest/api-reference/
    """
    _ggml.library()
    from llama_cpp import Llama

    threads = threads or host.cpus()
    wanted = {"n_threads": threads, "n_threads_batch": threads, "flash_attn": True, "verbose": False, **settings}
    with safe_defaults():
        return Llama(str(path), n_ctx=n_ctx, **wanted)


@contextlib.contextmanager
def safe_defaults() -> Iterator[None]:
    """Within the block, models load without rearranged weights where those would end the process."""
    library = _ggml.library()
    if not broken_amx():
        yield
        return
    plain = library.llama_model_default_params

    def without_repack() -> Any:
        params = plain()
        params.use_extra_bufts = False
        return params

    library.llama_model_default_params = without_repack
    try:
        yield
    finally:
        library.llama_model_default_params = plain

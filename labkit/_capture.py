"""Send everything a piece of code prints, from Python or from C, to a file."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def captured(path: Path) -> Iterator[None]:
    """Append stdout and stderr of this process and its children to `path` while the block runs."""
    with open(path, "a", encoding="utf-8", errors="replace", buffering=1) as log:
        _flush()
        saved = [(fd, os.dup(fd)) for fd in (1, 2) if _is_open(fd)]
        try:
            for fd, _ in saved:
                os.dup2(log.fileno(), fd)
            with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
                yield
        finally:
            _flush()
            for fd, copy in saved:
                os.dup2(copy, fd)
                os.close(copy)


def tail(path: Path, lines: int = 15) -> str:
    """The last lines of a log, for an error message."""
    if not path.exists():
        return ""
    return "\n".join(path.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-lines:])


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def _flush() -> None:
    """Empty Python's and C's buffers, so that what was printed before or inside lands where it belongs."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    with contextlib.suppress(Exception):
        ctypes.CDLL(None).fflush(None)

"""Writing files so that a crash, a full disk or a second process leaves nothing half-done."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from labkit.types import LabkitError

PARTIAL = ".partial-"
FULL = (errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC))


class Busy(Exception):
    """Another process holds the lock."""


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold an exclusive lock on `path` (created if absent) among processes; the system frees it if we die.

    `wait=False` raises Busy when another process holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as file:
        _lock(file, wait)
        try:
            yield
        finally:
            _unlock(file)


try:
    import fcntl

    def _lock(file: Any, wait: bool) -> None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise Busy from None

    def _unlock(file: Any) -> None:
        fcntl.flock(file, fcntl.LOCK_UN)

except ImportError:  # Windows
    import msvcrt
    import time

    def _lock(file: Any, wait: bool) -> None:
        while True:  # LK_LOCK gives up after ten seconds; a build takes longer
            try:
                file.seek(0)
                return msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            except OSError:
                if not wait:
                    raise Busy from None
                time.sleep(0.2)

    def _unlock(file: Any) -> None:
        file.seek(0)
        msvcrt.locking(file.fileno(), msvcrt.LK_UNLCK, 1)


@contextmanager
def written_beside(target: Path) -> Iterator[Path]:
    """Yield an empty folder next to `target`; on success it takes `target`'s place, else it vanishes.

    Call it while holding a lock on `target`: leftovers of killed writers of the same target are removed first.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    for leftover in target.parent.glob(f"{PARTIAL}{target.name}-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    partial = target.parent / f"{PARTIAL}{target.name}-{os.getpid()}"
    partial.mkdir()
    try:
        yield partial
        replace_folder(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def replace_folder(new: Path, target: Path) -> None:
    """Move the folder `new` to `target`; an older `target` is set aside first, so that it is never half-replaced."""
    for file in new.rglob("*"):
        if file.is_file() and file.suffix == ".json":
            sync(file)
    old = target.parent / f"{PARTIAL}{target.name}-old-{os.getpid()}"
    if target.exists():
        target.rename(old)
    new.rename(target)
    sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def sync(path: Path) -> None:
    """Ask the system to put a file (or a folder's entries) on the disk; a no-op where it cannot."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return  # Windows cannot open a folder
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write `data` to `path` as JSON, in one step."""
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False, default=str) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` in one step: a reader sees the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{PARTIAL}{path.name}-{os.getpid()}")
    try:
        partial.write_text(text, encoding="utf-8")
        sync(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read_json(path: Path, what: str) -> dict[str, Any]:
    """The JSON object in `path`; raises LabkitError naming `what` when it is absent or damaged."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise LabkitError(f"{what}: {path} is missing; expected a JSON file there.") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise LabkitError(f"{what}: {path} is damaged ({error}); expected JSON. Get or make that file again.") from None
    if not isinstance(data, dict):
        raise LabkitError(f"{what}: {path} holds a {type(data).__name__}; expected a JSON object.")
    return data


def need_space(folder: Path, needed: int, what: str) -> None:
    """Raise LabkitError when fewer than `needed` bytes are free where `folder` is or will be."""
    from labkit import host

    free = host.free_disk(folder)
    if free < needed:
        raise LabkitError(
            f"{what} needs about {size(needed)} of disk, but {folder} has {size(free)} free; "
            "run `labkit clean`, or set LABKIT_HOME to a larger disk."
        )


def is_disk_full(error: BaseException) -> bool:
    """Whether an error, or what caused it, says that the disk (or a quota) is full."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in FULL:
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def size(n: float) -> str:
    """Bytes in words: decimal units, three figures."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(n) < 1000:
            return f"{n:.3g} {unit}"
        n /= 1000
    return f"{n:.3g} TB"

"""An audit log that shows when it was changed: JSON lines, each with the hash of the one before.

It says who asked for what and how it ended, never what was in a prompt or an answer.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from labkit.types import LabkitError

START = "0" * 64


class AuditLog:
    """Appends to a file only its owner can read. `write` flushes each line; close it when the server stops."""

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self._last = START
        if self.path.exists():
            self._last = deque(_hashes(self.path), maxlen=1).pop() if self.path.stat().st_size else START  # checks what is there
        self.path.touch(mode=0o600)
        self._file = self.path.open("a", encoding="utf-8")

    def write(self, **fields: Any) -> None:
        entry = {"when": datetime.now(UTC).isoformat(timespec="milliseconds"), **fields, "previous": self._last}
        line = json.dumps(entry)
        self._last = hashlib.sha256(line.encode()).hexdigest()
        self._file.write(line + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def verify(path: Path | str) -> int:
    """The number of entries, when none was changed, removed from the middle or put in. LabkitError names the line.

    Lines cut off at the end leave no trace in the file itself: keep the last hash, or a copy, on another machine.
    """
    return sum(1 for _ in _hashes(Path(path)))


def _hashes(path: Path) -> Iterator[str]:
    last = START
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            line = line.rstrip("\n")
            try:
                previous = json.loads(line)["previous"]
            except (ValueError, KeyError, TypeError):
                raise LabkitError(f"Line {number} of {path} is no audit entry; keep the file and find out who wrote it.") from None
            if previous != last:
                raise LabkitError(f"Line {number} of {path} does not follow the one before; an entry was changed or removed.")
            last = hashlib.sha256(line.encode()).hexdigest()
            yield last

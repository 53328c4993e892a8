"""What the learner has done so far: one small JSON file under LABKIT_HOME that never leaves the machine.

`{"schema": 1, "exercises": {name: {"state", "attempts", "when"}}, "quizzes": {question: {"right", "tries", "when"}},
"settings": {"language": {"value", "when"}}}`
LABKIT_PROGRESS names another file; headless runs use it so that they do not touch the learner's own.
"""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from labkit._files import locked, write_json

SCHEMA = 1


def path() -> Path:
    from labkit.host import home

    return Path(os.environ.get("LABKIT_PROGRESS") or home() / "progress.json")


def read() -> dict[str, Any]:
    """The whole record. An unreadable file is put aside as `progress.json.broken`, never overwritten."""
    file = path()
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        found = _empty() | data
        if all(isinstance(found[kind], dict) for kind in ("exercises", "quizzes", "settings")):
            return found
    except FileNotFoundError:
        return _empty()
    except (ValueError, TypeError):
        pass
    file.replace(file.with_name(file.name + ".broken"))
    return _empty()


def _empty() -> dict[str, Any]:
    return {"schema": SCHEMA, "exercises": {}, "quizzes": {}, "settings": {}}


def note(kind: str, name: str, **facts: Any) -> None:
    """Merge `facts` into one entry of "exercises", "quizzes" or "settings", atomically, also with two notebooks open."""
    with locked(path().with_name(path().name + ".lock")):
        data = read()
        entry = data[kind].setdefault(name, {})
        entry |= facts | {"when": datetime.now(UTC).isoformat(timespec="seconds")}
        write_json(path(), data)

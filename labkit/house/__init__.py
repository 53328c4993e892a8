"""The house model `edgehome`: its language, its tasks and scores, and the recipe that trains it.

`tasks`, `score`, `heldout_text`, `calibration_text` and `SCHEMA` need neither torch nor the weights.

The tree: `words` and `language` (how things are said), `rooms`, `clock`, `people`, `senses`, `catalogue` (one group of intents
each), `tasks` (splits, score, texts), `tokenizer`, `model`, `train`, `evaluate`, `card`, `cli`.
"""

from __future__ import annotations

from typing import Any

from labkit.house.language import Task
from labkit.house.tasks import INTENTS, calibration_text, heldout_text, score, tasks

__all__ = ["INTENTS", "SCHEMA", "Task", "calibration_text", "heldout_text", "score", "tasks"]


def __getattr__(name: str) -> Any:
    if name == "SCHEMA":
        from labkit.house.tasks import schema

        return schema()
    raise AttributeError(f"module 'labkit.house' has no attribute {name!r}")

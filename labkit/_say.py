"""How the command line says its results: words for people, one JSON object for programs."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from typing import Any


def emit(chosen: argparse.Namespace, data: Mapping[str, Any], text: str) -> None:
    """The result on stdout: one JSON object with --json, else words."""
    print(json.dumps(data, default=str) if chosen.json else text)


def columns(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows with the same keys as aligned text."""
    if not rows:
        return ""
    cells = [[str(key) for key in rows[0]], *([str(value) for value in row.values()] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in cells)

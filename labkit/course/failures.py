"""What went wrong in an executed notebook, in a form that is the same for the same failure on another machine."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

MASKS = (
    (re.compile(r"\x1b\[[0-9;]*m"), ""),
    (re.compile(r"0x[0-9a-fA-F]+"), "<address>"),
    (re.compile(r"(?:[A-Za-z]:)?(?:[\\/][\w.+\-]+){2,}[\\/]?"), "<path>"),
    (re.compile(r"\b[0-9a-f]{12,}\b"), "<hash>"),
    (re.compile(r"\d+(?:\.\d+)?"), "<n>"),
)


def signature(name: str, message: str) -> str:
    """The error's kind and first line, with paths, addresses, hashes and numbers masked."""
    line = (message.strip().splitlines() or [""])[0]
    for pattern, mask in MASKS:
        line = pattern.sub(mask, line)
    return f"{name}: {line}"[:200]


def failed_cells(notebook: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The cells with an error, in order: {"cell": id, "index", "signature", "message"}. A clean SystemExit is none."""
    found = []
    for index, cell in enumerate(_own_cells(notebook)):
        for output in cell.get("outputs", []):
            if output["output_type"] != "error" or (output["ename"] == "SystemExit" and output["evalue"] in ("", "0")):
                continue
            name, message = output["ename"], output["evalue"]
            about = {"cell": cell.get("id"), "index": index, "message": f"{name}: {message}"[:2000]}
            found.append(about | {"signature": signature(name, message)})
    return found


def last_cell(notebook: Mapping[str, Any]) -> dict[str, Any]:
    """The code cell that was running when everything ended: the last one that was started."""
    started = {}
    for index, cell in enumerate(_own_cells(notebook)):
        if cell["cell_type"] == "code" and cell.get("metadata", {}).get("papermill", {}).get("start_time"):
            started = {"id": cell.get("id"), "index": index}
    return started


def _own_cells(notebook: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The lab's own cells: without those papermill adds for parameters and error marks."""
    added = {"injected-parameters", "papermill-error-cell-tag"}
    return [c for c in notebook["cells"] if not added & set(c.get("metadata", {}).get("tags", []))]

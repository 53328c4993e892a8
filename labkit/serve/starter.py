"""A folder to begin a model service with: three services, five kinds of tests, gold answers. Yours from then on.

    python -m labkit.serve.starter my-service
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from labkit import house
from labkit.types import LabkitError

SOURCE = Path(__file__).parents[1] / "data" / "templates" / "service_tests"
BAR = 0.8  # share of gold answers that must be right


def starter(into: Path | str, *, gold: int = 12, force: bool = False) -> list[Path]:
    """Copy the template into a new folder, with the house's schema and `gold` requests; returns the files written.

    LabkitError when the folder holds anything already; `force` replaces the template's files and leaves others alone.
    """
    into = Path(into)
    if into.exists() and any(into.iterdir()) and not force:
        raise LabkitError(f"{into} holds files already; give a new folder, or force=True to replace the template's own.")
    written = []
    for source in sorted(path for path in SOURCE.rglob("*") if path.is_file() and "__pycache__" not in path.parts):
        target = into / source.relative_to(SOURCE)
        target.parent.mkdir(parents=True, exist_ok=True)
        written.append(Path(shutil.copyfile(source, target)))
    for name, content in (("commands.schema.json", house.SCHEMA), ("gold.json", gold_answers(gold))):
        (into / name).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        written.append(into / name)
    return written


def gold_answers(n: int) -> dict:
    """`n` requests of the house that need no context, with their answers and the share that must be right."""
    plain = [task for task in house.tasks("heldout", 12 * n) if len(task.messages) == 1 and task.intent != "catalogue"]
    if not 2 <= n <= len(plain):
        raise LabkitError(f"{n} gold answers were asked for; expected 2 to {len(plain)}.")
    step = len(plain) // n
    chosen = plain[: n * step : step]
    return {"at_least": BAR, "requests": [{"text": task.messages[0]["content"], "command": task.answer} for task in chosen]}


if __name__ == "__main__":
    try:
        print("\n".join(map(str, starter(sys.argv[1] if len(sys.argv) > 1 else "my-service"))))
    except LabkitError as error:
        sys.exit(str(error))

"""Run one notebook in a fresh kernel: `python -m labkit.course.worker JOB.json`. `run` starts one for each lab.

Every cell is tried, also after a failed one. What happened goes to the job's `outcome` file; the executed notebook
is saved after each cell, so that even a killed kernel leaves everything up to its last cell.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path
from typing import Any


def main(job_file: str) -> int:
    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    threading.Thread(target=_end_with_parent, daemon=True).start()
    outcome = execute(job["notebook"], job["executed"], job["parameters"], job["folder"])
    Path(job["outcome"]).write_text(json.dumps(outcome), encoding="utf-8")
    return 0


def execute(notebook: str, executed: str, parameters: dict[str, Any], folder: str) -> dict[str, Any]:
    """Run through papermill; returns {"dead": whether the kernel died, "error": text or None}."""
    import papermill
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    try:
        papermill.execute_notebook(
            notebook,
            executed,
            parameters,
            cwd=folder,
            kernel_name="python3",
            language="python",
            progress_bar=False,
            allow_errors=True,
        )
    except DeadKernelError as error:
        return {"dead": True, "error": str(error)}
    except PapermillExecutionError:
        return {"dead": False, "error": None}  # the cells hold the errors
    except (
        Exception
    ) as error:  # the kernel did not start, the notebook is not JSON ...: one failed lab, not a failed run
        return {"dead": False, "error": f"{type(error).__name__}: {error}"}
    return {"dead": False, "error": None}


def _end_with_parent() -> None:
    """Standard input closes when the program that started us is gone; a kernel ends with its own parent, us."""
    sys.stdin.read()
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))

"""The workers of a fleet: who they are, as they say and as the client sees them, and one task done in a process of its own.

Tasks and results travel as JSON text, so client and worker need the same labkit but not the same Python or pickles.
`python -m labkit._fleet_task JOB.json` is the child that builds or measures; the worker ends it when it takes too long, and
it ends by itself when the worker is gone.
"""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from labkit import __version__
from labkit._files import is_disk_full, locked
from labkit.ledger import HOST_KEYS
from labkit.types import LabkitError

PROTOCOL = 1  # of the JSON between client and worker
HELLO = 60.0  # seconds a worker may take to say who it is
BOOT = Path("/proc/sys/kernel/random/boot_id")


def profile() -> str:
    """Who this worker is, as JSON: labkit and engine versions, circumstances, and the machine that it shares with others."""
    from labkit import engines, host

    return json.dumps({
        "protocol": PROTOCOL, "labkit": __version__, "hostname": platform.node(), "machine": machine(),
        "engines": {name: engines.version(name) for name in engines.ENGINES}, "host": host.circumstances(),
    }, default=str)  # fmt: skip


def machine() -> str:
    """One word for the machine whose processors we run on: containers of one kernel share it, whatever they are called."""
    try:
        return BOOT.read_text().strip()
    except OSError:
        return platform.node()


def perform(job: str, seconds: float) -> str:
    """Do one task in a child process; the result as JSON, with `error` and `kind` where it could not be done. Never raises."""
    try:
        with tempfile.TemporaryDirectory(prefix="labkit-task-") as folder:
            return _perform(job, seconds, Path(folder))
    except Exception as error:
        return _failed("disk" if is_disk_full(error) else "failed", f"{type(error).__name__}: {error}")


def _perform(job: str, seconds: float, folder: Path) -> str:
    from psutil import Popen

    from labkit.course.watch import end, watch

    (folder / "job.json").write_text(job, encoding="utf-8")
    command = [sys.executable, "-m", "labkit._fleet_task", str(folder / "job.json")]
    with open(folder / "log.txt", "w+b") as log:
        process = Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True)
        try:
            _, late = watch(process, time.monotonic() + seconds, itself=True)
        finally:
            end(process)
        log.seek(0)
        said = " | ".join(log.read().decode(errors="replace").strip().splitlines()[-3:])
    if late:
        return _failed("late", f"It was stopped after {seconds:.0f} s.")
    try:
        return (folder / "result.json").read_text(encoding="utf-8")
    except OSError:
        return _failed("died", f"Its process ended with status {process.returncode}: {said or 'it wrote nothing'}")


def _failed(kind: str, error: str) -> str:
    return json.dumps({"kind": kind, "error": error})


@dataclass(frozen=True)
class Worker:
    """A worker that may be given tasks."""

    address: str
    device: str  # its name and the fixed circumstances, hashed
    name: str | None  # None: this machine, as any other measurement here
    machine: str
    profile: Mapping[str, Any] = field(compare=False, repr=False)


class Fleet:
    """The workers of a Dask client, as labkit sees them. `here`: they are this machine's own (a LocalCluster)."""

    def __init__(self, client: Any, *, here: bool = False, hello: float = HELLO):
        self.client, self.here, self.hello = client, here, hello
        self.workers: dict[str, Worker] = {}
        self.refused: dict[str, str] = {}  # address -> why no task goes there

    def look(self) -> None:
        """Forget workers that are gone and greet new ones; LabkitError when the scheduler itself is gone."""
        if self.client.status != "running":
            raise LabkitError("The scheduler is gone; what had arrived is in the ledger. Run the sweep again to go on.")
        seen = self.client.scheduler_info(n_workers=-1)["workers"]
        self.workers = {address: one for address, one in self.workers.items() if address in seen}
        new = [address for address in seen if address not in self.workers and address not in self.refused]
        asked = {a: self.client.submit(profile, workers=[a], pure=False, allow_other_workers=False) for a in new}
        end = time.monotonic() + self.hello
        for address, future in asked.items():
            self._greet(address, str(seen[address].get("name", address)), future, max(0.1, end - time.monotonic()))

    def _greet(self, address: str, name: str, future: Any, seconds: float) -> None:
        try:
            told = json.loads(future.result(timeout=seconds))
        except Exception as error:  # it has no labkit, another Python, or does not answer
            future.cancel()
            self.refused[address] = f"it does not say who it is ({type(error).__name__}: {error}); install labkit {__version__} there"
            return
        if (told["labkit"], told["protocol"]) != (__version__, PROTOCOL):
            self.refused[address] = f"it has labkit {told['labkit']}, we have {__version__}; install the same there"
            return
        label = None if self.here else told["hostname"] if name == address or "://" in name else name
        fixed = [label, *(told["host"].get(key) for key in HOST_KEYS)]
        device = hashlib.sha256(json.dumps(fixed).encode()).hexdigest()[:12]
        self.workers[address] = Worker(address, device, label, told["machine"], told)

    def devices(self) -> dict[str, Worker]:
        """Device -> one of its workers."""
        return {one.device: one for one in self.workers.values()}


# --- the child -------------------------------------------------------------------------------------------------------


def main(job_file: str) -> int:
    """Do the job in the file and write `result.json` beside it."""
    from labkit.course.worker import _end_with_parent

    threading.Thread(target=_end_with_parent, daemon=True).start()
    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    try:
        answer = json.dumps({"measurements": [one.to_json() for one in _do(job)]}, default=str)
    except LabkitError as error:
        answer = _failed("disk" if is_disk_full(error) else "refused", str(error))
    except Exception as error:
        answer = _failed("disk" if is_disk_full(error) else "failed", f"{type(error).__name__}: {error}")
    Path(job_file).with_name("result.json").write_text(answer, encoding="utf-8")
    return 0


def _do(job: Mapping[str, Any]) -> list[Any]:
    """Build what the job names and, unless that was all, measure it while nothing else of this home measures."""
    import labkit
    from labkit import host, measure
    from labkit.types import Recipe

    source = labkit.checkpoint(job["model"])
    if source.fingerprint != job["fingerprint"]:
        raise LabkitError(f"{job['model']} is another model there: its files differ from ours; copy the same files.")
    artifacts = [labkit.build(source, Recipe.from_json(one)) for one in job["recipes"]]
    metric, settings = job["metric"], dict(job["settings"])
    if metric == "build":
        return []
    if job["reference"]:
        settings["reference"] = labkit.build(source, Recipe.from_json(job["reference"]))
    with locked(host.home() / ".measuring.lock"):
        began = time.time()
        if metric == "speed":
            found = measure.compare(artifacts, **settings)
        else:
            found = [measure.METRICS[metric].measure(artifact, **settings) for artifact in artifacts]
        span = {"span": [began, time.time()]}  # proves afterwards that nothing else was measured here meanwhile
    return [replace(one, details=dict(one.details) | span) for one in found]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))

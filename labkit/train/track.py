"""Every run to MLflow, through this one file: a SQLite file and a folder under labkit's home, no server, no network.

    with track.run("lora rank 8", asdict(settings)) as log:
        train(model, batch, settings, log=log.row)
        log.register(folder, "edgehome-lora", "champion")

`mlflow ui --backend-store-uri URI` with the URI of `track.uri()` shows them. Without MLflow the same code runs and says so once.
"""

from __future__ import annotations

import importlib.util
import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from labkit import host
from labkit.i18n import tr
from labkit.types import LabkitError

FLUSH = 500  # values kept before they are written: one transaction a step would cost more than a small step does
_said = False


def folder() -> Path:
    """Where runs and their files lie."""
    return host.home() / "mlflow"


def uri() -> str:
    """The address of the runs, for `mlflow ui` and for MLflow's own functions."""
    return f"sqlite:///{folder() / 'runs.db'}"


def available() -> bool:
    return importlib.util.find_spec("mlflow") is not None


class Log:
    """One run. `id` is MLflow's; a run without MLflow has none and keeps nothing."""

    def __init__(self, client: Any = None, run: Any = None):
        self._client, self._run, self._waiting = client, run, []

    @property
    def id(self) -> str | None:
        return self._run and self._run.info.run_id

    def row(self, step: int, values: Mapping[str, float]) -> None:
        """Metrics of a step; `train(log=log.row)` calls it after every step."""
        if self._client:
            from mlflow.entities import Metric

            now = int(time.time() * 1000)
            kept = {k: float(v) for k, v in values.items() if k != "step"}
            self._waiting += [Metric(k, v, now, step) for k, v in kept.items() if math.isfinite(v)]
            if len(self._waiting) >= FLUSH:
                self.flush()

    def flush(self) -> None:
        for at in range(0, len(self._waiting), FLUSH):
            self._client.log_batch(self.id, metrics=self._waiting[at : at + FLUSH])
        self._waiting = []

    def keep(self, path: str | Path) -> None:
        """Copy a file or folder to the run's artifacts."""
        if self._client:
            copy = self._client.log_artifacts if Path(path).is_dir() else self._client.log_artifact
            copy(self.id, str(path), Path(path).name if Path(path).is_dir() else None)

    def register(self, path: str | Path, name: str, *aliases: str) -> str | None:
        """Keep the folder `path` as a new version of the model `name` and point `aliases` at it; returns the version."""
        if not self._client:
            return None
        from mlflow.exceptions import MlflowException

        self.keep(path)
        try:
            self._client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        source = f"{self._run.info.artifact_uri}/{Path(path).name}"
        made = self._client.create_model_version(name, source, self.id)
        for alias in aliases:
            self._client.set_registered_model_alias(name, alias, made.version)
        return str(made.version)


@contextmanager
def run(name: str, settings: Mapping[str, Any], experiment: str = "labkit") -> Iterator[Log]:
    """A run with its settings; it ends FINISHED, or FAILED when the block raises."""
    if not available():
        _say_once()
        yield Log()
        return
    client = _client()
    found = client.get_experiment_by_name(experiment)
    where = (folder() / "artifacts" / experiment).as_uri()
    number = found.experiment_id if found else client.create_experiment(experiment, where)
    log = Log(client, client.create_run(number, run_name=name))
    for key, value in settings.items():
        client.log_param(log.id, key, value)
    try:
        yield log
    except BaseException:
        log.flush()
        client.set_terminated(log.id, "FAILED")
        raise
    log.flush()
    client.set_terminated(log.id, "FINISHED")


def registered(name: str, alias: str) -> Path:
    """The folder of the model version an alias points at. LabkitError when there is none."""
    if not available():
        raise LabkitError('MLflow is not installed, so no model is registered. Try:  pip install "labkit[track]"')
    from mlflow.exceptions import MlflowException

    try:
        source = _client().get_model_version_by_alias(name, alias).source
    except MlflowException:
        raise LabkitError(f"No model {name!r} has the alias {alias!r}; register one with Log.register.") from None
    from urllib.parse import urlparse
    from urllib.request import url2pathname

    return Path(url2pathname(urlparse(source).path))


def point(name: str, alias: str, version: str) -> None:
    """Let an alias of a registered model name another version. LabkitError when there is no such version."""
    if not available():
        raise LabkitError('MLflow is not installed, so no model is registered. Try:  pip install "labkit[track]"')
    from mlflow.exceptions import MlflowException

    try:
        _client().set_registered_model_alias(name, alias, version)
    except MlflowException:
        raise LabkitError(f"No version {version} of the model {name!r}; register one with Log.register.") from None


def frame(experiment: str = "labkit") -> Any:
    """pandas frame of all runs of an experiment: name, status, settings and each metric's last value."""
    import pandas as pd

    client = _client() if available() else None
    found = client and client.get_experiment_by_name(experiment)
    runs = client.search_runs([found.experiment_id], max_results=1000) if found else []
    return pd.DataFrame(
        {"run": r.info.run_name, "status": r.info.status, **r.data.params, **r.data.metrics} for r in reversed(list(runs))
    )


def _client() -> Any:
    # Before the import: MLflow reports its use to its makers otherwise, and looks for git.
    for key, value in (("MLFLOW_DISABLE_TELEMETRY", "true"), ("GIT_PYTHON_REFRESH", "quiet")):
        os.environ.setdefault(key, value)
    import logging

    for chatty in ("alembic", "mlflow.store.db.utils"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    from mlflow import MlflowClient

    folder().mkdir(parents=True, exist_ok=True)
    return MlflowClient(uri(), uri())


def _say_once() -> None:
    global _said
    if not _said:
        print(tr('MLflow is not installed, so this run is not logged. Try:  pip install "labkit[track]"'))
    _said = True

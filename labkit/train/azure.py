"""A distillation job for Azure Machine Learning: written as the file its command line takes, and checked before it costs anything.

The rules here need no package; `validated` also asks the installed SDK (azure-ai-ml, whose distillation is marked experimental):
every argument must be one of `model_customization.distillation`, and its own schema must read the file. Nothing is sent.
"""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import json
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from labkit.i18n import tr

SDK = "azure-ai-ml"
TASKS = ("nli", "nlu_qa", "conversation", "math", "summarization")
KINDS = ("label_generation", "data_generation")
NEEDED = (
    "experiment_name", "data_generation_type", "data_generation_task_type", "teacher_model_endpoint_connection", "student_model",
)  # fmt: skip
SAMPLING = ("temperature", "max_tokens", "top_p", "frequency_penalty", "presence_penalty", "stop")
SECRET = "$AZURE_TEACHER_KEY"  # stands where a key would; it is put in when the job is sent, never into the file


def job(name: str, *, teacher: str, endpoint: str, student: str, training: str, validation: str, task: str = "conversation",
        temperature: float = 0.0, max_tokens: int = 64, rate: float = 2e-5, batch: int = 2, epochs: int = 3) -> dict[str, Any]:  # fmt: skip
    """The job as plain data. teacher, endpoint: name and address of its serverless connection; student: azureml://registries/…

    temperature is the teacher's *sampling* temperature while it writes answers: the service has no other. rate, batch and
    epochs are those of the student's training, as text, as its schema wants them.
    """
    return {
        "type": "distillation",
        "name": name,
        "experiment_name": name,
        "data_generation_type": "label_generation",
        "data_generation_task_type": task,
        "training_data": {"type": "uri_file", "path": training},
        "validation_data": {"type": "uri_file", "path": validation},
        "teacher_model_endpoint_connection": {
            "type": "serverless", "name": teacher, "endpoint": endpoint, "api_key": SECRET,
        },
        "teacher_model_settings": {"inference_parameters": {"temperature": temperature, "max_tokens": max_tokens}},
        "student_model": student,
        "hyperparameters": {"learning_rate": str(rate), "batch_size": str(batch), "num_train_epochs": str(epochs)},
    }  # fmt: skip


def write(asked: Mapping[str, Any], path: str | Path) -> Path:
    """The job's file, for `az ml job create --file`; JSON is YAML too."""
    Path(path).write_text(json.dumps(asked, indent=2) + "\n", encoding="utf-8")
    return Path(path)


def problems(asked: Mapping[str, Any]) -> list[str]:
    """What would stop this job, one sentence each, as far as rules can tell without the SDK; empty when nothing."""
    found = [tr("{name} is missing", name=name) for name in NEEDED if not asked.get(name)]
    kind, task = asked.get("data_generation_type"), str(asked.get("data_generation_task_type", ""))
    if kind and kind not in KINDS:
        found.append(tr("data_generation_type is {given!r}; expected one of {known}", given=kind, known=", ".join(KINDS)))
    if task and task.lower() not in TASKS:
        found.append(tr("data_generation_task_type is {given!r}; expected one of {known}", given=task, known=", ".join(TASKS)))
    if kind == "label_generation":
        found += [tr("{name} is missing", name=name) for name in ("training_data", "validation_data") if not asked.get(name)]
    sampling = (asked.get("teacher_model_settings") or {}).get("inference_parameters") or {}
    found += [tr("the teacher has no inference parameter {name!r}", name=name) for name in sampling if name not in SAMPLING]
    found += [tr("{name} is a distillation setting the service does not have", name=name) for name in asked if name in _SOFTNESS]
    key = (asked.get("teacher_model_endpoint_connection") or {}).get("api_key")
    if key and not re.fullmatch(r"\$\{?[A-Z_]+\}?", str(key)):
        found.append(tr("a key stands in the job; put the name of a variable there, such as {name}", name=SECRET))
    if asked.get("student_model") and not str(asked["student_model"]).startswith("azureml:"):
        found.append(tr("student_model is {given!r}; expected azureml://registries/…/models/…", given=asked["student_model"]))
    return found


_SOFTNESS = ("temperature", "alpha", "distillation_temperature", "loss")


def validated(path: str | Path) -> dict[str, Any]:
    """What the installed SDK says of a job's file: {"sdk": version or None, "said": one sentence, "problems": [...]}."""
    if not installed():
        return {"sdk": None, "said": tr("{package} is not installed: only labkit's own rules were applied.", package=SDK),
                "problems": []}  # fmt: skip
    from importlib.metadata import version

    with _quiet():
        found = _arguments(json.loads(Path(path).read_text(encoding="utf-8"))) + _schema(Path(path))
    said = tr("read by the schema of {package} {version}", package=SDK, version=version(SDK))
    return {"sdk": version(SDK), "said": said, "problems": found}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Every class of the SDK warns that it is experimental, by logging and by warnings."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def installed() -> bool:
    """Whether the SDK can be imported."""
    with contextlib.suppress(ModuleNotFoundError):  # no package `azure` at all
        return importlib.util.find_spec("azure.ai.ml") is not None
    return False


def _arguments(asked: Mapping[str, Any]) -> list[str]:
    """Does every key name a parameter of `distillation`, and does every parameter without a default have a key?"""
    from azure.ai.ml.model_customization import distillation

    known = {k: p for k, p in inspect.signature(distillation).parameters.items() if p.kind is not p.VAR_KEYWORD}
    wrong = [tr("{name} is no parameter of distillation", name=k) for k in asked if k not in known and k not in ("type", "name")]
    need = [k for k, p in known.items() if p.default is p.empty and k not in asked]
    return wrong + [tr("{name} is missing", name=k) for k in need]


def _schema(path: Path) -> list[str]:
    from azure.ai.ml import load_job

    try:
        load_job(str(path))
    except Exception as error:  # whatever the SDK raises on reading is its verdict
        found = re.findall(r'"([^"]+)": \[\s*"([^"]*)"', str(error))
        return [f"{name}: {said}" for name, said in found] or [str(error).splitlines()[0]]
    return []

"""The Azure job: labkit's own rules always, the SDK's signature and schema where it is installed."""

from __future__ import annotations

import json

import pytest

from labkit.train import azure


def good(**changes):
    made = azure.job(
        "house-student", teacher="teacher", endpoint="https://example.org/v1", training="./train.jsonl",
        validation="./validation.jsonl", student="azureml://registries/azureml-meta/models/Meta-Llama-3.1-8B-Instruct/versions/2",
    )  # fmt: skip
    return made | changes


def test_a_good_job_has_no_problems_and_no_secret(tmp_path):
    assert azure.problems(good()) == []
    text = azure.write(good(), tmp_path / "job.json").read_text()
    assert json.loads(text) == good() and azure.SECRET in text


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"teacher_model_endpoint_connection": None}, "teacher_model_endpoint_connection is missing"),
        ({"validation_data": None}, "validation_data is missing"),
        ({"data_generation_task_type": "interpretation"}, "expected one of nli, nlu_qa"),
        ({"data_generation_type": "both"}, "expected one of label_generation, data_generation"),
        ({"temperature": 0.7}, "temperature is a distillation setting the service does not have"),
        ({"student_model": "Phi-4-mini"}, "expected azureml://registries"),
        ({"teacher_model_settings": {"inference_parameters": {"softness": 2}}}, "no inference parameter 'softness'"),
        ({"teacher_model_endpoint_connection": {"api_key": "abc123"}}, "a key stands in the job"),
    ],
)
def test_what_is_wrong_is_named(changes, said):
    (problem,) = azure.problems(good(**changes))
    assert said in problem


def test_the_chapters_call_is_refused():
    found = azure.problems(
        {"experiment_name": "x", "teacher_model": "DeepSeek-V3", "student_model": "Phi-4-mini", "temperature": 0.7}
    )
    assert len(found) == 5


def test_without_the_sdk_one_sentence_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(azure, "installed", lambda: False)
    found = azure.validated(azure.write(good(), tmp_path / "job.json"))
    assert found["sdk"] is None and found["problems"] == [] and "azure-ai-ml is not installed" in found["said"]


@pytest.mark.skipif(not azure.installed(), reason="azure-ai-ml is not installed")
def test_the_sdks_signature_and_schema_agree_with_our_rules(tmp_path):
    """Whatever our rules accept the SDK reads; what they refuse for its sake it refuses."""
    path = tmp_path / "job.json"
    assert azure.validated(azure.write(good(), path))["problems"] == []
    for changes in ({"data_generation_task_type": "interpretation"}, {"data_generation_type": "both"}, {"temperature": 0.7}):
        assert azure.validated(azure.write(good(**changes), path))["problems"], changes
    missing = {k: v for k, v in good().items() if k != "teacher_model_endpoint_connection"}
    assert "teacher_model_endpoint_connection is missing" in azure.validated(azure.write(missing, path))["problems"]
    from azure.ai.ml import constants

    tasks = constants.DataGenerationTaskType
    assert {v.lower() for k, v in vars(tasks).items() if k.isupper()} == set(azure.TASKS)

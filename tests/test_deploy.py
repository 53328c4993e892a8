"""Deployment files from measurements: what is taken, what is refused, what comes out, and the checklist that runs."""

from __future__ import annotations

import copy
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from live_gateway import artifact, live
from test_serve_parts import Counting

import labkit
from labkit import cli
from labkit.deploy import check as checking
from labkit.deploy import dashboards, sizing
from labkit.deploy.readiness import FAIL, ITEMS, NOT_APPLICABLE, PASS, Subject, readiness
from labkit.deploy.render import TEMPLATES, fill, render
from labkit.deploy.sizing import GIB, MIB
from labkit.measure.record import record
from labkit.standin import standin_config
from labkit.types import LabkitError

PHI = standin_config("phi-4-mini")
KEY = "a-secret-of-ana-1"


def ask(**more):
    return sizing.needs(**{"model": "phi-4-mini", "engine": "vllm", "precision": "bf16", "context": 4096, "startup": 60, "config": PHI, **more})


def measured(bytes_, served=True, when="2026-01-02T00:00:00+00:00", seconds=2.5, **more):
    found = record(artifact(), "memory", "bytes", [bytes_], workload={"served": served}, details={"peak_bytes": [bytes_]} | ({"startup_seconds": [seconds]} if served else {}))
    return replace(found, when=when, artifact={**found.artifact, "checkpoint": "edgehome", "engine": "onnxruntime", "precision": "int4", **more})


def house(ledger, **more):
    return sizing.needs("edgehome", "onnxruntime", "int4", **{"context": 512, "measurements": ledger, "config": labkit.checkpoint("edgehome").config, **more})


# --- sizing ----------------------------------------------------------------------------------------------------------


def test_the_chapters_limit_is_refused_with_the_numbers():
    """C053: 8 GB for Phi-4-mini in bfloat16 and four sequences of 4,096 tokens."""
    with pytest.raises(LabkitError, match=r"limit of 8\.00 GiB.*needs 9\.15 GiB.*4 x 4,096 tokens.*fewer slots"):
        ask(slots=4, limit=8 * GIB)
    assert ask(slots=1, limit=8 * GIB).limit == 8 * GIB and ask(slots=4).limit > 9.15 * GIB
    with pytest.raises(LabkitError, match="needs 7"):  # C033's request of 4 GiB
        ask(limit=4 * GIB)


def test_memory_by_hand():
    """Weights of Phi-4-mini at 16 bits, and 2 x 32 layers x 8 heads x 128 x 2 bytes a token."""
    found = ask(slots=4)
    assert found.cache == 2 * 32 * 8 * 128 * 2 * 4096 * 4 and found.planned == 2 * 3_836_021_760 + found.cache
    assert "not measured" in found.sources["memory"] and found.request % (32 * MIB) == 0 and found.request >= found.memory


def test_the_ledger_goes_before_the_shape_and_flags_before_the_ledger(tmp_path):
    ledger = labkit.ledger(tmp_path / "ledger.jsonl")
    ledger.append(measured(150e6), measured(90e6, served=False, when="2026-03-01T00:00:00+00:00"), measured(170e6, when="2026-02-01T00:00:00+00:00", seconds=4.0))
    found = house(ledger)
    assert (found.memory, found.startup) == (170e6, 4.0) and "2026-02-01" in found.sources["memory"] and "server" in found.sources["memory"]
    given = house(ledger, memory=300e6, startup=1.0)
    assert (given.memory, given.startup, given.sources["memory"], given.sources["startup"]) == (300e6, 1.0, "given", "given")


def test_a_measurement_without_the_server_says_so_and_leaves_the_start_open(tmp_path):
    ledger = labkit.ledger(tmp_path / "ledger.jsonl")
    ledger.append(measured(90e6, served=False))
    with pytest.raises(LabkitError, match=r"start-up .* was not measured.*--startup"):
        house(ledger)
    assert "without the web server" in house(ledger, startup=2).sources["memory"]


def test_more_slots_than_were_measured_raise_the_need():
    found = ask(memory=1e9, slots=4)
    assert found.memory == found.planned > 1e9 and "raised" in found.sources["memory"]


@pytest.mark.parametrize("wrong", [{"context": 0}, {"slots": 0}, {"memory": -1}, {"startup": float("nan")}, {"cpus": 0}, {"limit": float("inf")}])
def test_numbers_that_are_none(wrong):
    with pytest.raises(LabkitError, match="numbers above 0"):
        ask(**wrong)


def test_nothing_known_is_a_sentence():
    with pytest.raises(LabkitError, match="Nothing is known of the memory"):
        ask(precision="exotic")


def test_sizes_with_units():
    assert (sizing.size_in("8Gi"), sizing.size_in("512M"), sizing.size_in("1.5Ki")) == (8 * GIB, 512_000_000, 1536)
    assert sizing.size_in("8g", sizing.COMPOSE_UNITS) == 8 * GIB == sizing.size_in("8192M", sizing.COMPOSE_UNITS)
    for text in ("", "many", "-1Gi", "1Xi", "1e9e"):
        with pytest.raises(LabkitError, match="no size"):
            sizing.size_in(text)


def test_the_server_is_measured_as_it_runs(home):
    pytest.importorskip("onnxruntime_genai")
    pytest.importorskip("fastapi")
    made = labkit.build("edgehome", labkit.Recipe("onnxruntime", "int4"))
    found = sizing.measure_served(made, requests=1, new_tokens=2)
    assert found.metric == "memory" and found.values[0] > 4 * made.weight_bytes and 0.3 < found.details["startup_seconds"][0] < 90
    labkit.ledger().append(found)
    assert house(labkit.ledger()).sources["startup"].startswith("measured")


def test_a_built_artifact_is_found_without_a_lock(home, monkeypatch):
    """In a container the models lie on a file system that is mounted read-only."""
    pytest.importorskip("llama_cpp")
    recipe = labkit.Recipe("llamacpp", "q8_0")
    first = labkit.build("edgehome", recipe)

    def refused(*_, **__):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(sys.modules["labkit.build"], "locked", refused)
    assert labkit.build("edgehome", recipe).path == first.path


# --- render ----------------------------------------------------------------------------------------------------------


def sized():
    return ask(memory=9e8, precision="exotic")


def write(folder, **more):
    return render(folder, **{"model": "edgehome", "engine": "onnxruntime", "precision": "int4", "target": "kubernetes", "sized": sized(), "context": 512, **more})


def test_the_files_and_where_their_numbers_come_from(tmp_path):
    files = {path.relative_to(tmp_path / "out").as_posix() for path in write(tmp_path / "out")}
    assert {"containers/Dockerfile", "containers/compose.yaml", "containers/constraints.txt", "kubernetes/base/deployment.yaml", "dashboards/labkit.json",
            ".github/workflows/deploy.yml", "values.json"} <= files  # fmt: skip
    told = json.loads((tmp_path / "out/values.json").read_text())
    assert told["needs"]["memory"] == 9e8 and told["sources"]["memory"] == "given" and told["limit_mib"] * MIB >= 1.25 * 9e8
    deployment = (tmp_path / "out/kubernetes/base/deployment.yaml").read_text()
    assert f"memory: {told['limit_mib']}Mi" in deployment and "given" in deployment.splitlines()[0]
    import fastapi

    assert f"fastapi=={fastapi.__version__}\n" in (tmp_path / "out/containers/constraints.txt").read_text()


def test_compose_alone_has_no_cluster_and_a_start_is_given_four_times_its_time(tmp_path):
    files = write(tmp_path / "out", target="compose", engine="llamacpp", precision="q4_k_m")
    assert not [path for path in files if "kubernetes" in path.parts or ".github" in path.parts]
    assert "start_period: 240s" in (tmp_path / "out/containers/compose.yaml").read_text()


def test_the_rendered_command_is_one_the_server_takes(tmp_path):
    """The arguments in the image go through the gateway's own parser."""
    write(tmp_path / "out")
    line = next(one for one in (tmp_path / "out/containers/Dockerfile").read_text().splitlines() if one.startswith("CMD"))
    chosen = cli.parser().parse_args(json.loads(line.removeprefix("CMD ")))
    assert (chosen.model, chosen.engine, chosen.precision, chosen.host, chosen.port) == ("edgehome", "onnxruntime", "int4", "0.0.0.0", 8000)


def test_the_modelfile_is_one_ollama_takes(tmp_path):
    from labkit.serve import modelfile

    write(tmp_path / "out", engine="ollama", precision="q4_k_m")
    assert modelfile.lint((tmp_path / "out/containers/Modelfile").read_text()) == []


@pytest.mark.parametrize(("more", "says"), [
    ({"target": "swarm"}, "no target"), ({"engine": "tgi"}, "no template for the engine"), ({"name": "A b"}, "no name for a service"), ({"digest": "sha256:1"}, "no digest"),
    ({"model": "a\nUSER root"}, "no model's name"), ({"model": "../../etc"}, "no model's name"), ({"model": '"; rm'}, "no model's name"), ({"gpu": True}, "processors only"),
])  # fmt: skip
def test_what_cannot_be_filled_in_is_refused(tmp_path, more, says):
    with pytest.raises(LabkitError, match=says):
        write(tmp_path / "out", **more)
    assert not (tmp_path / "out").exists() and not list(tmp_path.iterdir())


def test_nothing_of_the_readers_is_overwritten(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("mine")
    with pytest.raises(LabkitError, match="not empty"):
        write(tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_a_template_without_its_value_is_an_error():
    with pytest.raises(LabkitError, match="'missing' is undefined"):
        fill("[[ missing ]]", {})
    assert fill("${{ x }} {{y}} [[ a ]]\n[% if a %]\nb\n[% endif %]\n", {"a": 1}) == "${{ x }} {{y}} 1\nb\n"


def test_no_value_of_a_secret_is_in_a_template():
    for path in TEMPLATES.rglob("*.yaml"):
        assert "stringData" not in path.read_text() and "kind: Secret" not in path.read_text(), path


# --- dashboards ------------------------------------------------------------------------------------------------------


def test_the_dashboard_keeps_its_schema_and_asks_for_what_is_counted():
    board = dashboards.gateway()
    assert dashboards.check(board) == [] and json.loads(dashboards.text(board)) == board
    assert {panel["title"] for panel in board["panels"] if panel["type"] == "row"} == {"Traffic", "Latency", "Resources", "Errors"}
    for _, expression in dashboards.expressions(board):
        assert dashboards.metrics_in(expression), expression


def test_every_expression_is_promql():
    parser = pytest.importorskip("promql_parser")
    for _, expression in dashboards.expressions(dashboards.gateway()):
        parser.parse(expression.replace("$__rate_interval", "5m"))


@pytest.mark.parametrize(("change", "says"), [
    (lambda b: b["panels"][1]["targets"][0].update(expr="sum(rate(labkit_request_total[5m]))"), "labkit_request_total, which the gateway does not expose"),
    (lambda b: b["panels"][1].update(type="graph2"), "not one of"), (lambda b: b["panels"][1]["gridPos"].update(w=30), "maximum"), (lambda b: b.pop("uid"), "'uid' is a required"),
    (lambda b: b["panels"][2].update(id=b["panels"][1]["id"]), "given twice"), (lambda b: b["panels"][2]["gridPos"].update(x=0), "lie over each other"),
    (lambda b: b["panels"][1].update(targets=[]), "non-empty"), (lambda b: b.update(colour="red"), "Additional properties"),
])  # fmt: skip
def test_a_broken_dashboard_is_found(tmp_path, change, says):
    board = copy.deepcopy(dashboards.gateway())
    change(board)
    assert says in " ".join(dashboards.check(board))
    (tmp_path / "dashboards").mkdir()
    (tmp_path / "dashboards/x.json").write_text(json.dumps(board))
    assert {one.rule for one in checking.check(tmp_path)} == {"dashboard"}


@pytest.mark.parametrize(("expression", "names"), [
    ("sum by (route) (rate(a_total{x=\"b_total\"}[5m]))", ["a_total"]), ("a / on (x) group_left (y) b:c", ["a", "b:c"]), ("histogram_quantile(0.9, sum(rate(h_bucket[1m])) by (le))", ["h_bucket"]),
    ("avg_over_time(g[$__rate_interval]) > bool 1e3", ["g"]), ("a and b unless c", ["a", "b", "c"]), ("a offset 5m", ["a"]),
])  # fmt: skip
def test_the_metrics_of_an_expression(expression, names):
    assert dashboards.metrics_in(expression) == names


def test_alert_rules_that_can_never_fire_are_found(tmp_path):
    write(tmp_path / "out")
    alerts = tmp_path / "out/monitoring/alerts.yml"
    assert not [one for one in checking.check(tmp_path / "out") if one.rule == "alert-metric"]
    alerts.write_text(alerts.read_text().replace("labkit_queue_length", "labkit_queue_lenght"))
    (found,) = [one for one in checking.check(tmp_path / "out") if one.rule == "alert-metric"]
    assert found.place == "QueueLong" and "labkit_queue_lenght" in found.sentence
    assert results(Subject(folder=tmp_path / "out"))["somebody is told"][0] == FAIL


@pytest.mark.parametrize("engine", ["onnxruntime", "vllm", "llamacpp", "ollama"])
def test_the_adapter_serves_what_the_autoscaler_asks_for(tmp_path, engine):
    import yaml

    write(tmp_path / "out", engine=engine, precision="q4_k_m")
    adapter, scaler = (tmp_path / "out/kubernetes" / name for name in ("adapter-rules.yaml", "overlays/production/autoscaler.yaml"))
    (metric,) = yaml.safe_load(scaler.read_text())["spec"]["metrics"]
    if engine == "ollama":  # it counts nothing
        assert not adapter.exists() and metric["type"] == "Resource"
    else:
        assert yaml.safe_load(adapter.read_text())["rules"][0]["name"]["as"] == metric["pods"]["metric"]["name"]


# --- other files in a folder -----------------------------------------------------------------------------------------


def test_overlays_that_do_not_build_and_modelfiles_are_looked_at_as_well(tmp_path):
    write(tmp_path / "out", engine="ollama", precision="q4_k_m")
    (tmp_path / "out/containers/Modelfile").write_text("FROM a\nPARAMETER context_length 4096\n")
    (tmp_path / "out/kubernetes/base/service.yaml").unlink()
    (tmp_path / "out/prometheus.yml").write_text("scrape_configs: [{job_name: ollama}]")
    assert {"modelfile", "endpoint"} <= {one.rule for one in checking.check(tmp_path / "out")} & {"modelfile", "kustomize", "not-built", "endpoint"}


# --- readiness -------------------------------------------------------------------------------------------------------


def results(subject):
    return {one.name: (one.result, one.reason) for one in readiness(subject)}


def test_what_was_not_given_is_not_applicable(tmp_path):
    write(tmp_path / "out")
    found = results(Subject(folder=tmp_path / "out"))
    assert len(found) == len(ITEMS) and found["health"] == (NOT_APPLICABLE, "no address of a gateway was given")
    assert found["images are pinned by digest"][0] == FAIL and found["numbers were measured"][0] == FAIL, "flags are not measurements"
    assert found["least privilege"][0] == found["no secret in a file"][0] == found["a key is asked for"][0] == PASS
    with pytest.raises(LabkitError, match="nothing to look at"):
        readiness(Subject())


def test_files_without_ours_fail_by_name(tmp_path):
    (tmp_path / "Dockerfile").write_text("FROM ollama/ollama:latest\nENV TOKEN=abcdefgh\nCMD ollama serve\n")
    found = results(Subject(folder=tmp_path))
    assert {name for name, (result, _) in found.items() if result == FAIL} >= {"images are pinned by digest", "health checks and probes", "least privilege", "no secret in a file", "numbers were measured"}
    assert found["more than one replica"] == (NOT_APPLICABLE, "the folder holds no autoscaler.yaml")


def test_ollama_asks_nobody_for_a_key(tmp_path):
    write(tmp_path / "out", engine="ollama", precision="q4_k_m")
    assert "proxy" in results(Subject(folder=tmp_path / "out"))["a key is asked for"][1]


def test_a_live_gateway(tmp_path):
    pytest.importorskip("fastapi")
    from labkit.serve.guard import Limits

    with live(Counting(), keys={"ana": KEY}, limits=Limits(per_minute=60, burst=20)) as (url, _):
        found = results(Subject(url=url, key=KEY))
        assert {result for name, (result, _) in found.items() if name in ("health", "metrics", "a model answers", "keys", "size limit", "rate limit")} == {PASS}, found
        assert found["TLS"][0] == NOT_APPLICABLE
    with live(Counting()) as (url, _):
        found = results(Subject(url=url))
        assert found["keys"] == (FAIL, "/v1/models without a key answered 200") and found["rate limit"][0] == FAIL and found["health"][0] == PASS


def test_nobody_answers_and_no_tls():
    found = results(Subject(url="http://127.0.0.1:9", key=KEY))
    assert found["health"][0] == found["metrics"][0] == found["keys"][0] == FAIL
    from labkit.deploy.readiness import _tls

    assert _tls(Subject(url="http://models.example"))[0] == FAIL


def test_the_model_that_is_shipped(tmp_path):
    pytest.importorskip("cryptography")
    from labkit.serve import manifest

    model = tmp_path / "model"
    model.mkdir()
    (model / "model.gguf").write_bytes(b"weights")
    assert {results(Subject(model=model))[name][0] for name in ("signed manifest", "bill of materials")} == {FAIL}
    (model / "bom.json").write_text(json.dumps({"bomFormat": "CycloneDX", "components": [{"name": "x"}]}))
    public = manifest.new_key(tmp_path / "key.pem")
    manifest.sign(model, tmp_path / "key.pem")
    found = results(Subject(model=model, public_key=public))
    assert [found[name][0] for name in ("signed manifest", "bill of materials", "no pickles")] == [PASS] * 3
    (model / "weights.bin").write_bytes(b"x")
    found = results(Subject(model=model, public_key=public))
    assert "weights.bin" in found["signed manifest"][1] and found["no pickles"][0] == FAIL


# --- the command line ------------------------------------------------------------------------------------------------


def call(capsys, *arguments: str) -> tuple[int, str, str]:
    status = cli.main(arguments)
    said = capsys.readouterr()
    return status, said.out, said.err


def test_render_and_check_on_the_command_line(tmp_path, home, capsys):
    out = str(tmp_path / "out")
    asked = ["deploy", "render", out, "--model", "phi-4-mini", "--engine", "vllm", "--precision", "bf16", "--target", "compose"]
    status, _, err = call(capsys, *asked, "--slots", "4", "--startup", "60", "--limit", "8Gi")
    assert status == 2 and "needs 9.15 GiB" in err and not Path(out).exists()
    status, _, err = call(capsys, *asked)
    assert status == 2 and "--startup" in err
    status, said, _ = call(capsys, *asked, "--startup", "60", "--slots", "4", "--json")
    told = json.loads(said)
    assert status == 0 and told["needs"]["sources"]["memory"].startswith("planned") and {one["rule"] for one in told["findings"]} == {"digest"}
    assert call(capsys, "deploy", "check", out, "--model", "phi-4-mini")[0] == 0
    file = Path(out) / "containers/compose.yaml"
    file.write_text(file.read_text().replace("read_only: true", "read_only: false"))
    status, said, _ = call(capsys, "deploy", "check", out)
    assert status == 1 and "read-only" in said
    assert call(capsys, "deploy", "ready", "--folder", out)[0] == 1

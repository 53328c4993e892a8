"""Every rule of the deployment checks has a file that breaks it, and the rendered files break none."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from labkit.deploy import arguments, compose, dockerfile, kubernetes, pipeline, shell
from labkit.deploy import check as checking
from labkit.deploy.render import render
from labkit.deploy.sizing import GIB, Needs
from labkit.standin import standin_config
from labkit.types import LabkitError

PHI = standin_config("phi-4-mini")
SOURCES = Path(checking.__file__).parent


def needs(memory=200e6, startup=3.0, **more) -> Needs:
    return Needs(memory, startup, 2, int(more.pop("limit", 384 * 2**20)), 0, {"memory": "measured here", "startup": "measured here", "limit": "x", "cpus": "x"})


def rendered(tmp_path, engine="onnxruntime", **more):
    precision = {"onnxruntime": "int4", "vllm": "bf16"}.get(engine, "q4_k_m")
    folder = tmp_path / engine
    render(folder, model="edgehome", engine=engine, precision=precision, target="kubernetes", sized=more.pop("sized", needs()), context=512,
           gpu=engine != "onnxruntime", **more)  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return rendered(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module")
def production(files):
    from labkit.types import NotInstalled

    try:
        return kubernetes.build(files / "kubernetes/overlays/production")
    except NotInstalled as error:
        pytest.skip(str(error))


def rules(found):
    return {one.rule for one in found if one.level != "accepted"}


# --- the good files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["onnxruntime", "llamacpp", "vllm", "ollama"])
def test_rendered_files_break_no_rule_but_the_missing_digest(tmp_path, engine):
    found = checking.check(rendered(tmp_path, engine), config=PHI if engine == "vllm" else None)
    assert rules(found) <= {"digest", "not-built"} and not any(one.level == "error" for one in found), found


def test_a_digest_silences_the_last_warning(tmp_path):
    folder = rendered(tmp_path, digest="sha256:" + "0" * 64)
    assert not [one for one in dockerfile.lint((folder / "containers/Dockerfile").read_text()) if one.rule in ("digest", "pinned")]


# --- one planted violation a rule ------------------------------------------------------------------------------------

DOCKER = [
    ("FROM python:3.11", "FROM python:latest #", "pinned"), ("FROM python:3.11", "FROM mcr.microsoft.com/foundry-local:1 #", "image-exists"),
    ("USER 10001:10001", "", "user"), ("USER 10001:10001", "USER root", "user"), ("USER 10001:10001", "USER server", "user"),
    ("HEALTHCHECK", "# HEALTHCHECK", "health"), ('CMD ["python", "-c"', 'CMD ["curl", "-f"', "health-program"), ("--start-period=30s", "--start-period=1s", "start-period"),
    ('ENTRYPOINT ["python", "-m", "labkit"]', "ENTRYPOINT python -m labkit", "exec-form"), ("HOME=/tmp", "HOME=/tmp API_KEY=abcdefgh", "secret"),
    ("HOME=/tmp", "HOME=/tmp OLLAMA_GPU_LAYERS=35", "ollama-variable"), ("HOME=/tmp", "HOME=/tmp HUGGING_FACE_HUB_TOKEN=$TOKEN", "hub-token"),
    ("RUN mkdir", "RUN ollama pull phi4-mini && mkdir", "build-time-pull"), ("RUN mkdir", "RUN echo phi4:mini && mkdir", "model-tag"),
    ("RUN mkdir", "RUN curl -fsSL https://example.org/i.sh | sh && mkdir", "piped-script"), ("RUN mkdir", "RUN pip install vllm && mkdir", "pinned-packages"),
    ("RUN mkdir", "ADD https://example.org/model.gguf /models/\nRUN mkdir", "unchecked-download"), ("COPY constraints.txt", "COPY . /app\nCOPY constraints.txt", "copy-all"),
    ("EXPOSE 8000", "EXPOSE 22", "ssh"), ("RUN mkdir", "RUNE mkdir", "syntax"), ("CMD [\"serve\"", "CMD [\"x\"]\nCMD [\"serve\"", "syntax"),
]  # fmt: skip
COMPOSE = [
    ("name: edgehome", 'name: edgehome\nversion: "3.8"', "version-key"), ("    healthcheck:", "    helthcheck:", "schema"), ("image: labkit-gateway:", "image: ollama/ollama:latest #", "pinned"),
    ('    user: "10001:10001"', '    user: "0:0"', "user"), ("read_only: true", "read_only: false", "read-only"), ("cap_drop: [ALL]", "cap_drop: []", "capabilities"),
    ("no-new-privileges:true", "label:disable", "no-new-privileges"), ("no-new-privileges:true", "seccomp:unconfined", "seccomp"), ("pids_limit: 512", "privileged: true", "privileged"),
    ("pids_limit: 512", "pid: host", "host-namespace"), ('["models:/models:ro"]', '["/var/run/docker.sock:/var/run/docker.sock"]', "docker-socket"),
    ("${LABKIT_API_KEYS:?set it to the API key, never write it here}", "abcdefghabcdefgh", "secret"), ("      LABKIT_API_KEYS:", "      OLLAMA_MAX_VRAM:", "ollama-variable"),
    ("      LABKIT_API_KEYS:", "      HUGGING_FACE_HUB_TOKEN:", "hub-token"), ('limits: {cpus: "2", memory: 384M}', "limits: {memory: 384M}", "cpu-limit"),
    ("memory: 384M}", "pids: 9}", "memory-limit"), ("memory: 384M}", "memory: many}", "memory-limit"), ("memory: 384M}", "memory: 128M}", "memory-fits"),
    ('test: ["CMD", "python"', 'test: ["CMD", "curl"', "health-program"), ('"127.0.0.1:8000:8000"', '"8000:8000"', "open-port"), ('"127.0.0.1:8000:8000"', '"0.0.0.0:8000:8000"', "open-port"),
    ("restart: unless-stopped", 'restart: "no"', "restart"), ("start_period: 30s", "start_period: 2s", "start-period"), ("      test: ", "      disable: true\n      test: ", "health"),
    ("name: edgehome", "name: edgehome\nname: again", "syntax"), ("image: labkit-gateway:0.1.0", "image: vllm/vllm-openai:v0.29.0", "cuda-image"),
    ("image: labkit-gateway:0.1.0", "image: vllm/vllm-openai:v0.29.0\n    command: [x, --enable-auto-tool-choice]", "vllm-tools"),
    ("image: labkit-gateway:0.1.0", "image: ollama/ollama:0.12.0\n    command: [run, 'phi4:mini']", "model-tag"),
]  # fmt: skip
CLUSTER = [
    ("runAsNonRoot: true", "runAsNonRoot: false", "user"), ("runAsUser: 10001", "runAsUser: 0", "user"), ("readOnlyRootFilesystem: true", "readOnlyRootFilesystem: false", "read-only"),
    ("allowPrivilegeEscalation: false", "allowPrivilegeEscalation: true", "no-new-privileges"), ("            - ALL", "            - CHOWN", "capabilities"),
    ("type: RuntimeDefault", "type: Unconfined", "seccomp"), ("allowPrivilegeEscalation: false", "allowPrivilegeEscalation: false\n          privileged: true", "privileged"),
    ("enableServiceLinks: false", "hostNetwork: true", "host-namespace"), ("automountServiceAccountToken: false\n      containers", "automountServiceAccountToken: true\n      containers", "token"),
    ("image: labkit-gateway:0.1.0", "image: labkit-gateway", "pinned"), ("valueFrom:\n            secretKeyRef:\n              key: keys\n              name: edgehome-keys", "value: abcdefgh", "secret"),
    ('cpu: "2"\n            ephemeral', "ephemeral", "requests"), ("memory: 384Mi", "memory: 400m", "memory-unit"), ("memory: 384Mi", "memory: 100Mi", "memory-fits"),
    ("          limits:\n            ephemeral-storage: 256Mi\n            memory: 384Mi\n", "", "memory-limit"), ("readinessProbe", "lifecycle: {}\n        x", "schema"),
    ("        readinessProbe:\n          failureThreshold: 3\n          httpGet:\n            path: /health\n            port: http\n          periodSeconds: 5\n          timeoutSeconds: 3\n", "", "probes"),
    ("startupProbe:\n          failureThreshold: 6\n          httpGet:\n            path: /health\n            port: http\n          periodSeconds: 5", "startupProbe:\n          failureThreshold: 2\n          httpGet:\n            path: /health\n            port: http\n          periodSeconds: 1", "start-period"),
    ("        startupProbe:\n          failureThreshold: 6\n          httpGet:\n            path: /health\n            port: http\n          periodSeconds: 5\n          timeoutSeconds: 3\n", "", "startup-probe"),
    ("maxUnavailable: 1\n  selector", "maxUnavailable: 0\n  selector", "disruption-blocks"), ("maxUnavailable: 1\n  selector", "minAvailable: 2\n  selector", "disruption-blocks"),
    ("  maxUnavailable: 1\n  selector:\n    matchLabels:\n      app.kubernetes.io/name: edgehome", "  maxUnavailable: 1\n  selector:\n    matchLabels:\n      app.kubernetes.io/name: other", "disruption"),
    ("ReadWriteMany", "ReadWriteOnce", "volume-mode"), ("progressDeadlineSeconds: 600", "progressDeadlineSeconds: 600\n  replicas: 3", "replicas-twice"),
    ("maxReplicas: 6", "maxReplicas: 2", "scale-range"), ("name: labkit_queue_length", "name: requests_per_second", "scale-metric"), ("    kind: Deployment\n    name: edgehome", "    kind: Deployment\n    name: edgehome2", "scale-target"),
    ("  podSelector:\n    matchLabels:\n      app.kubernetes.io/name: edgehome", "  podSelector:\n    matchLabels:\n      app.kubernetes.io/name: other", "network"),
    ("  - Egress\n", "", "egress"), ("  - from:\n    - namespaceSelector:\n        matchLabels:\n          may-reach/edgehome: \"true\"\n    ports:", "  - ports:", "ingress"),
    ("  selector:\n    app.kubernetes.io/name: edgehome\n  type: ClusterIP", "  selector:\n    app.kubernetes.io/name: other\n  type: ClusterIP", "service"), ("targetPort: http", "targetPort: web", "target-port"),
    ("type: ClusterIP", "type: NodePort", "open-port"), ("image: labkit-gateway:0.1.0", "image: ollama/ollama:0.12.0", "endpoint"),
    ("kind: Namespace\nmetadata:", "kind: Secret\ndata: {keys: YWJj}\nmetadata:", "secret"), ("image: labkit-gateway:0.1.0", "image: vllm/vllm-openai:v0.29.0", "vllm-argument"),
    ("apiVersion: v1\nkind: Namespace", "apiVersion: v9\nkind: Namespace", "schema"), ("- ALL", "- ALL\n  - [", "syntax"),
]  # fmt: skip
WORKFLOW = [
    ("permissions:\n  contents: read\nconcurrency", "concurrency", "permissions"), ("  pull_request:\n", "  pull_request_target:\n", "untrusted-code"), ("    timeout-minutes: 30\n", "", "timeout"),
    ("actions/checkout@v5", "actions/checkout@v3", "old-action"), ("actions/checkout@v5", "actions/checkout@main", "pinned"), ("actions/setup-python@v6", "someone/setup-python@v6", "pinned"),
    ("run: labkit deploy check .", 'run: echo "${{ github.event.issue.title }}"', "injection"), ("run: labkit deploy check .", "run: ollama pull phi4-mini", "no-server"),
    ("    environment: production\n", "", "approval"), ("    needs: build\n", "", "untested"), ("rollout status deployment/edgehome", "get deployment/edgehome", "unwatched"),
    ("${{ secrets.GITHUB_TOKEN }}", "abcdefgh", "secret"), ("    runs-on: ubuntu-24.04\n", "    runs: 3\n", "schema"), ("jobs:", "jobs: [", "syntax"),
]  # fmt: skip


def planted(lint, text, old, new, rule):
    assert old in text, f"{old!r} is not in the file"
    before, after = rules(lint(text)), rules(lint(text.replace(old, new, 1)))
    assert rule in after - before, f"{after - before} after the edit"


@pytest.mark.parametrize(("old", "new", "rule"), DOCKER)
def test_a_dockerfile_rule(files, old, new, rule):
    planted(lambda text: dockerfile.lint(text, startup=3), (files / "containers/Dockerfile").read_text(), old, new, rule)


@pytest.mark.parametrize(("old", "new", "rule"), COMPOSE)
def test_a_compose_rule(files, old, new, rule):
    if rule == "schema":
        pytest.importorskip("check_jsonschema")
    planted(lambda text: compose.lint(text, need=200e6, startup=3), (files / "containers/compose.yaml").read_text(), old, new, rule)


@pytest.mark.parametrize(("old", "new", "rule"), CLUSTER)
def test_a_kubernetes_rule(production, old, new, rule):
    planted(lambda text: kubernetes.lint(text, need=200e6, startup=3), production, old, new, rule)


@pytest.mark.parametrize(("old", "new", "rule"), WORKFLOW)
def test_a_workflow_rule(files, old, new, rule):
    if rule == "schema":
        pytest.importorskip("check_jsonschema")
    planted(pipeline.lint, (files / ".github/workflows/deploy.yml").read_text(), old, new, rule)


VLLM = [
    ("--model x --enable-auto-tool-choice", "vllm-tools"), ("--model x --quantization awq", "vllm-quantization"), ("--model x --quantization best", "vllm-quantization"),
    ("--model x --trust-remote-code", "vllm-remote-code"), ("--model x --max-len 7", "vllm-argument"), ("--model x --max-model-len 8192", "vllm-context"), ("--model x --max-model-len", "vllm-argument"),
    ("--model x --api-key abc", "secret"), ("--model x --max-model-len 4096 --max-num-seqs 4", "vllm-memory"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "rule"), VLLM)
def test_a_rule_of_vllms_arguments(given, rule):
    assert rule in rules(arguments.lint(given, PHI, memory=8 * GIB))
    assert not rules(arguments.lint("--model x --max-model-len 4096 --max-num-seqs 1 --enable-auto-tool-choice --tool-call-parser phi4_mini_json", PHI, memory=8 * GIB))


def test_a_checkpoint_in_the_asked_form_is_taken():
    stored = {**PHI, "quantization_config": {"quant_method": "awq"}}
    assert not arguments.lint("--quantization awq", stored) and not arguments.lint("--quantization awq_marlin", stored)
    assert "vllm-quantization" in rules(arguments.lint("--quantization gptq", stored))


def test_blocks_left_on_a_gpu():
    """C054: at 0.8 of a 12 GB card a few sequences of 4,096 tokens fit beside 16-bit weights, eight do not."""
    assert arguments.kv_blocks(PHI, 8e9, 0.8) == 0 and 1 <= arguments.kv_blocks(PHI, 12e9, 0.8) * 16 // 4096 < 8
    assert rules(arguments.lint("--max-model-len 4096 --gpu-memory-utilization 0.8", PHI, gpu=8e9)) == {"vllm-memory"}
    assert not arguments.lint("--max-model-len 4096 --gpu-memory-utilization 0.8", PHI, gpu=24e9)


SHELL = [
    ("docker run -d --memory 8g --cpus 4 -p 127.0.0.1:8000:8000 vllm/vllm-openai:v0.29.0 --model m --max-model-len 4096 --max-num-seqs 4", {"cuda-image", "vllm-memory"}),
    ("docker run -p 11434:11434 -e OLLAMA_NUM_GPU=1 --memory 4g ollama/ollama:0.12.0", {"open-port", "ollama-variable"}),
    ("docker run -e HF_TOKEN=abcdefgh -p 127.0.0.1:1:1 ollama/ollama:0.12.0", {"secret", "memory-limit"}), ("docker exec ollama ollama create mine -f ./Modelfile", {"host-file"}),
    ("foundry-local models list", {"no-such-command"}), ("ollama run phi4:mini", {"model-tag"}), ("curl http://localhost:11434/api/health", {"endpoint"}),
    ("vllm serve m --enable-auto-tool-choice", {"vllm-tools"}), ("docker run 'x", {"syntax"}),
]  # fmt: skip


@pytest.mark.parametrize(("line", "wanted"), SHELL)
def test_a_rule_of_the_commands_of_tutorials(line, wanted):
    assert wanted <= rules(shell.lint(line, PHI))


def test_good_commands_break_no_rule():
    image = "public.ecr.aws/q9t5s3a7/vllm-cpu-release-repo:v0.29.0@sha256:" + "0" * 64
    assert not shell.lint(f"docker run --memory 10g -p 127.0.0.1:8000:8000 \\\n {image} --model m --max-model-len 4096 --max-num-seqs 4", PHI)
    assert not shell.lint("foundry model list\nollama run phi4-mini\ncurl http://localhost:11434/api/tags")


def test_scraping_what_counts_nothing():
    text = "scrape_configs:\n- job_name: ollama\n  static_configs: [{targets: ['ollama:11434']}]\n- job_name: f\n  metrics_path: /api/metrics\n  static_configs: [{targets: ['f:1']}]\n"
    assert [one.rule for one in compose.scrape_findings(text)] == ["endpoint", "endpoint"]
    assert not compose.scrape_findings(text.replace("ollama", "gateway").replace("11434", "8000").replace("/api/metrics", "/metrics"))


ELSEWHERE = {"dashboard", "alert-metric", "modelfile", "kustomize", "not-built", "digest", "spread", "secret", "endpoint"}  # planted in test_deploy.py, or below


def test_every_rule_is_planted_somewhere():
    told = "".join(file.read_text() for file in SOURCES.glob("*.py"))
    named = set(re.findall(r'Finding\(\s*"([a-z-]+)"', told)) | set(re.findall(r'unless\(.*, "([a-z-]+)", "', told))
    shown = {rule for table in (DOCKER, COMPOSE, CLUSTER, WORKFLOW) for *_, rule in table} | {rule for _, rule in VLLM}
    shown |= {rule for _, found in SHELL for rule in found} | ELSEWHERE
    assert len(named) > 60 and named <= shown, sorted(named - shown)


def test_replicas_that_may_share_a_node(production):
    text = re.sub(r"      topologySpreadConstraints:\n(?:      [ -] .*\n)+", "", production)
    assert "topologySpread" not in text and rules(kubernetes.lint(text)) == {"spread"}


def test_an_exception_needs_a_reason_and_stays_visible(tmp_path):
    text = (rendered(tmp_path, "ollama") / "containers/compose.yaml").read_text()
    found = compose.lint(text)
    assert {one.rule for one in found if one.level == "accepted"} == {"user", "read-only"}
    without = compose.lint(re.sub(r"(      (?:user|read-only): )its image.*", r"\1''", text))
    assert {"user", "read-only"} <= rules(without)


# --- other people's judges -------------------------------------------------------------------------------------------


def test_hadolint_agrees(tmp_path):
    if not checking._installed("hadolint"):
        pytest.skip("hadolint is not installed")
    for engine in ("onnxruntime", "llamacpp", "vllm", "ollama"):
        said = {name: text for name, _, text in checking.programs(rendered(tmp_path, engine)) if name == "hadolint"}
        assert said == {"hadolint": "nothing found"}, engine


def test_programs_that_are_absent_say_so(files, monkeypatch):
    monkeypatch.setattr(checking.shutil, "which", lambda name, path=None: None)
    assert {text.split(";")[0] for *_, text in checking.programs(files)} == {"not installed here"}


@pytest.mark.parametrize("version", ["1.30", "1.34"])
def test_the_schemas_of_kubernetes_agree(production, version):
    judge = pytest.importorskip("kubernetes_validate")
    from labkit.deploy.finding import read_yaml

    for one in read_yaml(production):
        judge.validate(one, version, strict=True)


def test_the_published_schemas_agree(files):
    """GitHub's workflow schema and Compose's, as check-jsonschema carries them."""
    pytest.importorskip("check_jsonschema")
    from labkit.deploy.finding import published, read_yaml

    assert published("github-workflows.json") and published("compose-spec.json")
    (workflow,) = read_yaml((files / ".github/workflows/deploy.yml").read_text())
    workflow["on"] = workflow.pop(True)
    assert pipeline.schema_errors(workflow) == [] and pipeline.schema_errors({**workflow, "jobs": {"a": {"steps": 3}}})
    (composed,) = read_yaml((files / "containers/compose.yaml").read_text())
    assert compose.schema_errors(composed) == [] and compose.schema_errors({**composed, "services": {"a": {"imag": "x"}}})


# --- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["a: [", "- 1", "a: 1\na: 2", "{" * 1500, "a: !!python/object/apply:os.system ['x']", "\0"])
def test_files_that_cannot_be_read_are_findings_or_sentences(text):
    for lint in (compose.lint, kubernetes.lint, pipeline.lint):
        found = lint(text)
        assert found and {one.rule for one in found} == {"syntax"} and found[0].sentence.endswith((".", ";"))


def test_a_folder_without_files_is_a_sentence(tmp_path):
    with pytest.raises(LabkitError, match="holds nothing these rules know"):
        checking.check(tmp_path)
    with pytest.raises(LabkitError, match="no folder"):
        checking.check(tmp_path / "nowhere")

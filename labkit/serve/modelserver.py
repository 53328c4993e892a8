"""OpenVINO Model Server's repository and requests: written and checked here, answered by a server elsewhere.

The server is a program of its own (a container image or an archive), not a Python package. It reads a `config.json` that
names two kinds of servables: graphs (a folder with `graph.pbtxt` beside an LLM in OpenVINO GenAI's layout) and plain models
(numbered version folders with an IR). Sources: docs.openvino.ai, "Model Server", and llm_calculator.proto of
openvinotoolkit/model_server, whose options and types are OPTIONS below.
"""

from __future__ import annotations

import json
import re
import shutil
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from labkit.types import LabkitError

LLM_FILES = tuple(f"openvino_{part}.{end}" for part in ("model", "tokenizer", "detokenizer") for end in ("xml", "bin"))
COPIED = (*LLM_FILES, "config.json", "generation_config.json", "tokenizer_config.json", "chat_template.jinja")
CALCULATOR, EXTENSION = "HttpLLMCalculator", "type.googleapis.com / mediapipe.LLMCalculatorOptions"
OPTIONS: Mapping[str, type] = {
    "models_path": str, "max_num_batched_tokens": int, "cache_size": int, "max_num_seqs": int, "dynamic_split_fuse": bool,
    "device": str, "plugin_config": str, "best_of_limit": int, "max_tokens_limit": int, "enable_prefix_caching": bool,
    "draft_models_path": str, "draft_device": str, "draft_max_num_batched_tokens": int, "draft_cache_size": int,
    "draft_block_size": int, "draft_max_num_seqs": int, "draft_dynamic_split_fuse": bool, "draft_eagle3_mode": bool,
    "tool_parser": str, "reasoning_parser": str, "enable_tool_guided_generation": bool, "cache_interval_multiplier": int,
    "generation_config_path": str,
}  # fmt: skip
KSERVE = {"FP32": np.float32, "FP16": np.float16, "INT64": np.int64, "INT32": np.int32, "UINT8": np.uint8, "INT8": np.int8}
_TOKEN = re.compile(r'\s*("(?:[^"\\]|\\.)*"|\'(?:[^\'\\]|\\.)*\'|#[^\n]*|\[[^\]]*\]|[A-Za-z_][\w.]*|[-+]?[\d.]+|[{}:,;])')


def graph(**options: Any) -> str:
    """The text of `graph.pbtxt`: one node that turns HTTP requests into answers, in cycles, with these options of OPTIONS.

    `plugin_config` may be a dict of CPU properties. LabkitError for an unknown option or a value of another type.
    """
    chosen = {"models_path": "./", "device": "CPU", **options}
    if isinstance(chosen.get("plugin_config"), Mapping):
        chosen["plugin_config"] = json.dumps(chosen["plugin_config"])
    for name, value in chosen.items():
        if name not in OPTIONS or type(value) is not OPTIONS[name]:
            kind = OPTIONS[name].__name__ if name in OPTIONS else f"one of {', '.join(OPTIONS)}"
            raise LabkitError(f"Graph option {name}={value!r} was given; expected {kind}.")
    lines = "\n".join(f"      {name}: {_quoted(value)}" for name, value in chosen.items())
    return f"""input_stream: "HTTP_REQUEST_PAYLOAD:input"
output_stream: "HTTP_RESPONSE_PAYLOAD:output"
node: {{
  name: "LLMExecutor"
  calculator: "{CALCULATOR}"
  input_stream: "LOOPBACK:loopback"
  input_stream: "HTTP_REQUEST_PAYLOAD:input"
  input_side_packet: "LLM_NODE_RESOURCES:llm"
  output_stream: "LOOPBACK:loopback"
  output_stream: "HTTP_RESPONSE_PAYLOAD:output"
  input_stream_info: {{ tag_index: "LOOPBACK:0" back_edge: true }}
  node_options: {{
    [{EXTENSION}]: {{
{lines}
    }}
  }}
  input_stream_handler {{
    input_stream_handler: "SyncSetInputStreamHandler"
    options {{ [mediapipe.SyncSetInputStreamHandlerOptions.ext] {{ sync_set {{ tag_index: "LOOPBACK:0" }} }} }}
  }}
}}
"""


def _quoted(value: Any) -> str:
    return str(value).lower() if isinstance(value, (bool, int)) else json.dumps(value)


def parse(text: str) -> list[tuple[str, Any]]:
    """A protobuf text message as (field, value) pairs in order; messages are such lists, repeated fields repeat."""
    tokens, at = [], 0
    while text[at:].strip():
        found = _TOKEN.match(text, at)
        if not found:
            raise LabkitError(f"graph.pbtxt cannot be read at {text[at : at + 30].strip()!r}; expected a field or a bracket.")
        tokens += [] if found[1].startswith("#") else [found[1]]
        at = found.end()
    fields, rest = _message(tokens)
    if rest:
        raise LabkitError("graph.pbtxt closes a bracket that was never opened; remove one '}'.")
    return fields


def _message(tokens: list[str]) -> tuple[list[tuple[str, Any]], list[str]]:
    fields: list[tuple[str, Any]] = []
    while tokens and tokens[0] != "}":
        if tokens[0] in ",;":
            tokens = tokens[1:]
            continue
        name, tokens = tokens[0], tokens[1:]
        if tokens[:1] == [":"]:
            tokens = tokens[1:]
        if not tokens:
            raise LabkitError(f"graph.pbtxt ends after {name!r}; expected its value.")
        if tokens[0] == "{":
            value, tokens = _message(tokens[1:])
            if not tokens:
                raise LabkitError(f"graph.pbtxt never closes {name!r}; add a '}}'.")
            tokens = tokens[1:]
        else:
            value, tokens = _scalar(tokens[0]), tokens[1:]
        fields.append((name, value))
    return fields, tokens


def _scalar(token: str) -> Any:
    if token[0] in "\"'":
        return re.sub(r"\\(.)", r"\1", token[1:-1])
    if token in ("true", "false"):
        return token == "true"
    return int(token) if re.fullmatch(r"[-+]?\d+", token) else token


def repository(
    folder: Path, llms: Mapping[str, Path] | None = None, models: Mapping[str, Path] | None = None, **options: Any
) -> Path:
    """Write a repository and its config.json (the returned path): LLM folders by name, IRs (.xml) by name as version 1.

    `options` go into every graph. The folder of an LLM must hold its tokenizer's IR too (`openvino.pipeline` writes it).
    """
    folder = Path(folder)
    config: dict[str, list] = {"model_config_list": [], "mediapipe_config_list": []}
    for name, source in (llms or {}).items():
        place = folder / name
        place.mkdir(parents=True, exist_ok=True)
        for file in COPIED:
            if (Path(source) / file).exists():
                shutil.copyfile(Path(source) / file, place / file)
        (place / "graph.pbtxt").write_text(graph(**options), encoding="utf-8")
        config["mediapipe_config_list"].append({"name": name, "base_path": name})
    for name, xml in (models or {}).items():
        place = folder / name / "1"
        place.mkdir(parents=True, exist_ok=True)
        for end in (".xml", ".bin"):
            shutil.copyfile(Path(xml).with_suffix(end), place / f"model{end}")
        config["model_config_list"].append({"config": {"name": name, "base_path": name}})
    path = folder / "config.json"
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return path


def problems(config: Path) -> list[str]:
    """What would keep a server from loading a repository, one sentence each; empty when nothing was found."""
    try:
        told = json.loads(Path(config).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return [f"{config} cannot be read: {error}"]
    graphs = told.get("mediapipe_config_list", [])
    models = [entry.get("config", {}) for entry in told.get("model_config_list", [])]
    found = [] if graphs or models else [f"{Path(config).name} names no servable."]
    names = [entry.get("name") for entry in [*graphs, *models]]
    found += [f"The name {name!r} is given {names.count(name)} times." for name in dict.fromkeys(names) if names.count(name) > 1]
    for entry in graphs:
        found += _graph_problems(_base(config, entry), entry.get("name"))
    for entry in models:
        found += _model_problems(_base(config, entry), entry.get("name"))
    return found


def _base(config: Path, entry: Mapping[str, Any]) -> Path:
    return Path(config).parent / entry.get("base_path", entry.get("name", ""))  # an absolute path stays what it is


def _model_problems(base: Path, name: str) -> list[str]:
    versions = [p for p in base.glob("*") if p.is_dir() and p.name.isdigit() and int(p.name) > 0] if base.is_dir() else []
    if not versions:
        return [f"{name}: {base} holds no version folder such as 1."]
    lone = [p.name for p in versions if not any(x.with_suffix(".bin").exists() for x in p.glob("*.xml"))]
    return [f"{name}: version {version} has no .xml with its .bin." for version in lone]


def _graph_problems(base: Path, name: str) -> list[str]:
    path = base / "graph.pbtxt"
    if not path.is_file():
        return [f"{name}: {path} is missing."]
    try:
        fields = parse(path.read_text(encoding="utf-8"))
    except LabkitError as error:
        return [f"{name}: {error}"]
    nodes = [dict(value) for field, value in fields if field == "node" and isinstance(value, list)]
    node = next((node for node in nodes if node.get("calculator") == CALCULATOR), None)
    if node is None:
        return [f"{name}: no node has the calculator {CALCULATOR}."]
    found = [] if node.get("name") else [f"{name}: the node of {CALCULATOR} has no name."]
    streams = [value for field, value in fields if field in ("input_stream", "output_stream")]
    for tag in ("HTTP_REQUEST_PAYLOAD", "HTTP_RESPONSE_PAYLOAD"):
        if not any(str(stream).startswith(f"{tag}:") for stream in streams):
            found.append(f"{name}: the graph has no stream {tag}.")
    options = dict(next((v for _, v in node.get("node_options", []) if isinstance(v, list)), []))
    for option, value in options.items():
        if option in OPTIONS and type(value) is not OPTIONS[option]:
            found.append(f"{name}: option {option} is {value!r}; expected {OPTIONS[option].__name__}.")
    if "models_path" not in options:
        return [*found, f"{name}: the option models_path is missing."]
    for option in ("models_path", "draft_models_path"):
        if isinstance(options.get(option), str):
            place = base / options[option]
            lost = [file for file in LLM_FILES if not (place / file).exists()]
            found += [f"{name}: {option} {options[option]} holds no {lost[0]}."] if lost else []
    return found


def chat_request(model: str, messages: Sequence[Mapping[str, str]], **options: Any) -> tuple[str, dict[str, Any]]:
    """(route, body) of a chat completion. Generative servables answer under /v3 in OpenAI's form."""
    return "/v3/chat/completions", {"model": model, "messages": [dict(m) for m in messages], "max_tokens": 64, **options}


def infer_request(model: str, inputs: Mapping[str, np.ndarray]) -> tuple[str, dict[str, Any]]:
    """(route, body) of a KServe v2 inference: every input with its shape, its type's KServe name, and its values flat."""
    names = {np.dtype(kind): name for name, kind in KSERVE.items()}
    told = []
    for name, array in inputs.items():
        array = np.asarray(array)
        if array.dtype not in names:
            raise LabkitError(f"Input {name!r} has type {array.dtype}; expected one of {', '.join(map(str, names))}.")
        told.append({"name": name, "shape": list(array.shape), "datatype": names[array.dtype], "data": array.ravel().tolist()})
    return f"/v2/models/{model}/infer", {"inputs": told}


def read_infer(reply: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Output name -> array of a KServe v2 reply."""
    return {o["name"]: np.asarray(o["data"], KSERVE[o["datatype"]]).reshape(o["shape"]) for o in reply["outputs"]}


def call(url: str, route: str, body: Mapping[str, Any] | None = None, *, timeout: float = 60.0) -> Any:
    """The parsed answer of a GET (no body) or POST to a server at `url`, such as http://localhost:8000."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url.rstrip("/") + route, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=timeout) as reply:
            return json.loads(reply.read() or b"null")
    except OSError as error:
        raise LabkitError(f"No answer from {url}{route} ({error}); is OpenVINO Model Server running there?") from error

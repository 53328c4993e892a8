"""What Olive knows and what a workflow did, as tables: its passes, and the footprint a run leaves in its output folder."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from labkit.types import LabkitError

if TYPE_CHECKING:
    import pandas as pd

# Values that say nothing about what a pass did.
SILENT = (
    "save_as_external_data", "all_tensors_to_one_file", "external_data_name", "size_threshold", "convert_attribute", "data_config",
    "device", "providers_list", "axis", "io_bind", "enable_cuda_graph", "trt_fp16_enable", "force_evaluate_other_eps", "enable_profiling",
)  # fmt: skip
STEPS = ["model", "from", "pass", "seconds", "settings", "format", "MB", "operators"]


def registered() -> pd.DataFrame:
    """Pass, where it works (onnx, pytorch, openvino, …), precisions and algorithms it names: all that this Olive registers."""
    import pandas as pd

    columns = ["pass", "works on", "precisions", "algorithms"]
    spec = importlib.util.find_spec("olive")
    if spec is None or spec.origin is None:
        return pd.DataFrame(columns=columns)
    listed = json.loads(Path(spec.origin).with_name("olive_config.json").read_text(encoding="utf-8"))["passes"]
    rows = []
    for name, facts in listed.items():
        lists = [", ".join(facts.get(f"supported_{key}", [])) for key in ("precisions", "algorithms")]
        rows.append([name, facts["module_path"].removeprefix("olive.passes.").split(".")[0], *lists])
    return pd.DataFrame(rows, columns=columns)


def search_over(*values: Any) -> dict[str, Any]:
    """The JSON by which a pass's setting becomes part of the search: one of these values."""
    return {"olive_parameter_type": "SearchParameter", "type": "Categorical", "support": list(values)}


def steps(output: str | Path) -> pd.DataFrame:
    """One row a model of a run, in the order made: its parent, pass, seconds, settings, format, MB on disk, operators, metrics.

    `output`: a workflow's output folder. Columns of metrics, `goal met` and `on the front` are there when it evaluated.
    A folder without a footprint gives an empty table: Olive did not run there.
    """
    import pandas as pd

    file = Path(output) / "footprint.json"
    if not file.exists():
        return pd.DataFrame(columns=STEPS)
    nodes = list(json.loads(file.read_text(encoding="utf-8")).values())
    return pd.DataFrame([_row(node) for node in nodes])


def _row(node: Mapping[str, Any]) -> dict[str, Any]:
    settings = {k: v for k, v in (node["pass_run_config"] or {}).items() if k not in SILENT and _says(v)}
    made = (node["model_config_data"] or {}).get("config", {})
    row: dict[str, Any] = {
        "model": node["model_id"], "from": node["parent_model_id"] or "", "pass": node["from_pass"] or "input model",
        "seconds": node["end_time"] - node["start_time"],
        "settings": ", ".join(f"{k}={_short(v)}" for k, v in settings.items()),
        "format": (node["model_config_data"] or {}).get("type", "").removesuffix("model"), **_size(made),
    }  # fmt: skip
    if node["metrics"]:
        row |= {name: found["value"] for name, found in node["metrics"]["value"].items()}
        row |= {"goal met": bool(node["metrics"]["if_goals_met"]), "on the front": bool(node["is_pareto_frontier"])}
    return row


def _says(value: Any) -> bool:
    """Whether a setting was made: switches that are off are, only what is empty is not."""
    return value is not None and value != {} and value != []


def _short(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _size(made: Mapping[str, Any]) -> dict[str, Any]:
    """MB of the weights a model stores, and its operators if it is a graph."""
    from labkit import onnx_graphs

    folder = Path(made.get("model_path") or "/nowhere")
    folder = folder.parent if folder.is_file() else folder
    weights = [f for pattern in ("*.onnx*", "*.safetensors") for f in folder.glob(pattern)]
    graphs = sorted(folder.glob("*.onnx"))
    count = sum(onnx_graphs.operators(graphs[0]).values()) if graphs else None
    return {"MB": sum(f.stat().st_size for f in weights) / 1e6 if weights else None, "operators": count}


def write_workflow(config: Mapping[str, Any], file: str | Path) -> Path:
    """A configuration as JSON, the form `olive run --config` reads. Error: a configuration that is none."""
    if "input_model" not in config or "passes" not in config:
        raise LabkitError("A workflow needs at least input_model and passes; the configuration given has " + ", ".join(config) + ".")
    file = Path(file)
    file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return file


def passes_of(file: str | Path) -> Sequence[str]:
    """The types of a configuration file's passes in order; empty when there is no such file."""
    path = Path(file)
    if not path.exists():
        return []
    return [one["type"] for one in json.loads(path.read_text(encoding="utf-8"))["passes"].values()]

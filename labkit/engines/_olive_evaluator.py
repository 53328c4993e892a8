"""An evaluator for Olive: perplexity on our own windows, and bytes on disk. Olive calls it through a script of two lines:

    from labkit.engines import _olive_evaluator
    _olive_evaluator.register("evaluation.json")

Olive 0.13 cannot write down a metric of its type "custom" (its backend is None, and None has no model_dump), so an
evaluator of one's own is the way to a metric of one's own.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

NAME = "perplexity_and_size"
METRICS = [
    {"name": "text", "type": "accuracy", "sub_types": [{"name": "perplexity", "priority": 1, "higher_is_better": False}]},
    {"name": "disk", "type": "size_on_disk", "sub_types": [{"name": "bytes", "priority": 2}]},
]


def register(windows: str) -> None:
    """Make the evaluator known to Olive under NAME; `windows`: a JSON file with lists of token ids."""
    from olive.evaluator.metric_result import MetricResult
    from olive.evaluator.olive_evaluator import OliveEvaluator
    from olive.evaluator.registry import Registry

    class PerplexityAndSize(OliveEvaluator):
        def evaluate(self, model: Any, metrics: Any, device: Any = None, execution_providers: Any = None) -> Any:
            found = {"text-perplexity": perplexity(model.model_path, windows), "disk-bytes": model.size_on_disk}
            priorities = {f"{m.name}-{s.name}": s.priority for m in metrics for s in m.sub_types}
            rows = {key: {"value": found[key], "priority": priorities[key], "higher_is_better": False} for key in priorities}
            return MetricResult.model_validate(rows)

    Registry.register(NAME)(PerplexityAndSize)


def perplexity(graph: str | Path, windows: str | Path) -> float:
    """exp of the mean negative log likelihood of every token of the windows but their first, on the CPU."""
    from labkit import onnx_graphs

    session = onnx_graphs.session(graph)
    return onnx_graphs.perplexity(session, json.loads(Path(windows).read_text(encoding="utf-8")))

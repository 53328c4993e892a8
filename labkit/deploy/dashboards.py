"""Grafana's dashboard of the gateway, generated: four rows for the four groups an operator looks at.

A panel is one line of `PANELS`. Every expression uses metrics the gateway really exposes (`unknown_metrics` says which do not), and the
JSON keeps the schema in `labkit/data/templates/dashboards`. Source of the model: grafana.com/docs, "Dashboard JSON model".
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from labkit.types import NotInstalled

SCHEMA = Path(__file__).parent.parent / "data" / "templates" / "dashboards" / "dashboard.schema.json"
SOURCE = {"type": "prometheus", "uid": "${source}"}
WINDOW = "$__rate_interval"
# row, title, unit of Grafana, expression, legend, what it tells
PANELS = (
    ("Traffic", "Requests", "reqps", f"sum by (route, status) (rate(labkit_requests_total[{WINDOW}]))", "{{route}} {{status}}", "Answers a second, refusals among them."),
    ("Traffic", "Tokens", "short", f"sum(rate(labkit_generated_tokens_total[{WINDOW}]))", "generated", "Tokens a second, all replicas together."),
    ("Latency", "First token, 95 %", "s", f"histogram_quantile(0.95, sum by (le) (rate(labkit_first_token_seconds_bucket[{WINDOW}])))", "p95", "From joining the queue: what a user waits."),
    ("Latency", "First token, median", "s", f"histogram_quantile(0.5, sum by (le) (rate(labkit_first_token_seconds_bucket[{WINDOW}])))", "p50", "Half of all users wait no longer."),
    ("Latency", "Time of a token", "s", f"histogram_quantile(0.95, sum by (le) (rate(labkit_token_seconds_bucket[{WINDOW}])))", "p95", "After the first; above 0.2 s reading waits for the model."),
    ("Latency", "In the queue, 95 %", "s", f"histogram_quantile(0.95, sum by (le) (rate(labkit_queue_seconds_bucket[{WINDOW}])))", "p95", "The part more replicas can take away."),
    ("Resources", "Waiting requests", "short", "labkit_queue_length", "{{instance}}", "The autoscaler goes by this."),
    ("Resources", "Busy", "percentunit", f"avg_over_time(labkit_running[{WINDOW}])", "{{instance}}", "Share of the time a model works."),
    ("Resources", "Resident memory", "bytes", "process_resident_memory_bytes", "{{instance}}", "Beside the limit of the container."),
    ("Resources", "Processor", "short", f"rate(process_cpu_seconds_total[{WINDOW}])", "{{instance}}", "Cores in use."),
    ("Errors", "Refused for overload", "percentunit",
     f'sum(rate(labkit_requests_total{{status="429"}}[{WINDOW}])) / sum(rate(labkit_requests_total[{WINDOW}]))', "429", "A full queue says no at once."),
    ("Errors", "Failed", "percentunit", f'sum(rate(labkit_requests_total{{status=~"5.."}}[{WINDOW}])) / sum(rate(labkit_requests_total[{WINDOW}]))', "5xx", "The server's own fault."),
    ("Errors", "How answers end", "ops", f"sum by (reason) (rate(labkit_generations_total[{WINDOW}]))", "{{reason}}", "Many by length: the limit is too low."),
)  # fmt: skip
WORDS = {"by", "without", "on", "ignoring", "group_left", "group_right", "and", "or", "unless", "bool", "offset", "inf", "nan", "start", "end", "atan2"}


def gateway(title: str = "labkit gateway") -> dict[str, Any]:
    """The dashboard as Grafana's JSON model."""
    panels: list[dict[str, Any]] = []
    rows = list(dict.fromkeys(one[0] for one in PANELS))
    y = 0
    for row in rows:
        panels.append({"id": len(panels) + 1, "type": "row", "title": row, "collapsed": False, "panels": [], "gridPos": {"h": 1, "w": 24, "x": 0, "y": y}})
        mine = [one for one in PANELS if one[0] == row]
        width = 24 // min(4, len(mine))
        for place, one in enumerate(mine):
            panels.append(_panel(len(panels) + 1, one, {"h": 8, "w": width, "x": width * (place % 4), "y": y + 1 + 8 * (place // 4)}))
        y += 1 + 8 * ((len(mine) + 3) // 4)
    return {
        "id": None, "uid": "labkit-gateway", "title": title, "tags": ["labkit"], "timezone": "browser", "editable": False, "graphTooltip": 1,
        "schemaVersion": 41, "version": 1, "refresh": "30s", "time": {"from": "now-1h", "to": "now"}, "annotations": {"list": []},
        "templating": {"list": [{"name": "source", "label": "Prometheus", "type": "datasource", "query": "prometheus", "hide": 0}]},
        "panels": panels,
    }  # fmt: skip


def _panel(number: int, one: tuple[str, ...], place: Mapping[str, int]) -> dict[str, Any]:
    _, title, unit, expression, legend, says = one
    defaults: dict[str, Any] = {"unit": unit, "min": 0, "custom": {"lineWidth": 2, "fillOpacity": 10, "spanNulls": False}}
    return {
        "id": number, "type": "timeseries", "title": title, "description": says, "datasource": SOURCE, "gridPos": dict(place),
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom", "showLegend": True}, "tooltip": {"mode": "multi", "sort": "desc"}},
        "targets": [{"refId": "A", "datasource": SOURCE, "expr": expression, "legendFormat": legend, "range": True}],
    }  # fmt: skip


def text(dashboard: Mapping[str, Any]) -> str:
    """The file Grafana reads."""
    return json.dumps(dashboard, indent=1, ensure_ascii=False) + "\n"


def check(dashboard: Any) -> list[str]:
    """What the schema, and what no schema can say, finds wrong: ids twice, panels over each other, metrics nobody exposes."""
    from jsonschema import Draft202012Validator

    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    said = [f"{'/'.join(map(str, error.absolute_path)) or 'the dashboard'}: {error.message[:200]}" for error in Draft202012Validator(schema).iter_errors(dashboard)]
    if said:
        return said
    panels = dashboard["panels"]
    numbers = [panel["id"] for panel in panels]
    said += [f"The panel number {n} is given twice; Grafana keeps one of them." for n in sorted({n for n in numbers if numbers.count(n) > 1})]
    cells: dict[tuple[int, int], str] = {}
    for panel in panels:
        place = panel["gridPos"]
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                other = cells.setdefault((x, y), panel["title"])
                if other != panel["title"] and (note := f"The panels {other!r} and {panel['title']!r} lie over each other.") not in said:
                    said.append(note)
    for title, expression in expressions(dashboard):
        said += [f"The panel {title!r} asks for {name}, which the gateway does not expose." for name in unknown_metrics(expression)]
    return said


def expressions(dashboard: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(panel's title, PromQL) of every query."""
    return [(panel["title"], target["expr"]) for panel in dashboard["panels"] for target in panel.get("targets", ())]


def metrics_in(expression: str) -> list[str]:
    """Names of the metrics a PromQL expression reads, in order: identifiers that are no function, keyword or label."""
    bare = re.sub(r'"(?:\\.|[^"\\])*"', "", expression)
    bare = re.sub(r"\{[^{}]*\}|\[[^\[\]]*\]", " ", bare)
    bare = re.sub(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\([^()]*\)", " ", bare)
    names = re.findall(r"(?<![\w:.$])([A-Za-z_:][\w:]*)(?!\s*\()(?![\w:])", bare)
    return [name for name in dict.fromkeys(names) if name.lower() not in WORDS]


def exposed() -> set[str]:
    """Names of all samples at the gateway's /metrics, those of histograms and of the process included."""
    try:
        from labkit.serve.metrics import Meters
    except ImportError as error:
        raise NotInstalled(f'The metrics need {error.name}. Try:  pip install "labkit[serve]"') from None
    meters = Meters()
    meters.requests.labels("/", "200"), meters.ended.labels("stop"), meters.seconds.labels("/")
    found = {line.split("{")[0].split(" ")[0] for line in meters.text().decode().splitlines() if line and line[0] != "#"}
    return found | {"process_resident_memory_bytes", "process_cpu_seconds_total", "process_open_fds"}  # filled on Linux only


def unknown_metrics(expression: str, known: Iterable[str] | None = None) -> list[str]:
    """The metrics of an expression that nobody exposes."""
    have = set(exposed() if known is None else known)
    return [name for name in metrics_in(expression) if name not in have]

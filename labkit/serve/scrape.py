"""Reading what a server counts: its /metrics page, a real Prometheus over it, its alerts, and a canary that asks known questions.

    with prometheus({"labkit": [gateway.port]}, faster=60) as watcher:
        watcher.query("labkit_queue_length"); watcher.alerts()

The rules are the files of `labkit/data/templates/monitoring`, made for production: windows of minutes. `faster=60` divides
every duration in them by 60, so that a lab sees in seconds what takes minutes there; the rules stay what they are.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import subprocess
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from labkit.serve.supervisor import HOST, free_port, supervise
from labkit.types import LabkitError, NotInstalled

RULES = Path(__file__).parents[1] / "data" / "templates" / "monitoring"
MILLISECONDS = {"ms": 1, "s": 1000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}
SAMPLE = re.compile(r"^(?P<name>[a-zA-Z_:][\w:]*)(?:\{(?P<labels>.*)\})?\s+(?P<value>\S+)(?:\s+-?\d+)?$")
LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
DURATION = re.compile(r"(?P<before>\[|(?:for|interval|scrape_interval|evaluation_interval): )(?P<number>\d+)(?P<unit>ms|s|m|h|d)\b")


class Sample(NamedTuple):
    """One line of a metrics page."""

    name: str
    labels: dict[str, str]
    value: float


def parse(text: str) -> list[Sample]:
    """The samples of Prometheus's text format; comments left out. LabkitError names a line that is none."""
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        if not (seen := SAMPLE.match(line)):
            raise LabkitError(f"Line {number} is no sample of Prometheus's text format: {line[:80]!r}.")
        labels = {name: _plain(value) for name, value in LABEL.findall(seen["labels"] or "")}
        found.append(Sample(seen["name"], labels, float(seen["value"])))
    return found


def _plain(value: str) -> str:
    return re.sub(r"\\(.)", lambda found: "\n" if found[1] == "n" else found[1], value)


def total(samples: Sequence[Sample], name: str, **labels: str) -> float:
    """The sum of a metric over all samples that have these labels; 0 when there is none."""
    return sum(one.value for one in samples if one.name == name and labels.items() <= one.labels.items())


def page(url: str, headers: Mapping[str, str] | None = None) -> list[Sample]:
    """The samples at `url` + /metrics."""
    return parse(_get(url + "/metrics", headers).decode())


def increase(values: Sequence[float]) -> float:
    """What a counter grew by over its values; where it fell it was started again, from 0."""
    return sum(now - before if now >= before else now for before, now in pairwise(values))


def _get(url: str, headers: Mapping[str, str] | None = None) -> bytes:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(urllib.request.Request(url, headers=dict(headers or {})), timeout=10) as reply:
        return reply.read()


# --- Prometheus --------------------------------------------------------------------------------------------------


def hurried(rules: str, faster: float) -> str:
    """Rules or settings with every duration divided: windows in [ ], `for:` and intervals; at least 1 ms."""
    if faster <= 0:
        raise LabkitError(f"faster={faster} was given; expected a number above 0.")

    def short(found: re.Match[str]) -> str:
        return f"{found['before']}{max(1, round(int(found['number']) * MILLISECONDS[found['unit']] / faster))}ms"

    return DURATION.sub(short, rules)


class Watcher:
    """A running Prometheus."""

    def __init__(self, url: str):
        self.url = url

    def query(self, expression: str) -> list[Sample]:
        """The instant value of an expression."""
        told = json.loads(_get(f"{self.url}/api/v1/query?{urllib.parse.urlencode({'query': expression})}"))
        return [_sample(one["metric"], one["value"]) for one in told["data"]["result"]]

    def history(self, expression: str, seconds: float, step: float) -> list[tuple[float, float]]:
        """(seconds before now as a negative number, sum of the values) over the last `seconds`."""
        now = time.time()
        asked = urllib.parse.urlencode({"query": f"sum({expression})", "start": now - seconds, "end": now, "step": step})
        rows = json.loads(_get(f"{self.url}/api/v1/query_range?{asked}"))["data"]["result"]
        return [(float(when) - now, float(value)) for one in rows for when, value in one["values"]]

    def alerts(self) -> dict[str, str]:
        """Alert -> "pending" or "firing", of those that are either."""
        told = json.loads(_get(f"{self.url}/api/v1/alerts"))["data"]["alerts"]
        states: dict[str, str] = {}
        for one in sorted(told, key=lambda one: one["state"] == "firing"):
            states[one["labels"]["alertname"]] = one["state"]
        return states

    def ready(self, targets: int, seconds: float = 20.0) -> int:
        """Wait until so many targets were scraped (Prometheus takes its first five seconds to look for them); how many were."""
        until = time.monotonic() + seconds
        while (up := sum(one.value for one in self.query("up"))) < targets and time.monotonic() < until:
            time.sleep(0.2)
        return int(up)

    def until(self, alert: str, seconds: float = 20.0) -> float | None:
        """Seconds until an alert fires; None when it did not in time."""
        began = time.monotonic()
        while (passed := time.monotonic() - began) < seconds:
            if self.alerts().get(alert) == "firing":
                return passed
            time.sleep(0.2)
        return None


def _sample(labels: dict[str, str], value: Sequence[Any]) -> Sample:
    return Sample(labels.get("__name__", ""), {key: text for key, text in labels.items() if key != "__name__"}, float(value[1]))


def _program(name: str) -> str:
    if found := shutil.which(name):
        return found
    raise NotInstalled(f"{name} is not installed. Try:  apt-get install prometheus")


@contextlib.contextmanager
def prometheus(jobs: Mapping[str, Sequence[int]], *, faster: float = 60.0, rules: Path = RULES) -> Iterator[Watcher]:
    """Prometheus over loopback ports, job -> ports, with our rules `faster` times as fast, until the block ends."""
    program = _program("prometheus")
    with tempfile.TemporaryDirectory(prefix="labkit-prometheus-", ignore_cleanup_errors=True) as folder:
        for name in ("recording.yml", "alerts.yml"):
            (Path(folder) / name).write_text(hurried((rules / name).read_text(encoding="utf-8"), faster))
        (Path(folder) / "prometheus.yml").write_text(settings(jobs, faster))
        command = [
            program, f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data", "--log.level=warn",
            f"--web.listen-address={HOST}:{{port}}",
        ]  # fmt: skip
        with supervise(command, health="/-/ready", wait=30, environment={"GOMAXPROCS": "1"}) as child:
            yield Watcher(child.url)


def settings(jobs: Mapping[str, Sequence[int]], faster: float = 1.0) -> str:
    """prometheus.yml for loopback ports (JSON, which is YAML), from the intervals of the template."""
    pace = f"{max(100, round(15_000 / faster))}ms"
    scraped = [{"job_name": job, "static_configs": [{"targets": [f"{HOST}:{port}" for port in ports]}]} for job, ports in jobs.items()]
    return json.dumps({
        "global": {"scrape_interval": pace, "scrape_timeout": pace, "evaluation_interval": pace},
        "rule_files": ["recording.yml", "alerts.yml"], "scrape_configs": scraped,
    })  # fmt: skip


def rule_tests(file: Path = RULES / "rules_test.yml") -> tuple[bool, str]:
    """Whether `promtool test rules` passes a file, and what it said."""
    done = subprocess.run([_program("promtool"), "test", "rules", file.name], cwd=file.parent, capture_output=True, text=True, timeout=60)
    return done.returncode == 0, (done.stdout + done.stderr).strip()


# --- the canary --------------------------------------------------------------------------------------------------


class Canary:
    """Counts right and wrong answers to known questions, and how far the requests are from the accepted ones; serves /metrics.

    `reference` and `edges` bin tokens a word as `labkit.monitor` does. Use as a context manager; `port` is where it listens.
    """

    def __init__(self, reference: Sequence[int], edges: Sequence[float], window: int = 40):
        from prometheus_client import CollectorRegistry, Counter, Gauge

        from labkit.monitor import psi_limit

        self._reference, self._edges, self._window, self._recent = list(reference), edges, window, []
        self.registry, self.port = CollectorRegistry(), free_port()
        self._answers = Counter("canary_answers", "Known questions answered", ["right"], registry=self.registry)
        for right in ("yes", "no"):  # a counter that appears with its first value has not grown, as Prometheus sees it
            self._answers.labels(right)
        self._psi = Gauge("canary_request_psi", "Stability index of the last requests", registry=self.registry)
        self.limit = psi_limit(self._reference, window, draws=500)
        Gauge("canary_request_psi_limit", "What chance stays below in 99 of 100", registry=self.registry).set(self.limit)

    def tell(self, right: bool, pieces_per_word: float) -> None:
        """One question and its answer."""
        from labkit.monitor import counted, psi

        self._answers.labels("yes" if right else "no").inc()
        self._recent = [*self._recent, pieces_per_word][-self._window :]
        if len(self._recent) == self._window:
            self._psi.set(psi(self._reference, counted(self._recent, self._edges)))

    def __enter__(self) -> Canary:
        from prometheus_client import start_http_server

        self._server, self._thread = start_http_server(self.port, addr=HOST, registry=self.registry)
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


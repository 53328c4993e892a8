"""What the gateway counts, in the four groups an operator looks at: traffic, latency, resources, errors.

The text at /metrics is Prometheus's exposition format, written by prometheus-client (pure Python, no dependencies). Each
gateway has a registry of its own, so that several can live in one process.
"""

from __future__ import annotations

from typing import Any

from labkit.serve.worker import Job, Worker

FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
EACH = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)


class Meters:
    """Counters and histograms of one gateway; `text()` is the body of /metrics."""

    def __init__(self) -> None:
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)  # resident memory, processor seconds, open files (Linux)
        own: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter("labkit_requests", "Requests answered", ["route", "status"], **own)
        self.seconds = Histogram("labkit_request_seconds", "From request to last byte", ["route"], **own)
        self.wait = Histogram("labkit_queue_seconds", "From joining the queue to its end", buckets=FIRST, **own)
        self.first = Histogram("labkit_first_token_seconds", "From joining the queue to the first token", buckets=FIRST, **own)
        self.each = Histogram("labkit_token_seconds", "Mean time of a token after the first", buckets=EACH, **own)
        self.prompt = Counter("labkit_prompt_tokens", "Tokens read", **own)
        self.made = Counter("labkit_generated_tokens", "Tokens made", **own)
        self.ended = Counter("labkit_generations", "Answers by how they ended", ["reason"], **own)
        self.waiting = Gauge("labkit_queue_length", "Requests waiting for the model", **own)
        self.running = Gauge("labkit_running", "Requests the model works on", **own)

    def watch(self, worker: Worker) -> None:
        """Read the queue of `worker` whenever /metrics is asked for."""
        self.waiting.set_function(lambda: worker.waiting)
        self.running.set_function(lambda: worker.running)

    def generation(self, job: Job) -> None:
        """Count a job that ended."""
        self.ended.labels(job.reason).inc()
        if job.started is not None:
            self.wait.observe(job.started - job.queued)
            self.prompt.inc(len(job.prompt))
            self.made.inc(job.made)
        if job.first is not None:
            self.first.observe(job.first - job.queued)
            if job.made > 1 and job.ended is not None:
                self.each.observe((job.ended - job.first) / (job.made - 1))

    def text(self) -> bytes:
        from prometheus_client import generate_latest

        return generate_latest(self.registry)

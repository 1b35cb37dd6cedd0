"""Metrics of one API process, and how log lines look. No global registry: each app has its own."""

import logging
import sys

import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from flashbulb_service.queue import QueueStats
from flashbulb_service.tasks import ImageOutcome

PREFIX = "flashbulb"
SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 300)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """What /metrics shows."""

    def __init__(self) -> None:
        """Register every metric in a registry of its own."""
        self.registry = CollectorRegistry()
        self.requests = self._counter("requests", "HTTP requests by status.", "route", "method", "status")
        self.request_seconds = self._histogram("request_seconds", "Wall time of HTTP requests.", "route")
        self.images = self._counter("images", "Pictures delivered.", "model")
        self.queue_wait = self._histogram("queue_wait_seconds", "From acceptance to the batch.", "model")
        self.batch_seconds = self._histogram("batch_seconds", "Wall time of a picture's batch.", "model")
        self.stage_seconds = self._histogram("stage_seconds", "Parts of a batch.", "model", "stage")
        self.batch_size = self._histogram("batch_size", "Rows of a picture's batch.", "model", buckets=SIZES)
        self.abandoned = self._counter("jobs_abandoned", "Jobs cancelled since their client left.")
        self.queued = self._gauge("queue_depth", "Jobs waiting for a worker.", "model")
        self.running = self._gauge("jobs_running", "Jobs in a batch.")
        self.delayed = self._gauge("jobs_delayed", "Jobs waiting for a retry.")
        self.dead = self._gauge("jobs_dead", "Jobs that failed for good.")
        self.oldest = self._gauge("queue_oldest_age_seconds", "Age of the job that waits longest.")
        self.workers = self._gauge("workers", "Live workers.")

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, labels, namespace=PREFIX, registry=self.registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(name, text, labels, namespace=PREFIX, registry=self.registry)

    def _histogram(
        self, name: str, text: str, *labels: str, buckets: tuple[float, ...] = SECONDS
    ) -> Histogram:
        return Histogram(name, text, labels, namespace=PREFIX, registry=self.registry, buckets=buckets)

    def picture(self, model: str, outcome: ImageOutcome, queue_s: float) -> None:
        """Count one delivered picture."""
        self.images.labels(model).inc()
        self.queue_wait.labels(model).observe(queue_s)
        self.batch_seconds.labels(model).observe(outcome.batch_ms / 1000)
        self.batch_size.labels(model).observe(outcome.batch_size)
        for stage, ms in (*outcome.stages_ms.items(), ("encode", outcome.encode_ms)):
            self.stage_seconds.labels(model, stage).observe(ms / 1000)

    def queue(self, stats: QueueStats, num_workers: int) -> None:
        """Set the gauges to what the queue says now."""
        self.queued.clear()
        for model, depth in stats.queued.items():
            self.queued.labels(model).set(depth)
        self.running.set(stats.running)
        self.delayed.set(stats.delayed)
        self.dead.set(stats.dead)
        self.oldest.set(stats.oldest_age_s)
        self.workers.set(num_workers)

    def exposition(self) -> bytes:
        """Return everything in the Prometheus text format."""
        return generate_latest(self.registry)


def configure_logging(log_format: str, *, level: int = logging.INFO) -> None:
    """Send the log to stderr, one event a line: for people ("console") or for programs ("json")."""
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    last: structlog.typing.Processor
    if log_format == "json":
        last = structlog.processors.JSONRenderer()
    else:
        last = structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
        )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, last],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):  # they bring handlers of their own
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = True
    logging.getLogger("uvicorn.access").setLevel(logging.WARNING)  # our middleware logs requests

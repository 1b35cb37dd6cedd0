"""Metrics of one API process, and how log lines look."""

import logging
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager

import structlog

from flashbulb_service.jobs import Job
from flashbulb_service.measures import Measures
from flashbulb_service.queue import QueueStats

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


class Metrics(Measures):
    """What the API counts itself; /metrics shows it beside what the workers publish."""

    def __init__(self) -> None:
        """Declare the metrics; see docs/observability.md for what they mean."""
        super().__init__()
        self._requests = self._counter("requests", "HTTP requests by status.", "route", "method", "status")
        self._request_seconds = self._histogram("request_seconds", "Wall time of HTTP requests.", "route")
        self._overhead = self._histogram(
            "overhead_seconds", "Time of an answered request, less queue, batch and encoding.", "model"
        )
        self._shed = self._counter("shed", "Requests that a limit refused.", "reason")
        self._webhooks = self._counter("webhook_deliveries", "Webhook calls by how they ended.", "result")
        for result in ("delivered", "retried", "given_up"):
            self._webhooks.labels(result)  # at 0: Prometheus sees no rise of a series that begins with it
        self.early_answers = self._counter(
            "early_answers", "Pictures that the worker sent ahead of their commit."
        )
        self.abandoned = self._counter("jobs_abandoned", "Jobs cancelled since their client left.")
        self._queued = self._gauge("queue_depth", "Jobs waiting for a worker.", "model")
        self._work = self._gauge("queue_work_seconds", "Time of one worker for what waits.", "model")
        self._running = self._gauge("jobs_running", "Jobs in a batch.")
        self._delayed = self._gauge("jobs_delayed", "Jobs waiting for a retry.")
        self._dead = self._gauge("jobs_dead", "Jobs that failed for good.")
        self._oldest = self._gauge("queue_oldest_age_seconds", "Age of the job that waits longest.", "lane")
        self._workers = self._gauge("workers", "Live workers.")
        self._ready = self._gauge("ready", "1 when a request would be answered, else 0.")

    def request(self, route: str, method: str, status: int, seconds: float) -> None:
        """Count one HTTP request; `route` is one of ours, the method may be anything."""
        self._requests.labels(route, known_method(method), str(status)).inc()
        self._request_seconds.labels(route).observe(seconds)

    def answered(self, model: str, overhead_s: float) -> None:
        """Count what we added to one request whose pictures were waited for."""
        self._overhead.labels(model).observe(max(0.0, overhead_s))

    def shed(self, reason: str) -> None:
        """Count a refused request; `reason` is the code of its error."""
        self._shed.labels(reason).inc()

    def webhook_delivery(self, result: str) -> None:
        """Count one webhook call: "delivered", "retried" or "given_up"."""
        self._webhooks.labels(result).inc()

    def queue(self, stats: QueueStats, work_s: Mapping[str, float], num_workers: int, *, ready: bool) -> None:
        """Set the gauges to what the queue says now; `work_s` is model -> seconds of one worker that wait."""
        self._queued.clear()
        self._work.clear()
        for model, seconds in work_s.items():
            self._work.labels(model).set(seconds)
        for model, depth in stats.queued.items():
            self._queued.labels(model).set(depth)
        self._running.set(stats.running)
        self._delayed.set(stats.delayed)
        self._dead.set(stats.dead)
        self._oldest.labels("short").set(stats.oldest_short_s)
        self._oldest.labels("long").set(stats.oldest_long_s)
        self._workers.set(num_workers)
        self._ready.set(ready)

    def queue_lost(self) -> None:
        """Say that the queue does not answer: no workers, no known depth; other gauges keep their values."""
        self._queued.clear()  # a depth beside 0 workers would page for workers that nobody needs to start
        self._workers.set(0)
        self._ready.set(0)


def known_method(method: str) -> str:
    """Return an HTTP method of the usual ones, else "other": clients may send any word."""
    return method if method in METHODS else "other"


def current_request_id() -> str:
    """Return the id of the HTTP request that is being served, or "" outside of one."""
    return str(structlog.contextvars.get_contextvars().get("request_id", ""))


def job_context(job: Job, request_id: str = "") -> AbstractContextManager[None]:
    """Put a job's names into every log line that is written inside."""
    names = {"job_id": job.id, "tenant": job.tenant, "request_id": request_id}
    return structlog.contextvars.bound_contextvars(**{name: value for name, value in names.items() if value})


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

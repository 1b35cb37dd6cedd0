"""What one worker counts. It is published with the worker's presence, and on a port of its own if wanted.

Each event is one call, so that the code that draws and delivers stays free of metric names.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from prometheus_client import start_http_server

from flashbulb_service.errors import ServerStartError
from flashbulb_service.jobs import Job
from flashbulb_service.measures import SHARES, SIZES, Capped, Measures

log = logging.getLogger(__name__)

MAX_TENANTS = 100  # own values of the label `tenant`; further ones share "other"


class WorkerMetrics(Measures):
    """What happens to the jobs that a worker claims."""

    def __init__(self) -> None:
        """Declare the metrics; see docs/observability.md for what they mean."""
        super().__init__()
        self._queue_wait = self._histogram("queue_wait_seconds", "From acceptance to the batch.", "model")
        self._batch_size = self._histogram("batch_size", "Rows of a batch.", "model", buckets=SIZES)
        self._fill = self._histogram(
            "batch_fill_ratio", "Rows of a batch, of those allowed.", "model", buckets=SHARES
        )
        self._batch_seconds = self._histogram("batch_seconds", "Time of a batch on the device.", "model")
        self._stage_seconds = self._histogram(
            "stage_seconds", "Parts of a batch; encode and store once a picture.", "model", "stage"
        )
        self._device_seconds = self._counter("device_seconds", "Time on the device by tenant.", "tenant")
        self._images = self._counter("images", "Pictures whose result stands.", "model")
        self._pixels = self._counter("pixels", "Pixels of these pictures.", "model")
        self._failures = self._counter("attempts_failed", "Attempts that ended without a result.", "code")
        self._splits = self._counter("batch_splits", "Batches that were cut after a failure.", "cause")
        self._redeliveries = self._counter(
            "redeliveries", "Jobs of which a run failed or was lost before.", "model"
        )
        self._rejected = self._counter(
            "duplicate_commits_rejected", "Results refused: cancelled, or owned by another attempt.", "model"
        )
        self._load_seconds = self._gauge("model_load_seconds", "Time to load and warm up a model.", "model")
        self._missed = self._counter("deadline_missed", "Jobs whose deadline passed unserved.", "model")
        self._cache_hits = self._counter("embed_cache_hits", "Prompts whose embedding was kept.", "model")
        self._cache_misses = self._counter("embed_cache_misses", "Prompts that were encoded.", "model")
        self._drift = self._gauge(
            "calibration_drift_ratio", "Measured time of a batch over the calibrated.", "model"
        )
        self._tenant = Capped(MAX_TENANTS)

    def claimed(self, jobs: Sequence[Job]) -> None:
        """Count jobs of a claim that will be run."""
        for job in jobs:
            if job.burnt:
                self._redeliveries.labels(job.model).inc()

    def drawn(
        self,
        jobs: Sequence[Job],
        cap: int,
        *,
        started_at: float,
        batch_s: float,
        stages_ms: Mapping[str, float],
    ) -> None:
        """Count a finished batch of one model: how long its jobs had waited, its time, who used the device.

        `started_at` is in seconds since the epoch by the queue's clock, as the jobs' `enqueued_at`.
        """
        model = jobs[0].model
        self._batch_size.labels(model).observe(len(jobs))
        self._fill.labels(model).observe(len(jobs) / cap)
        self._batch_seconds.labels(model).observe(batch_s)
        for stage, ms in stages_ms.items():
            self._stage_seconds.labels(model, stage).observe(ms / 1000)
        for job in jobs:
            self._device_seconds.labels(self._tenant(job.tenant)).inc(batch_s / len(jobs))
            self._queue_wait.labels(model).observe(max(0.0, started_at - job.enqueued_at))

    def delivered(self, model: str, pixels: int, encode_s: float, store_s: float) -> None:
        """Count a picture that is encoded, stored and committed."""
        self._images.labels(model).inc()
        self._pixels.labels(model).inc(pixels)
        self._stage_seconds.labels(model, "encode").observe(encode_s)
        self._stage_seconds.labels(model, "store").observe(store_s)

    def commit_rejected(self, model: str) -> None:
        """Count a result that the queue refused."""
        self._rejected.labels(model).inc()

    def attempt_failed(self, code: str) -> None:
        """Count an attempt that ended without a result; `code` is one of ours."""
        self._failures.labels(code).inc()

    def batch_split(self, cause: str) -> None:
        """Count a failed batch whose rows are run in smaller ones: "error" or "out_of_memory"."""
        self._splits.labels(cause).inc()

    def model_loaded(self, model: str, seconds: float) -> None:
        """Keep how long a model took from its files to its first picture."""
        self._load_seconds.labels(model).set(seconds)
        for counter in (self._redeliveries, self._missed):
            counter.labels(model)  # at 0: Prometheus sees no rise of a series that begins with it

    def deadline_missed(self, model: str, count: int = 1) -> None:
        """Count jobs that were dropped because their time was over."""
        self._missed.labels(model).inc(count)

    def embeddings(self, model: str, *, hits: int, misses: int) -> None:
        """Count prompts of a batch by whether their embedding was kept."""
        self._cache_hits.labels(model).inc(hits)
        self._cache_misses.labels(model).inc(misses)

    def calibration_drift(self, model: str, ratio: float) -> None:
        """Keep the newest ratio of a batch's measured time to the one that was calibrated."""
        self._drift.labels(model).set(ratio)


@contextmanager
def serve_metrics(metrics: Measures, host: str, port: int | None) -> Iterator[None]:
    """Serve metrics on a port of their own while this is open; None: do not.

    Raises:
        ServerStartError: the address is taken or not ours.
    """
    if port is None:
        yield
        return
    try:
        server, thread = start_http_server(port, addr=host, registry=metrics.registry)
    except OSError as error:
        raise ServerStartError(
            f"cannot serve metrics on {host}:{port}: {error.strerror or error}; choose another --metrics-port"
        ) from error
    log.info("metrics on http://%s:%d/metrics", host, server.server_port)
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

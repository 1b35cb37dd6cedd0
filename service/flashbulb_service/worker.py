"""The worker: claims batches, runs them on a backend, stores the pictures, commits the results.

    claim ─► heartbeat beside: backend in a thread ─► encode ─► result store ─► complete (fenced)

A lost worker's batch is run again elsewhere; equal requests give equal bytes, so it does not matter who
stores them last, and the fenced commit lets exactly one result stand.
"""

import asyncio
import contextlib
import logging
import os
import secrets
import socket
import time
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from flashbulb_service.backends import Backend, Generated, ImageRequest, create_backend
from flashbulb_service.catalog import Model
from flashbulb_service.errors import BackendError, QueueUnavailable
from flashbulb_service.images import encode_image
from flashbulb_service.jobs import Job, JobError
from flashbulb_service.parts import load_catalog, open_parts
from flashbulb_service.presence import INTERVAL_S, LiveWorker, Presence
from flashbulb_service.queue import Queue
from flashbulb_service.results import ResultStore, result_id
from flashbulb_service.scheduler import batch_cap, in_chunks, split_suspects
from flashbulb_service.settings import Settings
from flashbulb_service.tasks import ImageOutcome, ImageTask

log = logging.getLogger(__name__)

IDLE_S = 5.0  # longest single wait for work; a wake-up ends it at once
CLEAN_INTERVAL_S = 600.0
OUTAGE_BACKOFF_S = 0.5


@dataclass(frozen=True)
class LoadedModel:
    """A model with the backend that holds it, and the largest batch worth forming."""

    model: Model
    backend: Backend
    cap: int


def load_model(model: Model, backend: Backend, *, backend_name: str, max_batch: int) -> LoadedModel:
    """Load a bundle into a backend and choose its batch cap."""
    backend.load(model.bundle)
    manifest = model.bundle.manifest
    return LoadedModel(
        model, backend, batch_cap(manifest.max_batch, max_batch, manifest.calibration.get(backend_name))
    )


def new_worker_id() -> str:
    """Return a name that no other worker has: host, process and a random part."""
    return f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"


class Worker:
    """One process that serves all of its models, one batch at a time."""

    def __init__(
        self,
        queue: Queue,
        results: ResultStore,
        presence: Presence,
        models: Sequence[LoadedModel],
        *,
        backend_name: str,
        lease_s: float,
        worker_id: str | None = None,
    ) -> None:
        """Keep the parts; nothing runs before `run`."""
        self._queue = queue
        self._results = results
        self._presence = presence
        self._models: Mapping[str, LoadedModel] = {loaded.model.id: loaded for loaded in models}
        self._lease_s = lease_s
        self._device = ThreadPoolExecutor(1, thread_name_prefix="device")
        self.id = worker_id or new_worker_id()
        self._me = LiveWorker(self.id, tuple(self._models), backend_name)

    async def run(self, stop: asyncio.Event, *, drain_s: float) -> bool:
        """Serve until `stop` is set, then finish the batch in hand, or hand it back after `drain_s`.

        Returns:
            True when the last batch was finished, False when it was handed back.
        """
        upkeep = [
            asyncio.create_task(self._queue.keep_reaping()),
            asyncio.create_task(self._keep_present()),
            asyncio.create_task(self._keep_clean()),
        ]
        serving = asyncio.create_task(self._serve(stop))
        stopping = asyncio.create_task(stop.wait())
        try:
            await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
            drained, _ = await asyncio.wait({serving}, timeout=drain_s)
            if drained:
                serving.result()
            return bool(drained)
        finally:
            await _cancel([serving, stopping, *upkeep])
            with contextlib.suppress(QueueUnavailable):
                await self._presence.withdraw(self._me)
            self._device.shutdown(wait=False)

    async def _serve(self, stop: asyncio.Event) -> None:
        names = list(self._models)
        most = max(loaded.cap for loaded in self._models.values())
        while not stop.is_set():
            try:
                jobs = await self._queue.claim(self.id, names, most, self._lease_s)
                if jobs:
                    await self._run_claimed(jobs)
                else:
                    await _unless(stop, self._queue.wait_for_work(names, IDLE_S))
            except QueueUnavailable as error:
                log.warning("queue out of reach, trying again: %s", error.message)
                await _unless(stop, asyncio.sleep(OUTAGE_BACKOFF_S))

    async def _run_claimed(self, jobs: list[Job]) -> None:
        """Run jobs of one bucket; whatever happens, none of them stays leased when this ends."""
        loaded = self._models[jobs[0].model]
        try:
            now, later = split_suspects(jobs)
            if later:
                await self._queue.release(self.id, later)
            async with self._heartbeats(now) as lost:
                for chunk in in_chunks(now, loaded.cap):
                    await self._run_batch(loaded, chunk, lost)
        except BaseException:  # finished jobs are no longer ours, so this hands back only the rest
            with contextlib.suppress(QueueUnavailable):
                await self._queue.release(self.id, jobs)
            raise

    async def _run_batch(self, loaded: LoadedModel, jobs: list[Job], lost: set[str]) -> None:
        tasks: dict[str, ImageTask] = {}
        for job in jobs:
            if job.id in lost:
                continue
            try:
                tasks[job.id] = ImageTask.from_bytes(job.payload)
            except ValueError as error:
                await self._fail(job, "invalid_task", error, retry=False)
        rows = [job for job in jobs if job.id in tasks]
        if not rows:
            return
        start = time.perf_counter()
        try:
            generated = await self._generate(loaded, [tasks[job.id] for job in rows])
        except Exception as error:  # noqa: BLE001  whatever a model raises belongs to its rows, not to us
            await self._after_failure(loaded, rows, error, lost)
            return
        batch_ms = (time.perf_counter() - start) * 1000
        log.info("batch of %d of %s in %.1f ms", len(rows), loaded.model.id, batch_ms)
        batch = (len(rows), batch_ms, generated.stages_ms)
        deliveries = [
            self._deliver(loaded, job, tasks[job.id], pixels, batch)
            for job, pixels in zip(rows, generated.images, strict=True)
            if job.id not in lost
        ]
        for ended in await asyncio.gather(*deliveries, return_exceptions=True):
            if isinstance(ended, BaseException):
                raise ended

    async def _generate(self, loaded: LoadedModel, tasks: Sequence[ImageTask]) -> Generated:
        requests = [ImageRequest(t.prompt, t.seed, t.index, t.width, t.height) for t in tasks]
        loop = asyncio.get_running_loop()
        generated = await loop.run_in_executor(self._device, loaded.backend.generate, requests)
        if len(generated.images) != len(requests):
            raise BackendError(
                f"expected {len(requests)} pictures of the backend, got {len(generated.images)}"
            )
        return generated

    async def _after_failure(
        self, loaded: LoadedModel, rows: list[Job], error: Exception, lost: set[str]
    ) -> None:
        """Find the row that spoils the batch: run each alone, so that innocent rows burn no attempt."""
        if len(rows) == 1:
            await self._fail(rows[0], "backend_error", error, retry=True)
            return
        log.warning("batch of %d failed, running its rows one by one: %s", len(rows), _one_line(error))
        for job in rows:
            await self._run_batch(loaded, [job], lost)

    async def _deliver(
        self,
        loaded: LoadedModel,
        job: Job,
        task: ImageTask,
        pixels: np.ndarray,
        batch: tuple[int, float, dict[str, float]],
    ) -> None:
        """Encode, store, then commit: a result that is announced can be read."""
        start = time.perf_counter()
        try:
            data = await asyncio.to_thread(encode_image, pixels, task.image_format, task.quality)
            file = result_id(job.id, task.image_format)
            await self._results.put(file, data)
        except Exception as error:  # noqa: BLE001  so does what a store raises
            await self._fail(job, "store_failed", error, retry=True)
            return
        size, batch_ms, stages_ms = batch
        outcome = ImageOutcome(
            file=file,
            batch_size=size,
            batch_ms=batch_ms,
            encode_ms=(time.perf_counter() - start) * 1000,
            stages_ms=stages_ms,
            bundle_sha256=loaded.model.bundle.sha256,
        )
        if not await self._queue.complete(
            self.id, job, outcome.to_bytes(), device_ms=outcome.batch_ms / outcome.batch_size
        ):
            log.info("result of job %s refused: it was cancelled, or another attempt owns it", job.id)

    async def _fail(self, job: Job, code: str, error: Exception, *, retry: bool) -> None:
        log.error("job %s, attempt %d: %s: %s", job.id, job.attempt, code, _one_line(error))
        await self._queue.fail(self.id, job, JobError(code, _one_line(error)), retry=retry)

    @contextlib.asynccontextmanager
    async def _heartbeats(self, jobs: Sequence[Job]) -> AsyncIterator[set[str]]:
        """Keep the leases alive; the yielded set fills with the ids that are no longer ours."""
        lost: set[str] = set()

        async def beat() -> None:
            while True:
                await asyncio.sleep(self._lease_s / 3)
                try:
                    lost.update(await self._queue.heartbeat(self.id, jobs, self._lease_s))
                except QueueUnavailable as error:
                    log.warning("heartbeat missed: %s", error.message)

        beating = asyncio.create_task(beat())
        try:
            yield lost
        finally:
            await _cancel([beating])

    async def _keep_present(self) -> None:
        while True:
            try:
                await self._presence.announce(self._me)
            except QueueUnavailable as error:
                log.warning("cannot say that this worker lives: %s", error.message)
            await asyncio.sleep(INTERVAL_S)

    async def _keep_clean(self) -> None:
        while True:
            try:
                removed = await asyncio.to_thread(self._results.clean)
            except OSError as error:
                log.warning("cannot clean the result store: %s", error)
            else:
                log.info("result store cleaned: %d expired", removed)
            await asyncio.sleep(CLEAN_INTERVAL_S)


async def run_worker(settings: Settings, stop: asyncio.Event) -> bool:
    """Verify and load every model of the repository, then serve until `stop`.

    Returns:
        True when the last batch was finished, False when it was handed back while still running.

    Raises:
        BundleRejected: a model is damaged; a worker serves all of its models or does not start.
    """
    async with open_parts(settings) as (queue, results, presence):  # first, since it refuses settings at once
        start = time.perf_counter()
        loaded = [
            load_model(
                model,
                create_backend(settings.backend, threads=settings.threads),
                backend_name=settings.backend,
                max_batch=settings.max_batch,
            )
            for model in load_catalog(settings, verify=True).models
        ]
        names = ", ".join(f"{one.model.id} (batches of {one.cap})" for one in loaded)
        log.info("loaded %s in %.2f s", names, time.perf_counter() - start)
        worker = Worker(
            queue, results, presence, loaded, backend_name=settings.backend, lease_s=settings.lease_s
        )
        log.info("worker %s serves", worker.id)
        try:
            return await worker.run(stop, drain_s=settings.drain_s)
        finally:
            for one in loaded:
                one.backend.close()


async def _unless(stop: asyncio.Event, work: Coroutine[Any, Any, object]) -> None:
    """Await `work`, but no longer than until `stop` is set; raise what the work raised."""
    working, stopping = asyncio.create_task(work), asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({working, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            working.result()
    finally:
        await _cancel([working, stopping])


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:500]}" if text else type(error).__name__


async def _cancel(tasks: Sequence[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)

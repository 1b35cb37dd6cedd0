"""The worker: claims batches and gives them to its pipeline, which draws, stores and commits them.

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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from typing import Any

from flashbulb_distill.bundle import check_unchanged
from flashbulb_service.backends.embeddings import EmbeddingCache
from flashbulb_service.calibration import batch_sizes, load_student
from flashbulb_service.catalog import Model, exporter_times
from flashbulb_service.errors import ModelUnavailable, QueueUnavailable
from flashbulb_service.garbage import settle_heap
from flashbulb_service.head_start import WorkerEnd
from flashbulb_service.heap import bound_heap
from flashbulb_service.huge_pages import use_huge_pages
from flashbulb_service.jobs import Job
from flashbulb_service.model_book import ModelBook, Words
from flashbulb_service.model_pool import LoadedModel, LoadPause, Loan, ModelPool, Served
from flashbulb_service.model_store import keep_following
from flashbulb_service.outages import BACKOFF_S, OutageLog, keep_at
from flashbulb_service.parts import load_catalog, open_parts
from flashbulb_service.pipeline import Pipeline
from flashbulb_service.presence import INTERVAL_S, TTL_S, LiveWorker, Presence
from flashbulb_service.provenance import Marker
from flashbulb_service.queue import Lone, Queue, Taken
from flashbulb_service.repository import Repository
from flashbulb_service.results import ResultStore
from flashbulb_service.safety import ImageChecker, image_checker_of
from flashbulb_service.scheduler import (
    LONG,
    SHORT,
    Plan,
    Scheduler,
    Window,
    bucket_name,
    choose_lane,
    count_tokens,
    lane_of,
    rows_within,
)
from flashbulb_service.settings import Settings
from flashbulb_service.stoppable import Stoppable
from flashbulb_service.timing import Tau
from flashbulb_service.tracing import OFF, Tracing, traced
from flashbulb_service.worker_metrics import WorkerMetrics, serve_metrics

log = logging.getLogger(__name__)

IDLE_S = 5.0  # longest single wait for work; a wake-up ends it at once
CLEAN_INTERVAL_S = 600.0  # at most: what lives shorter is deleted sooner
LEAST_CLEAN_INTERVAL_S = 10.0
SCAN_INTERVAL_S = 2.0
# A lone job is drawn before its claim is answered, which saves a call. Where another one has come meanwhile, the
# claim is refused and the batch was drawn in vain: the older the news and the longer the batch, the dearer.
FRESH_MS = 10.0
EARLY_MS = 50.0


def load_model(model: Model, settings: Settings, cache: EmbeddingCache) -> LoadedModel:
    """Load a verified bundle, and warm up every batch size that will be used.

    Raises:
        BundleError: its folder was replaced since: what it draws would bear the name of another bundle.
    """
    check_unchanged(model.bundle)
    known = load_student(model.bundle, settings, cache)
    try:
        check_unchanged(model.bundle)
        canonical = known.student.canonical
        shape, sizes = model.bundle.manifest.shapes[0], [canonical] if canonical else batch_sizes(known.cap)
        known.student.warm_up(shape.width, shape.height, sizes, frames=shape.frames)
    except BaseException:
        known.student.backend.close()
        raise
    return LoadedModel(model, known.student, known.cap, known.times_ms)


def new_worker_id() -> str:
    """Return a name that no other worker has: host, process and a random part."""
    return f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"


@dataclass
class Shelved:
    """A model that is verified but not served: it was unloaded, is to be loaded, or could not be."""

    model: Model
    pause: LoadPause = field(default_factory=LoadPause)  # unless an operator wants it before
    mark: str | None = None  # of what an operator wanted at the newest failure

    def is_due(self, mark: str | None) -> bool:
        """Tell whether to load it now, given the mark of what an operator wants."""
        return mark != self.mark or time.monotonic() >= self.pause.due_at

    def fail(self, mark: str | None) -> float:
        """Note a load that failed; return in how many seconds it is due again."""
        self.mark = mark
        return self.pause.begin(time.monotonic())


class Worker:
    """One process that serves all of its models, one batch at a time; long work gives way between its steps."""

    def __init__(
        self,
        queue: Queue,
        results: ResultStore,
        presence: Presence,
        models: ModelPool,
        *,
        backend_name: str,
        lease_s: float,
        marker: Marker | None = None,
        checker: ImageChecker | None = None,
        metrics: WorkerMetrics | None = None,
        cache: EmbeddingCache | None = None,
        tracing: Tracing = OFF,
        worker_id: str | None = None,
        repository: Repository | None = None,
        unloaded: Sequence[Model] = (),
        max_tokens: int | None = None,
        api: WorkerEnd | None = None,
    ) -> None:
        """Keep the parts; nothing runs before `run`.

        max_tokens: of one batch, as `count_tokens` counts. api: who gives us head starts.
        """
        self._queue = queue
        self._results = results
        self._presence = presence
        self._repository = repository
        self._pool = models
        self._book, self._words = ModelBook(queue), Words()
        self._shelved = {model.id: Shelved(model) for model in unloaded}
        self._done_wishes: dict[str, str] = {}
        self._announced: LiveWorker | None = None  # what the list says of us
        self._announcing = asyncio.Lock()
        self._lease_s = lease_s
        self._scheduler = Scheduler(models.swap_ms)
        self.id = worker_id or new_worker_id()
        self._metrics = metrics or WorkerMetrics()
        self._pipeline = Pipeline(
            queue,
            results,
            self._scheduler,
            self.id,
            lease_s=lease_s,
            marker=marker or Marker(),
            checker=checker,
            metrics=self._metrics,
            cache=cache,
            server_time=self._server_time,
            tracing=tracing,
            short_models=lambda: list(self._models_of(SHORT)),
            api=api,
        )
        self._api = api
        self._backend_name = backend_name
        self._max_tokens = max_tokens
        for served in models.served.values():
            self._announce_model(served)

    async def run(self, stop: asyncio.Event, *, drain_s: float) -> bool:
        """Serve until `stop` is set, then finish the batch in hand, or hand it back after `drain_s`.

        Returns:
            True when the last batch was finished, False when it was handed back.
        """
        announcing = [asyncio.create_task(keep_at(work)) for work in (self._keep_present, self._keep_models)]
        reaping = partial(self._queue.keep_reaping, self._lease_s)
        upkeep = [asyncio.create_task(keep_at(work)) for work in (reaping, self._keep_clean)]
        serving = asyncio.create_task(self._serve(stop))
        stopping = asyncio.create_task(stop.wait())
        try:
            with self._listening():
                await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
            await self._withdraw(announcing)  # first of all: nobody shall count on us any more
            drained, _ = await asyncio.wait({serving}, timeout=drain_s)
            if drained:
                serving.result()
            return bool(drained)
        finally:
            await _cancel([serving, stopping])
            await self._pipeline.close()
            await _cancel(upkeep)
            await self._withdraw(announcing)

    def _listening(self) -> contextlib.AbstractContextManager[None]:
        """Draw what an API tells us of before the queue does, while this is open."""
        if self._api is None:
            return contextlib.nullcontext()
        return self._api.listening(partial(self._draw_ahead, asyncio.get_running_loop()))

    def _draw_ahead(self, loop: asyncio.AbstractEventLoop, job: Job) -> None:
        served = self._pool.offer(job.model)
        expected_ms = self._scheduler.lone_ms(job.model, job.bucket)
        is_short = lane_of(job.bucket) == SHORT and expected_ms is not None and expected_ms <= EARLY_MS
        if served is not None and is_short:
            self._pipeline.draw_ahead(served.model, job, Loan(self._pool, served), loop)

    async def _withdraw(self, announcing: "Sequence[asyncio.Task[None]]") -> None:
        await _cancel(announcing)
        with contextlib.suppress(QueueUnavailable):
            for said in {self._me, self._announced or self._me}:  # the newest may have been on its way
                await self._presence.withdraw(said)

    async def _serve(self, stop: asyncio.Event) -> None:
        lanes = [asyncio.create_task(self._serve_lane(stop, lane)) for lane in (SHORT, LONG)]
        try:
            await asyncio.wait(lanes, return_when=asyncio.FIRST_EXCEPTION)
            for ended in lanes:
                if ended.done():
                    ended.result()
        finally:
            await _cancel(lanes)
        await self._pipeline.drain()

    async def _serve_lane(self, stop: asyncio.Event, lane: str) -> None:
        outage = OutageLog(log, "queue out of reach, trying again")
        more = True  # as far as we know
        async with Stoppable.by(stop) as until_stop:
            while not stop.is_set():
                try:
                    await until_stop(self._pipeline.room(lane))
                    names = list(self._models_of(lane))
                    if not names:  # all were removed or are paused, or there never were any
                        await until_stop(asyncio.sleep(SCAN_INTERVAL_S))
                        continue
                    wake = None if more else await until_stop(self._queue.wait_for_work(names, IDLE_S))
                    # A wake for what we gave up meanwhile is meant for a worker that has it.
                    if wake and (gone := set(names) - self._pool.offered.keys()):
                        await self._queue.wake(sorted(gone))
                    if wake and not self._pipeline.has_room(lane):  # a step of long work has begun since
                        await until_stop(self._pipeline.room(lane))
                    if stop.is_set():
                        break
                    self._pipeline.is_claiming = self._pipeline.is_claiming or lane == SHORT
                    more = await self._claim(lane, wake.lone if wake else None, stop)
                    outage.worked()
                except QueueUnavailable as error:
                    outage.failed(error)
                    await until_stop(asyncio.sleep(BACKOFF_S))
                finally:
                    if lane == SHORT:
                        self._pipeline.is_claiming = False

    def _models_of(self, lane: str) -> dict[str, Served]:
        """Return the models whose work belongs to a lane, as they are now: a scan of the repository may change them."""
        return {name: served for name, served in self._pool.offered.items() if self._lane(served) == lane}

    def _lane(self, served: Served) -> str:
        manifest = served.model.bundle.manifest
        return choose_lane(manifest.task, exporter_times(manifest, self._backend_name))

    async def _claim(self, lane: str, lone: Lone | None, stop: asyncio.Event) -> bool:
        """Claim a batch and have it drawn; return whether more waits in the lane, as far as we know."""
        models = self._models_of(lane)
        names, most = list(models), max((served.cap for served in models.values()), default=1)
        taken = await self._claim_lone(lone, models) if lone is not None else None
        if taken is None:
            plan = partial(self._plan, lane=lane)
            taken = await self._queue.claim_next(self.id, names, most, self._lease_s, plan=plan, stop=stop)
            if taken.jobs:
                self._submit(models[taken.jobs[0].model], taken.jobs)
        return taken.more

    def _server_time(self) -> float:
        """Return seconds since the epoch by the queue's clock."""
        return time.time() + self._presence.clock_offset_s

    def _submit(
        self, served: Served, jobs: list[Job], held: "asyncio.Future[bool | None] | None" = None
    ) -> None:
        loan = Loan(self._pool, served, is_long=lane_of(jobs[0].bucket) == LONG)
        self._pipeline.submit(served.model, jobs, loan, held=held)

    async def _claim_lone(self, lone: Lone, models: Mapping[str, Served]) -> Taken | None:
        """Begin to draw a job while its claim is on its way; None when it is to be claimed as any other."""
        if self._server_time() * 1000 - lone.window.now_ms > FRESH_MS:
            return None
        plan, served = self._decide(lone.window, SHORT), models.get(lone.job.model)
        if plan is None or served is None or served.loaded is None or plan.take != (lone.job.id,):
            return None
        if plan.predicted_ms > EARLY_MS:
            return None
        held: asyncio.Future[bool | None] = asyncio.get_running_loop().create_future()
        self._submit(served, [lone.job], held)
        try:
            taken = await self._queue.take(self.id, plan, self._lease_s, models=list(models), lone=lone)
            held.set_result(taken.jobs == [lone.job])
        finally:
            if not held.done():
                held.set_result(None)
        if not held.result() and taken.jobs:  # another attempt of it
            self._submit(served, taken.jobs)
        return taken if taken.jobs else None

    def _decide(self, window: Window, lane: str) -> Plan | None:
        return self._scheduler.plan(replace(window, now_ms=window.now_ms + self._pipeline.lead_ms(lane)))

    def _plan(self, window: Window, *, lane: str) -> Plan | None:
        plan = self._decide(window, lane)
        if plan is not None and plan.drop:
            self._metrics.deadline_missed(plan.model, len(plan.drop))
        return plan

    async def _keep_present(self) -> None:
        outage = OutageLog(log, "cannot say that this worker lives")
        while True:
            try:
                await self._announce(self._metrics.exposition())
                await self._queue.publish_times(self.id, self._known_times(), TTL_S)
                self._pool.elsewhere = await self._served_elsewhere() if self._pool.paused else None
                outage.worked()
            except QueueUnavailable as error:
                outage.failed(error)
            await asyncio.sleep(INTERVAL_S)

    async def _announce(self, metrics: bytes = b"") -> None:
        async with self._announcing:
            me = self._me
            await self._presence.announce(
                me, metrics=metrics, memory=self._pool.memory(), instead_of=self._announced
            )
            self._announced = me

    async def _served_elsewhere(self) -> set[str]:
        others = [worker for worker in await self._presence.workers() if worker.id != self.id]
        return {model for worker in others for model in set(worker.models) - set(worker.paused)}

    def _known_times(self) -> dict[tuple[str, str], tuple[Tau, int]]:
        """Return (model, bucket) -> time model and cap, of every bucket whose time is known."""
        known = {}
        for model_id, served in self._pool.offered.items():
            for bucket in self._tokens_by_bucket(served):
                facts = self._scheduler.facts(model_id, bucket)
                if facts.tau is not None:
                    known[model_id, bucket] = (facts.tau, facts.cap)
        return known

    def _tokens_by_bucket(self, served: Served) -> dict[str, int]:
        """Return every bucket of a model, with the tokens of one of its rows."""
        model_id, manifest, lane = served.model.id, served.model.bundle.manifest, self._lane(served)
        return {
            bucket_name(
                model_id, shape.width, shape.height, num_steps, lane, frames=shape.frames
            ): count_tokens(shape.width, shape.height, shape.frames, num_steps)
            for shape, num_steps in product(manifest.shapes, manifest.offered_steps)
        }

    def _announce_model(self, served: Served) -> None:
        num_steps = len(served.model.bundle.manifest.time_steps)
        limits = {
            bucket: rows_within(self._max_tokens, tokens, served.cap)
            for bucket, tokens in self._tokens_by_bucket(served).items()
        }
        self._scheduler.add(served.model.id, served.cap, served.times_ms, num_steps, limits)

    async def _keep_models(self) -> None:
        """Serve what appears in the repository, and nothing that is gone; batches in hand keep their model."""
        while self._repository is not None:
            await asyncio.sleep(SCAN_INTERVAL_S)
            try:
                new, gone = await asyncio.to_thread(self._repository.scan)
            except OSError as error:
                log.warning("cannot look through the model repository: %s", error)
                continue
            for model_id in gone:
                self._shelved.pop(model_id, None)
                self._give_up(model_id, "is gone from the repository")
            self._shelved |= {model.id: Shelved(model) for model in new}
            await self._follow_words()
            if self._me != self._announced:
                with contextlib.suppress(QueueUnavailable):
                    await self._announce()

    async def _follow_words(self) -> None:
        """Serve what is found but what operators have unloaded, and have in memory what they want there."""
        try:
            self._words = words = await self._book.read()
        except QueueUnavailable:
            words = self._words  # the last known
        for model_id in words.unloaded & set(self._pool.served):
            # What replaced it, and could not be loaded yet, lies there already.
            self._shelved.setdefault(model_id, Shelved(self._pool.served[model_id].model))
            self._give_up(model_id, "was unloaded")
        for model_id in set(self._shelved) - words.unloaded:
            await self._take_up(self._shelved[model_id], words.wanted.get(model_id))
        for model_id, mark in words.wanted.items():
            served = self._pool.served.get(model_id)
            if served is not None and self._done_wishes.get(model_id) != mark:
                self._done_wishes[model_id] = mark
                served.pause.due_at = 0.0
                with contextlib.suppress(ModelUnavailable):  # it says so to those who want to draw
                    async with self._pool.use(served):
                        log.info("model %s is in memory", model_id)

    def _give_up(self, model_id: str, reason: str) -> None:
        if self._pool.remove(model_id):
            self._scheduler.forget(model_id)
            log.info("model %s %s and is served no longer", model_id, reason)

    async def _take_up(self, shelved: Shelved, mark: str | None) -> None:
        if not shelved.is_due(mark):
            return
        try:
            served = await self._pool.add(shelved.model)
        except ModelUnavailable as error:
            log.error(
                "%s; the others go on, and it is loaded again in %d s", error.message, shelved.fail(mark)
            )
        else:
            del self._shelved[served.model.id]
            self._announce_model(served)
            log.info("model %s is ready (batches of %d)", served.model.id, served.cap)

    @property
    def _me(self) -> LiveWorker:
        served, paused = self._pool.served, self._pool.paused
        bundles = tuple(one.model.bundle.sha256 for one in served.values())
        backends = tuple(one.backend for one in served.values())
        return LiveWorker(
            self.id, tuple(served), self._backend_name, bundles, backends, paused=tuple(sorted(paused))
        )

    async def _keep_clean(self) -> None:
        interval_s = min(CLEAN_INTERVAL_S, max(LEAST_CLEAN_INTERVAL_S, self._results.ttl_s / 2))
        while True:
            try:
                removed = await asyncio.to_thread(self._results.clean)
            except OSError as error:
                log.warning("cannot clean the result store: %s", error)
            else:
                if removed:
                    log.info("result store cleaned: %d expired", removed)
            await asyncio.sleep(interval_s)


async def run_worker(settings: Settings, stop: asyncio.Event, *, head_start_fd: int | None = None) -> bool:
    """Verify and load every model of the repository, then serve until `stop`.

    head_start_fd: the worker's end of `head_start.open_pair`, which the parent process has left open.

    Returns:
        True when the last batch was finished, False when it was handed back while still running.

    Raises:
        BundleRejected: a model is damaged; a worker serves all of its models or does not start.
        ModelUnavailable: a model cannot be loaded, or is larger than the memory for models.
    """
    bound_heap()
    async with (
        open_parts(settings) as (queue, results, presence),  # first, since it refuses settings at once
        traced(settings, "worker") as tracing,
    ):
        start = time.perf_counter()
        cache = EmbeddingCache(settings.embedding_cache_mb << 20)
        metrics, checker = WorkerMetrics(), image_checker_of(settings)

        def load(model: Model) -> LoadedModel:
            begin = time.perf_counter()
            ready = load_model(model, settings, cache)
            use_huge_pages()
            metrics.model_loaded(model.id, time.perf_counter() - begin)
            return ready

        pool = ModelPool(load, capacity_bytes=settings.models_memory_bytes)
        models = load_catalog(settings, verify=True).models
        words = Words()
        with contextlib.suppress(QueueUnavailable):
            words = await ModelBook(queue).read()
        unloaded = [model for model in models if model.id in words.unloaded]
        for model in models:  # of each name the newest last: the least recently used leave the memory first
            if model not in unloaded:
                await pool.add(model)
        names = ", ".join(f"{name} (batches of {served.cap})" for name, served in pool.served.items())
        log.info("loaded %s in %.2f s", names, time.perf_counter() - start)
        worker = Worker(
            queue,
            results,
            presence,
            pool,
            backend_name=settings.backend,
            lease_s=settings.lease_s,
            marker=Marker.from_settings(settings),
            checker=checker,
            metrics=metrics,
            cache=cache,
            tracing=tracing,
            repository=Repository(settings.models, models),
            unloaded=unloaded,
            max_tokens=settings.max_batch_tokens,
            api=None if head_start_fd is None else WorkerEnd.inherited(head_start_fd),
        )
        log.info("worker %s serves", worker.id)
        settle_heap()
        following = asyncio.create_task(keep_at(partial(keep_following, settings)))
        try:
            with serve_metrics(metrics, settings.metrics_host, settings.metrics_port):
                return await worker.run(stop, drain_s=settings.drain_s)
        finally:
            await _cancel([following])
            await pool.aclose()


async def _cancel(tasks: Sequence[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)

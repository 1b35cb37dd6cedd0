"""The stages of a worker, overlapped: while a batch is encoded, stored and committed, the next one already runs.

    claim ─► text ─► denoise ─► decode ─► check, encode and store each picture ─► complete (fenced)
             a thread per batch,          that thread, and a pool of others      event loop
             a lock per stage

A batch keeps its thread from stage to stage: a change of threads costs more than a stage of a small model. At most
one claim waits behind the one that is being drawn, and at most `MAX_DELIVERING` are behind it in delivery.

Long work (videos) has one claim in hand besides. Between two of its steps it tells how far it is, hears whether anybody
still wants it, and gives the device to short work (`turns.py`).
"""

import asyncio
import contextlib
import contextvars
import logging
import math
import os
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import takewhile
from typing import Any, TypedDict, TypeVar

import numpy as np
from redis.exceptions import ResponseError

from flashbulb_service.backends import Embeddings, ImageRequest, OnStep
from flashbulb_service.backends.embeddings import EmbeddingCache
from flashbulb_service.catalog import Model
from flashbulb_service.errors import (
    BackendError,
    BundleReplaced,
    ModelUnavailable,
    NewerMessage,
    OutOfMemory,
    QueueUnavailable,
    without_frames,
)
from flashbulb_service.finishing import Finished, Finisher, Undeliverable
from flashbulb_service.head_start import WorkerEnd
from flashbulb_service.jobs import Job, JobError
from flashbulb_service.long_work import Key, LongRun
from flashbulb_service.model_pool import LoadedModel, Loan
from flashbulb_service.observability import job_context
from flashbulb_service.outages import BACKOFF_S, OutageLog
from flashbulb_service.previews import Estimate, due_previews
from flashbulb_service.provenance import Marker
from flashbulb_service.queue import Queue
from flashbulb_service.results import ResultStore
from flashbulb_service.safety import CODE as CONTENT_POLICY
from flashbulb_service.safety import ImageChecker
from flashbulb_service.scheduler import LONG, SHORT, Scheduler, halves, lane_of
from flashbulb_service.tasks import ImageOutcome, ImageTask, Preview, StepDone
from flashbulb_service.tracing import OFF, Tracing
from flashbulb_service.turns import Turn, Turns
from flashbulb_service.worker_metrics import WorkerMetrics

log = logging.getLogger(__name__)

MAX_DRAWING = 2  # claims being drawn: one on the device, one ahead
MAX_DELIVERING = 2  # claims drawn and not yet committed; a slow store then slows the device, not the memory
CLAIM_LEAD_S = (
    0.010  # a claim takes 1 to 5 ms; later claims find more rows, so it is not made earlier than this
)
MAX_ENCODERS = 4
MAX_ATTACHED_BYTES = (
    64 * 1024
)  # of a picture that travels with the news of it; whoever waits reads a larger one
MAX_KNOWN_TIMES = 1024
GIVE_WAY_S = 0.001  # for a thread to begin
NOTE_AFTER_S = 0.003  # in which another process answers
KNOWN_DELIVERIES = 64
ADOPT_S = 1.0  # in which what was drawn ahead is claimed, or it was in vain
PAUSE_AHEAD_S = 10.0  # after one that was: others claim the jobs that we are told of, or they are refused
MIN_HIDDEN_CHARS = 3  # to hide a prompt of one letter would spoil the message and protect nobody

Result = TypeVar("Result")


class Abandoned(Exception):
    """Nobody waits for any row of a batch any more."""


@dataclass
class Claim:
    """Jobs of one bucket, from their claim to their end."""

    model: Model
    jobs: list[Job]
    lent: LoadedModel | None = None  # from when it is in memory
    lost: set[str] = field(default_factory=set)  # cancelled, or another attempt owns them
    held: "asyncio.Future[bool | None] | None" = None  # whether the jobs are ours after all; None: they are
    drawn: bool = False
    previews: list["asyncio.Task[Any]"] = field(default_factory=list)  # on their way to those who watch
    adopted: threading.Event | None = (
        None  # of one that was begun ahead: set when it is a claim, or never will be
    )
    told: bytes | None = None  # the result that an API was told early

    async def is_held(self) -> bool:
        """Wait for the answer of the queue, before which it must not be told of any outcome."""
        return self.held is None or bool(await asyncio.shield(self.held))

    @property
    def is_surely_held(self) -> bool:
        """Tell whether the queue has said yes; from any thread."""
        if self.adopted is not None and not self.adopted.is_set():
            return False
        return self.held is None or (self.held.done() and bool(self.held.result()))

    @property
    def is_refused(self) -> bool:
        """Tell whether the queue said no: nothing is ours by this claim, though it may be by another one."""
        return self.held is not None and self.held.done() and self.held.result() is False

    @property
    def lane(self) -> str:
        """Return the lane that the claim belongs to."""
        return lane_of(self.jobs[0].bucket)

    @property
    def loaded(self) -> LoadedModel:
        """Return the model in memory, which the claim has from its first batch on."""
        assert self.lent is not None
        return self.lent

    @property
    def suspect(self) -> bool:
        """Tell whether a run of a job failed or was lost before: its worker may have died of it."""
        return any(job.burnt for job in self.jobs)


@dataclass
class Drawn:
    """One drawn batch, whose pictures are being finished."""

    size: int  # rows that were drawn
    rows: "list[tuple[Job, ImageTask, Future[Finished]]]"  # those that are still wanted
    stages_ms: dict[str, float]
    started_at: float  # in seconds since the epoch by the queue's clock
    drawn_at: float  # by the monotonic clock
    stands: bool | None = None  # whether the only picture was committed already, and its result stands


class Completion(TypedDict):
    """What the queue is told of a finished job; see `Queue.complete`."""

    result: bytes
    device_ms: float
    attached: bytes


@dataclass(frozen=True)
class Ahead:
    """What is drawn of a job that we hold no claim of yet."""

    claim: Claim
    loan: Loan
    begun: "Begun"
    loop: asyncio.AbstractEventLoop  # that the loan is given back on


@dataclass(frozen=True)
class Begun:
    """A batch that is being drawn."""

    rows: "list[tuple[Job, ImageTask]]"
    started_at: float  # in seconds since the epoch by the queue's clock
    drawing: "Future[Drawn | None]"  # None: nobody waited for it any more
    runs: threading.Lock  # free from when its thread runs


class Pipeline:
    """Draws and delivers claims. Use it from one event loop; `submit` only after `room`."""

    def __init__(
        self,
        queue: Queue,
        results: ResultStore,
        scheduler: Scheduler,
        worker_id: str,
        *,
        lease_s: float,
        marker: Marker,
        checker: ImageChecker | None,
        metrics: WorkerMetrics,
        cache: EmbeddingCache | None,
        server_time: Callable[[], float],
        tracing: Tracing = OFF,
        short_models: Callable[[], Sequence[str]] = tuple,
        api: WorkerEnd | None = None,
    ) -> None:
        """Keep the parts; threads start with the first batch.

        Args:
            short_models: whose work may go between the steps of long work.
            cache: of the students' embeddings, to count its hits.
            server_time: seconds since the epoch by the queue's clock.
            api: who gives head starts, and gets early results.
        """
        self._queue = queue
        self._scheduler = scheduler
        self._worker_id = worker_id
        self._lease_s = lease_s
        self._finisher = Finisher(results, marker, checker)
        self._metrics = metrics
        self._cache = cache
        self._server_time = server_time
        self._tracing = tracing
        self._short_models = short_models
        self._api = api
        self._hand = threading.Lock()  # held while it changes what is drawn ahead
        self._ahead: Ahead | None = None
        self._drawn_ahead: Future[Drawn | None] | None = None  # the newest, claimed or not
        self._no_ahead_until = 0.0  # by the monotonic clock
        self._drawers = ThreadPoolExecutor(2 * (MAX_DRAWING + MAX_DELIVERING), "draw")
        self._stages = {stage: threading.Lock() for stage in ("text", "decode")}
        self._device = Turns()
        self._step_end = 0.0  # of the step of long work that is being drawn; inf: nobody knows, 0: none is
        self._known_step_s: dict[Key, float] = {}  # seconds of a step of long work, newest
        self._encoders = ThreadPoolExecutor(min(MAX_ENCODERS, os.cpu_count() or 1), "encode")
        self._claims: dict[asyncio.Task[None], Claim] = {}
        self._changed = asyncio.Event()
        self._known_s: dict[tuple[str, int], float] = {}  # (model, rows) -> text and denoise, newest
        self._free_at = 0.0  # when the device will have drawn everything, as far as we know
        self._deliveries_ms: dict[str, deque[float]] = {  # lane -> the newest, of whole batches
            lane: deque(maxlen=KNOWN_DELIVERIES) for lane in (SHORT, LONG)
        }
        self._notes: deque[Callable[[], None]] = deque()  # on what was delivered
        self._noting: asyncio.TimerHandle | None = None
        self._failure: BaseException | None = None
        self._outage = OutageLog(log, "cannot tell the queue how jobs ended, trying again")
        self.is_claiming = False  # short work is on its way from the queue, where it waits no more

    async def room(self, lane: str = SHORT) -> None:
        """Return when the next claim of a lane is due.

        Of short work: the device is idle, or will be in the time that a claim takes. Of long work: none is being drawn.

        Raises:
            Exception: what ended an earlier claim, where it was nobody's row that was wrong.
        """
        while True:
            changed = self._changed
            if self._failure is not None:
                raise self._failure
            due_s = self._due_s(lane)
            if due_s is not None and due_s <= 0:
                return
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(due_s):
                    await changed.wait()

    def has_room(self, lane: str) -> bool:
        """Tell whether the next claim of a lane is due now."""
        return self._due_s(lane) == 0

    def lead_ms(self, lane: str = SHORT) -> float:
        """Return what a batch claimed now takes besides its own time, as far as is known.

        That is what the device still has to draw, and the 95 % point of the time from a drawn batch to its last commit.
        """
        ordered = sorted(self._deliveries_ms[lane])
        delivery_ms = ordered[math.ceil(0.95 * len(ordered)) - 1] if ordered else 0.0
        step_end = self._step_end if self._step_end < math.inf else 0.0
        free_at = max(self._free_at, step_end) if lane == SHORT else 0.0
        return max(0.0, free_at - time.monotonic()) * 1000 + delivery_ms

    def submit(
        self,
        model: Model,
        jobs: list[Job],
        loan: Loan,
        *,
        held: "asyncio.Future[bool | None] | None" = None,
    ) -> None:
        """Draw and deliver claimed jobs with a model that is lent for it; none stays leased when that ends.

        held: drawing starts while the claim is still on its way, and nothing is committed unless it succeeds (True).
            Refused (False), nothing is handed back: the jobs may be ours by another claim. None: nobody knows.
        """
        ahead = self._adopt(model, jobs, held)
        claim = ahead.claim if ahead else Claim(model, jobs, held=held)

        def stop_unless_held(answer: "asyncio.Future[bool | None]") -> None:
            if not answer.result():
                claim.lost.update(job.id for job in jobs)

        if held is not None:
            held.add_done_callback(stop_unless_held)
        if ahead is None:
            begun = self._begin_at_once(claim, loan)
        else:
            begun, loan = ahead.begun, ahead.loan
        if claim.lane == SHORT and not claim.drawn:
            free_at = max(
                time.monotonic(), self._free_at, self._step_end if self._step_end < math.inf else 0.0
            )
            self._free_at = free_at + self._expected_s(claim)
        task = asyncio.create_task(self._run(claim, loan, begun))
        self._claims[task] = claim
        task.add_done_callback(self._ended)

    def draw_ahead(self, model: Model, job: Job, loan: Loan, loop: asyncio.AbstractEventLoop) -> None:
        """Draw a short job that is about to be claimed on the calling thread, if nothing else is drawn.

        Whatever is submitted next is either its claim, which goes on with it, or the end of it. loop: of `submit`.
        """
        adopted = threading.Event()
        claim = Claim(model, [job], adopted=adopted)
        rows, refusals = read_rows(claim, claim.jobs)
        if refusals:
            return
        drawing: Future[Drawn | None] = Future()
        drawing.set_running_or_notify_cancel()  # whoever waits for it cannot cancel it
        with self._hand:
            if self._claims or self._ahead or self.is_claiming or time.monotonic() < self._no_ahead_until:
                return
            claim.lent = loan.take_now()
            if claim.lent is None:
                return
            begun = Begun(rows, self._server_time(), drawing, threading.Lock())
            self._ahead, self._drawn_ahead = Ahead(claim, loan, begun, loop), drawing
        _settle(drawing, self._drawing(claim, rows, loop, is_whole=True))
        if not adopted.wait(ADOPT_S):  # it has failed, and its claim would be told why
            self._drop_ahead(claim)

    async def drain(self) -> None:
        """Return when every claim is delivered.

        Raises:
            Exception: as `room` does.
        """
        if self._claims:
            await asyncio.wait(self._claims)
        if self._failure is not None:
            raise self._failure

    async def close(self) -> None:
        """Hand back what is not delivered. A running stage goes on in its thread until its next step."""
        self._drop_ahead()
        with self._hand:
            self._no_ahead_until = math.inf
        for task, claim in list(self._claims.items()):
            claim.lost.update(job.id for job in claim.jobs)
            task.cancel()
        await asyncio.gather(*self._claims, return_exceptions=True)
        if self._drawn_ahead is not None:  # its model is about to be closed
            await asyncio.wait({asyncio.ensure_future(_end_of(self._drawn_ahead))}, timeout=ADOPT_S)
        self._do_notes()
        for pool in (self._drawers, self._encoders):
            pool.shutdown(wait=False, cancel_futures=True)

    def _adopt(
        self, model: Model, jobs: list[Job], held: "asyncio.Future[bool | None] | None"
    ) -> Ahead | None:
        """Make what was begun ahead the claim of these jobs, if it is what they want; else it is in vain."""
        with self._hand:
            ahead = self._ahead
            if ahead is None:
                return None
            (job, task), claim = ahead.begun.rows[0], ahead.claim
            if claim.model is model and [replace(job, enqueued_at=one.enqueued_at) for one in jobs] == jobs:
                self._ahead = None
                claim.jobs, claim.held, ahead.begun.rows[:] = jobs, held, [(jobs[0], task)]
                assert claim.adopted is not None
                claim.adopted.set()
                return ahead
        self._drop_ahead()
        return None

    def _drop_ahead(self, claim: Claim | None = None) -> None:
        """Draw no further what was begun ahead (only this one, if given); from any thread."""
        with self._hand:
            ahead = self._ahead
            if ahead is None or claim not in (None, ahead.claim):
                return
            self._ahead = None
            self._no_ahead_until = time.monotonic() + PAUSE_AHEAD_S
            ahead.claim.lost.add(ahead.claim.jobs[0].id)
            assert ahead.claim.adopted is not None
            ahead.claim.adopted.set()
        log.info("job %s was drawn ahead of its claim in vain", ahead.claim.jobs[0].id)

        def give_back(_: "Future[Drawn | None]") -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                ahead.loop.call_soon_threadsafe(ahead.loan.give_back)

        ahead.begun.drawing.add_done_callback(give_back)

    def _due_s(self, lane: str) -> float | None:
        """Return in how many seconds a lane's next claim is due; None: not before something ends."""
        claims = [claim for claim in self._claims.values() if claim.lane == lane]
        drawing = sum(not claim.drawn for claim in claims)
        most = MAX_DRAWING if lane == SHORT else 1
        if drawing >= most or len(claims) - drawing >= MAX_DELIVERING:
            return None
        if any(claim.suspect for claim in self._claims.values()):
            return None  # nobody may lose an attempt beside it
        free_at = max(self._free_at if drawing else 0.0, self._step_end) if lane == SHORT else 0.0
        return None if free_at == math.inf else max(0.0, free_at - time.monotonic() - CLAIM_LEAD_S)

    def _must_end_before(self, claim: Claim) -> "set[asyncio.Task[None]]":
        """Return the earlier claims that must end first: none is drawn beside a suspect.

        The scheduler planned it alone in its batch. That the other lane claims beside it is not ruled out; by the order
        of the claims no two of them wait for each other.
        """
        earlier = takewhile(lambda entry: entry[1] is not claim, self._claims.items())
        return {task for task, other in earlier if claim.suspect or other.suspect}

    def _ended(self, task: "asyncio.Task[None]") -> None:
        claim = self._claims.pop(task)
        if claim.lane == LONG:
            self._step_end = 0.0  # it may have failed in the middle of a step
        elif not claim.drawn:
            self._foresee()
        if not task.cancelled() and (error := task.exception()) is not None:
            self._failure = self._failure or error
        self._tell_change()

    def _later(self, note: Callable[[], None]) -> None:
        """Do what nobody waits for a moment later: now the cores are needed for the answer."""
        self._notes.append(note)
        if self._noting is None:
            self._noting = asyncio.get_running_loop().call_later(
                NOTE_AFTER_S,
                self._do_notes,
                context=contextvars.Context(),  # of no job: log lines would have its names
            )

    def _do_notes(self) -> None:
        if self._noting is not None:
            self._noting.cancel()
            self._noting = None
        while self._notes:
            self._notes.popleft()()
        self._finisher.prepare()

    def _tell_change(self) -> None:
        """Let all who wait for room look again."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def _run(self, claim: Claim, loan: Loan, begun: Begun | None) -> None:
        self._metrics.claimed(claim.jobs)
        try:
            async with self._heartbeats(claim), contextlib.AsyncExitStack() as lending:
                lending.callback(loan.give_back)
                # Before a model is taken: whoever needs the room of one that is lent waits as well.
                if earlier := self._must_end_before(claim):
                    await asyncio.wait(earlier)
                try:
                    claim.lent = claim.lent or await loan.take()
                except ModelUnavailable as error:  # another worker may have the memory
                    if await claim.is_held():
                        for job in claim.jobs:
                            await self._fail(job, error.code, error, retry=True)
                    return
                await self._run_batch(claim, claim.jobs, begun, is_whole=True)
                if not await claim.is_held() and not claim.is_refused:  # the answer was lost
                    await self._tell_end(partial(self._queue.release, self._worker_id, claim.jobs))
        except BaseException:  # finished jobs are no longer ours, so this hands back only the rest
            await claim.is_held()
            if not claim.is_refused:
                with contextlib.suppress(QueueUnavailable):
                    await self._queue.release(self._worker_id, claim.jobs)
            raise
        finally:
            for sending in claim.previews:
                sending.cancel()

    async def _run_batch(
        self, claim: Claim, jobs: list[Job], begun: Begun | None = None, *, is_whole: bool = False
    ) -> None:
        if begun is None:
            rows, refusals = read_rows(claim, jobs)
            for job, code, error in refusals:
                await claim.is_held()
                await self._fail(
                    job, code, error, retry=code == NewerMessage.code
                )  # another worker may understand it
            if not rows:
                return
            begun = self._begin(claim, rows, is_whole=is_whole)
        try:
            drawn = await asyncio.wrap_future(begun.drawing)
        except Exception as error:  # noqa: BLE001  whatever a model raises belongs to its rows, not to us
            if await claim.is_held():
                await self._after_failure(claim, begun.rows, error)
        else:
            if drawn is None:
                log.info("batch of %d of %s stopped: nobody waits for it", len(begun.rows), claim.model.id)
                return
            if not await claim.is_held():
                log.info("job %s was drawn in vain: its claim was refused", jobs[0].id)
                return
            if claim.previews:  # a picture comes after them
                await asyncio.gather(*claim.previews, return_exceptions=True)
            try:
                await self._deliver(claim, drawn)
                self._deliveries_ms[claim.lane].append((time.monotonic() - drawn.drawn_at) * 1000)
            finally:
                drawn_jobs = [job for job, _ in begun.rows]
                self._later(
                    partial(self._note_batch, claim.loaded, drawn_jobs, drawn.stages_ms, begun.started_at)
                )

    def _begin_at_once(self, claim: Claim, loan: Loan) -> Begun | None:
        """Begin to draw before anything else is done for a claim, where nothing is in the way; else return None."""
        if claim.lane != SHORT or claim.suspect or self._must_end_before(claim):
            return None
        rows, refusals = read_rows(claim, claim.jobs)
        claim.lent = None if refusals else loan.take_now()
        if claim.lent is None:
            return None
        begun = self._begin(claim, rows, is_whole=True)
        begun.runs.acquire(
            timeout=GIVE_WAY_S
        )  # what is left to do here would keep the other thread from running
        return begun

    def _begin(self, claim: Claim, rows: list[tuple[Job, ImageTask]], *, is_whole: bool) -> Begun:
        draw = self._drawing(claim, rows, asyncio.get_running_loop(), is_whole=is_whole)
        started_at, runs = self._server_time(), threading.Lock()
        runs.acquire()

        def run() -> Drawn | None:
            runs.release()
            return draw()

        return Begun(rows, started_at, self._drawers.submit(run), runs)

    def _drawing(
        self,
        claim: Claim,
        rows: list[tuple[Job, ImageTask]],
        loop: asyncio.AbstractEventLoop,
        *,
        is_whole: bool,
    ) -> Callable[[], Drawn | None]:
        """Return what draws a batch on the thread that calls it; None from it: nobody wants it any more."""

        def note_denoised(stages_ms: dict[str, float]) -> None:
            if is_whole:
                loop.call_soon_threadsafe(self._note_drawn, claim, stages_ms)

        def show(estimates: list[Estimate]) -> None:
            loop.call_soon_threadsafe(self._show, claim, estimates)

        def draw() -> Drawn | None:
            try:
                return self._run_stages(claim, rows, note_denoised, show, loop)
            except Abandoned:
                return None
            except Exception as error:  # noqa: BLE001  it is raised again
                raise without_frames(error)  # noqa: B904  what it came from is dropped on purpose

        return draw

    def _run_stages(
        self,
        claim: Claim,
        rows: list[tuple[Job, ImageTask]],
        note_denoised: Callable[[dict[str, float]], None],
        show: Callable[[list[Estimate]], None],
        loop: asyncio.AbstractEventLoop,
    ) -> Drawn:
        """Draw a batch on the calling thread; each stage waits until no other batch is in it."""
        student, clock = claim.loaded.student, dict[str, float]()
        started_at = self._server_time()
        requests = [
            ImageRequest(t.prompt, t.seed, t.index, t.width, t.height, t.steps, t.frames) for _, t in rows
        ]

        def stage(name: str, work: Callable[[], Result]) -> Result:
            with self._stages[name]:
                _stop_if_abandoned(claim, rows)
                start = time.perf_counter()
                result = work()
                clock[name] = (time.perf_counter() - start) * 1000
                return result

        with self._device.enter(claim.lane) as turn:
            embeddings = stage("text", lambda: self._encode_prompts(claim.loaded, requests))
            long = self._long_run(claim, rows, turn, loop) if claim.lane == LONG else None
            with turn:
                _stop_if_abandoned(claim, rows)
                if long:
                    long.begin_step()
                latents = student.denoise(requests, embeddings, self._watch(claim, rows, clock, show, long))
        clock["denoise"] = turn.held_ms - clock.get("preview", 0.0)
        note_denoised(dict(clock))
        pictures = stage("decode", lambda: student.decode(latents))
        if len(pictures) != len(rows):
            raise BackendError(f"expected {len(rows)} pictures of the backend, got {len(pictures)}")
        if claim.adopted is not None:
            if not claim.adopted.wait(ADOPT_S):
                self._drop_ahead(claim)
            _stop_if_abandoned(claim, rows)
        drawn_at = time.monotonic()
        wanted = [
            (job, task, pixels)
            for (job, task), pixels in zip(rows, pictures, strict=True)
            if job.id not in claim.lost
        ]
        finishing = self._start_finishing(claim, wanted, clock, started_at)
        drawn = Drawn(len(rows), finishing, clock, started_at, drawn_at)
        self._commit_here(claim, drawn)
        return drawn

    def _commit_here(self, claim: Claim, drawn: Drawn) -> None:
        """Commit a lone picture on the thread that drew it, where nothing else is to be waited for.

        The event loop would have to wake first, while a client waits. It commits what this does not.
        """
        if len(drawn.rows) != 1 or not claim.is_surely_held or not self._finisher.is_local:
            return
        if claim.lane == LONG:  # the loop has its last step to tell first
            return
        job, task, finishing = drawn.rows[0]
        if task.partial_images or finishing.exception() is not None:
            return
        with contextlib.suppress(QueueUnavailable, ResponseError):
            drawn.stands = self._queue.complete_here(
                self._worker_id, job, **self._completion(claim, drawn, job, finishing.result())
            )

    def _start_finishing(
        self,
        claim: Claim,
        pictures: list[tuple[Job, ImageTask, np.ndarray]],
        stages_ms: dict[str, float],
        started_at: float,
    ) -> "list[tuple[Job, ImageTask, Future[Finished]]]":
        """Finish the first picture here, the shortest way for a batch of one, and the others on other threads."""

        def finish(job: Job, task: ImageTask, pixels: np.ndarray) -> Finished:
            finished = self._finisher.encode(claim.model, job.id, task, pixels)
            if claim.adopted is not None:
                self._answer_early(claim, finished, stages_ms, started_at)
            return self._finisher.store(finished)

        others = [
            (job, task, self._encoders.submit(finish, job, task, pixels))
            for job, task, pixels in pictures[1:]
        ]
        first = [(job, task, _settled(finish, job, task, pixels)) for job, task, pixels in pictures[:1]]
        return first + others

    def _answer_early(
        self, claim: Claim, finished: Finished, stages_ms: dict[str, float], started_at: float
    ) -> None:
        """Tell the API of the only picture of a claim that we hold, before it is stored and committed."""
        if self._api is None or not claim.is_surely_held or len(finished.data) > MAX_ATTACHED_BYTES:
            return
        if not self._finisher.is_local:  # it takes too long to leave the queue in the dark
            return
        (job,) = claim.jobs
        told = self._outcome(claim, 1, stages_ms, finished).to_bytes()
        times = {"started_at": max(job.enqueued_at, started_at), "finished_at": self._server_time()}
        if job.id not in claim.lost and self._api.answer(job, told, finished.data, **times):
            claim.told = told

    def _encode_prompts(self, loaded: LoadedModel, requests: list[ImageRequest]) -> Embeddings:
        if self._cache is None:
            return loaded.student.encode_prompts(requests)
        hits, misses = self._cache.hits, self._cache.misses
        embeddings = loaded.student.encode_prompts(requests)
        self._metrics.embeddings(
            loaded.model.id, hits=self._cache.hits - hits, misses=self._cache.misses - misses
        )
        return embeddings

    def _note_batch(
        self, loaded: LoadedModel, jobs: list[Job], clock: dict[str, float], started_at: float
    ) -> None:
        model_id, bucket, batch_ms = loaded.model.id, jobs[0].bucket, sum(clock.values())
        log.info("batch of %d of %s in %.1f ms", len(jobs), model_id, batch_ms)
        drift = self._scheduler.observe(model_id, bucket, len(jobs), batch_ms)
        self._metrics.drawn(jobs, loaded.cap, started_at=started_at, batch_s=batch_ms / 1000, stages_ms=clock)
        if drift is not None:
            self._metrics.calibration_drift(model_id, drift)

    def _note_drawn(self, claim: Claim, clock: dict[str, float]) -> None:
        claim.drawn = True
        if len(self._known_s) >= MAX_KNOWN_TIMES:
            self._known_s.clear()
        taken_s = (clock["text"] + clock["denoise"]) / 1000
        self._known_s[claim.model.id, len(claim.jobs)] = taken_s
        if claim.lane == SHORT:
            self._foresee()
        self._tell_change()

    def _foresee(self) -> None:
        """Tell anew when the short lane will be free, after it has drawn a claim or will never draw it."""
        waiting = [claim for claim in self._claims.values() if claim.lane == SHORT and not claim.drawn]
        self._free_at = time.monotonic() + sum(map(self._expected_s, waiting))

    def _expected_s(self, claim: Claim) -> float:
        """Return how long a claim takes to be drawn: as one of its size did, else by the time model; 0 if unknown."""
        rows = len(claim.jobs)
        known = self._known_s.get((claim.model.id, rows))
        if known is None:
            known = (self._scheduler.predicted_ms(claim.model.id, claim.jobs[0].bucket, rows) or 0.0) / 1000
        return known

    def _watch(
        self,
        claim: Claim,
        rows: list[tuple[Job, ImageTask]],
        clock: dict[str, float],
        show: Callable[[list[Estimate]], None],
        long: LongRun | None,
    ) -> OnStep:
        """Return what stops an abandoned batch between its steps, and decodes estimates that somebody wants to see."""

        def on_step(step: int, num_steps: int, x0: np.ndarray) -> None:
            if long:
                long.end_step(step, num_steps)
            _stop_if_abandoned(claim, rows)
            if due := due_previews(rows, step + 1, num_steps):
                start = time.perf_counter()
                with self._stages["decode"]:
                    pictures = claim.loaded.student.decode(x0)
                clock["preview"] = clock.get("preview", 0.0) + (time.perf_counter() - start) * 1000
                show([Estimate(*rows[row], index, step + 1, num_steps, pictures[row]) for row, index in due])
            if long and step + 1 < num_steps:
                long.begin_step()

        return on_step

    def _long_run(
        self,
        claim: Claim,
        rows: list[tuple[Job, ImageTask]],
        turn: Turn,
        loop: asyncio.AbstractEventLoop,
    ) -> LongRun:
        key = (claim.model.id, claim.jobs[0].bucket, len(rows))

        async def tell(step: int, num_steps: int) -> bool:
            return await self._tell_step(claim, rows, StepDone(step=step, steps=num_steps))

        async def ask() -> bool:
            return await self._tell_step(claim, rows, None)

        def tell_last(num_steps: int) -> None:
            claim.previews.append(asyncio.create_task(tell(num_steps, num_steps)))

        return LongRun(
            self._device, turn, loop, key, self._known_step_s, tell, ask, tell_last, self._note_step
        )

    def _note_step(self, end: float) -> None:
        """Note when the step that began will have been drawn; 0: it has been, and whoever waited may go on."""
        self._step_end = end
        if not end:
            self._tell_change()

    async def _tell_step(
        self, claim: Claim, rows: list[tuple[Job, ImageTask]], told: StepDone | None
    ) -> bool:
        """Tell the queue of a step, and learn what is not ours any more; return whether short work waits for us."""
        data, jobs = told.to_bytes().decode() if told else "", [job for job, _ in rows]
        try:
            lost, waits = await self._queue.step_done(self._worker_id, jobs, data, self._short_models())
        except QueueUnavailable as error:
            log.warning("a step of job %s is not told: %s", jobs[0].id, error.message)
            return False
        claim.lost.update(lost)
        return (
            waits or self.is_claiming or any(c.lane == SHORT and not c.drawn for c in self._claims.values())
        )

    def _show(self, claim: Claim, estimates: list[Estimate]) -> None:
        earlier = tuple(claim.previews)
        claim.previews += [asyncio.create_task(self._send_preview(claim, one, earlier)) for one in estimates]

    async def _send_preview(
        self, claim: Claim, estimate: Estimate, earlier: "Sequence[asyncio.Task[None]]"
    ) -> None:
        """Store an estimate and tell those who watch; the picture itself does not depend on it."""
        job, task = estimate.job, estimate.task
        name = f"{job.id}-p{estimate.index}"
        try:
            finished = await asyncio.get_running_loop().run_in_executor(
                self._encoders, self._finisher.finish, claim.model, name, task, estimate.pixels
            )
            finished = await self._finisher.store_remotely(finished)
            told = Preview(
                file=finished.file,
                partial_image_index=estimate.index,
                step=estimate.step,
                steps=estimate.num_steps,
            )
            await asyncio.gather(
                *earlier, return_exceptions=True
            )  # they are told in the order of their steps
            await self._queue.progress(self._worker_id, job, told.to_bytes().decode())
        except (Undeliverable, QueueUnavailable) as error:
            log.warning("a preview of job %s was left out: %s", job.id, error)

    async def _after_failure(self, claim: Claim, rows: list[tuple[Job, ImageTask]], error: Exception) -> None:
        """Halve the batch until the row that spoils it is alone, so that innocent rows burn no attempt."""
        no_memory = isinstance(error, OutOfMemory)
        if no_memory:
            self._scheduler.out_of_memory(claim.model.id, rows[0][0].bucket, len(rows))
        if len(rows) == 1:
            (job, task), code = rows[0], OutOfMemory.code if no_memory else "backend_error"
            await self._fail(job, code, error, retry=True, task=task)
            return
        # Its message is not logged: it may quote any row's prompt. The row that fails alone tells its own.
        log.warning("batch of %d failed, running its halves: %s", len(rows), type(error).__name__)
        self._metrics.batch_split("out_of_memory" if no_memory else "error")
        for part in halves([job for job, _ in rows]):
            await self._run_batch(claim, part)

    async def _deliver(self, claim: Claim, drawn: Drawn) -> None:
        deliveries = [self._deliver_row(claim, drawn, *row) for row in drawn.rows]
        if len(deliveries) == 1:
            await deliveries[0]
            return
        for ended in await asyncio.gather(*deliveries, return_exceptions=True):
            if isinstance(ended, BaseException):
                raise ended

    async def _deliver_row(
        self, claim: Claim, drawn: Drawn, job: Job, task: ImageTask, finishing: "Future[Finished]"
    ) -> None:
        """Finish, store, then commit: a result that is announced can be read."""
        with job_context(job, task.request_id):
            try:
                finished = finishing.result() if finishing.done() else await asyncio.wrap_future(finishing)
                finished = await self._finisher.store_remotely(finished)
            except Undeliverable as error:
                without_frames(error)  # of the thread that raised it as well
                await self._fail(job, error.code, error.reason, retry=error.retry)
            else:
                await self._commit(claim, drawn, job, task, finished)

    async def _commit(
        self, claim: Claim, drawn: Drawn, job: Job, task: ImageTask, finished: Finished
    ) -> None:
        stands = drawn.stands
        if stands is None:
            completion = self._completion(claim, drawn, job, finished)
            stands = await self._tell_end(partial(self._queue.complete, self._worker_id, job, **completion))
        self._later(partial(self._note_commit, drawn, job, task, finished, stands, self._server_time()))

    def _note_commit(
        self, drawn: Drawn, job: Job, task: ImageTask, finished: Finished, stands: bool, ended_at: float
    ) -> None:
        with job_context(job, task.request_id):
            if not stands:
                self._metrics.commit_rejected(job.model)
                log.info("result of job %s refused: it was cancelled, or another attempt owns it", job.id)
                return
            log.info("job %s done in a batch of %d", job.id, drawn.size)
        pixels = task.width * task.height * task.frames
        self._metrics.delivered(job.model, pixels, finished.encode_s, finished.store_s)
        self._tracing.job(
            task.traceparent,
            job,
            started_at=drawn.started_at,
            ended_at=ended_at,
            stages_ms={
                **drawn.stages_ms,
                "encode": finished.encode_s * 1000,
                "store": finished.store_s * 1000,
            },
            attributes={"flashbulb.model": job.model, "flashbulb.batch_size": drawn.size},
        )

    def _completion(self, claim: Claim, drawn: Drawn, job: Job, finished: Finished) -> Completion:
        attached = b"" if claim.told or not job.awaited else finished.data
        return {
            "result": claim.told or self._outcome(claim, drawn.size, drawn.stages_ms, finished).to_bytes(),
            "device_ms": sum(drawn.stages_ms.values()) / drawn.size,
            "attached": attached if len(attached) <= MAX_ATTACHED_BYTES else b"",
        }

    def _outcome(
        self, claim: Claim, size: int, stages_ms: dict[str, float], finished: Finished
    ) -> ImageOutcome:
        return ImageOutcome(
            file=finished.file,
            batch_size=size,
            batch_ms=sum(stages_ms.values()),
            encode_ms=(finished.encode_s + finished.store_s) * 1000,
            stages_ms=stages_ms,
            bundle_sha256=claim.model.bundle.sha256,
            backend=claim.loaded.student.backend.name,
        )

    async def _fail(
        self, job: Job, code: str, error: Exception, *, retry: bool, task: ImageTask | None = None
    ) -> None:
        message = one_line(error)
        # A model may quote what it could not draw: its client may read that, the log may not.
        logged = message if task is None else hide_prompt(message, task.prompt)
        with job_context(job, task.request_id if task else ""):
            log.error("job %s, attempt %d: %s: %s", job.id, job.attempt, code, logged)
        self._metrics.attempt_failed(code)
        keep = code != CONTENT_POLICY  # a replay would draw the same picture
        told = JobError(code, message)
        await self._tell_end(partial(self._queue.fail, self._worker_id, job, told, retry=retry, keep=keep))

    async def _tell_end(self, end: Callable[[], Awaitable[Result]]) -> Result:
        """Tell the queue how jobs ended, until it answers: what it hears twice or too late changes nothing."""
        while True:
            try:
                answer = await end()
            except QueueUnavailable as error:
                self._outage.failed(error)
                await asyncio.sleep(BACKOFF_S)
            else:
                self._outage.worked()
                return answer

    @contextlib.asynccontextmanager
    async def _heartbeats(self, claim: Claim) -> AsyncIterator[None]:
        """Keep the leases alive; `claim.lost` fills with the ids that are no longer ours."""

        async def beat() -> None:
            outage = OutageLog(log, "heartbeat missed")
            while True:
                pause_s = self._lease_s / 3
                try:
                    lost = await self._queue.heartbeat(self._worker_id, claim.jobs, self._lease_s)
                    claim.lost.update(lost)
                    outage.worked()
                except QueueUnavailable as error:
                    outage.failed(error)
                    pause_s = min(pause_s, BACKOFF_S)
                await asyncio.sleep(pause_s)

        beating: list[asyncio.Task[None]] = []
        first = asyncio.get_running_loop().call_later(
            self._lease_s / 3, lambda: beating.append(asyncio.create_task(beat()))
        )
        try:
            yield
        finally:
            first.cancel()
            for task in beating:
                task.cancel()
            await asyncio.gather(*beating, return_exceptions=True)


async def _end_of(future: "Future[Any]") -> None:
    with contextlib.suppress(Exception):
        await asyncio.wrap_future(future)


def _settled(work: Callable[..., Result], *args: object) -> "Future[Result]":
    """Do work on this thread, and return it as if another one had done it."""
    future: Future[Result] = Future()
    _settle(future, partial(work, *args))
    return future


def _settle(future: "Future[Result]", work: Callable[[], Result]) -> None:
    """Do work on this thread, and give what comes of it to those who wait."""
    try:
        future.set_result(work())
    except Exception as error:  # noqa: BLE001  whoever reads the future gets it
        future.set_exception(error)


def _stop_if_abandoned(claim: Claim, rows: Sequence[tuple[Job, ImageTask]]) -> None:
    if claim.lost.issuperset(job.id for job, _ in rows):
        raise Abandoned


def read_rows(
    claim: Claim, jobs: Sequence[Job]
) -> "tuple[list[tuple[Job, ImageTask]], list[tuple[Job, str, Exception]]]":
    """Read the tasks of those jobs that are still ours: what is to be drawn, and what cannot be."""
    rows: list[tuple[Job, ImageTask]] = []
    refusals: list[tuple[Job, str, Exception]] = []
    for job in jobs:
        if job.id in claim.lost:
            continue
        try:
            task = ImageTask.from_bytes(job.payload)
            check_bundle(claim.model, task)
        except ValueError as error:
            refusals.append((job, "invalid_task", error))
        except (BundleReplaced, NewerMessage) as error:
            refusals.append((job, error.code, error))
        else:
            rows.append((job, task))
    return rows, refusals


def check_bundle(model: Model, task: ImageTask) -> None:
    """Refuse to draw with another student than the one that was asked for under the same name and version.

    Raises:
        BundleReplaced: the bundle was exported again while the job waited.
    """
    if task.bundle_sha256 not in (None, model.bundle.sha256):
        raise BundleReplaced(
            f"expected the bundle {task.bundle_sha256[:12]} of {model.id}, which was replaced by "
            f"{model.bundle.sha256[:12]} while the job waited: send the request again"
        )


def hide_prompt(message: str, prompt: str) -> str:
    """Return a message without the prompt that it may quote."""
    for quoted in (" ".join(prompt.split()), repr(prompt)[1:-1]):
        if len(quoted) >= MIN_HIDDEN_CHARS:
            message = message.replace(quoted, "[prompt]")
    return message


def one_line(error: BaseException) -> str:
    """Say an error in one line of bounded length."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:500]}" if text else type(error).__name__

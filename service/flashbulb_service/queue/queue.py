"""The queue's interface: one typed wrapper per Lua script, and waiting without polling.

Promise: at-least-once execution + fenced commit = at most one accepted result per job.
All times come from the Redis server's clock, unless a test passes `now`.
"""

import asyncio
import hashlib
import json
import logging
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from types import MappingProxyType, TracebackType
from typing import Any, Self, cast

from redis.asyncio import Redis
from redis.exceptions import ResponseError

from flashbulb_service.errors import (
    IdempotencyConflict,
    InvalidRequest,
    JobNotFound,
    ModelDraining,
    QueueUnavailable,
)
from flashbulb_service.jobs import Job, JobError, JobState, JobView, NewJob
from flashbulb_service.outages import BACKOFF_S, OutageLog
from flashbulb_service.queue import scripts
from flashbulb_service.queue.completions import Completions, Expected
from flashbulb_service.queue.connection import (
    CONNECT_TIMEOUT_S,
    Part,
    open_client,
    patient_client,
    unavailable,
)
from flashbulb_service.queue.direct import Direct
from flashbulb_service.queue.events import Event, Events
from flashbulb_service.queue.keys import Keys, digest
from flashbulb_service.queue.line import Line
from flashbulb_service.queue.refusals import too_late, too_many
from flashbulb_service.queue.scripts import Script
from flashbulb_service.queue.values import (
    DueHook,
    Enqueued,
    Gate,
    Kept,
    KeyMode,
    Limits,
    QueueStats,
    RequestView,
    Sparing,
    Taken,
    Wake,
)
from flashbulb_service.queue.views import VIEW_FIELDS, make_view
from flashbulb_service.queue.windows import (
    Lone,
    bucket_window,
    claimed_job,
    is_cut,
    read_times,
    read_token,
    used_ms,
)
from flashbulb_service.scheduler import BucketFacts, Plan, Window, plan_batch
from flashbulb_service.timing import Tau

log = logging.getLogger(__name__)

MAX_WINDOW_ROWS = 512  # of one bucket, that one look at the queue returns
REAP_LIMIT = 200  # jobs moved per script call: the server serves nobody else meanwhile
MAX_MESSAGE_CHARS = 2_000
MAX_GATES = 1_000


class Queue:
    """A namespace of jobs in one Redis or Valkey server.

    Make it with `Queue.connect(url)` and close it with `aclose()`, or use it as an async context manager.
    Every method raises QueueUnavailable when the server does not answer.
    """

    @classmethod
    def connect(
        cls,
        url: str,
        *,
        namespace: str = "flashbulb",
        limits: Limits | None = None,
        max_connections: int = 64,
    ) -> Self:
        """Make a queue on `redis://host:port/db` or `unix:///path/to/socket`; connects lazily."""
        return cls(open_client(url, max_connections), namespace=namespace, limits=limits)

    def __init__(
        self, client: "Redis", *, namespace: str = "flashbulb", limits: Limits | None = None
    ) -> None:
        self.limits = limits or Limits()
        self.keys = Keys(namespace)
        self.instance = secrets.token_hex(8)  # names this process to those who end its jobs
        self._client = client
        self._patient = patient_client(client)
        # Scripts are short, and the server runs one at a time.
        self._scripts = {name: Script.of(scripts.source(name)) for name in scripts.NAMES}
        self._line = Line(client)
        self._direct = Direct(client)
        self._sleepers: list[Line] = []  # that wait for work, or did
        self._completions = Completions(client, self.keys.done(self.instance), self._read_ended)
        self.events = Events(self._patient, self.keys, self.instance)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Stop the completion reader and close all connections."""
        await self._completions.aclose()
        await self.events.aclose()
        await self._patient.aclose()
        for line in (self._line, *self._sleepers):
            await line.aclose()
        self._direct.close()
        await self._client.aclose()

    async def run_script(self, source: str, *args: str | bytes | float) -> Any:
        """Run a Lua script of another part on the namespace, on the queue's connections and with its errors."""
        script = self._scripts.get(source)
        if script is None:
            script = self._scripts[source] = Script.of(source)
        return await self._run_script(script, args)

    @asynccontextmanager
    async def commands(self) -> AsyncIterator["Redis"]:
        """Yield the client for plain commands; what goes wrong inside is told in the queue's words."""
        async with unavailable():
            yield self._client

    async def ping(self) -> None:
        """Return when the server answers.

        Raises:
            QueueUnavailable: it does not.
        """
        async with unavailable():
            await self._client.ping()

    # producers

    async def enqueue(
        self,
        jobs: Sequence[NewJob],
        *,
        idempotency_key: str | None = None,
        request_digest: str | None = None,
        mode: KeyMode = "replay",
        window_s: float = 0.0,
        keep: Kept | None = None,
        awaited: bool = True,
        ids: Sequence[str] | None = None,
        now: float | None = None,
    ) -> Enqueued:
        """Store all jobs of one request, or none.

        All jobs must have the same tenant. With an idempotency key, the same jobs sent again return the
        first ids with created=False, whatever became of those jobs. A key belongs to a tenant and is
        remembered only for admitted requests, as long as the results are. "The same" is decided by a hash
        of the jobs; pass request_digest (of what the client sent) when payloads hold fresh random draws.
        With mode "record" the key is only remembered; with "attach" it replays jobs that are live or ended
        well within the last window_s, and otherwise does as "record". Who does not wait for the jobs says
        so with awaited=False, and saves the news of their end. ids: of `new_id`, one per job, where the caller has
        told of them already.

        Raises:
            DeadlineUnreachable: the jobs would not be done by their deadline; a QueueFull.
            QueueFull: the total or the tenant's limit would be passed; has retry_after_s.
            IdempotencyConflict: the key was used for different jobs.
            ValueError: no jobs, jobs of several tenants, or another number of ids.
        """
        if not jobs:
            raise ValueError("enqueue needs at least one job, got none")
        tenants = {job.tenant for job in jobs}
        if len(tenants) > 1:
            raise ValueError(f"the jobs of one request must have one tenant, got {sorted(tenants)}")
        ids = [new_id() for _ in jobs] if ids is None else list(ids)
        rows: list[str | bytes | float] = []
        for job_id, job in zip(ids, jobs, strict=True):
            priority = max(-self.limits.max_priority_ms, min(job.priority_ms, self.limits.max_priority_ms))
            deadline = "" if job.deadline_s is None else _ms(job.deadline_s)
            target_s = self.limits.default_slo_s if job.deadline_s is None else job.deadline_s
            rows += [
                job_id,
                job.model,
                job.bucket,
                job.payload,
                job.cost,
                job.weight,
                _ms(target_s) - priority,
                deadline,
                job.max_attempts,
                job.wire,
            ]
        expected = self._completions.expect(ids) if awaited else None
        reply = await self._run(
            "enqueue",
            _time(now),
            jobs[0].tenant,
            self.instance if awaited else "",
            self.limits.max_queued,
            self.limits.max_queued_per_tenant,
            "" if idempotency_key is None else digest(idempotency_key),
            "" if idempotency_key is None else _request_hash(jobs, request_digest),
            _ms(self.limits.idempotency_ttl_s),
            mode,
            _ms(window_s),
            keep.record if keep else "",
            keep.owner if keep else "",
            " ".join(keep.lists) if keep else "",
            "1" if keep and keep.events else "",
            "1" if keep and keep.hook else "",
            _ms(self.limits.result_ttl_s),
            *rows,
        )
        outcome, *rest = reply
        if outcome == b"conflict":
            raise IdempotencyConflict(
                f"idempotency key {idempotency_key!r} was used for a different request: send a new key"
            )
        if outcome == b"draining":
            raise ModelDraining(rest[0].decode())
        if outcome == b"late":
            raise too_late(self.limits, *rest)
        if outcome == b"full":
            raise too_many(self.limits, jobs[0].tenant, *rest)
        created = outcome == b"created"
        found = tuple(job_id.decode() for job_id in rest)
        return Enqueued(found, created, waiter=ids[0], expected=expected if created else None)

    async def get(self, job_id: str) -> JobView | None:
        """Read a job; None when there is none, or its result has expired."""
        return (await self._views([job_id]))[0]

    async def views(self, ids: Sequence[str]) -> list[JobView | None]:
        """Read several jobs at once."""
        return await self._views(ids)

    async def request(self, request_id: str) -> RequestView | None:
        """Read a kept request; None when there is none, or it has expired."""
        async with unavailable():
            fields = await self._client.hmget(self.keys.job(request_id), ["record", "owner", "rows"])
        record, owner, rows = cast(list[bytes | None], fields)
        if record is None or owner is None or rows is None:
            return None
        return RequestView(request_id, owner.decode(), record, tuple(rows.decode().split()))

    async def requests(
        self, name: str, *, after: str | None = None, limit: int = 20, newest_first: bool = True
    ) -> list[RequestView]:
        """List the requests of a list that can still be read, from behind `after`.

        Raises:
            JobNotFound: `after` is not in the list.
        """
        key = self.keys.listing(name)
        async with unavailable():
            start = 0
            if after is not None:
                rank = await (self._client.zrevrank if newest_first else self._client.zrank)(key, after)
                if rank is None:
                    raise JobNotFound(after)
                start = cast(int, rank) + 1
            found: list[RequestView] = []
            while len(found) < limit:
                members = await self._client.zrange(key, start, start + limit - 1, desc=newest_first)
                if not members:
                    break
                start += len(members)
                for member in cast(list[bytes], members):
                    view = await self.request(member.decode())
                    if view is not None and len(found) < limit:
                        found.append(view)
            return found

    async def position(self, view: JobView) -> int | None:
        """Tell how many jobs of its bucket are before a queued one; None when it is not queued."""
        async with unavailable():
            rank = await self._client.zrank(self.keys.due(view.model, view.bucket), view.id)
        return cast(int | None, rank)

    async def last_step(self, job_id: str) -> str | None:
        """Return what the worker of a job last told of a step; None while there is nothing."""
        async with unavailable():
            told: Any = await self._client.hget(self.keys.job(job_id), "progress")
        return None if told is None else cast(bytes, told).decode()

    def watch(
        self, request_id: str, *, after: str, quiet_s: float, owner: str = ""
    ) -> AsyncGenerator[Event | None, None]:
        """Yield a request's events behind `after` ("0": all that are kept); None after quiet_s without one."""
        return self.events.watch(request_id, after=after, quiet_s=quiet_s, owner=owner)

    async def past_events(self, request_id: str, *, after: str) -> list[Event]:
        """Return a request's events behind `after` that have been written already."""
        async with unavailable():
            return await self.events.past(request_id, after=after)

    async def wait(
        self, ids: Sequence[str], timeout_s: float, *, expected: Expected | None = None
    ) -> list[JobView]:
        """Wait until all jobs are done, failed or cancelled; completion is pushed, not polled.

        expected: what `enqueue` returned with the ids; it saves asking for their state first.

        Returns:
            their views, in the order of ids.
        Raises:
            TimeoutError: not all ended within timeout_s; the jobs go on.
            JobNotFound: an id is unknown.
        """
        async with asyncio.timeout(timeout_s):
            while True:
                news = await self._completions.wait(ids, expected)
                unread = [job_id for job_id in dict.fromkeys(ids) if job_id not in news]
                read = dict(zip(unread, await self._views(unread), strict=True)) if unread else {}
                views = [news.get(job_id) or read.get(job_id) for job_id in ids]
                expected = None
                ended = [view for view in views if view is not None and view.state.is_terminal]
                if len(ended) == len(ids):
                    return ended
                for job_id, view in zip(ids, views, strict=True):
                    if view is None:
                        raise JobNotFound(job_id)

    @property
    def is_awaited(self) -> bool:
        """Tell whether anybody in this process waits for a job."""
        return self._completions.is_awaited

    def tell_early(self, view: JobView) -> bool:
        """Let those who wait here for a job have its end from the worker that holds it, ahead of the queue's word.

        Returns:
            False where nobody does, or the queue was faster.
        """
        return self._completions.tell_early(view)

    async def settled(self) -> None:
        """Return when the queue knows what was told early here, or is late with it.

        Whoever has an answer may count on the place of its job being free again.
        """
        await self._completions.settled()

    async def cancel(self, job_id: str, *, now: float | None = None) -> bool:
        """Cancel a queued, delayed or running job; its worker learns it at the next heartbeat.

        Returns:
            True when this call cancelled it, False when it had already ended.
        Raises:
            JobNotFound: the id is unknown.
        """
        outcome = await self._run("cancel", _time(now), job_id, _ms(self.limits.result_ttl_s))
        if outcome < 0:
            raise JobNotFound(job_id)
        return bool(outcome)

    async def abandon(self, ids: Sequence[str], waiter: str, *, now: float | None = None) -> int:
        """Wait no longer for the jobs of one request, which are cancelled if nobody else waits for them.

        Returns:
            how many were.
        """
        return int(await self._run("abandon", _time(now), _ms(self.limits.result_ttl_s), waiter, *ids))

    async def forget(self, view: RequestView, lists: Sequence[str], *, now: float | None = None) -> bool:
        """Cancel what is live of a kept request, and let nobody read it back; tell whether it was there."""
        ttl_ms = _ms(self.limits.result_ttl_s)
        return bool(await self._run("forget", _time(now), view.id, ttl_ms, *lists))

    # hooks

    async def due_hooks(
        self, lease_s: float, limit: int = 8, *, now: float | None = None
    ) -> tuple[list[DueHook], float | None]:
        """Take requests whose hook is due, each for one attempt; nobody else gets them for lease_s.

        Returns:
            them, and in how many seconds the next one is due (None: none waits).
        """
        wait_ms, *taken = await self._run("hooks", _time(now), _ms(lease_s), limit)
        attempts = zip(taken[::3], taken[1::3], taken[2::3], strict=True)
        due = [DueHook(lead.decode(), attempt, replays) for lead, attempt, replays in attempts]
        return due, None if wait_ms < 0 else wait_ms / 1000

    async def hook_done(
        self, hook: DueHook, *, again_in_s: float | None, counts: bool = True, now: float | None = None
    ) -> None:
        """End an attempt: delivered or given up (None), or to be tried again; one that does not count was not made."""
        delay = "" if again_in_s is None else _ms(again_in_s)
        await self._run(
            "hook_done", _time(now), hook.request_id, hook.attempt, hook.replays, delay, int(counts)
        )

    async def wait_for_hooks(self, timeout_s: float) -> None:
        """Block until a hook may be due."""
        async with unavailable(timeout_s + CONNECT_TIMEOUT_S):
            await self._patient.blpop([self.keys.hooks_wake()], timeout=timeout_s)

    # workers

    async def claim(
        self,
        worker_id: str,
        models: Sequence[str],
        max_batch: int,
        lease_s: float,
        *,
        plan: Callable[[Window], Plan | None] | None = None,
        now: float | None = None,
    ) -> list[Job]:
        """Take up to max_batch jobs, all of one bucket of one of the models; [] when none waits.

        Never waits. `plan` decides what to take of what waits (default: `plan_batch` without knowledge of
        times). Jobs whose deadline has passed, and those that the plan drops, end as failed with code
        deadline_exceeded instead of being returned.
        """
        if max_batch < 1:
            raise ValueError(f"max_batch must be at least 1, got {max_batch}")
        decide = plan or (lambda window: plan_batch(window, lambda _model, _bucket: BucketFacts(max_batch)))
        return (await self.claim_next(worker_id, models, max_batch, lease_s, plan=decide, now=now)).jobs

    async def claim_next(
        self,
        worker_id: str,
        models: Sequence[str],
        max_batch: int,
        lease_s: float,
        *,
        plan: Callable[[Window], Plan | None],
        stop: asyncio.Event | None = None,
        now: float | None = None,
    ) -> Taken:
        """Do as `claim`, and tell whether more waits.

        Where the call that takes the jobs is not answered, it is sent until it is, or until `stop` is set: the jobs may
        be this worker's. Without a `stop` it is sent once.
        """
        outage = OutageLog(log, "no answer to a claim, sending it again")
        while models:
            window = await self.window(worker_id, models, 2 * max_batch, now=now)
            decision = plan(window)
            if decision is None:
                break
            if decision.drop and len(decision.take) < max_batch and is_cut(window, decision):
                decision = replace(
                    decision, take=(), charges_ms=()
                )  # the others' places are for those behind
            call_id, taken = _new_call_id(), None
            while taken is None:
                try:
                    taken = await self.take(
                        worker_id, decision, lease_s, models=models, call_id=call_id, now=now
                    )
                    outage.worked()
                except QueueUnavailable as error:
                    if stop is None:
                        raise
                    outage.failed(error)
                    with suppress(TimeoutError):
                        await asyncio.wait_for(stop.wait(), BACKOFF_S)
                    if stop.is_set():
                        raise
            if taken.jobs:
                return taken
        return Taken([], more=False)

    async def window(
        self, worker_id: str, models: Sequence[str], max_rows: int, *, now: float | None = None
    ) -> Window:
        """Read a bounded part of what waits for the models: of each bucket up to about max_rows jobs.

        Tenants that are owed device time come first, each with an equal number of its most urgent jobs.
        """
        moment, workers, num_long, buckets = await self._run(
            "window", _time(now), worker_id, min(max_rows, MAX_WINDOW_ROWS), *models
        )
        return Window(
            now_ms=float(moment),
            buckets=tuple(bucket_window(bucket) for bucket in buckets),
            used_ms=used_ms(buckets),
            num_long=num_long,
            num_workers=max(1, workers),
        )

    async def take(
        self,
        worker_id: str,
        plan: Plan,
        lease_s: float,
        *,
        models: Sequence[str] = (),
        lone: Lone | None = None,
        call_id: str | None = None,
        now: float | None = None,
    ) -> Taken:
        """Lease the planned jobs that are still there, and fail those that the plan drops.

        models: the worker's, to tell whether more waits for them. lone: what the plan was made for; nothing is taken if
        more has come since. call_id: the same again finds what the first one took, if its answer was lost.
        """
        charged = [part for row in zip(plan.take, map(repr, plan.charges_ms), strict=True) for part in row]
        more, *rows = await self._run(
            "take",
            _time(now),
            worker_id,
            _ms(lease_s),
            _ms(self.limits.result_ttl_s),
            plan.model,
            plan.bucket,
            round(plan.predicted_ms),
            repr(plan.clock_ms),
            "" if lone is None else round(lone.window.now_ms),
            call_id or _new_call_id(),
            len(models),
            len(plan.take),
            *models,
            *charged,
            *plan.drop,
        )
        return Taken([claimed_job(row) for row in rows], more=bool(more))

    async def publish_times(
        self,
        worker_id: str,
        times: Mapping[tuple[str, str], tuple[Tau, int]],
        alive_s: float,
        *,
        now: float | None = None,
    ) -> None:
        """Say that a worker lives for alive_s more, and (model, bucket) -> its time model and batch cap.

        From then on, jobs with a deadline are admitted only if they are predicted to be in time.
        """
        rows = [
            part
            for (model, bucket), (tau, cap) in times.items()
            for part in (model, bucket, repr(tau.floor_ms), repr(tau.base_ms), repr(tau.row_ms), cap)
        ]
        await self._run("publish", _time(now), worker_id, _ms(alive_s), *rows)

    async def known_times(self, model: str, bucket: str) -> tuple[float, list[tuple[Tau, int]]]:
        """Return the server's time in seconds, and of every live worker that serves a bucket its time model and cap."""
        async with unavailable(), self._client.pipeline(transaction=False) as pipe:
            pipe.time()
            pipe.hvals(self.keys.speed(model, bucket))
            (seconds, micros), entries = await pipe.execute()
        now = seconds + micros / 1e6
        return now, read_times(entries, now * 1000)

    async def wait_for_work(self, models: Sequence[str], timeout_s: float) -> Wake | None:
        """Block until a model may have work; claim next in either case.

        Returns:
            what woke us, None after timeout_s. Waking is a hint: the claim may still be empty.
        """
        if timeout_s <= 0:
            raise ValueError(f"timeout_s must be > 0 (0 would block for ever), got {timeout_s}")
        line = next((line for line in self._sleepers if not line.is_busy), None)
        if line is None:
            line = Line(self._client, timeout_s=None)
            self._sleepers.append(line)
        # The margin ends a wait on a connection that died without a word.
        async with unavailable(timeout_s + CONNECT_TIMEOUT_S):
            found = await line.call("BLPOP", *map(self.keys.wake, models), timeout_s)
        return None if found is None else Wake(read_token(found[1]))

    async def wake(self, models: Sequence[str]) -> None:
        """Pass a wake on that was heard by a worker which does not take the work of these models."""
        await self._run("wake", *models)

    async def heartbeat(
        self, worker_id: str, jobs: Sequence[Job], lease_s: float, *, now: float | None = None
    ) -> set[str]:
        """Extend the leases of running jobs to lease_s from now.

        Returns:
            ids that are no longer this worker's (cancelled, or lease lost): stop working on them.
        """
        if not jobs:
            return set()
        lost = await self._run("heartbeat", _time(now), worker_id, _ms(lease_s), *_held(jobs))
        return {job_id.decode() for job_id in lost}

    async def complete(
        self,
        worker_id: str,
        job: Job,
        result: bytes,
        *,
        device_ms: float = 0.0,
        attached: bytes = b"",
        now: float | None = None,
    ) -> bool:
        """Store the result, if this worker still holds this attempt, and charge its tenant's API key for it.

        device_ms: this job's share of its batch's time on the device.
        attached: what those who wait for the job get with the result, and nobody later; keep it small.

        Returns:
            True when the result stands (also when a repeated call finds its own), False when it was refused.
        """
        command = self._completion(worker_id, job, result, device_ms, attached, now)
        return bool(await self._run("complete", *command))

    def complete_here(
        self, worker_id: str, job: Job, result: bytes, *, device_ms: float = 0.0, attached: bytes = b""
    ) -> bool:
        """Do as `complete`, on the thread that calls; it is not tried again, but `complete` may be called after it."""
        command = self._completion(worker_id, job, result, device_ms, attached, None)
        return bool(self._direct.call("EVALSHA", self._scripts["complete"].sha1, 1, self.keys.tag, *command))

    def _completion(
        self, worker_id: str, job: Job, result: bytes, device_ms: float, attached: bytes, now: float | None
    ) -> tuple[Part, ...]:
        ttl_ms, device_us = _ms(self.limits.result_ttl_s), round(device_ms * 1000)
        return (_time(now), worker_id, job.id, job.attempt, result, ttl_ms, device_us, attached)

    async def fail(
        self,
        worker_id: str,
        job: Job,
        error: JobError,
        *,
        retry: bool,
        keep: bool = True,
        delay_s: float | None = None,
        now: float | None = None,
    ) -> JobState:
        """End an attempt without a result, if this worker still holds it.

        With retry, the job is delayed by delay_s (default: exponential backoff) until max_attempts are
        burnt. Otherwise it is failed and, with keep, is a dead letter that may be replayed.

        Returns:
            the job's state afterwards. A refused call changes nothing and returns the state it found
            (JobState.CANCELLED for a job that no longer exists).
        """
        state = await self._run(
            "fail",
            _time(now),
            worker_id,
            job.id,
            job.attempt,
            int(retry),
            "" if delay_s is None else _ms(delay_s),
            _ms(self.limits.backoff_s),
            _ms(self.limits.max_backoff_s),
            error.code,
            error.message[:MAX_MESSAGE_CHARS],
            *self._expiry(),
            int(keep),
        )
        return JobState(state.decode()) if state else JobState.CANCELLED

    async def progress(self, worker_id: str, job: Job, data: str, *, now: float | None = None) -> bool:
        """Tell those who watch how far a running job is, if this worker still holds it."""
        return bool(await self._run("progress", _time(now), worker_id, job.id, job.attempt, data))

    async def step_done(
        self,
        worker_id: str,
        jobs: Sequence[Job],
        data: str,
        models: Sequence[str],
        *,
        now: float | None = None,
    ) -> tuple[set[str], bool]:
        """Tell those who watch running jobs which step is done, if data says so; `last_step` returns it from then on.

        Returns:
            ids that are no longer this worker's, and whether jobs of any of the models wait.
        """
        held = _held(jobs)
        waits, *lost = await self._run("step", _time(now), worker_id, data, len(jobs), *held, *models)
        return {job_id.decode() for job_id in lost}, bool(waits)

    async def release(self, worker_id: str, jobs: Sequence[Job]) -> int:
        """Hand running jobs back at once, burning no attempt; for a worker that must stop.

        Returns:
            how many were still this worker's and went back to the head of their queue.
        """
        return int(await self._run("release", worker_id, *_held(jobs))) if jobs else 0

    # upkeep

    async def reap(self, now: float | None = None, *, sparing: Sparing | None = None) -> int:
        """Do what is due: expired leases go back or die, delayed jobs return, passed deadlines end jobs.

        Any number of processes may call it at any time. sparing: of one that calls it again and again: while there
        was an outage lately, no lease goes back or dies by its calls.

        Returns:
            how many jobs it moved.
        """
        total = 0
        while True:
            known = () if sparing is None else sparing.told()
            moved, *heard = await self._run("reap", _time(now), REAP_LIMIT, *self._expiry(), *known)
            if sparing is not None:
                sparing.heard_ms, sparing.until_ms = heard
            total += int(moved)
            if moved < REAP_LIMIT:
                return total

    async def keep_reaping(self, lease_s: float, interval_s: float = 0.25) -> None:
        """Reap for ever, until the task is cancelled; outages are logged and survived.

        lease_s: of the workers. An outage in which they may have missed a heartbeat says nothing of them: after it,
            leases are spared for the time of a whole one, in which all who live renew theirs. Who begins does not
            know whether there was one.
        """
        outage = OutageLog(log, "reaping interrupted")
        sparing = Sparing(_ms(lease_s), most_apart_ms=_ms(lease_s / 3 + interval_s))
        while True:
            try:
                await self.reap(sparing=sparing)
                outage.worked()
            except QueueUnavailable as error:
                outage.failed(error)
            await asyncio.sleep(interval_s)

    async def replay_dead(self, job_id: str, *, now: float | None = None) -> bool:
        """Queue a failed job again with a fresh attempt budget and no deadline; not subject to admission.

        Returns:
            False when the job is not among the dead letters.

        Raises:
            InvalidRequest: its request was deleted, or other jobs of it have expired: nobody could read the result.
        """
        target_ms, ttl_ms = _ms(self.limits.default_slo_s), _ms(self.limits.result_ttl_s)
        replayed = await self._run("replay", _time(now), job_id, target_ms, ttl_ms)
        if replayed < 0:
            raise InvalidRequest(
                f"expected a job whose request can still be read, but that of {job_id!r} was deleted or has expired: "
                "have it sent again"
            )
        return bool(replayed)

    async def dead_letters(self, *, limit: int = 50, offset: int = 0) -> list[JobView]:
        """Return jobs that failed and can be replayed, the newest first."""
        async with unavailable():
            ids: Any = await self._client.zrevrange(self.keys.dead, offset, offset + limit - 1)
        views = await self._views([job_id.decode() for job_id in ids]) if ids else []
        return [view for view in views if view is not None and view.state is JobState.FAILED]

    async def set_gate(self, model: str, gate: Gate | None) -> None:
        """Pause a model (jobs are stored and wait), drain it (no new ones are stored), or open it with None.

        Batches in hand go on. It holds for all processes of the namespace, and until the next word on it.

        Raises:
            InvalidRequest: there are too many models that are not open.
        """
        if not await self._run("gate", model, gate or "", MAX_GATES):
            raise InvalidRequest(f"expected at most {MAX_GATES} paused or drained models: resume one first")

    async def gates(self) -> dict[str, Gate]:
        """Return the models (name@version) that are paused or draining."""
        async with unavailable():
            found: Any = await self._client.hgetall(self.keys.gates)
        return {
            model.decode(): "paused" if gate == b"paused" else "draining" for model, gate in found.items()
        }

    async def stats(self, *, now: float | None = None) -> QueueStats:
        """Count what is where."""
        reply = await self._run("stats", _time(now), _ms(self.limits.dead_ttl_s))
        running, delayed, dead, short_ms, long_ms, *queued = reply
        counts = {model.decode(): count for model, count in zip(queued[::2], queued[1::2], strict=True)}
        return QueueStats(MappingProxyType(counts), running, delayed, dead, short_ms / 1000, long_ms / 1000)

    # inside

    async def _run(self, script: str, *args: str | bytes | float) -> Any:
        return await self._run_script(self._scripts[script], args)

    async def _run_script(self, script: Script, args: Sequence[Part]) -> Any:
        try:
            return await self._line.call("EVALSHA", script.sha1, 1, self.keys.tag, *args)
        except ResponseError as error:
            if not str(error).startswith("NOSCRIPT"):
                raise
            return await self._line.call("EVAL", script.text, 1, self.keys.tag, *args)

    def _expiry(self) -> tuple[int, int, int]:
        return _ms(self.limits.result_ttl_s), _ms(self.limits.dead_ttl_s), self.limits.max_dead

    async def _read_ended(self, ids: Sequence[str]) -> set[str]:
        states = await self._run("watch", self.instance, *ids)
        return {
            job_id
            for job_id, state in zip(ids, states, strict=True)
            if not state or JobState(state.decode()).is_terminal
        }

    async def _views(self, ids: Sequence[str]) -> list[JobView | None]:
        async with unavailable(), self._client.pipeline(transaction=False) as pipe:
            for job_id in ids:
                pipe.hmget(self.keys.job(job_id), VIEW_FIELDS)
            rows = await pipe.execute()
        return [make_view(job_id, row) for job_id, row in zip(ids, rows, strict=True)]


def new_id() -> str:
    """Make a job id: unguessable, and sorted by time so that ties in a queue are served in order."""
    return f"{time.time_ns():016x}{secrets.token_hex(8)}"


def _new_call_id() -> str:
    return secrets.token_hex(4)


def _ms(seconds: float) -> int:
    return round(seconds * 1000)


def _time(now: float | None) -> str | int:
    """Encode a test's clock; the empty string asks the script for the server's."""
    return "" if now is None else _ms(now)


def _held(jobs: Sequence[Job]) -> list[str | int]:
    return [part for job in jobs for part in (job.id, job.attempt)]


def _request_hash(jobs: Sequence[NewJob], request_digest: str | None) -> str:
    """Hash all that a request asks for, or what stands for it."""
    if request_digest is not None:
        return digest(request_digest)
    rows = [
        (
            job.model,
            job.bucket,
            hashlib.sha256(job.payload).hexdigest(),
            job.cost,
            job.weight,
            job.priority_ms,
            job.deadline_s,
            job.max_attempts,
        )
        for job in jobs
    ]
    return digest(json.dumps(rows))

"""Any sequence of operations keeps the queue's promises, compared with a model in plain Python."""

import asyncio
import secrets
from dataclasses import dataclass, replace

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from flashbulb_service.errors import QueueFull
from flashbulb_service.jobs import LEGAL_MOVES, TERMINAL, Job, JobError, JobState, NewJob
from flashbulb_service.queue import Limits, Queue
from flashbulb_service.queue.views import read_news

MODELS = ("a@1", "b@1")
LEASE_S = 10.0
LIMITS = Limits(max_queued=12, max_queued_per_tenant=8, backoff_s=4.0, max_backoff_s=9.0, max_dead=100)
BOOM = JobError("boom", "x")

workers = st.sampled_from(["w1", "w2"])


@dataclass(frozen=True)
class Known:
    """What the model knows of a job."""

    state: JobState
    new: NewJob
    deadline: float | None
    worker: str = ""
    attempt: int = 0
    burnt: int = 0
    due: float = 0.0  # end of the lease, or of the delay


class QueueMachine(RuleBasedStateMachine):
    """The queue under test beside its model. Time is ours: it moves only in `time_passes`."""

    url = ""
    check_keys = None

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.queue = Queue.connect(self.url, namespace=f"machine-{secrets.token_hex(6)}", limits=LIMITS)
        self.known: dict[str, Known] = {}
        self.held: list[tuple[str, Job]] = []  # every claim there ever was: (worker, job)
        self.now = 1000.0
        self.ended: list[str] = []  # ids in the order in which they ended, as the model has it
        self.run(self.subscribe())

    def run(self, coroutine):
        return self.runner.run(coroutine)

    async def subscribe(self) -> None:
        self.subscription = self.queue._client.pubsub()
        await self.subscription.subscribe(self.queue.keys.done(self.queue.instance))
        await self.subscription.get_message(timeout=60)

    def teardown(self) -> None:
        async def close() -> None:
            await self.subscription.aclose()
            await self.queue.aclose()

        self.run(close())
        self.runner.close()

    def move(self, job_id: str, state: JobState, **changes) -> None:
        before = self.known[job_id]
        assert state in LEGAL_MOVES[before.state]
        self.known[job_id] = replace(before, state=state, **changes)
        if state in TERMINAL:
            self.ended.append(job_id)

    def in_state(self, *states: JobState) -> list[str]:
        return [job_id for job_id, known in self.known.items() if known.state in states]

    def is_overdue(self, job_id: str) -> bool:
        deadline = self.known[job_id].deadline
        return deadline is not None and deadline <= self.now

    def holds(self, worker: str, job: Job) -> bool:
        known = self.known[job.id]
        return (known.state, known.worker, known.attempt) == (JobState.RUNNING, worker, job.attempt)

    def pick(self, data, items):
        return items[data.draw(st.integers(0, len(items) - 1), label="which")]

    @initialize()
    def start(self) -> None:
        self.enqueue(MODELS[0], "x", "t1", 2, None, 2, 0)

    @rule(
        model=st.sampled_from(MODELS),
        bucket=st.sampled_from(["x", "y"]),
        tenant=st.sampled_from(["t1", "t2"]),
        num=st.integers(1, 4),
        deadline_s=st.sampled_from([None, None, 3.0, 15.0]),
        max_attempts=st.integers(1, 3),
        priority_ms=st.sampled_from([0, 0, 1500, -1500]),
    )
    def enqueue(self, model, bucket, tenant, num, deadline_s, max_attempts, priority_ms) -> None:
        new = NewJob(
            model,
            bucket,
            b"p",
            tenant,
            priority_ms=priority_ms,
            deadline_s=deadline_s,
            max_attempts=max_attempts,
        )
        live = [known for known in self.known.values() if known.state not in TERMINAL]
        of_tenant = sum(known.new.tenant == tenant for known in live)
        if len(live) + num > LIMITS.max_queued or of_tenant + num > LIMITS.max_queued_per_tenant:
            with pytest.raises(QueueFull):
                self.run(self.queue.enqueue([new] * num, now=self.now))
            return
        deadline = None if deadline_s is None else self.now + deadline_s
        for job_id in self.run(self.queue.enqueue([new] * num, now=self.now)).ids:
            assert job_id not in self.known
            self.known[job_id] = Known(JobState.QUEUED, new, deadline)

    @rule(worker=workers, models=st.sets(st.sampled_from(MODELS), min_size=1), max_batch=st.integers(1, 5))
    def claim(self, worker, models, max_batch) -> None:
        jobs = self.run(self.queue.claim(worker, sorted(models), max_batch, LEASE_S, now=self.now))
        possible = [j for j in self.in_state(JobState.QUEUED) if self.known[j].new.model in models]
        assert len(jobs) <= max_batch
        assert len({(job.model, job.bucket) for job in jobs}) <= 1
        for job in jobs:
            known = self.known[job.id]
            assert job.id in possible
            assert not self.is_overdue(job.id)
            assert not known.burnt or len(jobs) == 1
            assert (job.model, job.bucket) == (known.new.model, known.new.bucket)
            assert job.attempt == known.attempt + 1
            self.move(job.id, JobState.RUNNING, worker=worker, attempt=job.attempt, due=self.now + LEASE_S)
            self.held.append((worker, job))
        dropped = [j for j in possible if self.state_of(j) is JobState.FAILED]
        for job_id in dropped:
            assert self.is_overdue(job_id)
            self.move(job_id, JobState.FAILED)
        if not jobs:
            assert set(dropped) == set(possible)
        elif len(jobs) < max_batch and not any(self.known[job.id].burnt for job in jobs):
            # then its bucket holds nothing more, but for jobs that must run alone
            rest = [j for j in possible if self.known[j].state is JobState.QUEUED and not self.known[j].burnt]
            assert not [
                j
                for j in rest
                if (self.known[j].new.model, self.known[j].new.bucket) == (jobs[0].model, jobs[0].bucket)
            ]

    def state_of(self, job_id: str) -> JobState:
        return self.run(self.queue.get(job_id)).state

    @rule(data=st.data())
    def complete(self, data) -> None:
        if self.held:
            worker, job = self.pick(data, self.held)
            known = self.known[job.id]
            mine = self.holds(worker, job)
            repeated = (known.state, known.worker, known.attempt) == (JobState.DONE, worker, job.attempt)
            stands = self.run(self.queue.complete(worker, job, b"r%d" % job.attempt, now=self.now))
            assert stands == (mine or repeated)
            if mine:
                self.move(job.id, JobState.DONE)

    @rule(data=st.data(), retry=st.booleans())
    def fail(self, data, retry) -> None:
        if self.held:
            worker, job = self.pick(data, self.held)
            mine = self.holds(worker, job)
            state = self.run(self.queue.fail(worker, job, BOOM, retry=retry, now=self.now))
            if mine:
                burnt = self.known[job.id].burnt + 1
                if retry and burnt < self.known[job.id].new.max_attempts:
                    delay_s = min(4.0 * 2 ** (burnt - 1), 9.0)
                    self.move(job.id, JobState.DELAYED, burnt=burnt, due=self.now + delay_s)
                else:
                    self.move(job.id, JobState.FAILED, burnt=burnt)
            assert state is self.known[job.id].state

    @rule(data=st.data())
    def release(self, data) -> None:
        if self.held:
            worker, job = self.pick(data, self.held)
            mine = self.holds(worker, job)
            assert self.run(self.queue.release(worker, [job])) == mine
            if mine:
                self.move(job.id, JobState.QUEUED)

    @rule(worker=workers)
    def heartbeat(self, worker) -> None:
        jobs = [job for holder, job in self.held if holder == worker]
        newest = {job.id: job for job in jobs}  # a worker holds one attempt of a job at a time
        lost = self.run(self.queue.heartbeat(worker, list(newest.values()), LEASE_S, now=self.now))
        assert lost == {job.id for job in newest.values() if not self.holds(worker, job)}
        for job_id in set(newest) - lost:
            self.known[job_id] = replace(self.known[job_id], due=self.now + LEASE_S)

    @rule(data=st.data())
    def cancel(self, data) -> None:
        job_id = self.pick(data, list(self.known))
        live = self.known[job_id].state not in TERMINAL
        assert self.run(self.queue.cancel(job_id, now=self.now)) == live
        if live:
            self.move(job_id, JobState.CANCELLED)

    @rule(seconds=st.sampled_from([0.5, 4.0, 11.0]))
    def time_passes(self, seconds) -> None:
        self.now += seconds

    @rule()
    def reap(self) -> None:
        moved = self.run(self.queue.reap(now=self.now))
        expected = 0
        for job_id in self.in_state(JobState.QUEUED, JobState.DELAYED):
            if self.is_overdue(job_id):
                expected += 1
                self.move(job_id, JobState.FAILED)
        for job_id in self.in_state(JobState.RUNNING):
            known = self.known[job_id]
            if known.due <= self.now:
                expected += 1
                burnt = known.burnt + 1
                dies = burnt >= known.new.max_attempts
                self.move(job_id, JobState.FAILED if dies else JobState.QUEUED, burnt=burnt)
        for job_id in self.in_state(JobState.DELAYED):
            if self.known[job_id].due <= self.now:
                expected += 1
                self.move(job_id, JobState.QUEUED)
        # a job that came back from a lost lease with its deadline passed ends at the next reap or claim
        assert moved == expected

    @rule(data=st.data())
    def replay(self, data) -> None:
        job_id = self.pick(data, list(self.known))
        known = self.known[job_id]
        overdue = self.run(self.queue.get(job_id)).error
        is_dead = (
            known.state is JobState.FAILED and overdue is not None and overdue.code != "deadline_exceeded"
        )
        assert self.run(self.queue.replay_dead(job_id, now=self.now)) == is_dead
        if is_dead:
            self.move(job_id, JobState.QUEUED, burnt=0, deadline=None)

    @invariant()
    def states_agree_and_keys_are_consistent(self) -> None:
        async def check() -> None:
            await self.check_keys(self.queue)
            for job_id, view in zip(self.known, await self.queue._views(list(self.known)), strict=True):
                assert view.state is self.known[job_id].state, job_id
                assert view.attempt == self.known[job_id].attempt
            stats = await self.queue.stats(now=self.now)
            assert sum(stats.queued.values()) == len(self.in_state(JobState.QUEUED))

        self.run(check())

    @invariant()
    def every_end_was_published_exactly_once(self) -> None:
        async def heard() -> list[str]:
            await self.queue._client.publish(self.queue.keys.done(self.queue.instance), "marker")
            got = []
            while (message := await self.subscription.get_message(timeout=60))["data"] != b"marker":
                got.append(read_news(message["data"]).id)
            return got

        assert sorted(self.run(heard())) == sorted(self.ended)
        self.ended.clear()


def test_any_sequence_of_operations_keeps_the_promises(redis_url, check_invariants):
    machine = type(
        "Machine",
        (QueueMachine,),
        {"url": redis_url, "check_keys": staticmethod(check_invariants)},
    )
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=25,
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )

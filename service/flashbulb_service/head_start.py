"""A job ahead of the queue, its picture ahead of the commit: hints between an API and the one worker of its `serve`.

    API ── head start ──► worker ── early result ──► API          a pair of sockets
     └──── enqueue ──► queue ── claim ──┘ └── commit ──► queue

At light load a picture waits longer for its way through the queue than the queue works for it. So the worker hears of a
lone job at once, and draws while the queue admits it and hands it over; the API hears of the picture while it is stored
and committed. Nothing is decided here, and every hint may be lost or late: what was begun is kept only for the claim of
the very same job, and an early result is sent only by whom the queue has told that the job is his.
"""

import contextlib
import logging
import math
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence

from flashbulb_service.jobs import Job, JobState, JobView, NewJob
from flashbulb_service.queue import Queue

log = logging.getLogger(__name__)

FRESH_S = 0.010  # an older head start says nothing: the queue has told of its job, or somebody else has it
MAX_GIVEN = 16  # head starts of one moment
MAX_PAYLOAD_BYTES = 64 * 1024
MAX_MESSAGE_BYTES = 160 * 1024  # less than a system lets one have (212,992 on Linux)


def open_pair() -> tuple[socket.socket, socket.socket] | None:
    """Return the API's end and the worker's, None where the system has no such sockets."""
    if not hasattr(socket, "AF_UNIX"):
        return None
    pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    for end in pair:
        end.setblocking(False)
        for room in (socket.SO_SNDBUF, socket.SO_RCVBUF):  # macOS has 2 KB
            end.setsockopt(socket.SOL_SOCKET, room, 2 * MAX_MESSAGE_BYTES)
    return pair


class ApiEnd:
    """Gives head starts, and hears early results."""

    def __init__(
        self,
        end: socket.socket,
        queue: Queue,
        on_answer: Callable[[], None],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Tell those who wait on this queue, and call on_answer for each of them."""
        self._messages = _Messages(end)
        self._queue = queue
        self._given: dict[str, NewJob] = {}  # the newest, by id: no others are answered early
        self._on_answer = on_answer
        self._clock = clock

    def fileno(self) -> int:
        """Return the descriptor to wait on before `hear`."""
        return self._messages.fileno()

    def announce(self) -> None:
        """Wake the worker, if nobody here waits for it: a request has begun, and a head start may follow.

        It has slept, and its code is cold: that passes while the request is read.
        """
        if not self._queue.is_awaited:
            self._messages.wake()

    def give(self, ids: Sequence[str], jobs: Sequence[NewJob]) -> None:
        """Tell the worker of jobs that are about to be queued, if it is one, and nobody here waits for another."""
        if len(jobs) != 1 or self._queue.is_awaited or len(jobs[0].payload) > MAX_PAYLOAD_BYTES:
            return
        (job_id,), (job,) = ids, jobs
        self._given[job_id] = job
        if len(self._given) > MAX_GIVEN:
            del self._given[next(iter(self._given))]
        self._messages.send(repr(self._clock()), job_id, job.model, job.bucket, job.tenant, last=job.payload)

    def hear(self) -> None:
        """Take the early results that have come to those who wait."""
        for message in self._messages.heard():
            try:
                job_id, enqueued_at, started_at, finished_at, result, attached = message.split(b"\0", 5)
                told_id = job_id.decode()
                times_s = float(enqueued_at), float(started_at), float(finished_at)
            except ValueError as error:  # of a worker of another release, perhaps
                log.warning("an early result was not understood: %s", error)
                continue
            job = self._given.pop(told_id, None)
            if job is None or not all(map(math.isfinite, times_s)):
                continue
            is_answer = self._queue.tell_early(
                JobView(
                    id=told_id,
                    state=JobState.DONE,
                    model=job.model,
                    bucket=job.bucket,
                    attempt=1,
                    enqueued_at=times_s[0],
                    started_at=times_s[1],
                    finished_at=times_s[2],
                    result=result,
                    error=None,
                    attached=attached,
                )
            )
            if is_answer:
                self._on_answer()


class WorkerEnd:
    """Hears head starts, and sends early results."""

    def __init__(self, end: socket.socket, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Use this end. clock: the API's."""
        self._messages = _Messages(end)
        self._clock = clock

    @classmethod
    def inherited(cls, descriptor: int) -> "WorkerEnd":
        """Use the end that the parent process has left open for us."""
        return cls(socket.socket(fileno=descriptor))

    @contextlib.contextmanager
    def listening(self, begin: Callable[[Job], None]) -> Iterator[None]:
        """Have a thread of its own begin each job that we get a head start for, while this is open.

        A thread that waits for a message begins a quarter of a millisecond before an event loop that does. Nobody waits
        for its last call to end.
        """
        over, end = os.pipe()
        threading.Thread(target=self._listen, args=(begin, over), name="head-starts", daemon=True).start()
        try:
            yield
        finally:
            os.close(end)

    def _listen(self, begin: Callable[[Job], None], over: int) -> None:
        waiting = select.poll()
        for descriptor in (over, self._messages.fileno()):
            waiting.register(descriptor, select.POLLIN)
        while all(descriptor != over for descriptor, _ in waiting.poll()):
            for job in self.heard():
                try:
                    begin(job)
                except Exception:
                    log.exception("a head start of job %s failed", job.id)
        os.close(over)

    def heard(self) -> Iterator[Job]:
        """Yield the jobs that we got a head start for, as their claims will return them but for the enqueued_at."""
        for message in self._messages.heard():
            try:
                sent_at, job_id, model, bucket, tenant, payload = message.split(b"\0", 5)
                age_s = self._clock() - float(sent_at)
                job = Job(
                    id=job_id.decode(),
                    model=model.decode(),
                    bucket=bucket.decode(),
                    tenant=tenant.decode(),
                    payload=payload,
                    attempt=1,
                    burnt=0,
                    enqueued_at=0.0,
                    awaited=True,
                )
            except ValueError as error:
                log.warning("a head start was not understood: %s", error)
                continue
            if 0 <= age_s <= FRESH_S:
                yield job

    def answer(
        self, job: Job, result: bytes, attached: bytes, *, started_at: float, finished_at: float
    ) -> bool:
        """Tell the API how a job ends, which we hold and shall commit; return whether that is on its way.

        From any thread. Times are in seconds since the epoch, by the queue's clock.
        """
        times_s = (job.enqueued_at, started_at, finished_at)
        return self._messages.send(job.id, *map(repr, times_s), result, last=attached)


class _Messages:
    """Messages of several parts, of which only the last may hold a NUL; nobody waits for room."""

    def __init__(self, end: socket.socket) -> None:
        end.setblocking(False)
        self._end = end
        self._buffer = bytearray(MAX_MESSAGE_BYTES)

    def fileno(self) -> int:
        return self._end.fileno()

    def send(self, *parts: str | bytes, last: bytes) -> bool:
        message = b"\0".join([*(part.encode() if isinstance(part, str) else part for part in parts), last])
        if len(message) > MAX_MESSAGE_BYTES:
            return False
        with contextlib.suppress(OSError):  # nobody has read for long, or ever will
            self._end.send(message)
            return True
        return False

    def wake(self) -> None:
        with contextlib.suppress(OSError):
            self._end.send(b"")

    def heard(self) -> Iterator[bytes]:
        while True:
            try:
                size = self._end.recv_into(self._buffer)
            except OSError:
                return
            if size:  # an empty one has done what it is for
                yield bytes(self._buffer[:size])

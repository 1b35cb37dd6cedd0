"""What is read of a job: from its hash, or from the news of its end. Pure functions over bytes."""

from collections.abc import Iterator, Sequence

from flashbulb_service.jobs import JobError, JobState, JobView

# The scripts read the same fields, in this order.
VIEW_FIELDS = (
    "state",
    "model",
    "bucket",
    "attempt",
    "enqueued",
    "started",
    "finished",
    "result",
    "code",
    "message",
)


def make_view(job_id: str, row: Sequence[bytes | None], attached: bytes | None = None) -> JobView | None:
    """Make a view of the values of `VIEW_FIELDS`; None when there is no such job."""
    state, model, bucket, attempt, enqueued, started, finished, result, code, message = row
    if state is None or model is None or bucket is None or attempt is None or enqueued is None:
        return None
    return JobView(
        id=job_id,
        state=JobState(state.decode()),
        model=model.decode(),
        bucket=bucket.decode(),
        attempt=int(attempt),
        enqueued_at=int(enqueued) / 1000,
        started_at=None if started is None else int(started) / 1000,
        finished_at=None if finished is None else int(finished) / 1000,
        result=result,
        error=None if code is None else JobError(code.decode(), (message or b"").decode()),
        attached=attached,
    )


def read_news(message: bytes) -> JobView:
    """Read what `finish` of lib.lua tells a waiting process of a job that has ended.

    Raises:
        ValueError: the bytes are no such news.
    """
    job_id, *row, attached = _parts(message)
    if job_id is None or len(row) != len(VIEW_FIELDS):
        raise ValueError(
            f"expected an id, {len(VIEW_FIELDS)} fields and an attachment, got {len(row) + 2} parts"
        )
    view = make_view(job_id.decode(), row, attached)
    if view is None or not view.state.is_terminal:
        raise ValueError("expected news of a job that has ended")
    return view


def _parts(message: bytes) -> Iterator[bytes | None]:
    place = 0
    while place < len(message):
        if message[place : place + 1] == b"-":
            yield None
            place += 1
            continue
        start = message.index(b":", place) + 1
        end = start + int(message[place : start - 1])
        if not start <= end <= len(message):
            raise ValueError(f"expected {end - start} bytes at {start}, got {len(message) - start}")
        yield message[start:end]
        place = end

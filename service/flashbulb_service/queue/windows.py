"""What the scripts tell of waiting jobs, as the scheduler reads it. Pure functions over replies."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from flashbulb_service.jobs import Job
from flashbulb_service.scheduler import SHORT, BucketWindow, Plan, Waiting, Window, lane_of
from flashbulb_service.timing import Tau


def bucket_window(reply: Sequence[Any]) -> BucketWindow:
    """Read one bucket, as `look_into` of lib.lua returns it."""
    model, bucket, count, _accounts, flat = reply
    rows = tuple(
        Waiting(
            id=job_id.decode(),
            tenant=tenant.decode(),
            due_ms=float(due),
            deadline_ms=float(deadline) if deadline else None,
            cost=float(cost),
            weight=float(weight),
            is_suspect=int(burnt) > 0,
        )
        for job_id, tenant, due, deadline, cost, weight, burnt in zip(*[iter(flat)] * 7, strict=True)
    )
    return BucketWindow(model.decode(), bucket.decode(), rows, count)


def used_ms(buckets: Sequence[Sequence[Any]]) -> dict[str, float]:
    """Return tenant -> device time that it used, of all tenants in these buckets."""
    return {
        name.decode(): float(ms)
        for _model, _bucket, _count, accounts, _rows in buckets
        for name, ms in pairs(accounts)
    }


def is_cut(window: Window, plan: Plan) -> bool:
    """Tell whether more jobs wait in a plan's bucket than its window shows."""
    return any(
        bucket.num_waiting > len(bucket.rows)
        for bucket in window.buckets
        if (bucket.model, bucket.bucket) == (plan.model, plan.bucket)
    )


@dataclass(frozen=True, slots=True)
class Lone:
    """The one job that waited when somebody was woken: what a window showed, and what its claim would return."""

    window: Window
    job: Job


def read_token(token: bytes) -> Lone | None:
    """Read a token of a wake list; None when it says only that there is work."""
    if token == b"1":
        return None
    try:
        moment, (model, bucket, count, accounts, flat), row = json.loads(token)
    except ValueError:  # a payload that is no text
        return None
    if lane_of(bucket) != SHORT:
        return None  # what long work may do depends on the other workers
    job_id, tenant, due, deadline, cost, weight, burnt = map(str, flat)
    waiting = Waiting(
        id=job_id,
        tenant=tenant,
        due_ms=float(due),
        deadline_ms=float(deadline) if deadline else None,
        cost=float(cost),
        weight=float(weight),
        is_suspect=int(burnt) > 0,
    )
    window = Window(
        now_ms=float(moment),
        buckets=(BucketWindow(model, bucket, (waiting,), count),),
        used_ms=dict(zip(accounts[::2], map(float, accounts[1::2]), strict=True)),
        num_long=0,
        num_workers=1,
    )
    *_, payload, attempt, burnt_by, enqueued_ms, awaited = row
    job = Job(
        job_id, model, bucket, tenant, payload.encode(), attempt, burnt_by, enqueued_ms / 1000, bool(awaited)
    )
    return Lone(window, job)


def claimed_job(row: Sequence[Any]) -> Job:
    """Read a claimed job, as `claimed` of lib.lua returns it."""
    job_id, model, bucket, tenant, payload, attempt, burnt, enqueued_ms, awaited = row
    return Job(
        id=job_id.decode(),
        model=model.decode(),
        bucket=bucket.decode(),
        tenant=tenant.decode(),
        payload=payload,
        attempt=attempt,
        burnt=burnt,
        enqueued_at=enqueued_ms / 1000,
        awaited=bool(awaited),
    )


def read_times(entries: Sequence[bytes], now_ms: float) -> list[tuple[Tau, int]]:
    """Read what publish.lua wrote of a bucket: time model and batch cap of each worker that is still alive."""
    found = []
    for entry in entries:
        alive_ms, floor_ms, base_ms, row_ms, cap = entry.split()
        if float(alive_ms) > now_ms:
            found.append((Tau(float(floor_ms), float(base_ms), float(row_ms)), int(cap)))
    return found


def pairs(flat: Sequence[bytes]) -> list[tuple[bytes, bytes]]:
    """Pair up names and values."""
    return list(zip(flat[::2], flat[1::2], strict=True))

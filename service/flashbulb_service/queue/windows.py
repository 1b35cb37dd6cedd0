"""What the scripts tell of waiting jobs, as the scheduler reads it. Pure functions over replies."""

import json
from collections.abc import Sequence
from typing import Any

from flashbulb_service.scheduler import SHORT, BucketWindow, Waiting, Window, lane_of


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


def lone_window(token: bytes) -> Window | None:
    """Read what a token of a wake list tells: a window on the one short job that waited, or nothing."""
    if token == b"1":
        return None
    moment, (model, bucket, count, accounts, flat) = json.loads(token)
    if lane_of(bucket) != SHORT:
        return None  # what long work may do depends on the other workers
    reply = (model.encode(), bucket.encode(), count, _bytes(accounts), _bytes(flat))
    return Window(
        now_ms=float(moment),
        buckets=(bucket_window(reply),),
        used_ms=used_ms([reply]),
        lane_used_ms={},
        num_long=0,
        num_workers=1,
    )


def pairs(flat: Sequence[bytes]) -> list[tuple[bytes, bytes]]:
    """Pair up names and values."""
    return list(zip(flat[::2], flat[1::2], strict=True))


def _bytes(values: Sequence[Any]) -> list[bytes]:
    return [str(value).encode() for value in values]

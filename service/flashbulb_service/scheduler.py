"""The decisions of scheduling as pure functions: no queue, no model, no hidden clock."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar

from flashbulb_service.jobs import Job

Row = TypeVar("Row")


def bucket_name(model: str, width: int, height: int, num_steps: int) -> str:
    """Name the bucket whose rows may share a batch: one model version, one shape, one number of steps."""
    return f"{model}:{width}x{height}:{num_steps}"


def batch_cap(max_batch: int, limit: int, calibration: Mapping[int, float] | None = None) -> int:
    """Choose the largest batch worth forming.

    Beyond the knee a larger batch only makes its first row wait longer: the cap is the smallest calibrated
    size whose time per row is within 5 % of the best. Without a calibration it is what both limits allow.

    Args:
        max_batch: what the bundle's graphs allow.
        limit: what the operator allows.
        calibration: batch size -> milliseconds, as the bundle's manifest has it for this backend.
    """
    allowed = max(1, min(max_batch, limit))
    per_row = {size: ms / size for size, ms in (calibration or {}).items() if size <= allowed}
    if not per_row:
        return allowed
    best = min(per_row.values())
    return min(size for size, ms in per_row.items() if ms <= best * 1.05)


def split_suspects(jobs: Sequence[Job]) -> tuple[list[Job], list[Job]]:
    """Choose what of a claim to run now, and what to hand back.

    A job with a burnt attempt may have killed its worker. It runs alone, with nobody beside it whose
    attempt would be lost with it: the first such job is run, all others are handed back. Being
    handed back burns nothing, so an innocent job stays one.
    """
    suspect = next((job for job in jobs if job.burnt > 0), None)
    if suspect is None:
        return list(jobs), []
    return [suspect], [job for job in jobs if job is not suspect]


def in_chunks(rows: Sequence[Row], cap: int) -> Iterator[list[Row]]:
    """Cut rows into batches of at most `cap`, in order.

    Raises:
        ValueError: cap < 1.
    """
    if cap < 1:
        raise ValueError(f"expected a batch cap of at least 1, got {cap}")
    for start in range(0, len(rows), cap):
        yield list(rows[start : start + cap])

"""Why a request was not admitted, and when to come again. Pure functions of what the script told."""

from flashbulb_service.errors import ConcurrencyExceeded, DeadlineUnreachable, QueueFull
from flashbulb_service.queue.values import Limits

LEAST_RETRY_S = 0.1


def too_late(limits: Limits, predicted_ms: int, allowed_ms: int) -> DeadlineUnreachable:
    """Tell the caller when the queue will be short enough, if nothing else comes."""
    retry_after_s = _bounded(limits, (predicted_ms - allowed_ms) / 1000)
    return DeadlineUnreachable(
        f"expected to finish within {allowed_ms} ms, but it would take about {predicted_ms} ms; "
        f"try again in {retry_after_s:.1f} s, or allow more time",
        retry_after_s=retry_after_s,
    )


def too_many(
    limits: Limits,
    tenant: str,
    scope: bytes,
    live: int,
    missing: int,
    finished: int,
    window_ms: int,
    limit: int,
) -> QueueFull:
    """Tell the caller when enough jobs will have ended, at the rate of the last seconds."""
    rate = finished / window_ms * 1000
    wait_s = missing / rate if rate > 0 else limits.default_retry_after_s
    who = "the queue" if scope == b"total" else f"the share of tenant {tenant!r}"
    retry_after_s = _bounded(limits, wait_s)
    kind = ConcurrencyExceeded if scope == b"key" else QueueFull
    return kind(
        f"{who} is full: {live} jobs of at most {limit}; try again in {retry_after_s:.1f} s",
        retry_after_s=retry_after_s,
        scope=scope.decode(),
    )


def _bounded(limits: Limits, wait_s: float) -> float:
    return min(max(wait_s, LEAST_RETRY_S), limits.max_retry_after_s)

"""When a job will be done, as far as its worker's times and its steps tell. Pure functions; times in milliseconds."""

from collections.abc import Sequence

from flashbulb_service.timing import Tau

POLL_MIN_MS, POLL_MAX_MS = 50, 5_000
POLL_UNKNOWN_MS = 500
POLL_MARGIN_MS = 20.0  # of storing and telling: coming a little late costs less than coming once more


def queued_ms(known: Sequence[tuple[Tau, int]], position: int) -> float | None:
    """Return how long a job waits and runs that has `position` others of its bucket before it; None: unknown.

    known: time model and batch cap of each worker that serves it. They are taken to be free.
    """
    if not known:
        return None
    tau, cap = min(known, key=lambda one: one[0](1))
    batches, place = divmod(position, cap)
    return batches / len(known) * tau(cap) + tau(place + 1)


def running_ms(
    known: Sequence[tuple[Tau, int]], elapsed_ms: float, steps_done: int, steps: int
) -> float | None:
    """Return how long a running job still runs; None: unknown.

    Before its first step the time model tells. After that its own steps do, which know who else uses the device; the
    last step is taken to be half over.
    """
    if steps_done and steps > 1:
        return elapsed_ms / (steps_done + 0.5) * max(0.5, steps - steps_done - 0.5)
    if not known:
        return None
    return max(0.0, min(tau(1) for tau, _ in known) - elapsed_ms)


def poll_after_ms(left_ms: float | None) -> int:
    """Return after how long it pays to ask again."""
    if left_ms is None:
        return POLL_UNKNOWN_MS
    return round(min(max(left_ms + POLL_MARGIN_MS, POLL_MIN_MS), POLL_MAX_MS))

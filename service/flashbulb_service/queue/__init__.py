"""The durable queue: jobs in Redis, batches formed at claim time, every step one Lua script."""

from flashbulb_service.queue.completions import Expected
from flashbulb_service.queue.events import Event
from flashbulb_service.queue.queue import (
    Enqueued,
    Gate,
    Kept,
    Limits,
    Queue,
    QueueStats,
    RequestView,
    Taken,
    Wake,
)
from flashbulb_service.queue.windows import Lone

__all__ = [
    "Enqueued",
    "Event",
    "Expected",
    "Gate",
    "Kept",
    "Limits",
    "Lone",
    "Queue",
    "QueueStats",
    "RequestView",
    "Taken",
    "Wake",
]

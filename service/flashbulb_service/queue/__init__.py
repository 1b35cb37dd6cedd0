"""The durable queue: jobs in Redis, batches formed at claim time, every step one Lua script."""

from flashbulb_service.queue.completions import Expected
from flashbulb_service.queue.events import Event
from flashbulb_service.queue.queue import Queue, new_id
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
from flashbulb_service.queue.windows import Lone

__all__ = [
    "DueHook",
    "Enqueued",
    "Event",
    "Expected",
    "Gate",
    "Kept",
    "KeyMode",
    "Limits",
    "Lone",
    "Queue",
    "QueueStats",
    "RequestView",
    "Sparing",
    "Taken",
    "Wake",
    "new_id",
]

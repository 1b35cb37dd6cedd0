"""The durable queue: jobs in Redis, batches formed at claim time, every step one Lua script."""

from flashbulb_service.queue.events import Event
from flashbulb_service.queue.queue import Enqueued, Kept, Limits, Queue, QueueStats, RequestView

__all__ = ["Enqueued", "Event", "Kept", "Limits", "Queue", "QueueStats", "RequestView"]

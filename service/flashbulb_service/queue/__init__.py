"""The durable queue: jobs in Redis, batches formed at claim time, every step one Lua script."""

from flashbulb_service.queue.queue import Enqueued, Limits, Queue, QueueStats

__all__ = ["Enqueued", "Limits", "Queue", "QueueStats"]

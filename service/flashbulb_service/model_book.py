"""What operators say of models, kept in Redis: what is unloaded, what to have in memory, what else it is called.

It holds for all workers and API processes of the namespace, and until the next word on it.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from flashbulb_service.errors import InvalidRequest
from flashbulb_service.queue import Queue

MAX_ENTRIES = 1_000
_UNLOADED = "unloaded"


@dataclass(frozen=True)
class Words:
    """All that was said."""

    unloaded: frozenset[str] = frozenset()  # name@version
    wanted: Mapping[str, str] = field(
        default_factory=dict
    )  # name@version -> a mark that changes with each wish
    aliases: Mapping[str, str] = field(default_factory=dict)  # other name -> name or name@version


class ModelBook:
    """Reads and writes the words on models."""

    def __init__(self, queue: Queue) -> None:
        """Use the queue's connections and namespace."""
        self._queue = queue

    async def read(self) -> Words:
        """Return what was said.

        Raises:
            QueueUnavailable: the server does not answer.
        """
        async with self._queue.commands() as client, client.pipeline(transaction=False) as pipe:
            pipe.hgetall(self._queue.keys.residence)
            pipe.hgetall(self._queue.keys.aliases)
            residence, aliases = (_texts(found) for found in await pipe.execute())
        unloaded = frozenset(model for model, word in residence.items() if word == _UNLOADED)
        return Words(unloaded, {m: word for m, word in residence.items() if word != _UNLOADED}, aliases)

    async def load(self, model_id: str) -> None:
        """Serve a model again, and have it in memory now.

        Raises:
            InvalidRequest: words on too many models are kept.
            QueueUnavailable: the server does not answer.
        """
        await self._write(self._queue.keys.residence, model_id, f"wanted {time.time_ns()}")

    async def unload(self, model_id: str) -> None:
        """Serve a model no longer, until it is loaded; raises as `load` does."""
        await self._write(self._queue.keys.residence, model_id, _UNLOADED)

    async def set_alias(self, alias: str, target: str) -> None:
        """Let another name lead to a model; raises as `load` does."""
        await self._write(self._queue.keys.aliases, alias, target)

    async def remove_alias(self, alias: str) -> bool:
        """Forget another name; tell whether it was there.

        Raises:
            QueueUnavailable: the server does not answer.
        """
        async with self._queue.commands() as client:
            removed: Any = await client.hdel(self._queue.keys.aliases, alias)
        return bool(removed)

    async def _write(self, key: str, name: str, word: str) -> None:
        async with self._queue.commands() as client:
            known: Any = await client.hexists(key, name)
            count: Any = 0 if known else await client.hlen(key)
            if count >= MAX_ENTRIES:
                raise InvalidRequest(
                    f"expected words on at most {MAX_ENTRIES} models or aliases: remove one first"
                )
            written: Any = client.hset(key, name, word)
            await written


def _texts(found: Mapping[bytes, bytes]) -> dict[str, str]:
    return {name.decode(): value.decode() for name, value in found.items()}

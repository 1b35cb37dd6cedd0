"""API keys in the queue's Redis: made, rotated, revoked, admitted, reported.

What decides about a request (secret, rate, budget) is one script on the server, so that limits hold exactly
however many processes serve, and a revoked key ends with its next request for work. Administration reads its key
anew each time. Reads look keys up in a small cache, and so accept a revoked key for at most CACHE_S more.
"""

import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Any, cast

from flashbulb_service.errors import BudgetExceeded, InvalidApiKey, InvalidRequest, KeyNotFound, RateLimited
from flashbulb_service.queue import Queue
from flashbulb_service.queue.scripts import behind_lib
from flashbulb_service.tenants.access import Scope
from flashbulb_service.tenants.keys import (
    MAX_GRACE_S,
    MAX_NAME_CHARS,
    SCOPES,
    KeyLimits,
    KeyRecord,
    NewKey,
    hash_secret,
    is_key_id,
    key_id_of,
    new_key_id,
    new_secret,
)

CACHE_S = 5.0
MAX_CACHED = 1_000
MAX_KEYS = 10_000
MAX_USAGE_DAYS = 92  # USAGE_TTL_MS in the queue's lib.lua
KEEP_USAGE_MS = MAX_USAGE_DAYS * 86_400_000
KEEP_REVOKED_S = 92 * 86_400.0
REFUSAL = (
    "expected an API key as 'Authorization: Bearer fb_…', got {what}: ask whoever runs this server for one"
)


@dataclass(frozen=True)
class Standing:
    """Where a key stands against its rate after a request; times are seconds."""

    limit: int
    remaining: int
    full_in_s: float


@dataclass(frozen=True)
class Admission:
    """What became of a request for work: let in, unless there is a refusal. standing: None without a rate."""

    standing: Standing | None = None
    refusal: RateLimited | BudgetExceeded | None = None


@dataclass(frozen=True)
class UsageDay:
    """What a key used on one day (UTC)."""

    day: str  # 2026-11-25
    requests: int  # for work, that were let in
    refused: int
    images: int
    device_ms: float


class KeyStore:
    """The API keys of one namespace, on the connections of its queue."""

    def __init__(self, queue: Queue, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Share the queue's connections; `clock` ages the cache."""
        self._queue = queue
        self._keys = queue.keys
        self._clock = clock
        self._cached: OrderedDict[str, tuple[float, KeyRecord]] = OrderedDict()

    # who asks

    async def identify(self, secret: str, *, fresh: bool = False) -> KeyRecord:
        """Return the key that a secret belongs to, from the cache if it was read lately and need not be fresh.

        Raises:
            InvalidApiKey: it is no secret of a key that is good.
        """
        key_id = key_id_of(secret)
        if fresh and key_id:
            self._cached.pop(key_id, None)
        record = await self._lookup(key_id) if key_id else None
        if record is None or not record.accepts(hash_secret(secret), time.time()):
            raise InvalidApiKey(REFUSAL.format(what="another one"))
        return record

    async def admit(self, record: KeyRecord, secret: str, *, now: float | None = None) -> Admission:
        """Count a request for work of an identified key, by what the store says now.

        Raises:
            InvalidApiKey: the secret was revoked or replaced a moment ago.
        """
        outcome, *numbers = await self._run("admit", _ms(now), record.id, hash_secret(secret), KEEP_USAGE_MS)
        if outcome == b"unknown":
            self._cached.pop(record.id, None)
            raise InvalidApiKey(REFUSAL.format(what="one that was revoked or replaced"))
        if outcome == b"budget":
            spent_us, wait_ms = numbers
            return Admission(
                refusal=BudgetExceeded(
                    f"the device time of API key {record.id} is spent ({spent_us / 1000:.0f} ms used): "
                    f"its next period starts in {wait_ms / 1000:.0f} s",
                    retry_after_s=wait_ms / 1000,
                )
            )
        if not numbers:
            return Admission()
        capacity, remaining, wait_ms, full_in_ms = numbers
        standing = Standing(capacity, remaining, full_in_ms / 1000)
        if outcome != b"rate":
            return Admission(standing)
        return Admission(
            standing,
            RateLimited(
                f"API key {record.id} may send no request at the moment: try again in {wait_ms / 1000:.2f} s",
                retry_after_s=wait_ms / 1000,
            ),
        )

    # keys

    async def create(
        self, name: str, scopes: Sequence[str] = ("generate",), limits: KeyLimits | None = None
    ) -> NewKey:
        """Make a key; its secret is in the answer and nowhere else.

        Raises:
            InvalidRequest: the name or the scopes are not usable, or there are too many keys.
        """
        if not (0 < len(name) <= MAX_NAME_CHARS and name.isprintable()):
            raise InvalidRequest(
                f"name: expected 1 to {MAX_NAME_CHARS} printable characters, got {name[:120]!r}", param="name"
            )
        chosen = check_scopes(scopes)
        key_id = new_key_id()
        secret = new_secret(key_id)
        fields = {
            "name": name,
            "scopes": " ".join(chosen),
            "digest": hash_secret(secret),
            **(limits or KeyLimits()).fields(),
        }
        made = await self._run("create", "", key_id, MAX_KEYS, *_flat(fields))
        if not made:
            raise InvalidRequest(f"expected at most {MAX_KEYS} API keys: revoke some that are not used")
        return NewKey(await self.get(key_id), secret)

    async def find(self, key_id: str) -> KeyRecord | None:
        """Read a key; None when there is none, or it was revoked long ago."""
        if not is_key_id(key_id):
            return None
        async with self._queue.commands() as client:
            fields: Any = await client.hgetall(self._keys.api_key(key_id))
        return _record(key_id, fields)

    async def get(self, key_id: str) -> KeyRecord:
        """Read a key.

        Raises:
            KeyNotFound: there is none, or it was revoked long ago.
        """
        record = await self.find(key_id)
        if record is None:
            raise KeyNotFound(key_id)
        return record

    async def all(self) -> list[KeyRecord]:
        """Read all keys, the oldest first, with those that were revoked in the last months."""
        async with self._queue.commands() as client:
            found: Any = await client.zrange(self._keys.api_keys, 0, -1)
            ids = [key_id.decode() for key_id in found]
            async with client.pipeline(transaction=False) as pipe:
                for key_id in ids:
                    pipe.hgetall(self._keys.api_key(key_id))
                rows = await pipe.execute()
            records = {key_id: _record(key_id, row) for key_id, row in zip(ids, rows, strict=True)}
            gone = [key_id for key_id, record in records.items() if record is None]
            if gone:
                await client.zrem(self._keys.api_keys, *gone)
        return [record for record in records.values() if record is not None]

    async def any_active(self) -> bool:
        """Tell whether anybody could use the service with a key."""
        return any(record.revoked_at is None for record in await self.all())

    async def rotate(self, key_id: str, *, grace_s: float = 86_400.0) -> NewKey:
        """Give a key a new secret; the one before is good for grace_s more, earlier ones are not.

        Raises:
            KeyNotFound: there is no such key, or it was revoked.
            InvalidRequest: grace_s is out of range.
        """
        if not 0 <= grace_s <= MAX_GRACE_S:
            raise InvalidRequest(
                f"grace_s: expected 0 to {MAX_GRACE_S:.0f} seconds, got {grace_s:g}", param="grace_s"
            )
        secret = new_secret(key_id)
        await self._change("rotate", key_id, "", key_id, hash_secret(secret), round(grace_s * 1000))
        return NewKey(await self.get(key_id), secret)

    async def revoke(self, key_id: str) -> None:
        """End a key. Requests for work are refused at once, reads within CACHE_S.

        Raises:
            KeyNotFound: there is no such key, or it was revoked.
        """
        await self._change("revoke", key_id, "", key_id, round(KEEP_REVOKED_S * 1000))

    async def set_limits(self, key_id: str, limits: KeyLimits) -> KeyRecord:
        """Replace a key's limits; they hold from its next request on.

        Raises:
            KeyNotFound: there is no such key, or it was revoked.
        """
        names = list(KeyLimits.model_fields)
        await self._change("limits", key_id, key_id, len(names), *names, *_flat(limits.fields()))
        return await self.get(key_id)

    async def usage(self, key_id: str, *, days: int = 30, now: float | None = None) -> list[UsageDay]:
        """Report what a key used on each of the last days (UTC), today last.

        Raises:
            KeyNotFound: there is no such key.
        """
        await self.get(key_id)
        today = datetime.fromtimestamp(time.time() if now is None else now, UTC).date()
        dates = [today - timedelta(days=back) for back in reversed(range(min(days, MAX_USAGE_DAYS)))]
        epoch = datetime(1970, 1, 1, tzinfo=UTC).date()
        async with self._queue.commands() as client, client.pipeline(transaction=False) as pipe:
            for date in dates:
                pipe.hgetall(self._keys.usage(key_id, (date - epoch).days))
            rows = await pipe.execute()
        return [_usage_day(date.isoformat(), row) for date, row in zip(dates, rows, strict=True)]

    # inside

    async def _lookup(self, key_id: str) -> KeyRecord | None:
        now = self._clock()
        known = self._cached.get(key_id)
        if known is not None and now < known[0]:
            self._cached.move_to_end(key_id)
            return known[1]
        record = await self.find(key_id)
        if record is None:
            self._cached.pop(key_id, None)
            return None
        self._cached[key_id] = (now + CACHE_S, record)
        self._cached.move_to_end(key_id)
        while len(self._cached) > MAX_CACHED:
            self._cached.popitem(last=False)
        return record

    async def _change(self, script: str, key_id: str, *args: str | float) -> None:
        if not is_key_id(key_id) or not await self._run(script, *args):
            raise KeyNotFound(key_id)
        self._cached.pop(key_id, None)

    async def _run(self, name: str, *args: str | float) -> Any:
        return await self._queue.run_script(_source(name), *args)


def check_scopes(scopes: Sequence[str]) -> tuple[Scope, ...]:
    """Return scopes in their order, each once.

    Raises:
        InvalidRequest: there is none, or one that nobody knows.
    """
    unknown = [scope for scope in scopes if scope not in SCOPES]
    if unknown or not scopes:
        raise InvalidRequest(
            f"scopes: expected some of {', '.join(SCOPES)}, got {', '.join(unknown)[:80] or 'none'}",
            param="scopes",
        )
    return tuple(scope for scope in SCOPES if scope in scopes)


@cache
def _source(name: str) -> str:
    return behind_lib("flashbulb_service.tenants", name)


def _flat(fields: Mapping[str, str]) -> list[str]:
    return [part for pair in fields.items() for part in pair]


def _ms(now: float | None) -> str | int:
    return "" if now is None else round(now * 1000)


def _record(key_id: str, stored: Mapping[bytes, bytes]) -> KeyRecord | None:
    fields = {name.decode(): value.decode() for name, value in stored.items()}
    if "created" not in fields:
        return None

    def seconds(name: str) -> float | None:
        return int(fields[name]) / 1000 if name in fields else None

    return KeyRecord(
        id=key_id,
        name=fields["name"],
        scopes=cast(tuple[Scope, ...], tuple(fields["scopes"].split())),
        limits=KeyLimits.from_fields(fields),
        created_at=int(fields["created"]) / 1000,
        rotated_at=seconds("rotated"),
        revoked_at=seconds("revoked"),
        old_until=seconds("old_until"),
        digest=fields.get("digest", ""),
        old_digest=fields.get("old_digest", ""),
    )


def _usage_day(day: str, stored: Mapping[bytes, bytes]) -> UsageDay:
    def number(name: bytes) -> int:
        return int(stored.get(name, 0))

    return UsageDay(
        day, number(b"requests"), number(b"refused"), number(b"images"), number(b"device_us") / 1000
    )

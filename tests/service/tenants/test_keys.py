"""API keys in the store: what is kept of them, and that their limits hold exactly."""

import asyncio
import hashlib
from hmac import compare_digest
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashbulb_service.errors import (
    BudgetExceeded,
    ConcurrencyExceeded,
    InvalidApiKey,
    InvalidRequest,
    KeyNotFound,
    QueueFull,
    RateLimited,
)
from flashbulb_service.jobs import JobError, NewJob
from flashbulb_service.queue import Limits, Queue
from flashbulb_service.tenants import keys as keys_module
from flashbulb_service.tenants.keys import KeyLimits, key_id_of, new_key_id, new_secret
from flashbulb_service.tenants.store import CACHE_S, MAX_CACHED, KeyStore


def job(tenant: str, **kwargs: Any) -> NewJob:
    return NewJob(**{"model": "emoji@1", "bucket": "64x64", "payload": b"p", "tenant": tenant, **kwargs})


async def everything(client: Any, tag: str) -> str:
    """All keys and values of a namespace as one text."""
    parts = []
    async for name in client.scan_iter(match=f"{tag}:*"):
        kind = await client.type(name)
        if kind == b"hash":
            value = await client.hgetall(name)
        elif kind == b"zset":
            value = await client.zrange(name, 0, -1, withscores=True)
        else:
            value = await client.get(name)
        parts.append(f"{name} {value}")
    return "\n".join(parts)


async def test_secret_is_nowhere_in_redis(keys: KeyStore, queue: Queue, client: Any) -> None:
    made = await keys.create("somebody")
    again = await keys.rotate(made.record.id)
    await keys.admit(again.record, again.secret)
    stored = await everything(client, queue.keys.tag)
    assert "somebody" in stored
    for secret in (made.secret, again.secret):
        assert secret not in stored and secret[-43:] not in stored
        assert hashlib.sha256(secret.encode()).hexdigest() in stored
    for shown in (repr(made), repr(made.record), repr(again)):
        assert made.secret not in shown and hashlib.sha256(made.secret.encode()).hexdigest() not in shown


def test_secrets_hold_256_random_bits_and_name_their_key() -> None:
    key_id = new_key_id()
    secrets = {new_secret(key_id) for _ in range(50)}
    assert len(secrets) == 50
    assert {key_id_of(secret) for secret in secrets} == {key_id}
    assert {len(secret) for secret in secrets} == {len("fb_") + 16 + 1 + 43}  # 43 characters of base64


async def test_secrets_are_compared_in_constant_time(keys: KeyStore, monkeypatch: pytest.MonkeyPatch) -> None:
    made = await keys.create("a")
    compared = []

    def spy(one: str, other: str) -> bool:
        compared.append(other)
        return compare_digest(one, other)

    monkeypatch.setattr(keys_module, "compare_digest", spy)
    wrong = made.secret[:-1] + ("a" if made.secret[-1] != "a" else "b")
    with pytest.raises(InvalidApiKey):
        await keys.identify(wrong)
    assert set(compared) == {hashlib.sha256(wrong.encode()).hexdigest()}
    assert (await keys.identify(made.secret)).id == made.record.id


@given(text=st.one_of(st.text(max_size=90), st.from_regex(r"fb_[0-9a-f]{10,20}_[A-Za-z0-9_-]{30,50}")))
def test_no_text_is_taken_for_a_secret_by_mistake(text: str) -> None:
    key_id = key_id_of(text)
    if key_id is not None:
        assert text.startswith(f"fb_{key_id[4:]}_") and len(text) == 63


async def test_record_comes_back_as_it_was_made(keys: KeyStore) -> None:
    limits = KeyLimits(
        requests_per_minute=7, burst=3, max_live=5, weight=0.25, budget_ms=9, budget_period_s=60
    )
    made = await keys.create("Ünïcode 🍎", ["admin", "generate", "admin"], limits)
    assert made.record.scopes == ("generate", "admin")
    assert made.record.limits == limits
    assert [record.id for record in await keys.all()] == [made.record.id]
    assert (await keys.set_limits(made.record.id, KeyLimits(burst=2))).limits == KeyLimits(burst=2)


@pytest.mark.parametrize(
    ("name", "scopes"),
    [("", ["generate"]), ("a\nb", ["generate"]), ("x" * 101, ["generate"]), ("a", []), ("a", ["x"])],
)
async def test_unusable_keys_are_refused(keys: KeyStore, name: str, scopes: list[str]) -> None:
    with pytest.raises(InvalidRequest):
        await keys.create(name, scopes)
    assert await keys.all() == []


# ------------------------------------------------------------------------------------- rotation, revocation


async def test_rotation_keeps_two_secrets_good_and_never_three(keys: KeyStore) -> None:
    first = await keys.create("a")
    second = await keys.rotate(first.record.id, grace_s=1000)
    for secret in (first.secret, second.secret):
        assert (await keys.admit(await keys.identify(secret), secret)).refusal is None
    third = await keys.rotate(first.record.id, grace_s=1000)
    with pytest.raises(InvalidApiKey):
        await keys.identify(first.secret)
    for secret in (second.secret, third.secret):
        await keys.identify(secret)


async def test_old_secret_ends_with_its_grace(keys: KeyStore) -> None:
    first = await keys.create("a")
    second = await keys.rotate(first.record.id, grace_s=1000)
    until = second.record.old_until
    assert until is not None
    await keys.admit(second.record, first.secret, now=until - 1)
    with pytest.raises(InvalidApiKey):
        await keys.admit(second.record, first.secret, now=until + 1)
    await keys.admit(second.record, second.secret, now=until + 1)
    await keys.rotate(first.record.id, grace_s=0)
    with pytest.raises(InvalidApiKey):
        await keys.identify(second.secret)


async def test_revoked_key_gets_no_work_at_once_and_no_reads_after_the_cache(queue: Queue) -> None:
    """The second store is another process: it does not hear of the revocation."""
    now = 100.0
    here, there = KeyStore(queue), KeyStore(queue, clock=lambda: now)
    made = await here.create("a")
    record = await there.identify(made.secret)
    await here.revoke(made.record.id)
    with pytest.raises(InvalidApiKey):
        await here.identify(made.secret)
    assert (await there.identify(made.secret)).id == record.id  # a read, from the cache
    with pytest.raises(InvalidApiKey):
        await there.admit(record, made.secret)
    now += CACHE_S
    with pytest.raises(InvalidApiKey):
        await there.identify(made.secret)


async def test_revoked_key_stays_dead_and_its_usage_readable(
    keys: KeyStore, client: Any, queue: Queue
) -> None:
    made = await keys.create("a")
    await keys.admit(made.record, made.secret)
    await keys.revoke(made.record.id)
    for change in (
        keys.revoke(made.record.id),
        keys.rotate(made.record.id),
        keys.set_limits(made.record.id, KeyLimits()),
    ):
        with pytest.raises(KeyNotFound):
            await change
    assert not await keys.any_active()
    assert (await keys.usage(made.record.id, days=1))[0].requests == 1
    name = queue.keys.api_key(made.record.id)
    assert await client.pttl(name) > 0
    await client.delete(name)  # its time is over
    assert await keys.all() == []
    assert await client.zcard(queue.keys.api_keys) == 0


async def test_cache_saves_round_trips_and_is_bounded(keys: KeyStore, client: Any) -> None:
    made = await keys.create("a")
    await keys.identify(made.secret)

    async def lookups() -> int:
        return int((await client.info("commandstats"))["cmdstat_hgetall"]["calls"])

    before = await lookups()
    for _ in range(20):
        await keys.identify(made.secret)
    assert await lookups() == before
    keys._cached.clear()
    for number in range(MAX_CACHED + 5):
        keys._cached[f"key_{number}"] = (1e12, made.record)
    await keys.identify(made.secret)
    assert len(keys._cached) == MAX_CACHED


# ---------------------------------------------------------------------------------------------------- rate


async def test_rate_holds_exactly_under_concurrency(keys: KeyStore) -> None:
    made = await keys.create("a", limits=KeyLimits(requests_per_minute=10))
    asked = await asyncio.gather(*(keys.admit(made.record, made.secret, now=1000.0) for _ in range(60)))
    assert sum(admission.refusal is None for admission in asked) == 10
    refused = next(a for a in asked if isinstance(a.refusal, RateLimited))
    assert refused.refusal is not None and refused.refusal.retry_after_s == pytest.approx(6.0, abs=0.002)
    again = await keys.admit(made.record, made.secret, now=1000.0 + refused.refusal.retry_after_s)
    assert again.refusal is None
    assert again.standing is not None and (again.standing.limit, again.standing.remaining) == (10, 0)
    [today] = await keys.usage(made.record.id, days=1, now=1000.0)
    assert (today.requests, today.refused) == (11, 50)


@given(
    rate=st.integers(1, 1000), burst=st.integers(1, 50), gaps=st.lists(st.integers(0, 20_000), max_size=40)
)
def test_bucket_never_lets_more_in_than_burst_and_rate_allow(
    redis_url: str, rate: int, burst: int, gaps: list[int]
) -> None:
    async def run() -> None:
        namespace = new_key_id()
        async with Queue.connect(redis_url, namespace=namespace) as queue:
            store = KeyStore(queue)
            made = await store.create("a", limits=KeyLimits(requests_per_minute=rate, burst=burst))
            at, passed, tokens = 10_000_000, 0, float(burst)
            for gap in gaps:
                at, tokens = at + gap, min(float(burst), tokens + gap * rate / 60_000)
                let_in = (await store.admit(made.record, made.secret, now=at / 1000)).refusal is None
                assert let_in == (tokens + 1e-6 >= 1)
                tokens -= let_in
                passed += let_in
            assert passed <= burst + sum(gaps) * rate / 60_000 + 1e-3
            async with queue.commands() as client:
                async for name in client.scan_iter(match=queue.keys.pattern()):
                    await client.delete(name)

    asyncio.run(run())


# -------------------------------------------------------------------------------------------- device time


async def run_one(queue: Queue, tenant: str, device_ms: float, now: float) -> None:
    await queue.enqueue([job(tenant)], now=now)
    [claimed] = await queue.claim("w", ["emoji@1"], 1, 60, now=now)
    assert await queue.complete("w", claimed, b"r", device_ms=device_ms, now=now)
    assert await queue.complete("w", claimed, b"r", device_ms=device_ms, now=now)  # the same call once more


async def test_budget_is_refused_when_spent_and_fresh_in_the_next_period(
    keys: KeyStore, queue: Queue
) -> None:
    made = await keys.create("a", limits=KeyLimits(budget_ms=100, budget_period_s=60))
    tenant = made.record.id
    start = 60 * 29_000_000.0
    await run_one(queue, tenant, 60.5, start + 1)
    assert (await keys.admit(made.record, made.secret, now=start + 2)).refusal is None
    await run_one(queue, tenant, 60.5, start + 3)
    refusal = (await keys.admit(made.record, made.secret, now=start + 4)).refusal
    assert isinstance(refusal, BudgetExceeded) and refusal.code == "budget_exceeded"
    assert refusal.retry_after_s == pytest.approx(56)
    assert (await keys.admit(made.record, made.secret, now=start + 60)).refusal is None
    [day] = await keys.usage(tenant, days=1, now=start)
    assert (day.images, day.device_ms, day.requests, day.refused) == (2, 121.0, 2, 1)


async def test_only_results_that_stand_are_charged(keys: KeyStore, queue: Queue) -> None:
    tenant = (await keys.create("a")).record.id
    await queue.enqueue([job(tenant)], now=1000.0)
    [claimed] = await queue.claim("w", ["emoji@1"], 1, 60, now=1000.0)
    assert not await queue.complete("thief", claimed, b"r", device_ms=5, now=1000.0)
    await queue.fail("w", claimed, JobError("x", "y"), retry=False, now=1000.0)
    assert not await queue.complete("w", claimed, b"r", device_ms=5, now=1000.0)
    [day] = await keys.usage(tenant, days=1, now=1000.0)
    assert (day.images, day.device_ms) == (0, 0.0)


async def test_work_without_a_key_leaves_no_usage(queue: Queue, client: Any) -> None:
    await run_one(queue, "default", 5.0, 1000.0)
    assert [key async for key in client.scan_iter(match=f"{queue.keys.tag}:usage:*")] == []


async def test_everything_counted_expires(keys: KeyStore, queue: Queue, client: Any) -> None:
    made = await keys.create("a", limits=KeyLimits(requests_per_minute=5, budget_ms=5))
    await keys.admit(made.record, made.secret)
    await queue.enqueue([job(made.record.id)])
    [claimed] = await queue.claim("w", ["emoji@1"], 1, 60)
    await queue.complete("w", claimed, b"r", device_ms=9)
    for kind in ("usage", "rate", "spent"):
        [name] = [key async for key in client.scan_iter(match=f"{queue.keys.tag}:{kind}:*")]
        assert 0 < await client.pttl(name) <= 92 * 86_400_000


# --------------------------------------------------------------------------------------------- live jobs


async def test_live_jobs_of_a_key_are_limited_exactly_under_concurrency(keys: KeyStore, queue: Queue) -> None:
    tenant = (await keys.create("a", limits=KeyLimits(max_live=7))).record.id
    asked = await asyncio.gather(
        *(queue.enqueue([job(tenant)] * 2) for _ in range(20)), return_exceptions=True
    )
    refused = [error for error in asked if isinstance(error, ConcurrencyExceeded)]
    assert len(refused) == 17
    assert "at most 7" in refused[0].message
    await queue.enqueue([job("other")] * 5)
    await keys.set_limits(tenant, KeyLimits(max_live=8))  # in force at once
    await queue.enqueue([job(tenant)])


async def test_a_keys_own_limit_replaces_the_common_one(make_queue: Any) -> None:
    queue = make_queue(Limits(max_queued_per_tenant=2))
    tenant = (await KeyStore(queue).create("a", limits=KeyLimits(max_live=4))).record.id
    await queue.enqueue([job(tenant)] * 4)
    with pytest.raises(QueueFull) as refused:
        await queue.enqueue([job("other")] * 3)
    assert refused.value.code == "queue_full"

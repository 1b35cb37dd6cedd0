"""`flashbulb keys …` and `flashbulb queue …`: what an operator does on the queue's Redis, with or without a server.

Without --redis it is the Valkey of the data folder: that of a running `serve`, else one that runs for the command.
"""

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from flashbulb_service.queue import Gate, Queue
    from flashbulb_service.settings import Settings
    from flashbulb_service.tenants.keys import KeyLimits
    from flashbulb_service.tenants.store import KeyStore

Data = Annotated[Path | None, typer.Option("--data", metavar="DIR", help="Queue and results of this machine")]
Redis = Annotated[str | None, typer.Option("--redis", metavar="URL", help="redis:// or unix:// of the queue")]
KeyId = Annotated[str, typer.Argument(metavar="KEY", help="The key's id, key_…")]
ModelName = Annotated[
    str, typer.Argument(metavar="MODEL", help="name@version, or a name of the model repository")
]
Models = Annotated[
    str | None,
    typer.Option("--models", metavar="DIR|URL", help="Model repository, or s3:// of one [./models]"),
]
Rpm = Annotated[int | None, typer.Option("--rpm", min=0, help="Requests per minute, 0: any number")]
Burst = Annotated[int | None, typer.Option("--burst", min=0, help="Requests at once, 0: a minute's")]
MaxLive = Annotated[int | None, typer.Option("--max-live", min=0, help="Jobs that wait or run, 0: as all")]
Weight = Annotated[float | None, typer.Option("--weight", help="Share of contended device time [1]")]
BudgetMs = Annotated[
    int | None, typer.Option("--budget-ms", min=0, help="Device time per period, 0: any amount")
]
BudgetPeriod = Annotated[int | None, typer.Option("--budget-period-s", help="Length of that period [86400]")]

keys_app = typer.Typer(no_args_is_help=True, help="Make, change and end API keys.")
queue_app = typer.Typer(no_args_is_help=True, help="Pause, drain and look at the queue.")
dead_app = typer.Typer(no_args_is_help=True, help="Jobs that failed for good.")
queue_app.add_typer(dead_app, name="dead")


@keys_app.command("create")
def create(
    name: Annotated[str, typer.Argument(help="Whose key it is, for people")],
    scope: Annotated[list[str] | None, typer.Option("--scope", help="generate, admin; repeat it")] = None,
    rpm: Rpm = None,
    burst: Burst = None,
    max_live: MaxLive = None,
    weight: Weight = None,
    budget_ms: BudgetMs = None,
    budget_period_s: BudgetPeriod = None,
    data: Data = None,
    redis: Redis = None,
) -> None:
    """Make a key and print its secret, which nobody can read again."""
    given = _given(rpm, burst, max_live, weight, budget_ms, budget_period_s)

    async def work(_queue: "Queue", keys: "KeyStore") -> None:
        made = await keys.create(name, scope or ["generate"], _limits({}, given))
        typer.echo(f"{made.record.id}: keep this secret, it is not shown again", err=True)
        typer.echo(made.secret)

    on_store(work, data, redis)


@keys_app.command("list")
def list_keys(data: Data = None, redis: Redis = None) -> None:
    """List all keys."""

    async def work(_queue: "Queue", keys: "KeyStore") -> None:
        for record in await keys.all():
            state = "revoked" if record.revoked_at is not None else "good"
            limits = record.limits.model_dump_json(exclude_defaults=True)
            typer.echo(f"{record.id}\t{state}\t{'+'.join(record.scopes)}\t{record.name}\t{limits}")

    on_store(work, data, redis)


@keys_app.command("rotate")
def rotate(
    key: KeyId,
    grace_s: Annotated[
        float, typer.Option("--grace-s", help="How long the old secret stays good")
    ] = 86_400.0,
    data: Data = None,
    redis: Redis = None,
) -> None:
    """Make a new secret for a key and print it."""

    async def work(_queue: "Queue", keys: "KeyStore") -> None:
        made = await keys.rotate(key, grace_s=grace_s)
        typer.echo(f"{key}: keep this secret; the one before is good for {grace_s:g} s more", err=True)
        typer.echo(made.secret)

    on_store(work, data, redis)


@keys_app.command("revoke")
def revoke(key: KeyId, data: Data = None, redis: Redis = None) -> None:
    """End a key at once."""

    async def work(_queue: "Queue", keys: "KeyStore") -> None:
        await keys.revoke(key)
        typer.echo(f"{key}\trevoked")

    on_store(work, data, redis)


@keys_app.command("limits")
def limits(
    key: KeyId,
    rpm: Rpm = None,
    burst: Burst = None,
    max_live: MaxLive = None,
    weight: Weight = None,
    budget_ms: BudgetMs = None,
    budget_period_s: BudgetPeriod = None,
    data: Data = None,
    redis: Redis = None,
) -> None:
    """Print the limits of a key, after changing those that are given."""
    given = _given(rpm, burst, max_live, weight, budget_ms, budget_period_s)

    async def work(_queue: "Queue", keys: "KeyStore") -> None:
        record = await keys.get(key)
        if given:
            record = await keys.set_limits(key, _limits(record.limits.model_dump(), given))
        typer.echo(record.limits.model_dump_json())

    on_store(work, data, redis)


@keys_app.command("usage")
def usage(
    key: KeyId,
    days: Annotated[int, typer.Option("--days", min=1, max=92, help="How many days back")] = 30,
    data: Data = None,
    redis: Redis = None,
) -> None:
    """Print what a key used on each of the last days (UTC) on which it did anything."""

    async def work(_queue: "Queue", keys: "KeyStore") -> None:
        typer.echo("day\trequests\trefused\timages\tdevice_ms")
        for day in await keys.usage(key, days=days):
            if day.requests or day.refused or day.images:
                typer.echo(f"{day.day}\t{day.requests}\t{day.refused}\t{day.images}\t{day.device_ms:.1f}")

    on_store(work, data, redis)


@queue_app.command("pause")
def pause(model: ModelName, models: Models = None, data: Data = None, redis: Redis = None) -> None:
    """Let a model's jobs wait; new ones are taken up to the limits."""
    _set_gate(model, "paused", models, data, redis)


@queue_app.command("drain")
def drain(model: ModelName, models: Models = None, data: Data = None, redis: Redis = None) -> None:
    """Take no new jobs for a model; those that wait are done."""
    _set_gate(model, "draining", models, data, redis)


@queue_app.command("resume")
def resume(model: ModelName, models: Models = None, data: Data = None, redis: Redis = None) -> None:
    """End a pause or a drain."""
    _set_gate(model, None, models, data, redis)


@queue_app.command("stats")
def stats(data: Data = None, redis: Redis = None) -> None:
    """Count what is in the queue."""

    async def work(queue: "Queue", _keys: "KeyStore") -> None:
        counts, gates = await queue.stats(), await queue.gates()
        for model in sorted({*counts.queued, *gates}):
            typer.echo(f"{model}\t{counts.queued.get(model, 0)} queued\t{gates.get(model, 'open')}")
        typer.echo(
            f"all\t{sum(counts.queued.values())} queued\t{counts.running} running\t{counts.delayed} delayed\t"
            f"{counts.dead} dead\toldest {counts.oldest_age_s:.1f} s"
        )

    on_store(work, data, redis)


@dead_app.command("list")
def list_dead(
    limit: Annotated[int, typer.Option("--limit", min=1, max=1000, help="How many at most")] = 50,
    data: Data = None,
    redis: Redis = None,
) -> None:
    """List jobs that failed for good, the newest first."""

    async def work(queue: "Queue", _keys: "KeyStore") -> None:
        for view in await queue.dead_letters(limit=limit):
            code, message = (view.error.code, view.error.message) if view.error else ("", "")
            typer.echo(f"{view.id}\t{view.model}\t{code}\t{' '.join(message.split())[:200]}")

    on_store(work, data, redis)


@dead_app.command("replay")
def replay(
    jobs: Annotated[list[str], typer.Argument(metavar="JOB...", help="Ids of dead jobs")],
    data: Data = None,
    redis: Redis = None,
) -> None:
    """Queue failed jobs again, with fresh attempts and no deadline; one that cannot be keeps no other from it."""
    from flashbulb_service.errors import InvalidRequest, JobNotFound

    exit_code = 0

    async def work(queue: "Queue", _keys: "KeyStore") -> None:
        nonlocal exit_code
        for job in jobs:
            try:
                if not await queue.replay_dead(job):
                    raise JobNotFound(job)
            except (InvalidRequest, JobNotFound) as error:
                exit_code = max(exit_code, error.exit_code)
                typer.echo(f"{job}\t{error.message}")
            else:
                typer.echo(f"{job}\tqueued")

    on_store(work, data, redis)
    raise typer.Exit(exit_code)


# ------------------------------------------------------------------------------------------------- inside


def _given(
    rpm: int | None,
    burst: int | None,
    max_live: int | None,
    weight: float | None,
    budget_ms: int | None,
    budget_period_s: int | None,
) -> dict[str, float | None]:
    """Return the limits that were given; 0 takes one away."""
    named: dict[str, float | None] = {
        "requests_per_minute": rpm,
        "burst": burst,
        "max_live": max_live,
        "budget_ms": budget_ms,
    }
    chosen = {name: value or None for name, value in named.items() if value is not None}
    kept = {"weight": weight, "budget_period_s": budget_period_s}
    return chosen | {name: value for name, value in kept.items() if value is not None}


def _limits(known: dict[str, Any], given: dict[str, float | None]) -> "KeyLimits":
    from pydantic import ValidationError

    from flashbulb_service.errors import InvalidRequest
    from flashbulb_service.tenants.keys import KeyLimits

    try:
        return KeyLimits(**{**known, **given})
    except ValidationError as error:
        problem = error.errors()[0]
        name = str(problem["loc"][0])
        raise InvalidRequest(f"{name}: {problem['msg']}, got {problem['input']!r}", param=name) from error


def _set_gate(
    model: str, gate: "Gate | None", models: str | None, data: Path | None, redis: str | None
) -> None:
    from flashbulb_service.settings import read_settings

    settings = read_settings(models=models, data=data, redis=redis)
    model_id = model_id_of(settings, model)

    async def work(queue: "Queue", _keys: "KeyStore") -> None:
        await queue.set_gate(model_id, gate)
        typer.echo(f"{model_id}\t{gate or 'open'}")

    on_store(work, data, redis)


def model_id_of(settings: "Settings", model: str) -> str:
    """Return name@version: the given one, else that of the model repository."""
    from flashbulb_service.errors import InvalidRequest
    from flashbulb_service.parts import load_catalog

    if "@" not in model:
        return load_catalog(settings, verify=False).find(model).id
    name, _, version = model.rpartition("@")
    if not name or not version.isdecimal():
        raise InvalidRequest(f"expected a model as name or name@version, got {model!r}", param="MODEL")
    return model


def on_store(
    work: "Callable[[Queue, KeyStore], Awaitable[None]]", data: Path | None, redis: str | None
) -> None:
    """Do something on the queue's store and the keys in it."""
    import asyncio
    from contextlib import ExitStack

    from flashbulb_service.embedded import EmbeddedServer
    from flashbulb_service.queue import Queue
    from flashbulb_service.settings import read_settings
    from flashbulb_service.tenants.store import KeyStore

    async def run(url: str) -> None:
        async with Queue.connect(url, namespace=settings.namespace) as queue:
            await work(queue, KeyStore(queue))

    settings = read_settings(data=data, redis=redis)
    with ExitStack() as opened:
        url = settings.redis or opened.enter_context(EmbeddedServer(settings.data.expanduser() / "queue")).url
        asyncio.run(run(url))

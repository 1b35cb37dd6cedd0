"""The API alone, or all in one: API, workers and an embedded Valkey, supervised from one process."""

import asyncio
import contextlib
import json
import logging
import os
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial

import uvicorn

from flashbulb_service.api.admin_models import follow_words
from flashbulb_service.api.context import Context
from flashbulb_service.api.health import check_ready
from flashbulb_service.api.jobs import webhook_message
from flashbulb_service.app import create_app
from flashbulb_service.connections import PromptHeads
from flashbulb_service.embedded import EmbeddedServer
from flashbulb_service.errors import ServerStartError, ServiceError
from flashbulb_service.garbage import settle_heap
from flashbulb_service.head_start import open_pair
from flashbulb_service.heap import bound_heap
from flashbulb_service.huge_pages import use_huge_pages
from flashbulb_service.model_store import keep_following
from flashbulb_service.outages import keep_at
from flashbulb_service.parts import load_catalog, open_parts
from flashbulb_service.presence import serves, would_serve
from flashbulb_service.processes import keep_running
from flashbulb_service.results import make_private
from flashbulb_service.settings import Settings
from flashbulb_service.tenants.access import is_loopback, settle_auth
from flashbulb_service.tenants.store import KeyStore
from flashbulb_service.tracing import traced
from flashbulb_service.webhooks import keep_delivering

log = logging.getLogger(__name__)

READY_CHECK_S = 0.03
CATALOG_INTERVAL_S = 2.0
STORE = ("models_url", "models_wanted", "models_poll_s", "models_max_bytes")  # settings
# Longer than clients (5 s) and load balancers (60 s) keep an idle connection: the side that closes it must be theirs,
# or the request that they send just then is lost.
KEEP_ALIVE_S = 65


async def check_host(settings: Settings, *, allow_public: bool) -> Settings:
    """Return settings in which keys are either on or off, and refuse to serve the network by accident.

    Raises:
        InvalidRequest: others can reach the address, nobody has a key, and that was not asked for.
        QueueUnavailable: the store of the keys does not answer.
    """
    has_keys = not is_loopback(settings.host) and await _has_keys(settings)
    auth = settle_auth(settings.auth, settings.host, allow_public=allow_public, has_keys=has_keys)
    if auth == "off" and not is_loopback(settings.host):
        log.warning("everybody who reaches %s may draw: no API key is asked for", settings.host)
    return settings.model_copy(update={"auth": auth})


async def _has_keys(settings: Settings) -> bool:
    async with open_parts(settings) as (queue, _, _):
        return await KeyStore(queue).any_active()


def bind(host: str, port: int) -> socket.socket:
    """Open the listening socket before anything else starts.

    Raises:
        ServerStartError: the address is taken or not ours.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        reason = error.strerror or str(error)
        raise ServerStartError(
            f"cannot listen on {host}:{port}: {reason}; choose another --port or --host"
        ) from error
    return listener


def address_of(listener: socket.socket) -> str:
    """Return the http:// address of a listening socket."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


@contextmanager
def queue_server(settings: Settings) -> Iterator[Settings]:
    """Yield settings with a Redis URL: the given one, or that of an embedded Valkey while this is open.

    Raises:
        ServerStartError: another process runs the Valkey of the data folder. A guest of it could never work
            again after its host ends, since the next server has another password.
    """
    if settings.redis is not None:
        yield settings
        return
    data = settings.data.expanduser()
    make_private(data)
    make_private(data / "queue")
    with EmbeddedServer(data / "queue") as server:
        if not server.owned:
            raise ServerStartError(
                f"{data} is in use by another flashbulb serve (pid {server.owner_pid}): stop it, or pass --data"
            )
        yield settings.model_copy(update={"redis": server.url})


async def run_api(settings: Settings, listener: socket.socket, stop: asyncio.Event) -> None:
    """Serve the API alone until `stop`."""
    bound_heap()
    catalog = load_catalog(settings, verify=False)
    async with open_parts(settings) as (queue, results, presence), traced(settings, "api") as tracing:
        app = create_app(
            settings, queue=queue, results=results, presence=presence, catalog=catalog, tracing=tracing
        )
        server = _http_server(settings, app)
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        async with upkeep(app.state.context):
            await _until(stop, serving)
            await _stop_serving(settings, app.state.context, server, serving)


async def run_all(
    settings: Settings,
    listener: socket.socket,
    stop: asyncio.Event,
    *,
    num_workers: int,
    on_ready: Callable[[str], None],
) -> None:
    """Serve API and workers until `stop`; then finish what clients wait for, stop the workers, and return.

    Raises:
        ChildFailed: the workers cannot start.
    """
    bound_heap()
    catalog = load_catalog(settings, verify=True)
    started = asyncio.Event()
    command = [sys.executable, "-m", "flashbulb_service.cli", "worker", "--parent-pid", str(os.getpid())]
    # Of several workers, the one that got a head start need not be the one that gets the job.
    pair = open_pair() if num_workers == 1 else None
    if pair is not None:
        command += ["--head-start-fd", str(pair[1].fileno())]
    workers = [
        asyncio.create_task(
            keep_running(
                f"worker {number}",
                command,
                child_env(settings),
                started,
                stop_s=settings.drain_s + 5,
                pass_fds=() if pair is None else (pair[1].fileno(),),
            )
        )
        for number in range(num_workers)
    ]
    serving: asyncio.Task[None] | None = None
    try:
        async with open_parts(settings) as (queue, results, presence), traced(settings, "api") as tracing:
            app = create_app(
                settings,
                queue=queue,
                results=results,
                presence=presence,
                catalog=catalog,
                tracing=tracing,
                to_worker=None if pair is None else pair[0],
            )
            if (head_starts := app.state.context.head_starts) is not None:
                asyncio.get_running_loop().add_reader(head_starts.fileno(), head_starts.hear)
            server = _http_server(settings, app)
            serving = asyncio.create_task(server.serve(sockets=[listener]))
            ready = asyncio.create_task(_when_ready(app.state.context))
            async with upkeep(app.state.context, manifests_only=False):
                await _until(stop, serving, ready, *workers)
                if ready.done():
                    started.set()
                    on_ready(address_of(listener))
                    await _until(stop, serving, *workers)
                ready.cancel()
                await _stop_serving(settings, app.state.context, server, serving)
    finally:
        for task in workers:
            task.cancel()
        ended = await asyncio.gather(*workers, return_exceptions=True)
        for end in pair or ():
            asyncio.get_running_loop().remove_reader(end)
            end.close()
    for result in ended:
        if isinstance(result, Exception):
            raise result


@asynccontextmanager
async def upkeep(context: Context, *, manifests_only: bool = True) -> AsyncIterator[None]:
    """Follow models and their store, reap, and deliver webhooks if there is a secret to sign them with."""
    works: list[Callable[[], Awaitable[None]]] = [
        partial(context.queue.keep_reaping, context.settings.lease_s),  # workers do, but there may be none
        partial(_follow_models, context),
        partial(keep_following, context.settings, manifests_only=manifests_only),
    ]
    if context.settings.webhook_secret is not None:
        works.append(
            partial(
                keep_delivering,
                context.queue,
                partial(webhook_message, context),
                context.settings.webhook_secret,
                allow_private=context.settings.webhook_allow_private,
                on_attempt=context.metrics.webhook_delivery,
            )
        )
    tasks = [asyncio.create_task(keep_at(work)) for work in works]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


def child_env(settings: Settings) -> dict[str, str]:
    """Return the environment that gives a child these settings; secrets stay out of the process list."""
    # The port of metrics is one worker's: several children could not share it, and the API shows theirs. The store of
    # models is followed by this process alone, into the repository that the children scan.
    values = settings.model_dump(mode="json", exclude_none=True, exclude={"metrics_port", *STORE})
    env = {name: value for name, value in os.environ.items() if not name.upper().startswith("FLASHBULB_")}
    for name, value in values.items():
        text = value if isinstance(value, str) else json.dumps(value)
        env[f"FLASHBULB_{name.upper()}"] = text
    return env


class _Server(uvicorn.Server):
    """A server that leaves the process's signals to us: workers and queue must stop after it, not with it."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _http_server(settings: Settings, app: object) -> _Server:
    settle_heap()
    use_huge_pages()
    config = uvicorn.Config(
        app,  # type: ignore[arg-type]
        http=partial(PromptHeads, head_timeout_s=settings.head_timeout_s),  # type: ignore[arg-type]
        log_config=None,
        access_log=False,
        lifespan="off",
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=max(1, int(settings.drain_s)),
    )
    return _Server(config)


async def _stop_serving(
    settings: Settings, context: Context, server: _Server, serving: "asyncio.Task[None]"
) -> None:
    """Say that we stop, give load balancers the time to hear it, then finish what clients wait for."""
    context.draining.set()
    if not serving.done():
        await asyncio.wait({serving}, timeout=settings.drain_notice_s)
    server.should_exit = True
    await serving


async def _when_ready(context: Context) -> None:
    """Return when a request would be answered; asked at start only, when nobody can tell us."""
    while True:
        with contextlib.suppress(ServiceError):
            await check_ready(context)
            return
        await asyncio.sleep(READY_CHECK_S)


async def _follow_models(context: Context) -> None:
    """Keep the catalog at what the repository holds and workers have ready, until this task is cancelled."""
    is_served = would_serve if context.settings.ready_without_workers else serves
    while True:
        try:
            workers = await context.presence.workers()
            context.catalog.refresh(context.settings.models, partial(is_served, workers))
            await follow_words(context)
        except (ServiceError, OSError) as error:
            log.warning("the list of models was not refreshed: %s", error)
        await asyncio.sleep(CATALOG_INTERVAL_S)


async def _until(stop: asyncio.Event, *tasks: "asyncio.Task[None]") -> None:
    """Wait for the stop event or the first task to end."""
    stopping = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({stopping, *tasks}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        stopping.cancel()

"""The API alone, or all in one: API, workers and an embedded Valkey, supervised from one process."""

import asyncio
import contextlib
import json
import logging
import os
import socket
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial

import uvicorn

from flashbulb_service.api.context import Context
from flashbulb_service.api.health import check_ready
from flashbulb_service.api.jobs import webhook_message
from flashbulb_service.app import create_app
from flashbulb_service.connections import PromptHeads
from flashbulb_service.errors import ServerStartError, ServiceError
from flashbulb_service.parts import load_catalog, open_parts
from flashbulb_service.processes import keep_running
from flashbulb_service.settings import Settings
from flashbulb_service.tenants.access import is_loopback, settle_auth
from flashbulb_service.tenants.store import KeyStore
from flashbulb_service.webhooks import keep_delivering

log = logging.getLogger(__name__)

READY_CHECK_S = 0.03


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


async def run_api(settings: Settings, listener: socket.socket, stop: asyncio.Event) -> None:
    """Serve the API alone until `stop`."""
    catalog = load_catalog(settings, verify=False)
    async with open_parts(settings) as (queue, results, presence):
        app = create_app(settings, queue=queue, results=results, presence=presence, catalog=catalog)
        server = _http_server(settings, app)
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        async with webhooks(app.state.context):
            await _until(stop, serving)
            server.should_exit = True
            await serving


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
    catalog = load_catalog(settings, verify=True)
    started = asyncio.Event()
    command = [sys.executable, "-m", "flashbulb_service.cli", "worker", "--parent-pid", str(os.getpid())]
    workers = [
        asyncio.create_task(
            keep_running(
                f"worker {number}", command, child_env(settings), started, stop_s=settings.drain_s + 5
            )
        )
        for number in range(num_workers)
    ]
    serving: asyncio.Task[None] | None = None
    try:
        async with open_parts(settings) as (queue, results, presence):
            app = create_app(settings, queue=queue, results=results, presence=presence, catalog=catalog)
            server = _http_server(settings, app)
            serving = asyncio.create_task(server.serve(sockets=[listener]))
            ready = asyncio.create_task(_when_ready(app.state.context))
            async with webhooks(app.state.context):
                await _until(stop, serving, ready, *workers)
                if ready.done():
                    started.set()
                    on_ready(address_of(listener))
                    await _until(stop, serving, *workers)
                ready.cancel()
                server.should_exit = True
                await serving
    finally:
        for task in workers:
            task.cancel()
        ended = await asyncio.gather(*workers, return_exceptions=True)
    for result in ended:
        if isinstance(result, Exception):
            raise result


@asynccontextmanager
async def webhooks(context: Context) -> AsyncIterator[None]:
    """Deliver webhooks while this is open, if there is a secret to sign them with."""
    if context.settings.webhook_secret is None:
        yield
        return
    delivering = asyncio.create_task(
        keep_delivering(
            context.queue,
            partial(webhook_message, context),
            context.settings.webhook_secret,
            allow_private=context.settings.webhook_allow_private,
        )
    )
    try:
        yield
    finally:
        delivering.cancel()
        await asyncio.wait([delivering])


def child_env(settings: Settings) -> dict[str, str]:
    """Return the environment that gives a child these settings; secrets stay out of the process list."""
    values = settings.model_dump(mode="json", exclude_none=True)
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
    config = uvicorn.Config(
        app,  # type: ignore[arg-type]
        http=partial(PromptHeads, head_timeout_s=settings.head_timeout_s),  # type: ignore[arg-type]
        log_config=None,
        access_log=False,
        lifespan="off",
        server_header=False,
        timeout_graceful_shutdown=max(1, int(settings.drain_s)),
    )
    return _Server(config)


async def _when_ready(context: Context) -> None:
    """Return when a request would be answered; asked at start only, when nobody can tell us."""
    while True:
        with contextlib.suppress(ServiceError):
            await check_ready(context)
            return
        await asyncio.sleep(READY_CHECK_S)


async def _until(stop: asyncio.Event, *tasks: "asyncio.Task[None]") -> None:
    """Wait for the stop event or the first task to end."""
    stopping = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({stopping, *tasks}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        stopping.cancel()

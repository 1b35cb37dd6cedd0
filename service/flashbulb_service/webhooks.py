"""Tells other servers that jobs have ended: signed, at least once, never into a private network.

The form is Standard Webhooks': ``webhook-id``, ``webhook-timestamp``, and ``webhook-signature: v1,<base64>`` of
HMAC-SHA256 over "id.timestamp.body". A delivery is a due entry in Redis; whichever API process takes it tries it.
"""

import asyncio
import base64
import binascii
import contextlib
import hashlib
import hmac
import ipaddress
import json
import logging
import random
import re
import socket
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any
from urllib.parse import urlsplit
from weakref import WeakValueDictionary

from flashbulb_service.errors import InvalidRequest, NewerMessage, QueueUnavailable
from flashbulb_service.outages import OutageLog
from flashbulb_service.queue import DueHook, Queue

log = logging.getLogger(__name__)

MAX_URL_CHARS = 2_000
MAX_ATTEMPTS = 8
MAX_DELAY_S = 3_600.0
TIMEOUT_S = 10.0
LEASE_S = 4 * TIMEOUT_S
MAX_CALLS = 64  # at a time, of this process
MAX_CALLS_PER_HOST = 8
PATIENCE_S = 1.0  # waits for one of its host's places keep others' calls from the process
IDLE_S = 30.0
MAX_HEAD_BYTES = 16 * 1024
_URL = re.compile(r"https?://[!-~]+")  # visible ASCII only: nothing that could start a header
_UNICAST = ipaddress.ip_network("2000::/3")  # all that is public of IPv6; the rest may spell any IPv4 address


class NoPlace(Exception):
    """Other calls of its host are under way, so that this one has to wait."""


class DeliveryError(Exception):
    """The other server was not told; the text says why."""


@dataclass(frozen=True)
class Target:
    """A checked address."""

    secure: bool
    host: str
    port: int
    path: str


@dataclass(frozen=True)
class Message:
    """What is to be said, and to whom."""

    url: str
    id: str
    body: bytes


def secret_key(secret: str) -> bytes:
    """Return the key of a secret in the form whsec_<base64>.

    Raises:
        ValueError: it has another form, or is shorter than 24 bytes.
    """
    try:
        key = base64.b64decode(secret.removeprefix("whsec_"), validate=True)
    except binascii.Error:
        key = b""
    if not secret.startswith("whsec_") or len(key) < 24:
        raise ValueError("expected a webhook secret as whsec_<base64 of at least 24 random bytes>")
    return key


def parse_target(url: str, *, allow_private: bool) -> Target:
    """Check an address before anything is resolved.

    Raises:
        InvalidRequest: it is no plain http(s) URL, or it names a private address.
    """
    try:
        if len(url) > MAX_URL_CHARS or not _URL.fullmatch(url):
            raise ValueError
        parts = urlsplit(url)
        if not parts.hostname or "@" in parts.netloc or parts.fragment:
            raise ValueError
        port = parts.port if parts.port is not None else (443 if parts.scheme == "https" else 80)
        target = Target(
            parts.scheme == "https",
            parts.hostname,
            port,
            (parts.path or "/") + (f"?{parts.query}" if parts.query else ""),
        )
    except ValueError:
        raise InvalidRequest(
            f"webhook_url: expected http:// or https://, a host and a path, in at most {MAX_URL_CHARS} visible "
            "ASCII characters, without user or fragment",
            param="webhook_url",
            code="invalid_url",
        ) from None
    literal = _literal(target.host)
    named_private = target.host == "localhost" or target.host.endswith((".localhost", ".local", ".internal"))
    if not allow_private and (named_private or (literal is not None and not is_public(literal))):
        raise InvalidRequest(
            "webhook_url: expected a public address, got one of a private network",
            param="webhook_url",
            code="private_address",
        )
    return target


def _literal(host: str) -> str | None:
    """Return the address that a host spells, in any form that a resolver would read (2130706433, 0x7f.1)."""
    try:
        return str(ipaddress.ip_address(host.partition("%")[0]))
    except ValueError:
        pass
    try:
        return socket.inet_ntoa(socket.inet_aton(host))
    except OSError:
        return None


def is_public(address: str) -> bool:
    """Tell whether an address is one of the public internet, also seen through IPv6's ways of writing IPv4."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is not None:
            return is_public(str(ip.ipv4_mapped))
        if ip.sixtofour is not None or ip.teredo is not None or ip not in _UNICAST:
            return False
    return ip.is_global and not ip.is_multicast


def sign(key: bytes, message_id: str, timestamp: int, body: bytes) -> str:
    """Return the signature header."""
    digest = hmac.new(key, f"{message_id}.{timestamp}.".encode() + body, hashlib.sha256).digest()
    return f"v1,{base64.b64encode(digest).decode()}"


def retry_delay_s(attempt: int, spread: float) -> float | None:
    """Return when to try again after this failed attempt, None to give up. spread: random, in [0, 1)."""
    if attempt >= MAX_ATTEMPTS:
        return None
    return min(2.0 * 4.0 ** (attempt - 1), MAX_DELAY_S) * (0.5 + spread)


async def deliver(message: Message, key: bytes, *, allow_private: bool, now: int) -> int:
    """Post a message and return the status. Resolves once, connects to what was checked, follows nothing.

    Raises:
        DeliveryError: no answer came.
        InvalidRequest: the address may not be used.
    """
    target = parse_target(message.url, allow_private=allow_private)
    try:
        async with asyncio.timeout(TIMEOUT_S):
            address = await _resolve(target, allow_private=allow_private)
            reader, writer = await asyncio.open_connection(
                address,
                target.port,
                ssl=_tls() if target.secure else None,
                server_hostname=target.host if target.secure else None,
                limit=MAX_HEAD_BYTES,
            )
            try:
                writer.write(_request(target, message, key, now))
                await writer.drain()
                return _status(await reader.readline())
            finally:
                writer.close()
    except (OSError, ValueError, TimeoutError, ssl.SSLError) as error:
        raise DeliveryError(f"{type(error).__name__}: {str(error)[:200]}") from error


@cache
def _tls() -> ssl.SSLContext:
    """Return the one context of all calls: to read the system's certificates takes the event loop 30 ms and more."""
    return ssl.create_default_context()


async def _resolve(target: Target, *, allow_private: bool) -> str:
    found = await asyncio.get_running_loop().getaddrinfo(
        target.host, target.port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP
    )
    addresses = [str(entry[4][0]) for entry in found]
    if not addresses or (not allow_private and not all(is_public(address) for address in addresses)):
        raise DeliveryError("the host leads to a private address")
    return addresses[0]


def _request(target: Target, message: Message, key: bytes, now: int) -> bytes:
    host = f"[{target.host}]" if ":" in target.host else target.host
    headers = {
        "host": f"{host}:{target.port}",
        "content-type": "application/json",
        "content-length": str(len(message.body)),
        "user-agent": "flashbulb-webhooks",
        "webhook-id": message.id,
        "webhook-timestamp": str(now),
        "webhook-signature": sign(key, message.id, now, message.body),
        "connection": "close",
    }
    head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return f"POST {target.path} HTTP/1.1\r\n{head}\r\n".encode("ascii") + message.body


def _status(line: bytes) -> int:
    found = re.match(rb"HTTP/1\.[01] ([1-5][0-9][0-9])\b", line)
    if found is None:
        raise DeliveryError("the other server's answer is not HTTP")
    return int(found[1])


def make_body(kind: str, data: Mapping[str, Any], created_at: int, message_id: str) -> bytes:
    """Write the event in the form of OpenAI's."""
    event = {"id": message_id, "object": "event", "type": kind, "created_at": created_at, "data": data}
    return json.dumps(event).encode()


MessageOf = Callable[[DueHook], Awaitable[Message | None]]  # what to say; None: nothing, or it is gone
Places = WeakValueDictionary[str, asyncio.Semaphore]  # of the hosts that are being called


async def keep_delivering(
    queue: Queue,
    message_of: MessageOf,
    secret: str,
    *,
    allow_private: bool,
    on_attempt: Callable[[str], None] = lambda result: None,
) -> None:
    """Deliver due hooks for ever, until the task is cancelled; outages are logged and survived.

    Each call is a task of its own, so that a receiver that does not answer keeps nobody else's from being made.

    Args:
        on_attempt: told of every call how it ended: "delivered", "retried" or "given_up".
    """
    key = secret_key(secret)
    outage = OutageLog(log, "webhooks interrupted")
    places: Places = WeakValueDictionary()
    calls: set[asyncio.Task[None]] = set()

    async def attempt(hook: DueHook) -> None:
        try:
            result = await _attempt(queue, message_of, key, hook, places, allow_private)
            if result is not None:
                on_attempt(result)
        except QueueUnavailable:
            pass  # the loop tells; the hook is due again after its lease
        except Exception:  # what is wrong with one hook keeps no other from being told
            log.exception("unforeseen error in the webhook of request %s", hook.request_id)

    async with asyncio.TaskGroup() as group:
        while True:
            while len(calls) >= MAX_CALLS:
                await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
            try:
                due, next_s = await queue.due_hooks(LEASE_S, MAX_CALLS - len(calls))
                outage.worked()
                for hook in due:
                    call = group.create_task(attempt(hook))
                    calls.add(call)
                    call.add_done_callback(calls.discard)
                if not due:
                    await queue.wait_for_hooks(IDLE_S if next_s is None else min(max(next_s, 0.01), IDLE_S))
            except QueueUnavailable as error:
                outage.failed(error)
                await asyncio.sleep(0.5)


@contextlib.asynccontextmanager
async def _place(places: Places, url: str) -> AsyncIterator[None]:
    """Hold one of the places of a message's host.

    Raises:
        NoPlace: all are taken, and none became free soon.
    """
    place = places.setdefault(urlsplit(url).hostname or "", asyncio.Semaphore(MAX_CALLS_PER_HOST))
    try:
        async with asyncio.timeout(PATIENCE_S):
            await place.acquire()
    except TimeoutError:
        raise NoPlace from None
    try:
        yield
    finally:
        place.release()


async def _attempt(
    queue: Queue,
    message_of: MessageOf,
    key: bytes,
    hook: DueHook,
    places: Places,
    allow_private: bool,
) -> str | None:
    """Try once; return how it ended, None when there was nothing to say."""
    try:
        message = await message_of(hook)
    except NewerMessage:  # an API of that version will say it
        await queue.hook_done(hook, again_in_s=LEASE_S)
        return None
    again_in_s: float | None = None
    result: str | None = None
    if message is not None:
        try:
            async with _place(places, message.url):
                status = await deliver(message, key, allow_private=allow_private, now=int(time.time()))
            outcome = f"status {status}"
            result = "delivered" if 200 <= status < 300 else "given_up" if status == 410 else "retried"
        except NoPlace:  # our own limit, and no fault of the receiver's
            await queue.hook_done(hook, again_in_s=TIMEOUT_S * (0.5 + random.random()), counts=False)
            return None
        except InvalidRequest as error:
            outcome, result = error.message, "given_up"  # it will not become better
        except DeliveryError as error:
            outcome, result = str(error), "retried"
        if result == "retried":
            again_in_s = retry_delay_s(hook.attempt, random.random())
            result = "given_up" if again_in_s is None else result
        log.info("webhook %s, attempt %d: %s", message.id, hook.attempt, outcome)
    await queue.hook_done(hook, again_in_s=again_in_s)
    return result

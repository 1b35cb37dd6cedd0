"""One request over HTTP, and what is kept of its answer. aiohttp: a seventh of httpx2's CPU time per request."""

import asyncio
import resource
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import aiohttp

from flashbulb_service.bench.workload import Planned, Target


@dataclass(slots=True)
class Sample:
    """What became of one planned request; times are seconds since the start of its measurement."""

    planned: Planned
    sent_s: float = 0.0
    done_s: float = 0.0
    status: int = 0  # 0: no answer; see error
    error: str | None = None
    body: bytes | None = None  # until it has been judged
    server_timing: str | None = None
    # filled in by validity.judge:
    valid: bool = False
    timings: dict[str, float] | None = None
    batch_size: int | None = None

    @property
    def latency_ms(self) -> float:
        """Return the time since the request was meant to be sent, whether or not we were on time."""
        return (self.done_s - self.planned.offset_s) * 1000

    @property
    def answered(self) -> bool:
        """Tell whether a picture was promised by the status."""
        return 200 <= self.status < 300

    @property
    def shed(self) -> bool:
        """Tell whether the server refused the request for being too busy."""
        return self.status == 429


class Client:
    """Sends requests to one server over as many kept connections as it needs."""

    def __init__(self, session: aiohttp.ClientSession, target: Target, timeout_s: float) -> None:
        """Use an open session; see `connect`."""
        self._session = session
        self._timeout = aiohttp.ClientTimeout(total=timeout_s, sock_connect=min(10.0, timeout_s))
        self.target = target

    async def send(self, sample: Sample, clock: Callable[[], float] = time.perf_counter) -> None:
        """Send a sample's request and write the outcome into it; network trouble is an outcome, too."""
        target, planned = self.target, sample.planned
        body, headers = target.body(planned), target.headers(planned)
        sample.sent_s = clock()
        try:
            async with self._session.post(
                target.url, data=body, headers=headers, timeout=self._timeout, allow_redirects=False
            ) as answer:
                content = await answer.read()
                sample.done_s = clock()
                sample.status = answer.status
                sample.server_timing = answer.headers.get("server-timing")
                sample.body = content
        except TimeoutError:
            sample.error = "timeout"
        except (aiohttp.ClientError, OSError) as error:
            sample.error = type(error).__name__
        except asyncio.CancelledError:
            sample.error = "abandoned"
            raise
        finally:
            sample.done_s = sample.done_s or clock()


@asynccontextmanager
async def connect(target: Target, *, timeout_s: float) -> AsyncIterator[Client]:
    """Open a client without a limit on connections; the process's limit on open files is raised to allow it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=60)
    async with aiohttp.ClientSession(
        connector=connector, auto_decompress=False, trust_env=False, cookie_jar=aiohttp.DummyCookieJar()
    ) as session:
        yield Client(session, target, timeout_s)

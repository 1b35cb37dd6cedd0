"""Traces of requests, from HTTP through the queue to the stages of a worker, in OpenTelemetry's form.

The API's span is FastAPI's own. Its context travels with the job, and the worker adds what the job went through once
that is known: nothing is recorded while a batch runs. Prompts are in no span.
"""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from importlib.metadata import version

from opentelemetry import trace
from opentelemetry.trace import SpanKind, TracerProvider
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from flashbulb_service.errors import InvalidRequest
from flashbulb_service.jobs import Job
from flashbulb_service.settings import Settings

FLUSH_MS = 1000
_CONTEXT = TraceContextTextMapPropagator()


class Tracing:
    """What one process tells of its part of a trace; without a provider, nothing."""

    def __init__(self, provider: TracerProvider | None = None) -> None:
        """Use a provider; whoever made it decides where spans go."""
        self.provider = provider

    def job(
        self,
        parent: str,
        job: Job,
        *,
        started_at: float,
        ended_at: float,
        stages_ms: Mapping[str, float],
        attributes: Mapping[str, str | int],
    ) -> None:
        """Tell of a finished job: its wait, then its stages one after another.

        Args:
            parent: the traceparent that came with the job; "" tells nothing.
            started_at, ended_at: seconds since the epoch by the queue's clock, as the job's `enqueued_at`.
            stages_ms: stage -> milliseconds, in their order from started_at.
        """
        if self.provider is None or not parent:
            return
        tracer = self.provider.get_tracer("flashbulb", version("flashbulb"))
        whole = tracer.start_span(
            "job",
            context=_CONTEXT.extract({"traceparent": parent}),
            kind=SpanKind.CONSUMER,
            start_time=_ns(job.enqueued_at),
            attributes={"flashbulb.job": job.id, "flashbulb.attempt": job.attempt, **attributes},
        )
        inside = trace.set_span_in_context(whole)
        at = max(started_at, job.enqueued_at)  # a worker reckons the queue's clock, to some milliseconds
        tracer.start_span("queue", context=inside, start_time=_ns(job.enqueued_at)).end(_ns(at))
        for stage, ms in stages_ms.items():
            span = tracer.start_span(stage, context=inside, start_time=_ns(at))
            at += ms / 1000
            span.end(_ns(at))
        whole.end(_ns(max(ended_at, at)))

    def close(self) -> None:
        """Send what was not sent yet."""
        if self.provider is not None and hasattr(self.provider, "shutdown"):
            self.provider.shutdown()


OFF = Tracing()


def current_traceparent() -> str:
    """Return the traceparent of the request that is being served, "" where none is recorded."""
    if not trace.get_current_span().get_span_context().trace_flags.sampled:
        return ""
    carrier: dict[str, str] = {}
    _CONTEXT.inject(carrier)
    return carrier.get("traceparent", "")


def start_tracing(settings: Settings, part: str) -> Tracing:
    """Send traces of this process to the collector of the settings; without one, none are made.

    Raises:
        InvalidRequest: the extra `otel` is not installed.
    """
    if settings.otlp_endpoint is None:
        return OFF
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider as SdkProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
    except ModuleNotFoundError as error:
        raise InvalidRequest(
            f"otlp_endpoint needs the package {error.name!r}, which is not installed: pip install 'flashbulb[otel]'",
            param="otlp_endpoint",
        ) from error
    provider = SdkProvider(
        resource=Resource.create(
            {"service.name": f"flashbulb-{part}", "service.version": version("flashbulb")}
        ),
        sampler=ParentBased(TraceIdRatioBased(settings.trace_share)),
    )
    exporter = OTLPSpanExporter(endpoint=settings.otlp_endpoint.rstrip("/") + "/v1/traces")
    provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=FLUSH_MS))
    return Tracing(provider)


@asynccontextmanager
async def traced(settings: Settings, part: str) -> AsyncIterator[Tracing]:
    """Trace while this is open, and send what is left at its end."""
    tracing = start_tracing(settings, part)
    try:
        yield tracing
    finally:
        await asyncio.to_thread(tracing.close)


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)

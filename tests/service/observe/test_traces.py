"""One trace from the client's span through HTTP and the queue to the stages of a worker, on a real server."""

import itertools
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx2
import pytest

from flashbulb_service.errors import InvalidRequest
from flashbulb_service.jobs import Job
from flashbulb_service.settings import Settings
from flashbulb_service.tracing import OFF, Tracing, current_traceparent, start_tracing
from support.serving import Serving
from support.tiny_bundle import make_tiny_bundle

trace_service = pytest.importorskip(
    "opentelemetry.proto.collector.trace.v1.trace_service_pb2", reason="the extra `otel` is not installed"
)

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
STAGES = {"queue", "text", "denoise", "decode", "encode", "store"}


class Collector:
    """An OpenTelemetry collector for the spans of one test."""

    def __init__(self) -> None:
        self.spans: list[tuple[str, object]] = []  # (service, span)
        self.arrived = threading.Condition()
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                if self.headers.get("content-encoding") == "gzip":
                    import gzip

                    body = gzip.decompress(body)
                request = trace_service.ExportTraceServiceRequest.FromString(body)
                with collector.arrived:
                    for resource in request.resource_spans:
                        names = {a.key: a.value.string_value for a in resource.resource.attributes}
                        for scope in resource.scope_spans:
                            collector.spans += [(names["service.name"], span) for span in scope.spans]
                    collector.arrived.notify_all()
                self.send_response(200)
                self.end_headers()

            def log_message(self, *args: object) -> None:
                """Say nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def until(self, names: set[str]) -> dict[str, object]:
        """Return spans by name as soon as all of these are there."""
        with self.arrived:
            assert self.arrived.wait_for(lambda: names <= {span.name for _, span in self.spans}, timeout=20)
            return {span.name: span for _, span in self.spans}

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def collector() -> Iterator[Collector]:
    made = Collector()
    yield made
    made.close()


def draw(url: str, *, sampled: bool = True) -> httpx2.Response:
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-0{int(sampled)}"}
    answer = httpx2.post(
        f"{url}/v1/images/generations", json={"prompt": "my secret wish"}, headers=headers, timeout=30
    )
    assert answer.status_code == 200
    return answer


def test_a_trace_goes_from_the_clients_span_to_the_workers_stages(
    collector: Collector, tmp_path: Path
) -> None:
    make_tiny_bundle(tmp_path / "models")
    with Serving(tmp_path / "models", tmp_path / "data", otlp_endpoint=collector.url) as server:
        draw(server.url)
        draw(server.url, sampled=False)  # its client said no
        route = "POST /v1/images/generations"
        spans = collector.until({route, "job", *STAGES})
    assert {span.trace_id.hex() for span in spans.values()} == {TRACE}
    http, job = spans[route], spans["job"]
    assert http.parent_span_id.hex() == PARENT
    assert job.parent_span_id == http.span_id
    assert {spans[stage].parent_span_id for stage in STAGES} == {job.span_id}
    order = [spans[stage] for stage in ("queue", "text", "denoise", "decode", "encode", "store")]
    for before, after in itertools.pairwise(order):
        assert before.start_time_unix_nano <= before.end_time_unix_nano <= after.start_time_unix_nano + 1000
    assert job.start_time_unix_nano <= order[0].start_time_unix_nano
    assert order[-1].end_time_unix_nano <= job.end_time_unix_nano
    services = {span.name: service for service, span in collector.spans}
    assert (services[route], services["job"]) == ("flashbulb-api", "flashbulb-worker")
    assert sum(span.name == "job" for _, span in collector.spans) == 1, "the second request was not traced"
    assert "secret" not in str([span for _, span in collector.spans])


def test_no_span_ends_before_it_begins_where_a_worker_reckons_the_queues_clock_too_early() -> None:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    job = Job("j", "tiny@1", "b", "default", b"p", attempt=1, burnt=0, enqueued_at=100.0)
    parent = f"00-{TRACE}-{PARENT}-01"
    stages = {"text": 1.0, "denoise": 2.0}
    Tracing(provider).job(parent, job, started_at=99.997, ended_at=100.001, stages_ms=stages, attributes={})
    told = {span.name: (span.start_time, span.end_time) for span in exporter.get_finished_spans()}
    assert set(told) == {"job", "queue", *stages}
    assert all(start <= end for start, end in told.values())
    assert told["queue"][1] <= told["text"][0] and told["denoise"][1] <= told["job"][1]


def test_without_a_collector_nothing_is_recorded() -> None:
    assert start_tracing(Settings(), "api") is OFF
    assert OFF.provider is None
    assert current_traceparent() == ""
    job = Job.__new__(Job)  # nothing of it is read
    OFF.job("", job, started_at=0, ended_at=0, stages_ms={}, attributes={})


def test_a_collector_without_the_extra_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(InvalidRequest, match=r"pip install 'flashbulb\[otel\]'"):
        start_tracing(Settings(otlp_endpoint="http://127.0.0.1:4318"), "api")

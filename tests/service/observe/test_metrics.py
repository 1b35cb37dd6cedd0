"""Metrics: every one is documented, labels are bounded, and the numbers of several workers stay apart."""

import re
import urllib.request
from pathlib import Path

import pytest

from flashbulb_service.errors import ServerStartError
from flashbulb_service.jobs import Job
from flashbulb_service.measures import merge_expositions, write_families
from flashbulb_service.observability import Metrics
from flashbulb_service.presence import MAX_METRICS_BYTES, LiveWorker, Presence
from flashbulb_service.queue import QueueStats
from flashbulb_service.worker_metrics import MAX_TENANTS, WorkerMetrics, serve_metrics

DOCUMENT = Path(__file__).parents[3] / "docs" / "observability.md"


def job(tenant: str = "default", burnt: int = 0, enqueued_at: float = 100.0) -> Job:
    return Job("id", "tiny@1", "bucket", tenant, b"", burnt + 1, burnt, enqueued_at)


def draw(metrics: WorkerMetrics, jobs: list[Job]) -> None:
    metrics.drawn(jobs, 4, started_at=103.0, batch_s=0.5, stages_ms={"denoise": 400.0})


def sample(metrics: WorkerMetrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(f"flashbulb_{name}", labels)


def test_every_metric_is_documented_and_every_documented_one_exists() -> None:
    rows = re.findall(r"^\| (`flashbulb_.*?) \|", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE)
    documented = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    assert sorted(documented) == sorted(set(documented))
    assert set(documented) == Metrics().names | WorkerMetrics().names


def test_a_batch_is_counted_once_and_its_jobs_each() -> None:
    metrics = WorkerMetrics()
    draw(metrics, [job("ann"), job("ann"), job("bob", enqueued_at=102.0)])
    assert sample(metrics, "batch_size_sum", model="tiny@1") == 3
    assert sample(metrics, "batch_size_count", model="tiny@1") == 1
    assert sample(metrics, "batch_fill_ratio_sum", model="tiny@1") == 0.75
    assert sample(metrics, "stage_seconds_sum", model="tiny@1", stage="denoise") == 0.4
    assert sample(metrics, "queue_wait_seconds_sum", model="tiny@1") == 3.0 + 3.0 + 1.0
    assert sample(metrics, "device_seconds_total", tenant="ann") == pytest.approx(1 / 3)
    assert sample(metrics, "device_seconds_total", tenant="bob") == pytest.approx(1 / 6)


def test_tenants_beyond_the_limit_share_one_label() -> None:
    metrics = WorkerMetrics()
    for number in range(3 * MAX_TENANTS):
        draw(metrics, [job(f"user-{number}")])
    assert metrics.exposition().count(b"flashbulb_device_seconds_total{") == MAX_TENANTS + 1
    assert sample(metrics, "device_seconds_total", tenant="other") == pytest.approx(MAX_TENANTS)


def test_numbers_of_two_workers_stay_apart_and_a_damaged_one_hides_none() -> None:
    first, second = WorkerMetrics(), WorkerMetrics()
    draw(first, [job()])
    draw(second, [job(), job()])
    found = {
        "w1": first.exposition(),
        "w2": second.exposition(),
        "w3": b"flashbulb_x{ nonsense",
        "w4": b"\xff",
    }
    text = write_families(merge_expositions(found, label="worker")).decode()
    assert 'flashbulb_batch_size_sum{model="tiny@1",worker="w1"} 1.0' in text
    assert 'flashbulb_batch_size_sum{model="tiny@1",worker="w2"} 2.0' in text
    assert text.count("# TYPE flashbulb_batch_size histogram") == 1
    assert "w3" not in text and "w4" not in text
    assert "_created" not in text


def test_what_alerts_watch_of_a_loaded_model_begins_at_zero() -> None:
    """A dead worker's jobs began the series of the one that ran them, and increase() saw no rise."""
    metrics = WorkerMetrics()
    metrics.model_loaded("tiny@1", 0.5)
    assert sample(metrics, "redeliveries_total", model="tiny@1") == 0
    assert sample(metrics, "deadline_missed_total", model="tiny@1") == 0
    metrics.claimed([job(burnt=1), job(burnt=1), job()])
    metrics.model_loaded("tiny@1", 0.5)  # again, after it left the memory: nothing is forgotten
    assert sample(metrics, "redeliveries_total", model="tiny@1") == 2


def test_a_queue_that_does_not_answer_is_no_lack_of_workers() -> None:
    """0 workers beside the last known depth paged for workers when Valkey was away."""
    metrics = Metrics()
    stats = QueueStats({"tiny@1": 5}, running=0, delayed=0, dead=0, oldest_short_s=1.0, oldest_long_s=0.0)
    metrics.queue(stats, {"tiny@1": 0.5}, 1, ready=True)
    assert 'flashbulb_queue_depth{model="tiny@1"} 5.0' in metrics.exposition().decode()
    metrics.queue_lost()
    text = metrics.exposition().decode()
    assert "flashbulb_queue_depth{" not in text
    assert 'flashbulb_queue_work_seconds{model="tiny@1"} 0.5' in text, (
        "or an autoscaler would stop the workers"
    )


async def test_published_numbers_end_with_the_sign_of_life(redis_url: str, namespace: str) -> None:
    presence = Presence.connect(redis_url, namespace=namespace)
    worker, large = LiveWorker("w1", ("tiny@1",), "onnx"), LiveWorker("w2", ("tiny@1",), "onnx")
    await presence.announce(worker, metrics=b"flashbulb_x 1\n")
    await presence.announce(large, metrics=b"x" * (MAX_METRICS_BYTES + 1))  # bounded: not stored
    assert await presence.metrics(await presence.workers()) == {"w1": b"flashbulb_x 1\n"}
    left_ms = await presence._client.pttl(presence._metrics_key(worker))
    assert 0 < left_ms <= 6000
    assert abs(presence.clock_offset_s) < 1.0  # one machine, one clock
    await presence.aclose()


def test_a_port_of_its_own_serves_the_metrics_and_is_free_afterwards(
    caplog: pytest.LogCaptureFixture,
) -> None:
    metrics = WorkerMetrics()
    draw(metrics, [job()])
    with caplog.at_level("INFO"), serve_metrics(metrics, "127.0.0.1", 0):
        port = int(caplog.messages[0].split(":")[2].split("/")[0])
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
            assert b'flashbulb_batch_size_sum{model="tiny@1"} 1.0' in answer.read()
        with (
            pytest.raises(ServerStartError, match=f"127.0.0.1:{port}.*--metrics-port"),
            serve_metrics(metrics, "127.0.0.1", port),
        ):
            pass
    with serve_metrics(metrics, "127.0.0.1", port):
        pass

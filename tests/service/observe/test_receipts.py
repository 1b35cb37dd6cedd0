"""The receipt of a request, as a pure function of its outcomes."""

import pytest

from flashbulb_service.receipts import make_receipt
from flashbulb_service.tasks import ImageOutcome


def outcome(batch_size: int, batch_ms: float) -> ImageOutcome:
    return ImageOutcome(
        file="a.png",
        batch_size=batch_size,
        batch_ms=batch_ms,
        encode_ms=1.0,
        bundle_sha256="ab" * 32,
        backend="onnx",
    )


def test_device_time_is_the_sum_of_the_pictures_shares() -> None:
    receipt = make_receipt(
        "emoji@3", [outcome(4, 40.0), outcome(2, 30.0)], {"queue_ms": 1.5, "total_ms": 80.0}
    )
    assert receipt.body() == {
        "model": "emoji",
        "version": 3,
        "sha256": "ab" * 32,
        "backend": "onnx",
        "batch_size": 4,
        "device_ms": 25.0,
        "timings": {"queue_ms": 1.5, "total_ms": 80.0},
    }
    assert receipt.headers() == {
        "server-timing": "queue;dur=1.5, total;dur=80.0",
        "x-flashbulb-model": "emoji@3",
        "x-flashbulb-sha256": "ab" * 32,
        "x-flashbulb-backend": "onnx",
        "x-flashbulb-batch-size": "4",
        "x-flashbulb-device-ms": "25.0",
    }


def test_a_request_without_pictures_has_no_receipt() -> None:
    with pytest.raises(ValueError, match="at least one"):
        make_receipt("emoji@3", [], {})

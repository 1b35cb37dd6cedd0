"""What a request was answered with: which model, drawn how, at what cost."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from flashbulb_service.tasks import ImageOutcome


@dataclass(frozen=True)
class Receipt:
    """The receipt of one request; `batch_size` is the largest batch that one of its pictures was drawn in."""

    model: str  # name
    version: int
    sha256: str  # of the bundle's manifest
    backend: str
    batch_size: int
    device_ms: float  # of all pictures, each with its share of its batch
    timings: Mapping[str, float]  # name_ms -> milliseconds

    def body(self) -> dict[str, Any]:
        """Return what stands under "receipt" in the body."""
        return {field.name: getattr(self, field.name) for field in _FIELDS} | {"timings": dict(self.timings)}

    def headers(self) -> dict[str, str]:
        """Return the same as headers."""
        spans = ", ".join(f"{name.removesuffix('_ms')};dur={ms}" for name, ms in self.timings.items())
        return {
            "server-timing": spans,
            "x-flashbulb-model": f"{self.model}@{self.version}",
            "x-flashbulb-sha256": self.sha256,
            "x-flashbulb-backend": self.backend,
            "x-flashbulb-batch-size": str(self.batch_size),
            "x-flashbulb-device-ms": str(self.device_ms),
        }


_FIELDS = fields(Receipt)


def make_receipt(model_id: str, outcomes: Sequence[ImageOutcome], timings: Mapping[str, float]) -> Receipt:
    """Make the receipt of a request from the outcomes of its pictures; `model_id` is name@version.

    Raises:
        ValueError: there is no outcome.
    """
    if not outcomes:
        raise ValueError("expected the outcome of at least one picture, got none")
    name, _, version = model_id.rpartition("@")
    return Receipt(
        model=name,
        version=int(version),
        sha256=outcomes[0].bundle_sha256,
        backend=outcomes[0].backend,
        batch_size=max(outcome.batch_size for outcome in outcomes),
        device_ms=round(sum(outcome.batch_ms / outcome.batch_size for outcome in outcomes), 3),
        timings=dict(timings),
    )

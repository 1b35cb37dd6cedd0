"""How metrics are made, written and put together: no global registry, no numbers that nobody fed."""

import logging
from collections.abc import Iterable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

log = logging.getLogger(__name__)

PREFIX = "flashbulb"
SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 300)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
SHARES = (0.125, 0.25, 0.5, 0.75, 1.0)


class Measures:
    """Makes the metrics of one process part, in a registry of its own."""

    def __init__(self) -> None:
        """Make an empty registry."""
        self.registry = CollectorRegistry()

    @property
    def names(self) -> set[str]:
        """Return the name of every declared metric, as Prometheus stores it."""
        return {
            f"{family.name}_total" if family.type == "counter" else family.name
            for family in _without_created(self.registry.collect())
        }

    def exposition(self) -> bytes:
        """Return everything in the Prometheus text format."""
        return write_families(self.registry.collect())

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, labels, namespace=PREFIX, registry=self.registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(name, text, labels, namespace=PREFIX, registry=self.registry)

    def _histogram(
        self, name: str, text: str, *labels: str, buckets: tuple[float, ...] = SECONDS
    ) -> Histogram:
        return Histogram(name, text, labels, namespace=PREFIX, registry=self.registry, buckets=buckets)


class Capped:
    """Bounds the values of a label that others choose: the first ones keep their names, later ones share one."""

    def __init__(self, limit: int) -> None:
        """Keep at most `limit` names."""
        self._limit = limit
        self._known: set[str] = set()

    def __call__(self, value: str) -> str:
        """Return the value, or "other" when there are too many."""
        if value not in self._known:
            if len(self._known) >= self._limit:
                return "other"
            self._known.add(value)
        return value


def merge_expositions(expositions: Mapping[str, bytes], *, label: str) -> list[Metric]:
    """Put expositions of several processes into one set of families; `label` tells whose each sample is.

    What cannot be read is left out and logged: one process must not hide the numbers of all others.
    """
    merged: dict[str, Metric] = {}
    for owner, data in sorted(expositions.items()):
        try:
            families = list(text_string_to_metric_families(data.decode()))
        except ValueError as error:
            log.warning("metrics of %s left out: %s", owner, type(error).__name__)
            continue
        for family in families:
            into = merged.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            for sample in family.samples:
                into.add_sample(sample.name, {**sample.labels, label: owner}, sample.value)
    return list(merged.values())


def write_families(families: Iterable[Metric]) -> bytes:
    """Write families in the Prometheus text format, without the times at which counters were made."""
    registry = CollectorRegistry()
    registry.register(_Given(list(_without_created(families))))
    return generate_latest(registry)


class _Given(Collector):
    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


def _without_created(families: Iterable[Metric]) -> Iterator[Metric]:
    for family in families:
        family.samples = [sample for sample in family.samples if not sample.name.endswith("_created")]
        yield family

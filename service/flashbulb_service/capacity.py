"""How many workers a load needs, and how much work a queue holds: both from what batches were measured to take."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from flashbulb_service.errors import InvalidRequest
from flashbulb_service.simulate import Outcome, poisson, simulate
from flashbulb_service.timing import Tau

UNKNOWN_PICTURE_S = 1.0  # assumed of a model that nobody has calibrated
WARM_UP_SHARE = 0.1
SHARE_ON_TIME = 0.99
MAX_WORKERS = 512


@dataclass(frozen=True, slots=True)
class Plan:
    """What a number of workers makes of a load, in simulated time."""

    workers: int
    busy: float  # share of the device time that batches took
    mean_batch: float  # over requests: the batch that each was drawn in, as `bench serve` tells it
    p50_ms: float  # of the answered requests, `overhead_ms` included
    p99_ms: float
    share_on_time: float  # of all requests; a refused one is not on time

    @property
    def is_enough(self) -> bool:
        """Tell whether at least 99 % of all requests are answered within the objective."""
        return self.share_on_time >= SHARE_ON_TIME


def plan_workers(
    tau: Tau,
    cap: int,
    *,
    rate_per_s: float,
    p99_ms: float,
    overhead_ms: float = 10.0,
    noise: float = 0.1,
    requests: int = 20_000,
    seed: int = 0,
) -> list[Plan]:
    """Simulate fleets from the fewest workers that could keep up to the fewest with 99 % of requests on time.

    Sizes grow by an eighth until one is enough; then the range between the last two is halved.

    Args:
        tau: time of a batch; its margin guards deadlines as it does while serving.
        cap: the largest batch.
        overhead_ms: HTTP, encoding and storing of one picture, which no device does.
        noise: sigma of log-normal noise on batch times.

    Returns:
        What was simulated, by size; the last one is enough, and one worker fewer is not.

    Raises:
        InvalidRequest: no number of workers reaches the objective; says why.
    """
    allowed_ms = p99_ms - overhead_ms
    if allowed_ms < tau.safe(1):
        raise InvalidRequest(
            f"expected an objective of at least {overhead_ms + tau.safe(1):.0f} ms (one picture alone with its "
            f"margin, and {overhead_ms:g} ms of overhead), got {p99_ms:g} ms: no number of workers reaches it",
            param="p99",
        )
    best_per_s = max(tau.throughput(size) for size in range(1, cap + 1)) * 1000
    workers = max(1, math.ceil(rate_per_s / best_per_s))
    if workers > MAX_WORKERS:
        raise InvalidRequest(
            f"expected a rate below {best_per_s * MAX_WORKERS:.0f}/s ({MAX_WORKERS} workers of {best_per_s:.1f}/s), "
            f"got {rate_per_s:g}/s: use a faster student or device",
            param="rate",
        )
    arrivals = poisson(rate_per_s, requests, allowed_ms, seed=seed)
    plans: dict[int, Plan] = {}

    def is_enough(number: int) -> bool:
        outcomes = simulate(arrivals, {"b": tau}, {"b": cap}, num_workers=number, noise=noise, seed=seed + 1)
        plans[number] = _summarise(outcomes, tau, number, overhead_ms)
        return plans[number].is_enough

    too_few = workers - 1  # cannot keep up, whatever the objective
    while not is_enough(workers):
        if workers == MAX_WORKERS:
            raise InvalidRequest(
                f"expected an objective that {MAX_WORKERS} workers reach, got p99 {p99_ms:g} ms at "
                f"{rate_per_s:g}/s: allow more time",
                param="p99",
            )
        too_few, workers = workers, min(workers + max(1, workers // 8), MAX_WORKERS)
    while workers - too_few > 1:
        middle = (too_few + workers) // 2
        if is_enough(middle):
            workers = middle
        else:
            too_few = middle
    return [plans[number] for number in sorted(plans) if number <= workers]


def _summarise(outcomes: list[Outcome], tau: Tau, workers: int, overhead_ms: float) -> Plan:
    start = max(one.arrival.at_ms for one in outcomes) * WARM_UP_SHARE
    counted = [one for one in outcomes if one.arrival.at_ms >= start]
    done = [one for one in counted if one.fate == "done"]
    times = sorted(one.end_ms - one.arrival.at_ms + overhead_ms for one in done) or [math.inf]
    rows = [one.batch_size for one in done]
    device_ms = sum(tau(size) / size for size in rows)
    span_ms = max(one.end_ms for one in counted) - start
    return Plan(
        workers=workers,
        busy=min(1.0, device_ms / (span_ms * workers)),
        mean_batch=sum(rows) / len(rows) if rows else 0.0,
        p50_ms=times[len(times) // 2],
        p99_ms=times[min(len(times) - 1, math.ceil(0.99 * len(times)) - 1)],
        share_on_time=sum(one.is_on_time for one in counted) / len(counted),
    )


def work_seconds(queued: Mapping[str, int], times_ms: Mapping[str, Mapping[int, float]]) -> dict[str, float]:
    """Return how long one worker would take for what waits, by model.

    Args:
        queued: model -> jobs that wait.
        times_ms: model -> batch size -> milliseconds; a model without is taken to need a second per picture.
    """
    return {model: depth * _picture_s(times_ms.get(model, {})) for model, depth in queued.items()}


def _picture_s(times_ms: Mapping[int, float]) -> float:
    """Return seconds per picture in the best batch size."""
    return min((ms / size / 1000 for size, ms in times_ms.items()), default=UNKNOWN_PICTURE_S)


def parse_rate(text: str) -> float:
    """Read "20/s", "20", "900/min" or "5000/h" as requests per second.

    Raises:
        InvalidRequest: it is none of these, or not above 0.
    """
    number, _, unit = text.strip().partition("/")
    return _positive(
        number, {"": 1.0, "s": 1.0, "min": 1 / 60, "h": 1 / 3600}.get(unit.strip()), text, "20/s", "rate"
    )


def parse_ms(text: str) -> float:
    """Read "300ms", "1.5s" or "300" (ms) as milliseconds.

    Raises:
        InvalidRequest: it is none of these, or not above 0.
    """
    stripped = text.strip()
    number = stripped.rstrip("ms")
    return _positive(
        number, {"": 1.0, "ms": 1.0, "s": 1000.0}.get(stripped[len(number) :]), text, "300ms", "p99"
    )


def _positive(number: str, factor: float | None, text: str, example: str, param: str) -> float:
    try:
        value = float(number) * (factor or math.nan)
    except ValueError:
        value = math.nan
    if not (value > 0 and math.isfinite(value)):
        raise InvalidRequest(f"--{param}: expected a value such as {example}, got {text!r}", param=param)
    return value

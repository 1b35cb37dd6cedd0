"""From samples to numbers: what one measurement says, what its repeats say together, and the table."""

import functools
import math
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from flashbulb_service.bench.client import Sample
from flashbulb_service.bench.openloop import Run

# Student's t, two-sided 95 %, by degrees of freedom 1, 2, 3, …
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
T95_LARGE = 1.96


@dataclass(frozen=True)
class Slo:
    """When an answer is in time: by a fixed limit, or by a multiple of the unloaded latency of its group."""

    absolute_ms: float | None = None
    by_group_ms: Mapping[str, float] | None = None

    def limit_ms(self, sample: Sample) -> float:
        """Return the limit of one sample."""
        if self.absolute_ms is not None:
            return self.absolute_ms
        assert self.by_group_ms is not None
        return self.by_group_ms[sample.planned.picture.group]


@dataclass(frozen=True)
class Trust:
    """When the generator's own trouble makes a measurement void."""

    max_lag_ms: float = 20.0  # p99 of how late requests left
    max_cpu_share: float = 0.9  # of one core


def measure(
    run: Run, *, slo: Slo, warm_up_s: float, seconds: float, offered: float, trust: Trust
) -> dict[str, Any]:
    """Summarise one measurement; requests that were due in the first `warm_up_s` do not count."""
    end_s = warm_up_s + seconds
    window = [s for s in run.samples if warm_up_s <= s.planned.offset_s < end_s and s.error != "abandoned"]
    good = [s for s in window if _is_good(s, slo)]
    answered = [s for s in window if s.answered]
    in_window = [s for s in run.samples if s.answered and warm_up_s <= s.done_s < end_s]
    # A request that timed out counts with the time it waited: to leave it out would flatter a stalled server.
    latencies = [s.latency_ms for s in window if s.answered or s.error == "timeout"]
    lags = [(s.sent_s - s.planned.offset_s) * 1000 for s in window]
    share = run.cpu_s / run.wall_s if run.wall_s else 0.0
    lag_p99 = _percentile(lags, 99)
    reasons = []
    if run.unsent:
        reasons.append(f"{run.unsent} requests were not sent: the limit on requests in flight was hit")
    if lag_p99 is not None and lag_p99 > trust.max_lag_ms:
        reasons.append(f"the generator was late: p99 {lag_p99:.1f} ms, allowed {trust.max_lag_ms:g} ms")
    if share > trust.max_cpu_share:
        reasons.append(f"the generator used {share:.0%} of a core, allowed {trust.max_cpu_share:.0%}")
    if run.interrupted:
        reasons.append("interrupted")
    if not window:
        reasons.append("no request was due in the window")
    return {
        "offered_rps": round(offered, 4),
        "sent": len(window),
        "sent_rps": round(len(window) / seconds, 4),
        "achieved_rps": round(len(in_window) / seconds, 4),
        "goodput_rps": round(len(good) / seconds, 4),
        "attainment": round(len(good) / len(window), 6) if window else None,
        "on_time_of_answered": round(len(good) / len(answered), 6) if answered else None,
        "shed": round(sum(s.shed for s in window) / len(window), 6) if window else None,
        "valid": round(sum(s.valid for s in answered) / len(answered), 6) if answered else None,
        "errors": dict(Counter(_label(s) for s in window if not s.valid).most_common()),
        "latency_ms": distribution(latencies),
        "overhead_ms": distribution(_told(answered, _overhead)),
        "server_overhead_ms": distribution(_told(answered, _server_overhead)),
        **{
            name: distribution(_told(answered, functools.partial(_timing, name)))
            for name in ("queue_ms", "batch_ms", "encode_ms")
        },
        "mean_batch": _mean(_told(answered, lambda s: s.batch_size)),
        "by_tenant": _by_tenant(window, slo, seconds),
        "generator": {
            "lag_ms": distribution(lags),
            "cpu_share": round(share, 4),
            "cpu_us_per_request": round(run.cpu_s / len(run.samples) * 1e6, 1) if run.samples else None,
            "peak_in_flight": run.peak_in_flight,
            "unsent": run.unsent,
        },
        "invalid": reasons,
    }


def distribution(values: Sequence[float]) -> dict[str, float] | None:
    """Return mean, p50, p90, p99, max of values; None of none."""
    if not values:
        return None
    array = np.asarray(values, dtype=float)
    p50, p90, p99 = np.percentile(array, [50, 90, 99])
    found = {"mean": array.mean(), "p50": p50, "p90": p90, "p99": p99, "max": array.max()}
    return {name: round(float(value), 3) for name, value in found.items()} | {"count": len(values)}


def interval(values: Sequence[float]) -> dict[str, float | None]:
    """Return the mean of repeats and half the width of its 95 % confidence interval (Student's t; None for one)."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return {"mean": round(mean, 4), "ci95": None}
    freedom = len(values) - 1
    t = T95[freedom - 1] if freedom <= len(T95) else T95_LARGE
    return {
        "mean": round(mean, 4),
        "ci95": round(t * statistics.stdev(values) / math.sqrt(len(values)), 4),
    }


SUMMARISED: Mapping[str, tuple[str, ...]] = {
    "achieved_rps": ("achieved_rps",),
    "goodput_rps": ("goodput_rps",),
    "attainment": ("attainment",),
    "on_time_of_answered": ("on_time_of_answered",),
    "shed": ("shed",),
    "p50_ms": ("latency_ms", "p50"),
    "p90_ms": ("latency_ms", "p90"),
    "p99_ms": ("latency_ms", "p99"),
    "max_ms": ("latency_ms", "max"),
    "overhead_p50_ms": ("overhead_ms", "p50"),
    "overhead_p99_ms": ("overhead_ms", "p99"),
    "mean_batch": ("mean_batch",),
}


def summarise(repeats: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Join the repeats of one rate; a number that some repeat lacks is left out."""
    summary: dict[str, Any] = {"offered_rps": repeats[0]["offered_rps"], "repeats": len(repeats)}
    for name, path in SUMMARISED.items():
        values = [_dig(repeat, path) for repeat in repeats]
        present = [value for value in values if value is not None]
        summary[name] = interval(present) if len(present) == len(values) else None
    errors: Counter[str] = Counter()
    for repeat in repeats:
        errors.update(repeat["errors"])
    summary["errors"] = dict(errors.most_common())
    summary["invalid"] = sorted({reason for repeat in repeats for reason in repeat["invalid"]})
    return summary


def table(points: Sequence[Mapping[str, Any]]) -> str:
    """Write the summaries of several rates as a markdown table."""
    lines = [
        (
            "| offered /s | achieved /s | goodput /s | attainment | shed | p50 ms | p90 ms | p99 ms | max ms "
            "| mean batch | overhead p50 / p99 ms | errors | trust |"
        ),
        "|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|---|---|",
    ]
    for point in points:
        overhead = f"{_show(point['overhead_p50_ms'])} / {_show(point['overhead_p99_ms'])}"
        errors = ", ".join(f"{label} {count}" for label, count in point["errors"].items()) or "none"
        trust = "void: " + "; ".join(point["invalid"]) if point["invalid"] else "ok"
        cells = [
            f"{point['offered_rps']:.1f}",
            _show(point["achieved_rps"]),
            _show(point["goodput_rps"]),
            _show(point["attainment"], percent=True),
            _show(point["shed"], percent=True),
            *(_show(point[name]) for name in ("p50_ms", "p90_ms", "p99_ms", "max_ms")),
            _show(point["mean_batch"]),
            overhead,
            errors,
            trust,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _show(value: Mapping[str, float | None] | None, *, percent: bool = False) -> str:
    if value is None or value["mean"] is None:
        return "–"
    mean, ci = value["mean"], value["ci95"]
    if percent:
        return f"{mean:.1%}"
    return f"{mean:.1f}" + (f" ± {ci:.1f}" if ci is not None else "")


def _is_good(sample: Sample, slo: Slo) -> bool:
    return sample.answered and sample.valid and sample.latency_ms <= slo.limit_ms(sample)


def _label(sample: Sample) -> str:
    return f"{sample.status or 'no answer'} {sample.error or ''}".strip()


def _told(samples: Sequence[Sample], read: Callable[[Sample], float | None]) -> list[float]:
    return [value for sample in samples if (value := read(sample)) is not None]


def _timing(name: str, sample: Sample) -> float | None:
    return (sample.timings or {}).get(name)


def _overhead(sample: Sample) -> float | None:
    """Return what a client waited beyond model and picture encoding: network, HTTP, queue, store."""
    parts = _work_ms(sample)
    return None if parts is None else (sample.done_s - sample.sent_s) * 1000 - parts


def _server_overhead(sample: Sample) -> float | None:
    """Return the same, of the server's own clock."""
    parts, total = _work_ms(sample), (sample.timings or {}).get("total_ms")
    return None if parts is None or total is None else total - parts


def _work_ms(sample: Sample) -> float | None:
    timings = sample.timings or {}
    if "batch_ms" not in timings:
        return None
    return timings["batch_ms"] + timings.get("encode_ms", 0.0)


def _by_tenant(window: Sequence[Sample], slo: Slo, seconds: float) -> dict[str, Any]:
    names = sorted({sample.planned.tenant.name for sample in window})
    if len(names) < 2:
        return {}
    told = {}
    for name in names:
        own = [sample for sample in window if sample.planned.tenant.name == name]
        good = sum(_is_good(sample, slo) for sample in own)
        told[name] = {
            "sent": len(own),
            "goodput_rps": round(good / seconds, 4),
            "attainment": round(good / len(own), 6),
            "shed": round(sum(sample.shed for sample in own) / len(own), 6),
            "latency_ms": distribution([s.latency_ms for s in own if s.answered or s.error == "timeout"]),
        }
    return told


def _percentile(values: Sequence[float], q: float) -> float | None:
    return float(np.percentile(values, q)) if values else None


def _mean(values: Sequence[float]) -> float | None:
    return round(statistics.fmean(values), 3) if values else None


def _dig(tree: Mapping[str, Any], path: Sequence[str]) -> float | None:
    value: Any = tree
    for name in path:
        value = value.get(name) if isinstance(value, Mapping) else None
    return None if value is None else float(value)

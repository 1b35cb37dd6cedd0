"""When requests are sent: offsets in seconds from the start, decided before anything runs."""

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

MAX_REQUESTS = 1_000_000


@dataclass(frozen=True)
class TraceRow:
    """One line of a trace: when, and which fields of the request it sets."""

    offset_s: float
    fields: Mapping[str, Any]


def draw_offsets(rng: np.random.Generator, rate: float, seconds: float, cv: float = 1.0) -> np.ndarray:
    """Draw arrival times in [0, seconds) with gamma-distributed gaps.

    Args:
        rate: mean arrivals per second.
        cv: coefficient of variation of the gaps; 1 is a Poisson process, 2 comes in bursts, 0 is a metronome.

    Raises:
        ValueError: the numbers make no sense, or ask for more than a million requests.
    """
    if not (0 < rate < math.inf and 0 < seconds < math.inf and 0 <= cv <= 10):
        raise ValueError(
            f"expected a rate and a duration above 0 and a CV of 0 to 10, got {rate}, {seconds}, {cv}"
        )
    if rate * seconds > MAX_REQUESTS:
        raise ValueError(
            f"expected at most {MAX_REQUESTS} requests, got {rate:g}/s for {seconds:g} s: "
            "lower the rate or the time"
        )
    if cv == 0:
        return np.arange(math.ceil(rate * seconds)) / rate
    shape = 1 / cv**2
    parts: list[np.ndarray] = []
    start = 0.0
    chunk = int(rate * seconds * 1.2) + 64
    while start < seconds:
        times = start + np.cumsum(rng.gamma(shape, 1 / (rate * shape), chunk))
        parts.append(times)
        start = float(times[-1])
    offsets = np.concatenate(parts)
    return offsets[offsets < seconds]


def read_trace(path: Path) -> list[TraceRow]:
    """Read a trace: JSONL or CSV with `offset_s` and any of prompt, seed, size, n, tenant, deadline_ms.

    Raises:
        ValueError: a line is not readable, or goes back in time.
    """
    rows: list[TraceRow] = []
    for number, fields in enumerate(_lines(path), 1):
        try:
            offset_s = float(fields.pop("offset_s"))
        except (KeyError, TypeError, ValueError):
            raise ValueError(
                f"{path}, row {number}: expected a number in offset_s, got none that can be read"
            ) from None
        unknown = set(fields) - {"prompt", "seed", "size", "n", "tenant", "deadline_ms"}
        if unknown or not 0 <= offset_s < math.inf or (rows and offset_s < rows[-1].offset_s):
            raise ValueError(
                f"{path}, row {number}: expected known fields and times that do not fall, got "
                f"{', '.join(sorted(unknown)) or f'offset_s {offset_s:g}'}"
            )
        rows.append(TraceRow(offset_s, fields))
        if len(rows) > MAX_REQUESTS:
            raise ValueError(f"{path}: expected at most {MAX_REQUESTS} rows: split the trace")
    if not rows:
        raise ValueError(f"{path}: expected at least one row, got an empty trace")
    return rows


def _lines(path: Path) -> Sequence[dict[str, Any]]:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".csv":
        integers = {"seed", "n", "deadline_ms"}
        return [
            {key: _whole(value) if key in integers else value for key, value in row.items() if value}
            for row in csv.DictReader(text.splitlines())
        ]
    try:
        rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: expected one JSON object a line, got {error}") from error
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path}: expected one JSON object a line, got something else")
    return rows


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"expected a whole number in the trace, got {text!r}") from None

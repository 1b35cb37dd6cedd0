"""Goodput and p99 latency over offered load, as an SVG file that needs no library to write and none to show."""

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

WIDTH, PANEL, LEFT, RIGHT, TOP, GAP = 720, 220, 70, 24, 56, 70
COLOURS = ("#0b66c3", "#c2410c", "#15803d", "#7e22ce", "#a16207", "#0f766e", "#be123c", "#475569")

Scale = Callable[[float], float]


def draw_plot(title: str, series: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Draw summaries of several rates, one line per server: what was good, and the p99 of all answers.

    Args:
        title: the heading.
        series: name of a server to its points, as `report.summarise` makes them.
    """
    points = [point for of_one in series.values() for point in of_one]
    x_max = nice_ceiling(max(point["offered_rps"] for point in points))
    x = _scale(0, x_max, LEFT, WIDTH - RIGHT)
    height = TOP + 2 * PANEL + 2 * GAP
    parts = [
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
            f'font-family="sans-serif" font-size="12" role="img" aria-label="{escape(title)}">'
        ),
        f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>',
        f'<text x="{LEFT}" y="24" font-size="15">{escape(title)}</text>',
    ]
    goodput_max = nice_ceiling(max(_mean(point, "goodput_rps") or 0.0 for point in points) or 1.0)
    parts += _panel(TOP, "goodput, requests/s", x, x_max, goodput_max)
    limit = min(x_max, goodput_max)  # where everything offered is good
    y = _scale(0, goodput_max, TOP + PANEL, TOP)
    parts.append(
        f'<line x1="{x(0):.1f}" y1="{y(0):.1f}" x2="{x(limit):.1f}" y2="{y(limit):.1f}" '
        'stroke="#999" stroke-dasharray="4 4"/>'
    )
    lower = TOP + PANEL + GAP
    p99_max = nice_ceiling(max(_mean(point, "p99_ms") or 0.0 for point in points) or 1.0)
    parts += _panel(lower, "p99 latency, ms", x, x_max, p99_max)
    for number, (name, of_one) in enumerate(series.items()):
        colour = COLOURS[number % len(COLOURS)]
        parts += _line(of_one, "goodput_rps", x, y, colour)
        parts += _line(of_one, "p99_ms", x, _scale(0, p99_max, lower + PANEL, lower), colour)
        if len(series) > 1:
            parts.append(
                f'<text x="{LEFT + 8 + 150 * (number % 4)}" y="{40 + 13 * (number // 4)}" fill="{colour}">'
                f"{escape(name)}</text>"
            )
    parts.append(
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{height - 24}" text-anchor="middle">offered, requests/s</text>'
    )
    return "\n".join([*parts, "</svg>\n"])


def nice_ceiling(value: float) -> float:
    """Return the next number above that is 1, 2, 2.5 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 2.5, 5, 10) if step * power >= value * (1 - 1e-9))


def _scale(low: float, high: float, start: float, end: float) -> Scale:
    return lambda value: start + (value - low) / (high - low) * (end - start)


def _panel(top: float, label: str, x: Scale, x_max: float, y_max: float) -> list[str]:
    """Draw axes with five steps each, and the label of the values."""
    y = _scale(0, y_max, top + PANEL, top)
    parts = [f'<text x="{LEFT}" y="{top - 6}" fill="#333">{label}</text>']
    for step in range(6):
        x_value, y_value = x_max * step / 5, y_max * step / 5
        parts += [
            f'<line x1="{LEFT}" y1="{y(y_value):.1f}" x2="{WIDTH - RIGHT}" y2="{y(y_value):.1f}" stroke="#e5e5e5"/>',
            f'<text x="{LEFT - 8}" y="{y(y_value) + 4:.1f}" text-anchor="end" fill="#333">{y_value:g}</text>',
            f'<text x="{x(x_value):.1f}" y="{top + PANEL + 18}" text-anchor="middle" fill="#333">{x_value:g}</text>',
        ]
    return parts


def _line(points: Sequence[Mapping[str, Any]], name: str, x: Scale, y: Scale, colour: str) -> list[str]:
    """Draw means as a line with dots, and confidence intervals as bars; a point without a value is left out."""
    told = sorted(
        (point["offered_rps"], mean, point[name]["ci95"] or 0.0)
        for point in points
        if (mean := _mean(point, name)) is not None
    )
    path = " ".join(f"{x(offered):.1f},{y(mean):.1f}" for offered, mean, _ in told)
    parts = [f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>']
    for offered, mean, ci in told:
        parts += [
            (
                f'<line x1="{x(offered):.1f}" y1="{y(max(0.0, mean - ci)):.1f}" x2="{x(offered):.1f}" '
                f'y2="{y(mean + ci):.1f}" stroke="{colour}"/>'
            ),
            f'<circle cx="{x(offered):.1f}" cy="{y(mean):.1f}" r="3" fill="{colour}"/>',
        ]
    return parts


def _mean(point: Mapping[str, Any], name: str) -> float | None:
    value = point[name]
    return None if value is None else float(value["mean"])

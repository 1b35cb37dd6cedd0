"""Line charts as SVG text: no library, no script, no asset."""

import math
from collections.abc import Mapping, Sequence
from html import escape

Points = Sequence[tuple[float, float]]
WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 340, 150, 46, 20, 22
COLOURS = ("#2563a8", "#c2571a", "#3a8a3a", "#8a3a8a", "#7a6a2a")


def line_chart(
    title: str,
    series: Mapping[str, Points],
    *,
    band: tuple[float | None, float | None] = (None, None),
    marks: Sequence[tuple[float, str]] = (),
) -> str:
    """Draw series of (step, value) in one chart.

    Args:
        band: lowest and highest expected value; what lies between is shaded.
        marks: (step, text) of vertical lines.
    Returns:
        an <svg> element; values that are no numbers are left out.
    """
    kept = {name: [(x, y) for x, y in points if math.isfinite(y)] for name, points in series.items()}
    points = [point for line in kept.values() for point in line]
    if not points:
        return ""
    xs, ys = [x for x, _ in points], [y for _, y in points]
    low, high = _limits(ys, band)
    left, right = min(xs), max(max(xs), min(xs) + 1)

    def at(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (x - left) / (right - left) * (WIDTH - LEFT - 8)
        clipped = min(max(y, low), high)
        return across, TOP + (high - clipped) / (high - low) * (HEIGHT - TOP - BOTTOM)

    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">',
        f'<text x="{LEFT}" y="14" class="title">{escape(title)}</text>',
    ]
    if band != (None, None):
        bottom = at(left, low if band[0] is None else band[0])[1]
        top = at(left, high if band[1] is None else band[1])[1]
        parts.append(
            f'<rect x="{LEFT}" y="{top:.1f}" width="{WIDTH - LEFT - 8}" '
            f'height="{max(bottom - top, 0):.1f}" class="band"/>'
        )
    for value in (low, (low + high) / 2, high):
        y = at(left, value)[1]
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - 8}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>')
        parts.append(f'<text x="{LEFT - 4}" y="{y + 3:.1f}" class="tick end">{_short(value)}</text>')
    parts.append(f'<text x="{LEFT}" y="{HEIGHT - 5}" class="tick">{_short(left)}</text>')
    parts.append(f'<text x="{WIDTH - 8}" y="{HEIGHT - 5}" class="tick end">{_short(right)} steps</text>')
    for x, text in marks:
        across = at(x, low)[0]
        parts.append(
            f'<line x1="{across:.1f}" x2="{across:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}" class="mark">'
            f"<title>{escape(text)}</title></line>"
        )
    for index, (name, line) in enumerate(kept.items()):
        colour = COLOURS[index % len(COLOURS)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*point) for point in line))
        parts.append(f'<polyline points="{path}" stroke="{colour}"><title>{escape(name)}</title></polyline>')
        if len(kept) > 1:
            parts.append(
                f'<text x="{WIDTH - 10}" y="{TOP + 11 + 11 * index}" class="tick end" '
                f'style="fill:{colour}">{escape(name)}</text>'
            )
    return "".join([*parts, "</svg>"])


def _limits(ys: Sequence[float], band: tuple[float | None, float | None]) -> tuple[float, float]:
    """Span the values, and the band's edges where they are near."""
    low, high = min(ys), max(ys)
    room = max(high - low, 1e-9 * max(abs(high), 1e-9))
    for edge in band:
        if edge is not None and low - 2 * room <= edge <= high + 2 * room:
            low, high = min(low, edge), max(high, edge)
    if high - low < 1e-12:
        return low - 0.5 * max(abs(low), 1), high + 0.5 * max(abs(high), 1)
    return low, high


def _short(value: float) -> str:
    return f"{value:.0f}" if value == round(value) and abs(value) < 1e6 else f"{value:.3g}"

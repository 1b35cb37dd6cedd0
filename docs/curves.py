"""Draw the curves of a run: a panel per figure of its metrics.jsonl and of its guard, a stage per colour.

python docs/curves.py runs/emoji -o curves.svg                   # your own run
python docs/curves.py docs/evaluation/reference-run -o docs/images/reference-run.svg
"""

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

STAGES = ("regression", "adp", "adm", "dmd", "ladd", "lcm", "variety")
COLOURS = ("#0b66c3", "#c2410c", "#15803d", "#7e22ce", "#a16207", "#be123c", "#0f766e")
COLUMNS, WIDTH, HEIGHT, LEFT, TOP, GAP = 3, 240, 120, 44, 40, 48
PROBES = ("colour_drift", "contrast", "diversity")  # what the guard draws besides
LEFT_OUT = ("stage", "step", "seconds")

Points = list[tuple[float, float]]


def read_curves(run: Path) -> dict[str, dict[str, Points]]:
    """Return stage -> figure -> (step, value), of every stage of a run that has written metrics.

    Raises:
        FileNotFoundError: there is none.
    """
    curves: dict[str, dict[str, Points]] = {}
    for stage in STAGES:
        path = run / stage / "metrics.jsonl"
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                row = json.loads(line)
                for figure, value in row.items():
                    if figure not in LEFT_OUT and isinstance(value, float) and math.isfinite(value):
                        curves.setdefault(stage, {}).setdefault(figure, []).append((row["step"], value))
        looks = run / stage / "guard.json"
        if looks.exists():
            for look in json.loads(looks.read_text(encoding="utf-8"))["looks"]:
                for figure in PROBES:
                    if figure in look["figures"]:
                        curves.setdefault(stage, {}).setdefault(figure, []).append(
                            (look["step"], look["figures"][figure])
                        )
    if not curves:
        raise FileNotFoundError(
            f"expected <stage>/metrics.jsonl below {run}, found none: give a run's folder"
        )
    return curves


def draw(curves: Mapping[str, Mapping[str, Points]]) -> str:
    """Return an SVG of all figures, each on its own scale."""
    panels = [(stage, figure) for stage, figures in curves.items() for figure in figures]
    rows = math.ceil(len(panels) / COLUMNS)
    width, height = COLUMNS * (WIDTH + LEFT) + 16, rows * (HEIGHT + GAP) + TOP
    parts = [
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
            f'font-size="11" role="img" aria-label="Curves of a run: {escape(", ".join(curves))}">'
        ),
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
    ]
    for place, (stage, figure) in enumerate(panels):
        left = LEFT + (place % COLUMNS) * (WIDTH + LEFT)
        top = TOP + (place // COLUMNS) * (HEIGHT + GAP)
        colour = COLOURS[STAGES.index(stage) % len(COLOURS)]
        parts += _panel(f"{stage}: {figure}", curves[stage][figure], left, top, colour)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(
    title: str, points: Sequence[tuple[float, float]], left: float, top: float, colour: str
) -> list[str]:
    low, high = min(value for _, value in points), max(value for _, value in points)
    if high == low:
        low, high = low - 1, high + 1
    last = max(step for step, _ in points)
    path = " ".join(
        f"{left + step / last * WIDTH:.1f},{top + (high - value) / (high - low) * HEIGHT:.1f}"
        for step, value in points
    )
    label = f'<text text-anchor="end" fill="#333" x="{left - 4}"'
    return [
        f'<text x="{left}" y="{top - 8}" fill="#111">{escape(title)}</text>',
        f'<rect x="{left}" y="{top}" width="{WIDTH}" height="{HEIGHT}" fill="none" stroke="#ddd"/>',
        f'{label} y="{top + 8}">{high:.3g}</text>',
        f'{label} y="{top + HEIGHT}">{low:.3g}</text>',
        f'<text x="{left + WIDTH}" y="{top + HEIGHT + 14}" text-anchor="end" fill="#333">step {last:g}</text>',
        f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>',
    ]


def main() -> None:
    """Draw a run that is named on the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder of a run")
    parser.add_argument("-o", "--out", type=Path, required=True, help="SVG file to write")
    args = parser.parse_args()
    args.out.write_text(draw(read_curves(args.run)), encoding="utf-8")


if __name__ == "__main__":
    main()

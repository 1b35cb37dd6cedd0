"""Labelled grids of pictures: models or seeds as rows, prompts as columns."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from flashbulb_distill.evaluate.errors import EvaluationError
from flashbulb_distill.evaluate.features import Images

GAP_PX = 4
MARGIN_PX = 12
BAND_GAP_PX = 16
FONT_PX = 13
LINE_PX = 16
INK, PAPER, FRAME = "#222222", "#ffffff", "#dddddd"

_Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def save_grid(
    rows: Sequence[tuple[str, Sequence[Images]]],
    columns: Sequence[str],
    path: Path,
    *,
    scale: int = 2,
    max_columns: int = 10,
) -> Path:
    """Write a PNG of `rows` (label, one picture uint8 [h, w, 3] per column) under the `columns`' labels.

    Each pixel becomes `scale` x `scale` ones. After `max_columns` columns a new band of rows begins.
    Raises EvaluationError when there is nothing to draw or the pictures are not of one size and number.
    """
    height, width = _cell_size(rows, columns, scale)
    font = ImageFont.load_default(FONT_PX)
    row_labels = [_wrap(label, 120, font) for label, _ in rows]
    label_width = max(_text_width(line, font) for lines in row_labels for line in lines) + 2 * GAP_PX
    titles = [_wrap(title, width, font) for title in columns]
    bands = [range(i, min(i + max_columns, len(columns))) for i in range(0, len(columns), max_columns)]
    title_heights = [max(len(titles[i]) for i in band) * LINE_PX + GAP_PX for band in bands]
    rows_height = len(rows) * (height + GAP_PX)

    canvas = Image.new(
        "RGB",
        (
            2 * MARGIN_PX + label_width + len(bands[0]) * (width + GAP_PX) - GAP_PX,
            2 * MARGIN_PX
            + sum(title_heights)
            + len(bands) * (rows_height - GAP_PX)
            + (len(bands) - 1) * BAND_GAP_PX,
        ),
        PAPER,
    )
    draw = ImageDraw.Draw(canvas)
    top = MARGIN_PX
    for band, title_height in zip(bands, title_heights, strict=True):
        left = MARGIN_PX + label_width
        for place, column in enumerate(band):
            x = left + place * (width + GAP_PX)
            _write(draw, titles[column], x, top + title_height - GAP_PX, font, width)
            for r, (_, pictures) in enumerate(rows):
                y = top + title_height + r * (height + GAP_PX)
                picture = Image.fromarray(np.asarray(pictures[column]))
                canvas.paste(picture.resize((width, height), Image.Resampling.NEAREST), (x, y))
                draw.rectangle((x, y, x + width - 1, y + height - 1), outline=FRAME)
        for r, lines in enumerate(row_labels):
            middle = top + title_height + r * (height + GAP_PX) + height // 2
            _write(draw, lines, MARGIN_PX, middle + len(lines) * LINE_PX // 2, font)
        top += title_height + rows_height - GAP_PX + BAND_GAP_PX
    canvas.save(path, format="PNG", optimize=True)
    return Path(path)


def _cell_size(
    rows: Sequence[tuple[str, Sequence[Images]]], columns: Sequence[str], scale: int
) -> tuple[int, int]:
    if not rows or not columns:
        raise EvaluationError(f"expected rows and columns, got {len(rows)} and {len(columns)}")
    for label, pictures in rows:
        if len(pictures) != len(columns):
            raise EvaluationError(f"row {label!r}: expected {len(columns)} pictures, got {len(pictures)}")
    shapes = {np.asarray(picture).shape for _, pictures in rows for picture in pictures}
    types = {np.asarray(picture).dtype for _, pictures in rows for picture in pictures}
    shape = shapes.pop()
    if shapes or len(shape) != 3 or shape[2] != 3 or types != {np.dtype(np.uint8)}:
        raise EvaluationError("expected pictures of one size, uint8 [h, w, 3]")
    return shape[0] * scale, shape[1] * scale


def _text_width(text: str, font: _Font) -> int:
    return int(np.ceil(font.getlength(text)))


def _wrap(text: str, width: int, font: _Font) -> list[str]:
    """Break at spaces; a single word that is too long is cut with an ellipsis."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and _text_width(longer, font) <= width:
            lines[-1] = longer
        else:
            lines.append(_cut(word, width, font))
    return lines or [""]


def _cut(word: str, width: int, font: _Font) -> str:
    if _text_width(word, font) <= width:
        return word
    while word and _text_width(word + "…", font) > width:
        word = word[:-1]
    return word + "…"


def _write(
    draw: ImageDraw.ImageDraw,
    lines: Sequence[str],
    x: int,
    bottom: int,
    font: _Font,
    width: int | None = None,
) -> None:
    """Write lines that end at `bottom`; centred in `width` if given, else flush left."""
    for i, line in enumerate(lines):
        indent = (width - _text_width(line, font)) // 2 if width else 0
        draw.text((x + indent, bottom - (len(lines) - i) * LINE_PX), line, fill=INK, font=font)

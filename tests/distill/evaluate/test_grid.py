from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from flashbulb_distill.evaluate.errors import EvaluationError
from flashbulb_distill.evaluate.grid import save_grid

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def flat(colour: tuple[int, int, int], size: int = 8) -> NDArray[np.uint8]:
    return np.full((size, size, 3), colour, dtype=np.uint8)


def read(path: Path) -> NDArray[np.uint8]:
    return np.asarray(Image.open(path).convert("RGB"))


def area_of(pixels: NDArray[np.uint8], colour: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """Top, left, height and width of the box around one colour."""
    rows, columns = np.nonzero((pixels == colour).all(axis=-1))
    return int(rows.min()), int(columns.min()), int(np.ptp(rows)) + 1, int(np.ptp(columns)) + 1


def test_columns_go_right_and_rows_go_down_each_enlarged_by_the_scale(tmp_path: Path) -> None:
    rows = [("teacher", [flat(RED), flat(GREEN)]), ("student", [flat(BLUE), flat(GREEN)])]
    pixels = read(save_grid(rows, ["red apple", "tree"], tmp_path / "grid.png", scale=4))
    top, left, height, width = area_of(pixels, RED)
    assert (height, width) == (30, 30)  # 8 x 4, less the frame of one pixel on each side
    below = area_of(pixels, BLUE)
    assert below[1] == left
    assert below[0] > top + height
    assert area_of(pixels, GREEN)[1] > left + width


def test_pixels_are_enlarged_without_blur(tmp_path: Path) -> None:
    board = np.zeros((4, 4, 3), np.uint8)
    board[::2, ::2] = RED
    pixels = read(save_grid([("", [board])], [""], tmp_path / "grid.png", scale=8))
    reddish = (pixels[..., 0] > 0) & (pixels[..., 1] == 0)
    assert (pixels[reddish] == RED).all()


def test_columns_beyond_the_limit_start_a_band_below(tmp_path: Path) -> None:
    pictures = [flat(RED), flat(GREEN), flat(BLUE)]
    pixels = read(save_grid([("a", pictures)], ["one", "two", "three"], tmp_path / "g.png", max_columns=2))
    red, green, blue = (area_of(pixels, colour) for colour in (RED, GREEN, BLUE))
    assert red[0] == green[0] < blue[0]
    assert red[1] == blue[1] < green[1]


def test_long_labels_stay_inside_the_canvas_and_off_the_pictures(tmp_path: Path) -> None:
    labels = ["smiling face with sunglasses", "Donaudampfschifffahrtsgesellschaft"]
    rows = [("teacher, 50 steps, guidance 3.5", [flat(RED, 32), flat(RED, 32)])]
    pixels = read(save_grid(rows, labels, tmp_path / "grid.png"))
    dark = np.asarray((pixels < 100).all(axis=-1))
    assert dark.any()
    assert not dark[:4].any() and not dark[-4:].any()
    assert not dark[:, :4].any() and not dark[:, -4:].any()
    top, left, height, width = area_of(pixels, RED)
    assert not dark[top : top + height, left : left + width].any()


@pytest.mark.parametrize(
    ("rows", "columns", "message"),
    [
        ([], ["a"], "expected rows and columns"),
        ([("x", [])], [], "expected rows and columns"),
        ([("x", [flat(RED)])], ["a", "b"], "row 'x': expected 2 pictures, got 1"),
        ([("x", [flat(RED), flat(RED, 9)])], ["a", "b"], "of one size"),
        ([("x", [flat(RED).astype(np.float32)])], ["a"], "uint8"),
    ],
    ids=["no rows", "no columns", "too few", "two sizes", "floats"],
)
def test_rows_that_do_not_fill_the_grid_are_refused(
    tmp_path: Path,
    rows: list[tuple[str, list[NDArray[np.uint8]]]],
    columns: list[str],
    message: str,
) -> None:
    with pytest.raises(EvaluationError, match=message):
        save_grid(rows, columns, tmp_path / "grid.png")
    assert not (tmp_path / "grid.png").exists()

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from flashbulb_distill.evaluate.errors import ReferenceDataError
from flashbulb_distill.evaluate.reference import Label, Reference, load_reference

LABELS = [
    {"concept": "apple", "style": "flat", "split": "train"},
    {"concept": "apple", "style": "round", "split": "held-out"},
]


def write(folder: Path, *, labels: object = LABELS, tensors: dict[str, np.ndarray] | None = None) -> Path:
    images = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
    save_file(tensors or {"images": images}, folder / "reference.safetensors")
    (folder / "reference.json").write_text(json.dumps(labels))
    return folder


def test_pictures_and_labels_come_back_as_written(tmp_path: Path) -> None:
    reference = load_reference(write(tmp_path))
    assert reference.images.shape == (2, 4, 4, 3)
    assert reference.images[1, 3, 3, 2] == 95
    assert reference.concepts.tolist() == ["apple", "apple"]
    assert reference.styles.tolist() == ["flat", "round"]
    assert reference.trained.tolist() == [True, False]


def test_the_hash_changes_with_a_pixel_and_with_a_label(tmp_path: Path) -> None:
    one = load_reference(write(tmp_path))
    pixel = Reference(one.images ^ np.uint8(1), one.labels)
    label = Reference(one.images, (one.labels[0], Label(concept="apple", style="round", split="train")))
    assert len({one.sha256, pixel.sha256, label.sha256}) == 3
    assert load_reference(tmp_path).sha256 == one.sha256


@pytest.mark.parametrize("missing", ["reference.json", "reference.safetensors"])
def test_a_missing_file_is_named(tmp_path: Path, missing: str) -> None:
    (write(tmp_path) / missing).unlink()
    with pytest.raises(ReferenceDataError, match=r"reference\.safetensors and reference\.json"):
        load_reference(tmp_path)


def test_a_damaged_tensor_file_is_refused(tmp_path: Path) -> None:
    (write(tmp_path) / "reference.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(ReferenceDataError, match="expected a tensor 'images'"):
        load_reference(tmp_path)


def test_another_tensor_name_is_refused(tmp_path: Path) -> None:
    write(tmp_path, tensors={"pictures": np.zeros((2, 4, 4, 3), np.uint8)})
    with pytest.raises(ReferenceDataError, match="expected a tensor 'images'"):
        load_reference(tmp_path)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([LABELS[0], {**LABELS[1], "split": "test"}], r"1\.split: Input should be 'train' or 'held-out'"),
        ([LABELS[0], {**LABELS[1], "colour": "red"}], r"1\.colour"),
        (LABELS[:1], "a label per picture, got 2 and 1"),
        ([LABELS[0], LABELS[0]], "one picture of each concept and style"),
        ({}, "the whole file: Input should be a valid array"),
    ],
    ids=["unknown split", "unknown field", "too few", "same pair twice", "not a list"],
)
def test_labels_that_do_not_fit_are_refused(tmp_path: Path, labels: object, message: str) -> None:
    with pytest.raises(ReferenceDataError, match=message):
        load_reference(write(tmp_path, labels=labels))


@pytest.mark.parametrize(
    "images", [np.zeros((2, 4, 4, 3), np.float32), np.zeros((2, 3, 4, 4), np.uint8)], ids=["floats", "planar"]
)
def test_pictures_of_another_layout_are_refused(tmp_path: Path, images: np.ndarray) -> None:
    with pytest.raises(ReferenceDataError, match="expected pictures uint8"):
        load_reference(write(tmp_path, tensors={"images": images}))

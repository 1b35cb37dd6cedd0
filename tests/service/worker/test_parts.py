"""The small parts around the worker: result store, encodings, scheduling decisions, tasks."""

import io
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from flashbulb_service.images import encode_image
from flashbulb_service.results import ResultStore, is_result_id, media_type, result_id
from flashbulb_service.scheduler import batch_cap, bucket_name, in_chunks
from flashbulb_service.tasks import ImageTask

NOISE = np.random.Generator(np.random.Philox(1)).integers(0, 256, (48, 64, 3), dtype=np.uint8)


async def test_a_stored_picture_is_read_back(results: ResultStore) -> None:
    await results.put("a1.png", b"first")
    await results.put("a1.png", b"second")
    assert await results.get("a1.png") == b"second"
    assert await results.get("a2.png") is None


@pytest.mark.parametrize(
    "name", ["../a.png", "a/b.png", "/a.png", ".png", "a.exe", "a.png/..", "a.png\n", "", "..", "a\0.png"]
)
async def test_names_that_lead_elsewhere_are_no_results(results: ResultStore, name: str) -> None:
    assert not is_result_id(name)
    assert await results.get(name) is None
    with pytest.raises(ValueError, match="expected a result id"):
        await results.put(name, b"")


RESULT_IDS = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}\.(png|jpeg|webp)", fullmatch=True)


@given(RESULT_IDS)
def test_a_result_id_is_one_plain_file_name(name: str) -> None:
    assert is_result_id(name)
    assert name.isascii() and Path(name).name == name and name not in (".", "..")


@given(
    RESULT_IDS, st.integers(min_value=0), st.sampled_from(["/", "\\", "\0", "\n", "%", "..", "é", " ", ":"])
)
def test_a_result_id_with_anything_else_in_it_is_none(name: str, place: int, inserted: str) -> None:
    place %= len(name) + 1
    assert not is_result_id(name[:place] + inserted + name[place:])


def test_result_id_refuses_odd_job_ids() -> None:
    assert media_type(result_id("0af3", "webp")) == "image/webp"
    with pytest.raises(ValueError, match="job id"):
        result_id("../x", "png")


def test_only_expired_pictures_are_cleaned(tmp_path: Path) -> None:
    store = ResultStore(tmp_path.as_uri(), ttl_s=100)
    for name, age in (("old.png", 101), ("new.png", 99)):
        (tmp_path / name).write_bytes(b"x")
        os.utime(tmp_path / name, (10_000 - age, 10_000 - age))
    (tmp_path / "stranger.txt").write_text("not ours")
    os.utime(tmp_path / "stranger.txt", (1, 1))
    assert store.clean(now=10_000) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new.png", "stranger.txt"]


async def test_any_obstore_location_works() -> None:
    store = ResultStore("memory:///", ttl_s=1)
    await store.put("a.png", b"x")
    assert await store.get("a.png") == b"x"
    assert store.clean() == 0


def test_png_is_lossless_and_equal_pixels_give_equal_bytes() -> None:
    data = encode_image(NOISE, "png")
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(data))), NOISE)
    assert encode_image(NOISE.copy(), "png") == data


@pytest.mark.parametrize(("name", "kind"), [("jpeg", "JPEG"), ("webp", "WEBP")])
def test_lossy_formats_are_close_at_full_quality(name: str, kind: str) -> None:
    ramp = np.broadcast_to(np.arange(64, dtype=np.uint8)[None, :, None] * 4, (48, 64, 3)).copy()
    picture = Image.open(io.BytesIO(encode_image(ramp, name, 100)))  # type: ignore[arg-type]
    assert picture.format == kind
    assert np.abs(np.asarray(picture).astype(int) - ramp).mean() < 3


def test_encode_refuses_what_is_no_picture() -> None:
    with pytest.raises(ValueError, match="uint8"):
        encode_image(NOISE.astype(np.float32), "png")


def test_batch_cap_is_the_knee_of_the_calibration() -> None:
    assert batch_cap(8, 64) == 8
    assert batch_cap(8, 4) == 4
    flat = {1: 10.0, 2: 20.0, 4: 40.0, 8: 80.0}  # a CPU: batching gains nothing
    assert batch_cap(8, 64, flat) == 1
    device = {1: 10.0, 2: 11.0, 4: 13.0, 8: 25.5}  # 10, 5.5, 3.25, 3.19 ms a row
    assert batch_cap(8, 64, device) == 4
    assert batch_cap(2, 64, device) == 2
    assert batch_cap(8, 64, {16: 1.0}) == 8  # calibrated only where it may not go


@given(st.lists(st.integers(), max_size=50), st.integers(min_value=1, max_value=10))
def test_chunks_keep_every_row_once_and_in_order(rows: list[int], cap: int) -> None:
    chunks = list(in_chunks(rows, cap))
    assert [row for chunk in chunks for row in chunk] == rows
    assert all(1 <= len(chunk) <= cap for chunk in chunks)
    assert all(len(chunk) == cap for chunk in chunks[:-1])


def test_bucket_separates_what_cannot_share_a_batch() -> None:
    names = {bucket_name(*key) for key in [("a@1", 64, 64, 1), ("a@2", 64, 64, 1), ("a@1", 64, 32, 1)]}
    assert len(names | {bucket_name("a@1", 64, 64, 2)}) == 4


def test_a_task_survives_the_queue_and_refuses_strangers() -> None:
    task = ImageTask(prompt="naïve 🍎", seed=2**63 - 1, index=3, width=64, height=32, image_format="webp")
    assert ImageTask.from_bytes(task.to_bytes()) == task
    for payload in (b"", b"{}", task.to_bytes().replace(b"seed", b"sede")):
        with pytest.raises(ValueError, match="ImageTask"):
            ImageTask.from_bytes(payload)

"""Clips as files, read again by FFmpeg and Pillow."""

import io

import av
import numpy as np
import pytest
from PIL import Image

from flashbulb_service import video
from flashbulb_service.video import (
    choose_encoder,
    encode_animation,
    encode_spritesheet,
    encode_thumbnail,
    encode_video,
)


@pytest.fixture
def clip():
    """A red disc that moves to the right on white, its edge soft."""
    ys, xs = np.mgrid[:32, :48]
    frames = []
    for index in range(16):
        cover = np.clip(8.5 - np.hypot(ys - 16, xs - 10 - 2 * index / 1.5), 0, 1)[..., None]
        frames.append(np.rint(255 * (1 - cover) + cover * (230, 30, 40)))
    return np.array(frames, dtype=np.uint8)


def read(data):
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.video[0]
        about = stream.codec_context.name, stream.average_rate, float(stream.duration * stream.time_base)
        frames = [
            frame.reformat(format="rgb24", src_colorspace="ITU709").to_ndarray()
            for frame in container.decode(stream)
        ]
    return about, np.array(frames)


@pytest.mark.parametrize("fps", [8, 29.97])
@pytest.mark.parametrize("encoder", ["libx264", "libvpx-vp9"])
def test_a_video_has_every_frame_at_its_time_and_looks_the_same(clip, fps, encoder, monkeypatch):
    monkeypatch.setattr(video, "choose_encoder", lambda available: encoder)
    data = encode_video(clip, fps)
    assert data == encode_video(clip, fps)
    (codec, rate, duration_s), frames = read(data)
    assert codec in ("h264", "vp9", "libvpx-vp9")
    assert float(rate) == pytest.approx(fps, rel=1e-3)
    assert duration_s == pytest.approx(16 / fps, rel=1e-3)
    assert frames.shape == clip.shape
    for arrived, drawn in zip(frames, clip, strict=True):
        error = np.square(arrived.astype(float) - drawn).mean()
        assert 10 * np.log10(255**2 / error) > 28  # colours at half resolution soften a red edge
    ink = 255.0 - frames.mean(-1)
    centres = (ink * np.arange(48)).sum((1, 2)) / ink.sum((1, 2))
    assert np.all(np.abs(centres - (10 + np.arange(16) / 0.75)) < 0.3), "every frame is at its place"


def test_the_colour_of_an_area_is_kept(clip):
    flat = np.full_like(clip, (200, 60, 20))
    _, frames = read(encode_video(flat, 8))
    assert np.abs(frames.astype(int) - flat).max() <= 3


def test_equal_frames_give_equal_bytes_and_no_time_or_version_is_in_them(clip):
    first = encode_video(clip, 8)
    assert first == encode_video(clip.copy(), 8)
    assert b"Lavf" not in first


def test_the_thumbnail_is_the_middle_frame(clip):
    picture = Image.open(io.BytesIO(encode_thumbnail(clip)))
    assert (picture.format, picture.size) == ("WEBP", (48, 32))
    assert np.abs(np.asarray(picture).astype(int) - clip[8]).mean() < 3


def test_the_spritesheet_shows_all_frames_in_reading_order_and_white_after_them(clip):
    sheet = np.asarray(Image.open(io.BytesIO(encode_spritesheet(clip[:11]))))
    assert sheet.shape == (3 * 32, 4 * 48, 3)
    for index in range(12):
        row, column = divmod(index, 4)
        place = sheet[row * 32 : row * 32 + 32, column * 48 : column * 48 + 48].astype(int)
        wanted = clip[index] if index < 11 else np.full_like(clip[0], 255)
        assert np.abs(place - wanted).mean() < 3


def test_the_animation_is_without_loss_and_loops(clip):
    picture = Image.open(io.BytesIO(encode_animation(clip, 8)))
    assert (picture.n_frames, picture.info["loop"]) == (16, 0)
    for index in range(16):
        picture.seek(index)
        assert np.array_equal(np.asarray(picture.convert("RGB")), clip[index])


def test_h264_is_written_where_the_encoder_is_there_and_vp9_elsewhere():
    assert choose_encoder(av.codecs_available) == "libx264"
    assert choose_encoder({"h264", "libvpx-vp9"}) == "libvpx-vp9"
    with pytest.raises(ImportError, match="libx264 or libvpx-vp9"):
        choose_encoder({"mpeg4"})


@pytest.mark.parametrize(
    ("frames", "fps", "message"),
    [
        (np.zeros((2, 32, 32), np.uint8), 8, "uint8"),
        (np.zeros((2, 32, 32, 3), np.float32), 8, "uint8"),
        (np.zeros((0, 32, 32, 3), np.uint8), 8, "uint8"),
        (np.zeros((2, 31, 32, 3), np.uint8), 8, "even"),
        (np.zeros((2, 32, 32, 3), np.uint8), 0, "fps"),
        (np.zeros((2, 32, 32, 3), np.uint8), float("nan"), "fps"),
    ],
)
def test_what_is_no_clip_is_refused(frames, fps, message):
    with pytest.raises(ValueError, match=message):
        encode_video(frames, fps)


def test_a_sheet_that_no_webp_can_hold_is_refused():
    with pytest.raises(ValueError, match="16383"):
        encode_spritesheet(np.zeros((5, 8, 8192, 3), np.uint8))

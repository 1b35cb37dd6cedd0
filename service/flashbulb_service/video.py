"""Frames to files: MP4 with PyAV, a thumbnail and a sheet of all frames. Equal frames give equal bytes.

PyAV's wheels carry FFmpeg with libx264, which is under the GPL: the optional extra "video" brings it, and nothing else
of the product needs it. An FFmpeg without it writes VP9 into the MP4, an open codec that every browser plays.
"""

import io
import math
from collections.abc import Collection
from fractions import Fraction
from typing import Any

import numpy as np
from PIL import Image

from flashbulb_service.images import encode_image

MAX_SHEET_SIDE_PX = 16_383  # of a WebP picture
# Constant quality for small flat pictures, where the usual 23 of H.264 shows; one thread, so that bytes repeat.
ENCODERS = {
    "libx264": {
        "crf": "12",
        "preset": "medium",
        "x264-params": "threads=1:lookahead-threads=1:cpu-independent=1",
    },
    "libvpx-vp9": {"crf": "16", "b": "0", "deadline": "good", "cpu-used": "2", "row-mt": "0"},
}
_BT709, _LIMITED_RANGE = 1, 1  # as FFmpeg numbers them


def encode_video(frames: np.ndarray, fps: float) -> bytes:
    """Encode a clip as MP4: H.264 (else VP9) in 4:2:0, BT.709; the bytes depend on the frames and FFmpeg alone.

    Args:
        frames: uint8 [f, h, w, 3], RGB; height and width even, as 4:2:0 needs them.
        fps: frames a second.

    Raises:
        ValueError: the array is no such clip, or fps is not positive.
        ImportError: PyAV is not installed, or knows no encoder of ours.
    """
    _check(frames)
    if not (math.isfinite(fps) and fps > 0):
        raise ValueError(f"fps: expected a positive number, got {fps}")
    if frames.shape[1] % 2 or frames.shape[2] % 2:
        raise ValueError(f"expected frames of even height and width, got {frames.shape[1]}x{frames.shape[2]}")
    av = _av()
    encoder = choose_encoder(av.codecs_available)
    out = io.BytesIO()
    with av.open(out, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream(encoder, rate=Fraction(fps).limit_denominator(1001))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.options = ENCODERS[encoder]
        context = stream.codec_context
        context.flags |= av.codec.context.Flags.bitexact
        context.thread_count = 1
        context.colorspace = context.color_primaries = context.color_trc = _BT709
        context.color_range = _LIMITED_RANGE
        for pixels in frames:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            yuv = frame.reformat(format="yuv420p", dst_colorspace="ITU709")
            container.mux(stream.encode(yuv))
        container.mux(stream.encode(None))
    return out.getvalue()


def choose_encoder(available: Collection[str]) -> str:
    """Return the first of our encoders that an FFmpeg has.

    Raises:
        ImportError: it has none of them.
    """
    for name in ENCODERS:
        if name in available:
            return name
    raise ImportError(
        f"expected an FFmpeg with {' or '.join(ENCODERS)}, found neither: pip install 'flashbulb[video]'"
    )


def encode_thumbnail(frames: np.ndarray) -> bytes:
    """Encode the middle frame of a clip as lossy WebP of the best quality."""
    _check(frames)
    return encode_image(frames[len(frames) // 2], "webp")


def encode_spritesheet(frames: np.ndarray) -> bytes:
    """Encode all frames of a clip, row by row in a grid that is about square, as WebP; free places are white.

    Raises:
        ValueError: the sheet would be larger than a WebP picture may be.
    """
    _check(frames)
    count, height, width = frames.shape[:3]
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    if max(columns * width, rows * height) > MAX_SHEET_SIDE_PX:
        raise ValueError(
            f"expected a sheet of at most {MAX_SHEET_SIDE_PX} pixels a side, "
            f"got {columns * width}x{rows * height}: make a shorter clip"
        )
    places = np.full((rows * columns, height, width, 3), 255, np.uint8)
    places[:count] = frames
    sheet = places.reshape(rows, columns, height, width, 3).swapaxes(1, 2)
    return encode_image(sheet.reshape(rows * height, columns * width, 3), "webp")


def encode_animation(frames: np.ndarray, fps: float) -> bytes:
    """Encode a clip as an animated WebP without loss that loops, for previews."""
    _check(frames)
    pictures = [Image.fromarray(frame) for frame in frames]
    out = io.BytesIO()
    duration_ms = max(1, round(1000 / fps))
    pictures[0].save(
        out, "WEBP", save_all=True, append_images=pictures[1:], duration=duration_ms, loop=0, lossless=True
    )
    return out.getvalue()


def _check(frames: np.ndarray) -> None:
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or len(frames) == 0:
        raise ValueError(f"expected uint8 [f, h, w, 3], got {frames.dtype} {list(frames.shape)}")


def _av() -> Any:
    try:
        import av
    except ImportError as error:
        raise ImportError(
            "videos are written with PyAV, which is not installed; run: pip install 'flashbulb[video]'"
        ) from error
    return av

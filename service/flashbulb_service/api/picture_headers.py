"""Format and size of an uploaded picture, from its first bytes: nothing is decoded, so no bomb can go off."""

from dataclasses import dataclass
from typing import Literal

MAX_PIXELS = 4096 * 4096
MAX_JPEG_SEGMENTS = 1_000


@dataclass(frozen=True)
class PictureHeader:
    """What a picture says of itself."""

    kind: Literal["png", "jpeg", "webp"]
    width: int
    height: int


def read_header(data: bytes) -> PictureHeader | None:
    """Read the header of a PNG, JPEG or WebP file; None when it is none of them, or damaged."""
    if data.startswith(b"\x89PNG\r\n\x1a\n") and data[12:16] == b"IHDR" and len(data) >= 33:
        return _header("png", int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big"))
    if data.startswith(b"\xff\xd8\xff"):
        return _read_jpeg(data)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP" and len(data) >= 30:
        return _read_webp(data)
    return None


def _header(kind: Literal["png", "jpeg", "webp"], width: int, height: int) -> PictureHeader | None:
    return PictureHeader(kind, width, height) if width > 0 and height > 0 else None


def _read_jpeg(data: bytes) -> PictureHeader | None:
    """Walk the segments to the frame header (SOF0 to SOF15, less the three markers that are none)."""
    at = 2
    for _ in range(MAX_JPEG_SEGMENTS):
        if at + 9 > len(data) or data[at] != 0xFF:
            return None
        marker = data[at + 1]
        if marker == 0xFF:  # padding
            at += 1
            continue
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return _header(
                "jpeg",
                int.from_bytes(data[at + 7 : at + 9], "big"),
                int.from_bytes(data[at + 5 : at + 7], "big"),
            )
        at += 2 + max(2, int.from_bytes(data[at + 2 : at + 4], "big"))
    return None


def _read_webp(data: bytes) -> PictureHeader | None:
    chunk = data[12:16]
    if chunk == b"VP8X":
        return _header(
            "webp", 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
        )
    if chunk == b"VP8L" and data[20] == 0x2F:
        bits = int.from_bytes(data[21:25], "little")
        return _header("webp", 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF))
    if chunk == b"VP8 " and data[23:26] == b"\x9d\x01\x2a":
        width, height = int.from_bytes(data[26:28], "little"), int.from_bytes(data[28:30], "little")
        return _header("webp", width & 0x3FFF, height & 0x3FFF)
    return None

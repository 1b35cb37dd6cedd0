"""The formats of pictures and videos that are offered, by name."""

from typing import Literal

ImageFormat = Literal["png", "jpeg", "webp"]
VideoFormat = Literal["mp4"]
FileFormat = ImageFormat | VideoFormat
VideoVariant = Literal["video", "thumbnail", "spritesheet"]

MEDIA_TYPES: dict[str, str] = {
    "png": "image/png",
    "jpeg": "image/jpeg",
    "webp": "image/webp",
    "mp4": "video/mp4",
}
DEFAULT_QUALITY = 100

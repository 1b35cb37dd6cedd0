"""Edits and variations: judged in full, refused clearly; pictures are judged by their headers alone."""

import base64
import io
import struct
import zlib

import httpx2
import numpy as np
import openai
import pytest
from openai import OpenAI
from PIL import Image

from flashbulb_service.api.picture_headers import read_header


def picture(kind: str, width: int = 24, height: int = 17, **options: object) -> bytes:
    out = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
    Image.fromarray(noise).save(out, kind, **options)
    return out.getvalue()


def bomb(side: int = 60_000) -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(10_000))) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (picture("PNG"), "png"),
        (picture("JPEG"), "jpeg"),
        (picture("JPEG", progressive=True), "jpeg"),
        (picture("WEBP"), "webp"),
        (picture("WEBP", lossless=True), "webp"),
        (picture("WEBP", exif=b"Exif\0\0"), "webp"),
    ],
)
def test_header_says_what_pillow_says(data: bytes, kind: str) -> None:
    header = read_header(data)
    assert header is not None
    assert (header.kind, header.width, header.height) == (kind, 24, 17)
    for length in range(len(data[:64])):
        read_header(data[:length])  # a cut file is judged, not a crash


@pytest.mark.filterwarnings("ignore:deprecated:DeprecationWarning")  # the client library on variations
def test_an_edit_is_refused_with_what_the_model_offers(openai_client: OpenAI) -> None:
    for call in (
        lambda: openai_client.images.edit(image=[picture("PNG"), picture("WEBP")], prompt="dog", n=2),
        lambda: openai_client.images.edit(image=picture("PNG"), mask=picture("PNG"), prompt="dog"),
        lambda: openai_client.images.create_variation(image=picture("JPEG")),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            call()
        assert caught.value.code == "unsupported_task"
        assert "text-to-image" in caught.value.message


@pytest.mark.parametrize(
    ("files", "fields", "code"),
    [
        ({}, {"prompt": "dog"}, None),
        ({"image": b"GIF89a..."}, {"prompt": "dog"}, "invalid_image"),
        ({"image": bomb()}, {"prompt": "dog"}, "image_too_large"),
        ({"image": picture("PNG")}, {}, "missing_required_parameter"),
        ({"image": picture("PNG")}, {"prompt": "dog", "n": "11"}, "integer_above_max_value"),
        ({"image": picture("PNG")}, {"prompt": "dog", "n": "x"}, "invalid_type"),
        ({"image": picture("PNG")}, {"prompt": "dog", "sede": "1"}, "unknown_parameter"),
        ({"image": picture("PNG"), "mask": b"x"}, {"prompt": "dog"}, "invalid_image"),
    ],
)
def test_what_is_wrong_with_an_edit_is_told_first(
    http: httpx2.Client, files: dict[str, bytes], fields: dict[str, str], code: str | None
) -> None:
    answer = http.post(
        "/v1/images/edits", files={name: ("../../x.png", data) for name, data in files.items()}, data=fields
    )
    assert answer.status_code in (400, 415)
    assert code in (None, answer.json()["error"]["code"])


def test_pictures_by_reference(http: httpx2.Client) -> None:
    def post(url: object) -> str:
        answer = http.post("/v1/images/edits", json={"prompt": "dog", "images": [{"image_url": url}]})
        assert answer.status_code == 400
        return str(answer.json()["error"]["code"])

    assert post(f"data:image/png;base64,{base64.b64encode(picture('PNG')).decode()}") == "unsupported_task"
    assert post(f"data:image/png;base64,{base64.b64encode(bomb()).decode()}") == "image_too_large"
    for url in ("http://127.0.0.1/x.png", "http://169.254.169.254/", "file:///etc/passwd", 7, None):
        assert post(url) == "unsupported_value"

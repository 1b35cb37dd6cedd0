"""The AI-generated mark: in every format, readable by others, the same bytes again, and nothing private in it."""

import io
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from flashbulb_service.errors import InvalidRequest
from flashbulb_service.formats import ImageFormat
from flashbulb_service.images import encode_image
from flashbulb_service.provenance import SOURCE_TYPE, Marker, Origin, embed_xmp, xmp_packet
from flashbulb_service.settings import Settings

FORMATS: tuple[ImageFormat, ...] = ("png", "jpeg", "webp")
PIXELS = np.random.default_rng(0).integers(0, 256, (48, 37, 3), dtype=np.uint8)  # odd sizes need padding
ORIGIN = Origin("emoji@2", "ab" * 32, 2**63 - 1, 3, 'a "red" <apple> & a dog 🍎')
DESCRIPTION = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}Description"
EXTENSION = "{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}"
OURS = "{https://flashbulb.invalid/ns/1.0/}"


def read_xmp(data: bytes) -> dict[str, str]:
    """Read the packet with Pillow and a real XML parser, not with our own code."""
    picture = Image.open(io.BytesIO(data))
    picture.load()
    packet = picture.info["xmp"]
    text = (packet.encode() if isinstance(packet, str) else packet).strip(b"\0")
    (description,) = ElementTree.fromstring(text.decode()).iter(DESCRIPTION)
    return dict(description.attrib)


@pytest.mark.parametrize("image_format", FORMATS)
def test_a_marked_picture_says_that_a_model_made_it(image_format: ImageFormat) -> None:
    told = read_xmp(Marker().apply(encode_image(PIXELS, image_format), image_format, ORIGIN))
    assert told[f"{EXTENSION}DigitalSourceType"] == SOURCE_TYPE
    assert told[f"{OURS}Model"] == "emoji@2"
    assert told[f"{OURS}ModelSHA256"] == "ab" * 32
    assert (told[f"{OURS}Seed"], told[f"{OURS}Index"]) == (str(2**63 - 1), "3")


@pytest.mark.parametrize("image_format", FORMATS)
@pytest.mark.parametrize("quality", [0, 80, 100])
def test_the_mark_leaves_the_pixels_alone_and_its_bytes_are_always_the_same(
    image_format: ImageFormat, quality: int
) -> None:
    plain = encode_image(PIXELS, image_format, quality)
    marked = Marker().apply(plain, image_format, ORIGIN)
    assert marked == Marker().apply(encode_image(PIXELS, image_format, quality), image_format, ORIGIN)
    np.testing.assert_array_equal(
        np.asarray(Image.open(io.BytesIO(marked))), np.asarray(Image.open(io.BytesIO(plain)))
    )


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_a_lossless_webp_keeps_size_and_alpha(mode: str) -> None:
    picture = Image.fromarray(PIXELS).convert(mode)
    if mode == "RGBA":
        picture.putalpha(77)
    out = io.BytesIO()
    picture.save(out, "WEBP", lossless=True, exact=True)
    read = Image.open(io.BytesIO(embed_xmp(out.getvalue(), "webp", xmp_packet(ORIGIN))))
    assert (read.size, read.mode) == ((37, 48), mode)
    np.testing.assert_array_equal(np.asarray(read), np.asarray(picture))


def test_an_extended_webp_keeps_its_other_chunks() -> None:
    out = io.BytesIO()
    Image.fromarray(PIXELS).save(out, "WEBP", icc_profile=b"profile")
    read = Image.open(io.BytesIO(embed_xmp(out.getvalue(), "webp", xmp_packet(ORIGIN))))
    assert read.info["icc_profile"] == b"profile"
    assert b"emoji@2" in read.info["xmp"]


@pytest.mark.parametrize("image_format", FORMATS)
def test_the_prompt_is_told_only_when_asked_for(image_format: ImageFormat) -> None:
    plain = encode_image(PIXELS, image_format)
    assert b"apple" not in Marker().apply(plain, image_format, ORIGIN)
    told = read_xmp(Marker(include_prompt=True).apply(plain, image_format, ORIGIN))
    assert told[f"{OURS}Prompt"] == ORIGIN.prompt


@pytest.mark.parametrize("image_format", FORMATS)
def test_without_the_mark_the_file_is_what_the_encoder_wrote(image_format: ImageFormat) -> None:
    plain = encode_image(PIXELS, image_format)
    assert Marker(mark=False).apply(plain, image_format, ORIGIN) == plain


@given(st.text(alphabet=st.characters(), max_size=5000))
def test_any_prompt_fits_and_is_well_formed(prompt: str) -> None:
    """NUL, lone surrogates and markup included: the file must stay readable, whatever somebody typed."""
    packet = xmp_packet(Origin("a@1", "", 0, 0, prompt), include_prompt=True)
    (description,) = ElementTree.fromstring(packet.decode()).iter(DESCRIPTION)
    assert len(description.attrib[f"{OURS}Prompt"]) <= 4000
    embed_xmp(encode_image(PIXELS, "jpeg"), "jpeg", packet)


@pytest.mark.parametrize("image_format", FORMATS)
def test_other_bytes_are_refused(image_format: ImageFormat) -> None:
    with pytest.raises(ValueError, match="expected a"):
        embed_xmp(b"GIF89a and more than thirty bytes of something", image_format, b"<x/>")


def test_half_a_signing_pair_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="together"):
        Marker.from_settings(Settings(c2pa_certificate=tmp_path / "a.pem"))

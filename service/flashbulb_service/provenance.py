"""What a picture says about itself: made by a model, by which one, from which seed.

The mark is an XMP packet with IPTC's digital source type "trained algorithmic media", put into the finished
file as PNG, JPEG, WebP and MP4 carry XMP. It is made of what is asked for and of nothing else: no time, no machine,
no person, so equal requests still give equal bytes. The pixels are not touched.
"""

import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from xml.sax.saxutils import quoteattr

from flashbulb_service.errors import InvalidRequest
from flashbulb_service.formats import FileFormat
from flashbulb_service.settings import Settings

SOURCE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
NAMESPACE = "https://flashbulb.invalid/ns/1.0/"  # a name, not an address: nothing is fetched from it
MAX_PROMPT_CHARS = 4000  # a JPEG segment holds 65,533 bytes, and a character takes at most 12 as &#x…;

_PNG = b"\x89PNG\r\n\x1a\n"
_JPEG_XMP = b"http://ns.adobe.com/xap/1.0/\0"
_MP4_XMP = bytes.fromhex("be7acfcb97a942e89c71999491e3afac")
# What XML 1.0 cannot hold, not even escaped.
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@dataclass(frozen=True)
class Origin:
    """Where a picture comes from: enough to draw it again."""

    model: str  # name@version
    bundle_sha256: str
    seed: int
    index: int
    prompt: str | None = None  # None: the picture does not tell it


class Signer(Protocol):
    """Puts a signed manifest into a finished file."""

    def sign(self, data: bytes, file_format: FileFormat, origin: Origin) -> bytes:
        """Return the file with the manifest."""
        ...


class Marker:
    """Marks finished files as the operator has decided."""

    def __init__(
        self, *, mark: bool = True, include_prompt: bool = False, signer: Signer | None = None
    ) -> None:
        """Keep the decisions."""
        self._mark = mark
        self._include_prompt = include_prompt
        self._signer = signer

    @classmethod
    def from_settings(cls, settings: Settings) -> "Marker":
        """Make the marker that the settings describe.

        Raises:
            InvalidRequest: signing is asked for and cannot be done: a file is missing, or the extra is.
        """
        return cls(
            mark=settings.mark_pictures, include_prompt=settings.mark_prompts, signer=_signer_of(settings)
        )

    def apply(self, data: bytes, file_format: FileFormat, origin: Origin) -> bytes:
        """Mark one finished file; the pixels stay as they are."""
        if self._mark:
            data = embed_xmp(data, file_format, xmp_packet(origin, include_prompt=self._include_prompt))
        if self._signer is not None:
            data = self._signer.sign(data, file_format, origin)
        return data


def _signer_of(settings: Settings) -> Signer | None:
    certificate, key = settings.c2pa_certificate, settings.c2pa_key
    if certificate is None and key is None:
        return None
    if certificate is None or key is None:
        raise InvalidRequest(
            "expected FLASHBULB_C2PA_CERTIFICATE and FLASHBULB_C2PA_KEY together, got one of them",
            param="c2pa_certificate",
        )
    from flashbulb_service.signing import C2paSigner

    return C2paSigner(_read(certificate), _read(key), settings.c2pa_algorithm)


def _read(path: Path) -> bytes:
    try:
        return path.expanduser().read_bytes()
    except OSError as error:
        raise InvalidRequest(
            f"expected a readable PEM file at {path}: {error.strerror}", param="c2pa"
        ) from error


def xmp_packet(origin: Origin, *, include_prompt: bool = False) -> bytes:
    """Write the XMP packet of a picture; the prompt only when asked for and known."""
    attributes = {
        "xmp:CreatorTool": "Flashbulb",
        "Iptc4xmpExt:DigitalSourceType": SOURCE_TYPE,
        "flashbulb:Model": origin.model,
        "flashbulb:ModelSHA256": origin.bundle_sha256,
        "flashbulb:Seed": str(origin.seed),
        "flashbulb:Index": str(origin.index),
    }
    if include_prompt and origin.prompt is not None:
        attributes["flashbulb:Prompt"] = _NOT_XML.sub("\ufffd", origin.prompt[:MAX_PROMPT_CHARS])
    written = "".join(f"\n   {name}={quoteattr(value)}" for name, value in attributes.items())
    return (
        '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>\n'
        '<x:xmpmeta xmlns:x="adobe:ns:meta/">\n'
        ' <rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">\n'
        '  <rdf:Description rdf:about=""\n'
        '   xmlns:xmp="http://ns.adobe.com/xap/1.0/"\n'
        '   xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/"\n'
        f'   xmlns:flashbulb="{NAMESPACE}"{written}/>\n'
        " </rdf:RDF>\n"
        "</x:xmpmeta>\n"
        '<?xpacket end="r"?>'
    ).encode()


def embed_xmp(data: bytes, file_format: FileFormat, packet: bytes) -> bytes:
    """Put an XMP packet into a finished file that has none.

    Raises:
        ValueError: the bytes are no such file, or the packet does not fit.
    """
    embed = {"png": _into_png, "jpeg": _into_jpeg, "webp": _into_webp, "mp4": _into_mp4}[file_format]
    return embed(data, packet)


def _into_png(data: bytes, packet: bytes) -> bytes:
    """Add an iTXt chunk behind IHDR (PNG 1.2 §4.2.3, XMP part 3 §1.1.5)."""
    ihdr_end = len(_PNG) + 12 + 13
    if not data.startswith(_PNG) or data[12:16] != b"IHDR":
        raise ValueError("expected a PNG file, got other bytes")
    # keyword, not compressed, compression method, language, translated keyword
    body = b"iTXt" + b"XML:com.adobe.xmp\0" + b"\0\0" + b"\0" + b"\0" + packet
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    return data[:ihdr_end] + chunk + data[ihdr_end:]


def _into_jpeg(data: bytes, packet: bytes) -> bytes:
    """Add an APP1 segment behind the start, and behind JFIF's APP0, which has to be first."""
    if not data.startswith(b"\xff\xd8\xff"):
        raise ValueError("expected a JPEG file, got other bytes")
    place = 2
    if data[2:4] == b"\xff\xe0":
        place = 4 + int.from_bytes(data[4:6], "big")
    size = 2 + len(_JPEG_XMP) + len(packet)
    if size > 0xFFFF:
        raise ValueError(f"expected an XMP packet that fits into a JPEG segment, got {len(packet)} bytes")
    segment = b"\xff\xe1" + struct.pack(">H", size) + _JPEG_XMP + packet
    return data[:place] + segment + data[place:]


def _into_webp(data: bytes, packet: bytes) -> bytes:
    """Add an XMP chunk at the end; the file gets the extended header that announces it (RFC 9649 §2.7)."""
    if data[:4] != b"RIFF" or data[8:12] != b"WEBP":
        raise ValueError("expected a WebP file, got other bytes")
    chunks = list(_riff_chunks(data))
    kind, body = chunks[0]
    has_xmp = 0x04
    if kind == b"VP8X":
        chunks[0] = (kind, bytes([body[0] | has_xmp]) + body[1:])
    else:
        width, height, has_alpha = _webp_canvas(kind, body)
        flags = has_xmp | (0x10 if has_alpha else 0)
        header = struct.pack("<I", flags) + (width - 1).to_bytes(3, "little")
        chunks.insert(0, (b"VP8X", header + (height - 1).to_bytes(3, "little")))
    chunks.append((b"XMP ", packet))
    written = b"".join(
        kind + struct.pack("<I", len(body)) + body + b"\0" * (len(body) % 2) for kind, body in chunks
    )
    return b"RIFF" + struct.pack("<I", 4 + len(written)) + b"WEBP" + written


def _into_mp4(data: bytes, packet: bytes) -> bytes:
    """Add a uuid box at the end (XMP part 3 §1.2.4.2): nothing before it moves, so all offsets stay right."""
    if data[4:8] != b"ftyp":
        raise ValueError("expected an MP4 file, got other bytes")
    return data + struct.pack(">I", 8 + len(_MP4_XMP) + len(packet)) + b"uuid" + _MP4_XMP + packet


def _riff_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    place = 12
    while place + 8 <= len(data):
        size = int.from_bytes(data[place + 4 : place + 8], "little")
        yield data[place : place + 4], data[place + 8 : place + 8 + size]
        place += 8 + size + size % 2


def _webp_canvas(kind: bytes, body: bytes) -> tuple[int, int, bool]:
    """Read width, height and whether alpha is used from a simple file's only chunk (RFC 6386, RFC 9649)."""
    if kind == b"VP8 ":
        width, height = struct.unpack("<HH", body[6:10])
        return width & 0x3FFF, height & 0x3FFF, False
    if kind == b"VP8L":
        bits = int.from_bytes(body[1:5], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1, bool(bits >> 28 & 1)
    raise ValueError(f"expected a WebP file with a picture first, got the chunk {kind!r}")

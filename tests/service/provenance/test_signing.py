"""Content Credentials with a certificate made here: signed, read back, and broken by a changed byte."""

import datetime
import io
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flashbulb_service.errors import InvalidRequest
from flashbulb_service.formats import MEDIA_TYPES, ImageFormat
from flashbulb_service.images import encode_image
from flashbulb_service.provenance import SOURCE_TYPE, Marker, Origin
from flashbulb_service.settings import Settings

c2pa = pytest.importorskip("c2pa", reason="the extra `c2pa` is not installed")
from cryptography import x509  # noqa: E402
from cryptography.hazmat.primitives import hashes, serialization  # noqa: E402
from cryptography.hazmat.primitives.asymmetric import ec  # noqa: E402
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID  # noqa: E402

PIXELS = np.random.default_rng(0).integers(0, 256, (48, 40, 3), dtype=np.uint8)
ORIGIN = Origin("emoji@2", "ab" * 32, 7, 3, "red apple")
NOW = datetime.datetime.now(datetime.UTC)


@dataclass(frozen=True)
class Pair:
    certificate: Path
    key: Path


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A root and a leaf that may sign content, as an operator would get them."""
    folder = tmp_path_factory.mktemp("c2pa")
    root_key, leaf_key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    root_name, leaf_name = _name("Test Root"), _name("Test Signer")
    root = _certificate(root_name, root_name, root_key.public_key(), root_key, is_ca=True)
    leaf = _certificate(leaf_name, root_name, leaf_key.public_key(), root_key, is_ca=False)
    pem = serialization.Encoding.PEM
    (folder / "chain.pem").write_bytes(leaf.public_bytes(pem) + root.public_bytes(pem))
    (folder / "key.pem").write_bytes(
        leaf_key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return Pair(folder / "chain.pem", folder / "key.pem")


def _name(common: str) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Test"),
            x509.NameAttribute(NameOID.COMMON_NAME, common),
        ]
    )


def _certificate(
    subject: x509.Name,
    issuer: x509.Name,
    public_key: ec.EllipticCurvePublicKey,
    signing_key: ec.EllipticCurvePrivateKey,
    *,
    is_ca: bool,
) -> x509.Certificate:
    usage = dict.fromkeys(
        (
            "content_commitment",
            "key_encipherment",
            "data_encipherment",
            "key_agreement",
            "encipher_only",
            "decipher_only",
        ),
        False,
    )
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(NOW - datetime.timedelta(days=1))
        .not_valid_after(NOW + datetime.timedelta(days=30))
        .add_extension(x509.BasicConstraints(ca=is_ca, path_length=None), critical=True)
        .add_extension(
            x509.KeyUsage(digital_signature=not is_ca, key_cert_sign=is_ca, crl_sign=is_ca, **usage),
            critical=True,
        )
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(signing_key.public_key()), critical=False
        )
    )
    if not is_ca:
        purposes = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION])
        builder = builder.add_extension(purposes, critical=False)
    return builder.sign(signing_key, hashes.SHA256())


def read_manifest(data: bytes, image_format: ImageFormat) -> dict[str, object]:
    with c2pa.Reader(MEDIA_TYPES[image_format], io.BytesIO(data)) as reader:
        told: dict[str, object] = json.loads(reader.json())
    return told


def problems(manifest: dict[str, object]) -> set[str]:
    """The failures that the reader found, less those about a root that nobody knows."""
    statuses = json.dumps(manifest.get("validation_status", []))
    return {entry["code"] for entry in json.loads(statuses)} - {"signingCredential.untrusted"}


@pytest.mark.parametrize("image_format", ["png", "jpeg", "webp"])
def test_a_signed_picture_tells_who_signed_what(pair: Pair, image_format: ImageFormat) -> None:
    marker = Marker.from_settings(Settings(c2pa_certificate=pair.certificate, c2pa_key=pair.key))
    plain = encode_image(PIXELS, image_format)
    signed = marker.apply(plain, image_format, ORIGIN)
    told = read_manifest(signed, image_format)
    assert problems(told) == set()
    text = json.dumps(told)
    assert SOURCE_TYPE in text and "emoji@2" in text and '"Test"' in text
    assert "red apple" not in text
    picture = Image.open(io.BytesIO(signed))
    np.testing.assert_array_equal(np.asarray(picture), np.asarray(Image.open(io.BytesIO(plain))))
    assert "xmp" in picture.info


def test_a_changed_pixel_breaks_the_signature(pair: Pair) -> None:
    marker = Marker.from_settings(Settings(c2pa_certificate=pair.certificate, c2pa_key=pair.key))
    signed = bytearray(marker.apply(encode_image(PIXELS, "png"), "png", ORIGIN))
    signed[-20] ^= 1  # inside the last IDAT
    assert "assertion.dataHash.mismatch" in problems(read_manifest(bytes(signed), "png"))


def test_a_key_of_another_certificate_is_refused_at_start(pair: Pair, tmp_path: Path) -> None:
    other = tmp_path / "other.pem"
    other.write_text("-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n")
    with pytest.raises(InvalidRequest, match="certificate and key"):
        Marker.from_settings(Settings(c2pa_certificate=pair.certificate, c2pa_key=other))


def test_a_missing_file_is_told_by_name(pair: Pair, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"none\.pem"):
        Marker.from_settings(Settings(c2pa_certificate=tmp_path / "none.pem", c2pa_key=pair.key))

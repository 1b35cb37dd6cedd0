"""Content Credentials: a C2PA manifest signed with the operator's own certificate. Needs the extra `c2pa`.

A signed file is not equal byte for byte to another one of the same picture: manifests have ids of their own and
most signatures a random part. The pixels, and the XMP mark, are equal still.
"""

import io

from flashbulb_service.errors import InvalidRequest
from flashbulb_service.formats import MEDIA_TYPES, FileFormat
from flashbulb_service.provenance import SOURCE_TYPE, Origin

try:
    import c2pa
except ModuleNotFoundError as error:
    raise InvalidRequest(
        "signing needs the package c2pa-python, which is not installed: pip install 'flashbulb[c2pa]'",
        param="c2pa_certificate",
    ) from error


class C2paSigner:
    """Signs finished files with one certificate chain and key."""

    def __init__(self, certificate: bytes, key: bytes, algorithm: str) -> None:
        """Keep the chain (leaf first) and the key, and sign a first file: a bad pair fails at start.

        Raises:
            InvalidRequest: they do not fit together or are not allowed to sign content.
        """
        self._certificate = certificate
        self._key = key
        self._algorithm = algorithm
        try:
            self.sign(_PIXEL, "png", Origin("none@0", "", 0, 0))
        except c2pa.C2paError as error:
            raise InvalidRequest(
                f"expected a certificate and key that may sign content with {algorithm}, got: {error}",
                param="c2pa_certificate",
            ) from error

    def sign(self, data: bytes, file_format: FileFormat, origin: Origin) -> bytes:
        """Return the file with a signed manifest that says how it was made; no network is used."""
        info = c2pa.C2paSignerInfo(self._algorithm, self._certificate, self._key, None)
        out = io.BytesIO()
        with c2pa.Signer.from_info(info) as signer, c2pa.Builder(_manifest(origin)) as builder:
            builder.sign(signer, MEDIA_TYPES[file_format], io.BytesIO(data), out)
        return out.getvalue()


def _manifest(origin: Origin) -> dict[str, object]:
    agent = {"name": "Flashbulb"}
    return {
        "claim_generator_info": [agent],
        "title": origin.model,
        "assertions": [
            {
                "label": "c2pa.actions.v2",
                "data": {
                    "actions": [
                        {
                            "action": "c2pa.created",
                            "digitalSourceType": SOURCE_TYPE,
                            "softwareAgent": agent,
                            "parameters": {
                                "model": origin.model,
                                "modelSha256": origin.bundle_sha256,
                                "seed": str(origin.seed),
                                "index": origin.index,
                            },
                        }
                    ]
                },
            }
        ],
    }


# The smallest PNG there is: one grey pixel.
_PIXEL = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108000000003a7e9b550"
    "000000a49444154789c636800000082008177cd72b60000000049454e44ae426082"
)

"""POST /v1/images/edits and /v1/images/variations: read and judged in full, then refused in one clear sentence.

The students served here draw from words alone. The pictures of a request are judged by their headers; none is decoded.
"""

import base64
import binascii
import re
from collections.abc import Mapping
from typing import Any, NoReturn

from fastapi import APIRouter, Request
from pydantic import ValidationError

from flashbulb_service.api.context import Context, Shared
from flashbulb_service.api.errors import first_problem
from flashbulb_service.api.forms import BODY, read_form
from flashbulb_service.api.media import is_json
from flashbulb_service.api.picture_headers import MAX_PIXELS, read_header
from flashbulb_service.api.schemas import ERRORS, ImagesRequest
from flashbulb_service.errors import InvalidRequest

router = APIRouter(responses=ERRORS)

MAX_PICTURES = 16
_EDIT_ONLY = ("input_fidelity",)
_DATA_URL = re.compile(r"data:image/(png|jpeg|webp);base64,([A-Za-z0-9+/=\s]+)")


@router.post("/v1/images/edits", summary="Change pictures (no student here does)", openapi_extra=BODY)
async def edit_images(request: Request, context: Shared) -> None:
    """Check the request in full, then say that no model of this server edits pictures."""
    fields, pictures, mask = await _read(request)
    _check_pictures(pictures, mask)
    _check_fields(fields)
    _refuse(context, "image editing", fields)


@router.post(
    "/v1/images/variations", summary="Draw a picture again (no student here does)", openapi_extra=BODY
)
async def vary_image(request: Request, context: Shared) -> None:
    """Check the request in full, then say that no model of this server varies pictures."""
    fields, pictures, mask = await _read(request)
    _check_pictures(pictures, mask)
    _check_fields({"prompt": "none", **fields})
    _refuse(context, "image variations", fields)


Fields = dict[str, Any]


async def _read(request: Request) -> tuple[Fields, list[bytes], bytes | None]:
    """Read a JSON or multipart body into fields, pictures and a mask."""
    form = await read_form(request, max_files=MAX_PICTURES + 1)
    if is_json(request.headers.get("content-type", "")):
        return _from_json(form.fields)
    pictures: list[bytes] = []
    mask: bytes | None = None
    for name, data in form.files:
        if name in ("image", "image[]"):
            pictures.append(data)
        elif name == "mask":
            mask = data
        else:
            raise InvalidRequest(
                f"{name[:64]}: expected text, got a file", param=name[:64], code="invalid_type"
            )
    for name in ("image", "mask"):
        if name in form.fields:
            raise InvalidRequest(f"{name}: expected a file, got text", param=name, code="invalid_type")
    return form.fields, pictures, mask


def _from_json(body: Mapping[str, Any]) -> tuple[Fields, list[bytes], bytes | None]:
    fields = {name: value for name, value in body.items() if name not in ("images", "mask")}
    images = body.get("images")
    if not isinstance(images, list) or len(images) > MAX_PICTURES:
        raise InvalidRequest(
            f"images: expected a list of 1 to {MAX_PICTURES} pictures", param="images", code="invalid_type"
        )
    mask = body.get("mask")
    return fields, [_from_reference(one) for one in images], None if mask is None else _from_reference(mask)


def _from_reference(reference: Any) -> bytes:
    """Read a data: URL. An address elsewhere is never fetched: it could be anybody's, ours included."""
    url = reference.get("image_url") if isinstance(reference, dict) else None
    found = _DATA_URL.fullmatch(url) if isinstance(url, str) else None
    if found is None:
        raise InvalidRequest(
            "images: expected {'image_url': 'data:image/png;base64,…'}; addresses and file ids are not read here",
            param="images",
            code="unsupported_value",
        )
    try:
        return base64.b64decode(found[2])
    except binascii.Error as error:
        raise InvalidRequest("images: expected base64", param="images", code="invalid_image") from error


def _check_pictures(pictures: list[bytes], mask: bytes | None) -> None:
    if not 0 < len(pictures) <= MAX_PICTURES:
        raise InvalidRequest(
            f"image: expected 1 to {MAX_PICTURES} pictures, got {len(pictures)}",
            param="image",
            code="missing_required_parameter" if not pictures else "too_many_images",
        )
    for name, data in [*(("image", picture) for picture in pictures), *([("mask", mask)] if mask else [])]:
        header = read_header(data)
        if header is None:
            raise InvalidRequest(
                f"{name}: expected a PNG, JPEG or WebP picture, whatever its name says",
                param=name,
                code="invalid_image",
            )
        if header.width * header.height > MAX_PIXELS:
            raise InvalidRequest(
                f"{name}: expected at most {MAX_PIXELS} pixels, got {header.width}x{header.height}",
                param=name,
                code="image_too_large",
            )


def _check_fields(fields: Fields) -> None:
    try:
        ImagesRequest.model_validate(
            {name: value for name, value in fields.items() if name not in _EDIT_ONLY}
        )
    except ValidationError as error:
        raise first_problem(error.errors()) from error


def _refuse(context: Context, wanted: str, fields: Fields) -> NoReturn:
    name = fields.get("model")
    model = context.catalog.find(name if isinstance(name, str) else None, task="text-to-image")
    raise InvalidRequest(
        f"{model.id} does not offer {wanted}: it offers {model.bundle.manifest.task} "
        "at POST /v1/images/generations",
        param="model",
        code="unsupported_task",
    )

"""Bodies that may come as JSON or as a multipart form: fields in the types of their schema, and uploaded files."""

import re
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from flashbulb_service.api.errors import UnsupportedMedia
from flashbulb_service.api.media import is_json
from flashbulb_service.errors import InvalidRequest

MAX_FIELDS = 60
_INTEGERS = (
    "n",
    "seed",
    "rng_seed",
    "steps",
    "num_inference_steps",
    "output_compression",
    "partial_images",
    "num_frames",
    "deadline_ms",
    "priority",
)
_NUMBERS = ("guidance_scale", "true_cfg_scale", "fps")
_FLAGS = ("stream",)
_INNER = re.compile(r"([A-Za-z_]{1,64})\[([^\[\]]{0,128})\]")  # metadata[key], webhook_events[]

BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {"schema": {"type": "object"}},
            "application/json": {"schema": {"type": "object"}},
        },
    }
}


@dataclass
class Form:
    """What a body holds. files: (name of the field, content) of each upload, in their order."""

    fields: dict[str, Any] = field(default_factory=dict)
    files: list[tuple[str, bytes]] = field(default_factory=list)


async def read_form(request: Request, *, max_files: int) -> Form:
    """Read a JSON object or a multipart form.

    Raises:
        UnsupportedMedia: it says that it is neither.
        InvalidRequest: it is no object, no form, or has too many parts.
    """
    kind = request.headers.get("content-type", "")
    if is_json(kind):
        try:
            body = await request.json()
        except (ValueError, RecursionError) as error:
            raise InvalidRequest("expected a JSON body", code="invalid_json") from error
        if not isinstance(body, dict):
            raise InvalidRequest("expected a JSON object", code="invalid_body")
        return Form(body)
    if kind.partition(";")[0].strip().lower() != "multipart/form-data":
        raise UnsupportedMedia(f"expected multipart/form-data or application/json, got {kind[:80]!r}")
    form = Form()
    try:
        async with request.form(max_files=max_files, max_fields=MAX_FIELDS) as parts:
            for name, value in parts.multi_items():
                if isinstance(value, UploadFile):
                    form.files.append((name, await value.read()))
                else:
                    _add(form.fields, name, value)
    except HTTPException as error:
        raise InvalidRequest(f"expected a multipart body: {error.detail}", code="invalid_body") from error
    return form


def _add(fields: dict[str, Any], name: str, text: str) -> None:
    """Put a form's text where it belongs: `a[b]` into an object, `a[]` into a list."""
    inner = _INNER.fullmatch(name)
    if inner is None:
        fields[name] = from_text(name, text)
    elif inner[2]:
        held = fields.setdefault(inner[1], {})
        if isinstance(held, dict):
            held[inner[2]] = text
    else:
        held = fields.setdefault(inner[1], [])
        if isinstance(held, list):
            held.append(text)


def from_text(name: str, text: str) -> Any:
    """Turn a form's text into what the field holds; what cannot be turned is left for the schema to judge."""
    if name in _INTEGERS and re.fullmatch(r"-?[0-9]{1,20}", text):
        return int(text)
    if name in _NUMBERS and re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,12})?", text):
        return float(text)
    if name in _FLAGS and text in ("true", "false"):
        return text == "true"
    return text

"""What a body must be before it is read."""

from fastapi import Request

from flashbulb_service.api.errors import UnsupportedMedia


def is_json(content_type: str) -> bool:
    """Tell whether a content type says JSON."""
    kind = content_type.partition(";")[0].strip().lower()
    return kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))


async def expect_json(request: Request) -> None:
    """Refuse a body that does not say it is JSON.

    Raises:
        UnsupportedMedia: it says something else, or nothing.
    """
    given = request.headers.get("content-type", "")
    if not is_json(given) and await request.body():
        raise UnsupportedMedia(
            f"expected the header 'Content-Type: application/json', got {given[:80]!r}: send JSON"
        )

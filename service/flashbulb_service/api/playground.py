"""The playground: one page and its files, read from the package at start, under a strict policy."""

from importlib.resources import files

from fastapi import APIRouter
from fastapi.responses import Response

# Only our own files run, connect or show; pictures and videos arrive as data: from the API.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; media-src data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
PAGE_HEADERS = {
    "content-security-policy": POLICY,
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}
FILES = {
    "/": ("index.html", "text/html"),
    "/ui/playground.js": ("playground.js", "text/javascript"),
    "/ui/server.js": ("server.js", "text/javascript"),
    "/ui/request.js": ("request.js", "text/javascript"),
    "/ui/run.js": ("run.js", "text/javascript"),
    "/ui/video.js": ("video.js", "text/javascript"),
    "/ui/playground.css": ("playground.css", "text/css"),
    "/ui/icon.svg": ("icon.svg", "image/svg+xml"),
}


def create_router() -> APIRouter:
    """Make a route per file; a missing one fails here, not at the first visitor."""
    router = APIRouter(include_in_schema=False)
    folder = files("flashbulb_service") / "ui"
    for path, (name, media_type) in FILES.items():
        _add_file(router, path, (folder / name).read_bytes(), media_type)
    return router


def _add_file(router: APIRouter, path: str, data: bytes, media_type: str) -> None:
    async def serve() -> Response:
        return Response(data, media_type=media_type, headers=PAGE_HEADERS)

    router.add_api_route(path, serve, methods=["GET"], name=path)

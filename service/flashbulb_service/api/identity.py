"""Who asks: the one place where a request gets an owner and a share of the machine."""

import hashlib
from dataclasses import dataclass

from fastapi import Request

from flashbulb_service.api.schemas import ImagesRequest


@dataclass(frozen=True)
class Caller:
    """Who owns a request, and whose share of the queue it uses."""

    owner: str
    tenant: str


def owner_of(request: Request) -> str:
    """Return who may read back what this request makes; access control sets it in the request's state."""
    return str(getattr(request.state, "tenant", "default"))


def caller_of(request: Request, body: ImagesRequest) -> Caller:
    """Return the caller; an end user that the client names has a share of its own within the owner's."""
    owner = owner_of(request)
    user = body.safety_identifier or body.user
    if not user:
        return Caller(owner, owner)
    digest = hashlib.sha256(f"{owner} {user}".encode("utf-8", "surrogatepass")).hexdigest()[:16]
    return Caller(owner, f"user-{digest}")

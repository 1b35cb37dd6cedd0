"""Who asks: the one place where a request gets an owner and a share of the machine."""

import hashlib
from dataclasses import dataclass

from fastapi import Request

from flashbulb_service.api.schemas import DrawRequest
from flashbulb_service.tenants.keys import KeyRecord

EVERYBODY = "default"  # the owner of all there is, where nobody has a key


@dataclass(frozen=True)
class Caller:
    """Who owns a request, and whose share of the queue it uses. weight: of that share, relative to others'."""

    owner: str
    tenant: str
    weight: float = 1.0


def owner_of(request: Request) -> str:
    """Return who may read back what this request makes: the API key, as the gate has set it, or everybody."""
    return str(getattr(request.state, "tenant", EVERYBODY))


def list_of(owner: str, task: str = "text-to-image") -> str:
    """Return the name of an owner's list of what a task made; older versions know the pictures' alone."""
    return f"{owner}/videos" if task == "text-to-video" else owner


def caller_of(request: Request, body: DrawRequest) -> Caller:
    """Return the caller: the API key, with its share; without keys, the end user that the client names.

    The share is the key's as a whole, since otherwise a client could take more by making up end users.
    """
    owner = owner_of(request)
    key: KeyRecord | None = getattr(request.state, "key", None)
    if key is not None:
        return Caller(owner, owner, key.limits.weight)
    user = body.safety_identifier or body.user
    if not user:
        return Caller(owner, owner)
    digest = hashlib.sha256(f"{owner} {user}".encode("utf-8", "surrogatepass")).hexdigest()[:16]
    return Caller(owner, f"user-{digest}")

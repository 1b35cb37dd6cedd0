"""Where keys are asked for, and what a route needs. Pure decisions: no HTTP, no Redis."""

import contextlib
import ipaddress
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from flashbulb_service.errors import InvalidRequest

Scope = Literal["generate", "admin"]
AuthMode = Literal["auto", "off", "keys"]

# What needs no key. The page and the document are the same for everybody; the probes say that we live. The address
# of a picture is random and told to its owner only: it is a secret of its own, so that an <img> can show it.
OPEN_PATHS = frozenset({"/", "/livez", "/readyz", "/openapi.json"})
OPEN_FOLDERS = ("/ui/", "/v1/images/results/")


@dataclass(frozen=True)
class Access:
    """How one API process treats those who ask.

    keys: every request needs one. public: others than this machine's users can reach us.
    """

    keys: bool
    public: bool

    @classmethod
    def of(cls, auth: AuthMode, host: str) -> "Access":
        """Read the settings; "auto" asks for keys wherever others could come from."""
        public = not is_loopback(host)
        return cls(keys=auth == "keys" or (auth == "auto" and public), public=public)

    def needs(self, path: str) -> Scope | None:
        """Return the scope that a path needs here, None when it is open to those who reach it."""
        scope = scope_of(path)
        if self.keys or (self.public and scope == "admin"):
            return scope
        return None


def scope_of(path: str) -> Scope | None:
    """Return the scope of a path; what nobody listed as open needs one."""
    if path in OPEN_PATHS or path.startswith(OPEN_FOLDERS):
        return None
    # Wherever it stands, so that a path that some proxy puts something in front of is not mistaken for less.
    return "admin" if path.endswith("/metrics") or "/v1/admin" in path else "generate"


@lru_cache(maxsize=256)
def is_loopback(host: str) -> bool:
    """Tell whether a host name or address, an IPv6 one with brackets or without, can only mean this machine."""
    if host.lower() == "localhost":
        return True
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host.removeprefix("[").removesuffix("]")).is_loopback
    return False


def settle_auth(auth: AuthMode, host: str, *, allow_public: bool, has_keys: bool) -> Literal["off", "keys"]:
    """Decide whether keys are asked for, and refuse to serve the network by accident.

    Raises:
        InvalidRequest: others can reach the address, nobody has a key or keys are off, and that was not
            asked for.
    """
    if is_loopback(host):
        return "keys" if auth == "keys" else "off"
    if auth != "off" and has_keys:
        return "keys"
    if allow_public:
        return "keys" if auth == "keys" else "off"
    if auth == "off":
        raise InvalidRequest(
            f"expected a loopback address such as 127.0.0.1, got {host} with auth 'off': everybody who reaches "
            "it may draw; leave FLASHBULB_AUTH out, or add --allow-public if that is meant",
            param="--host",
        )
    raise InvalidRequest(
        f"expected a loopback address such as 127.0.0.1, or an API key in the queue's store, got {host} and no "
        "key: make one with 'flashbulb keys create NAME', or add --allow-public to let everybody draw",
        param="--host",
    )

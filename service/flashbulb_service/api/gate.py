"""Who may come in, decided before a body is read: the key, its scope, its rate and its budget."""

from collections.abc import Collection

import structlog
from starlette.datastructures import Headers
from starlette.types import Scope as Request

from flashbulb_service.errors import InvalidApiKey, MissingScope
from flashbulb_service.tenants.access import Access, is_loopback
from flashbulb_service.tenants.store import REFUSAL, KeyStore, Standing

MAX_HEADER_CHARS = 200


class Gate:
    """Refuses a request, or writes its key into the request's state: `tenant`, `key`, `answer_headers`."""

    def __init__(self, keys: KeyStore, access: Access, own_hosts: Collection[str] = ()) -> None:
        """Look keys up in a store. own_hosts: names of pages that are ours beside the one in the Host header."""
        self._keys = keys
        self._access = access
        self._own_hosts = own_hosts

    async def __call__(self, request: Request) -> None:
        """Admit one HTTP request.

        Raises:
            InvalidApiKey, MissingScope: the request has no key that is good for it, or needs none and comes from
                another site's page.
            RateLimited, BudgetExceeded: its key has none left.
            QueueUnavailable: the store of the keys does not answer.
        """
        path: str = request["path"]
        headers = Headers(scope=request)
        needed = self._access.needs(path)
        if needed is None:
            if path.startswith("/v1/admin"):
                check_local(headers)
            elif request["method"] not in ("GET", "HEAD"):
                check_origin(headers, self._own_hosts)
            return
        secret = bearer(headers)
        # A revoked key must not have seconds left in which to make itself another one.
        key = await self._keys.identify(secret, fresh=needed == "admin")
        structlog.contextvars.bind_contextvars(tenant=key.id)
        if needed not in key.scopes:
            raise MissingScope(
                f"expected an API key with the scope '{needed}', got one with {' and '.join(key.scopes)}: "
                "ask whoever runs this server"
            )
        state = request.setdefault("state", {})
        state["tenant"], state["key"] = key.id, key
        if needed == "generate" and request["method"] == "POST":  # reading is free
            admission = await self._keys.admit(key, secret)
            if admission.standing is not None:
                state.setdefault("answer_headers", {}).update(rate_headers(admission.standing))
            if admission.refusal is not None:
                raise admission.refusal


def bearer(headers: Headers) -> str:
    """Return the secret of the header Authorization.

    Raises:
        InvalidApiKey: there is no such header, or more than one, or one of another form.
    """
    given = headers.getlist("authorization")
    if not given:
        raise InvalidApiKey(REFUSAL.format(what="none"))
    scheme, _, secret = given[0].strip(" ").partition(" ")
    if len(given) > 1 or len(given[0]) > MAX_HEADER_CHARS or scheme.lower() != "bearer":
        raise InvalidApiKey(REFUSAL.format(what="a header of another form"))
    return secret.strip(" ")


def check_local(headers: Headers) -> None:
    """Refuse what a foreign page makes a visitor's browser send here; where no key is asked for, nothing else would.

    Raises:
        MissingScope: the request comes from another site's page, or under a name that is not this machine's.
    """
    if not is_loopback(host_name(headers.get("host", ""))) or is_foreign(headers):
        raise MissingScope(
            "expected a request of this machine's own programs or pages, got one that another site's page may have "
            "made: use the address 127.0.0.1, or turn keys on with FLASHBULB_AUTH=keys"
        )


def check_origin(headers: Headers, own_hosts: Collection[str]) -> None:
    """Refuse work for a foreign page; a browser sends forms anywhere, without asking us first.

    Raises:
        MissingScope: the request comes from another site's page.
    """
    if is_foreign(headers, own_hosts):
        raise MissingScope(
            "expected a request of a program or of this server's own page, got one of another site's page: "
            "add its host to FLASHBULB_ALLOWED_HOSTS, or turn keys on with FLASHBULB_AUTH=keys"
        )


def is_foreign(headers: Headers, own_hosts: Collection[str] = ()) -> bool:
    """Tell whether a browser says that another site's page made the request; programs send no Origin."""
    origin = headers.get("origin")
    if origin is None:
        return False
    host = origin.partition("://")[2]  # "null", of a file or a sandbox, has none
    return host != headers.get("host") and host_name(host) not in own_hosts


def host_name(host: str) -> str:
    """Return the name of a Host header, without port and brackets."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]


def rate_headers(standing: Standing) -> dict[str, str]:
    """Say where a key stands, in OpenAI's headers."""
    return {
        "x-ratelimit-limit-requests": str(standing.limit),
        "x-ratelimit-remaining-requests": str(standing.remaining),
        "x-ratelimit-reset-requests": duration(standing.full_in_s),
    }


def duration(seconds: float) -> str:
    """Write a time as OpenAI does: 20ms, 1.5s, 6m0s, 2h0m3s."""
    if seconds < 1:
        return f"{round(seconds * 1000)}ms"
    if seconds < 60:
        return f"{round(seconds, 3):g}s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes}m{rest}s" if hours else f"{minutes}m{rest}s"

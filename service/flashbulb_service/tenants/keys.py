"""What an API key is: a public id, a secret of which only a hash is kept, scopes and limits.

A secret is ``fb_<id>_<43 characters>``, the last part 256 random bits. Nobody can search that space, so one
SHA-256 is the right hash: slow password hashes protect what people choose.
"""

import hashlib
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from hmac import compare_digest
from typing import Annotated, get_args

from pydantic import BaseModel, ConfigDict, Field

from flashbulb_service.tenants.access import Scope

SCOPES: tuple[Scope, ...] = get_args(Scope)
MAX_NAME_CHARS = 100
MAX_GRACE_S = 30 * 86400.0
DAY_S = 86400

_SECRET = re.compile(r"fb_([0-9a-f]{16})_[A-Za-z0-9_-]{43}")
_ID = re.compile(r"key_[0-9a-f]{16}")

Whole = Annotated[int, Field(strict=True)]


class KeyLimits(BaseModel):
    """How much a key may use; what is null is not limited beyond what holds for everybody."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    requests_per_minute: Whole | None = Field(default=None, ge=1, le=1_000_000)
    burst: Whole | None = Field(
        default=None, ge=1, le=1_000_000, description="requests at once; null: as many as a minute allows"
    )
    max_live: Whole | None = Field(default=None, ge=1, le=100_000, description="jobs that wait or run")
    weight: float = Field(default=1.0, ge=0.01, le=100, description="share of contended device time")
    budget_ms: Whole | None = Field(default=None, ge=1, le=10**12, description="device time per period")
    budget_period_s: Whole = Field(
        default=DAY_S, ge=60, le=31 * DAY_S, description="counted from the epoch, UTC"
    )

    def fields(self) -> dict[str, str]:
        """Return what is set, as a Redis hash holds it."""
        return {name: repr(value) for name, value in self.model_dump(exclude_none=True).items()}

    @classmethod
    def from_fields(cls, fields: Mapping[str, str]) -> "KeyLimits":
        """Read what `fields` wrote."""
        numbers = {name: fields[name] for name in cls.model_fields if name in fields}
        return cls(**{n: float(text) if n == "weight" else int(text) for n, text in numbers.items()})


@dataclass(frozen=True)
class KeyRecord:
    """A key as it is stored. Times are seconds since the epoch; hashes are no one's business but ours."""

    id: str
    name: str
    scopes: tuple[Scope, ...]
    limits: KeyLimits
    created_at: float
    rotated_at: float | None = None
    revoked_at: float | None = None
    old_until: float | None = None  # until then the secret before the last rotation is good, too
    digest: str = field(default="", repr=False)
    old_digest: str = field(default="", repr=False)

    def accepts(self, digest: str, now: float) -> bool:
        """Tell, in a time that does not depend on where hashes differ, whether a secret of this hash is good."""
        if self.revoked_at is not None:
            return False
        current = compare_digest(self.digest, digest)
        old = compare_digest(self.old_digest, digest)
        return current or (old and self.old_until is not None and now < self.old_until)


@dataclass(frozen=True)
class NewKey:
    """A key that was just made or rotated, with its secret: the only time that anybody sees it."""

    record: KeyRecord
    secret: str = field(repr=False)


def new_key_id() -> str:
    """Make the public id of a key."""
    return f"key_{secrets.token_hex(8)}"


def new_secret(key_id: str) -> str:
    """Make a secret of a key."""
    return f"fb_{key_id.removeprefix('key_')}_{secrets.token_urlsafe(32)}"


def key_id_of(secret: str) -> str | None:
    """Return the key that a secret claims to belong to; None for what has not the form of a secret."""
    found = _SECRET.fullmatch(secret)
    return f"key_{found[1]}" if found else None


def is_key_id(text: str) -> bool:
    """Tell whether a text has the form of a key's id."""
    return _ID.fullmatch(text) is not None


def hash_secret(secret: str) -> str:
    """Return what is kept of a secret."""
    return hashlib.sha256(secret.encode()).hexdigest()

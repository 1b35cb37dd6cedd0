"""What is sent: a pool of different pictures, and a plan of who asks for which one when.

Pool entry and plan depend on the seed alone, so two servers can be given the very same requests.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from flashbulb_service.bench.arrivals import TraceRow, draw_offsets

Value = TypeVar("Value")

SUBJECTS = ("apple", "heart", "rocket", "dog", "cat", "cake", "car", "flower", "star", "tree", "fish", "moon")
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange")
DEFAULT_PROMPTS = tuple(f"{colour} {subject}" for subject in SUBJECTS for colour in COLOURS)


@dataclass(frozen=True)
class Tenant:
    """Who sends: a name for the report, a share of the requests, and the key that is sent."""

    name: str
    share: float = 1.0
    api_key: str | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Picture:
    """One request of the pool: equal pictures have equal bodies, and shall get equal pixels."""

    prompt: str
    seed: int
    size: str | None = None
    n: int = 1
    output_format: str | None = None

    @property
    def group(self) -> str:
        """Name what makes requests comparable in cost; a relative SLO is taken per group."""
        return f"{self.size or 'default'} n={self.n} {self.output_format or 'default'}"


@dataclass(frozen=True)
class Planned:
    """One request of the plan."""

    offset_s: float
    picture: Picture
    tenant: Tenant
    deadline_ms: int | None = None


@dataclass(frozen=True)
class Mix:
    """Shares of everything that varies between requests; weights need not sum to one."""

    prompts: tuple[str, ...] = DEFAULT_PROMPTS
    sizes: tuple[tuple[str | None, float], ...] = ((None, 1.0),)
    counts: tuple[tuple[int, float], ...] = ((1, 1.0),)
    formats: tuple[tuple[str | None, float], ...] = ((None, 1.0),)
    tenants: tuple[Tenant, ...] = (Tenant("default"),)
    deadlines_ms: tuple[tuple[int | None, float], ...] = ((None, 1.0),)
    zipf: float = 0.0  # popularity of entry k of the pool is k ** -zipf; 0 is uniform
    pool: int = 64
    seed: int = 0


@dataclass(frozen=True)
class Target:
    """The server, and what every request to it says besides its picture."""

    base_url: str
    model: str | None = None
    api_key: str | None = field(default=None, repr=False)
    extra_body: Mapping[str, Any] = field(default_factory=dict)
    send_seed: bool = True

    @property
    def url(self) -> str:
        """Return the address of the images route."""
        return f"{self.base_url.rstrip('/')}/images/generations"

    def body(self, planned: Planned) -> bytes:
        """Write the JSON body of a request."""
        picture = planned.picture
        fields: dict[str, Any] = {"prompt": picture.prompt, "n": picture.n, "response_format": "b64_json"}
        optional = {
            "model": self.model,
            "size": picture.size,
            "output_format": picture.output_format,
            "seed": picture.seed if self.send_seed else None,
            "deadline_ms": planned.deadline_ms,
            "user": None if planned.tenant.name == "default" else planned.tenant.name,
        }
        fields.update({name: value for name, value in optional.items() if value is not None})
        return json.dumps({**fields, **self.extra_body}, ensure_ascii=False).encode()

    def headers(self, planned: Planned) -> dict[str, str]:
        """Return the headers of a request."""
        key = planned.tenant.api_key or self.api_key
        # identity: compressed pictures cost both sides time, and the answer is read as it comes
        headers = {
            "content-type": "application/json",
            "accept": "application/json",
            "accept-encoding": "identity",
        }
        return headers | ({"authorization": f"Bearer {key}"} if key else {})


def make_pool(mix: Mix) -> tuple[Picture, ...]:
    """Draw the pictures that are asked for: every prompt in turn, a seed each, the rest by its shares."""
    rng = _rng(mix.seed, "pool")
    return tuple(
        Picture(
            prompt=mix.prompts[index % len(mix.prompts)],
            seed=int(rng.integers(0, 2**31)),
            size=_choose(rng, mix.sizes),
            n=_choose(rng, mix.counts),
            output_format=_choose(rng, mix.formats),
        )
        for index in range(mix.pool)
    )


def plan(
    mix: Mix, pool: Sequence[Picture], *, rate: float, seconds: float, cv: float, repeat: int
) -> list[Planned]:
    """Plan one measurement: arrival times, and for each a picture, a tenant and a deadline."""
    rng = _rng(mix.seed, f"plan {rate!r} {repeat}")
    offsets = draw_offsets(rng, rate, seconds, cv)
    weights = np.arange(1, len(pool) + 1, dtype=float) ** -mix.zipf
    chosen = rng.choice(len(pool), size=len(offsets), p=weights / weights.sum())
    shares = tuple((tenant, tenant.share) for tenant in mix.tenants)
    tenants = _choose_many(rng, shares, len(offsets))
    deadlines = _choose_many(rng, mix.deadlines_ms, len(offsets))
    return [
        Planned(float(offset), pool[index], tenant, deadline)
        for offset, index, tenant, deadline in zip(offsets, chosen, tenants, deadlines, strict=True)
    ]


def trace_pool(mix: Mix, rows: Sequence[TraceRow]) -> tuple[Picture, ...]:
    """Return the different pictures of a trace, in order of appearance; what a row leaves out the mix fills in."""
    return tuple(dict.fromkeys(planned.picture for planned in replay(mix, rows, speed=1.0)))


def replay(mix: Mix, rows: Sequence[TraceRow], *, speed: float) -> list[Planned]:
    """Plan a trace, `speed` times as fast as it was recorded."""
    fill = make_pool(mix)
    tenants = {tenant.name: tenant for tenant in mix.tenants}
    planned = []
    for index, row in enumerate(rows):
        default = fill[index % len(fill)]
        name = str(row.fields.get("tenant", mix.tenants[0].name))
        picture = Picture(
            prompt=str(row.fields.get("prompt", default.prompt)),
            seed=int(row.fields.get("seed", default.seed)),
            size=row.fields.get("size", default.size),
            n=int(row.fields.get("n", default.n)),
            output_format=default.output_format,
        )
        tenant = tenants.get(name, Tenant(name))
        planned.append(Planned(row.offset_s / speed, picture, tenant, row.fields.get("deadline_ms")))
    return planned


def _rng(seed: int, purpose: str) -> np.random.Generator:
    return np.random.default_rng([seed, *purpose.encode()])


def _choose(rng: np.random.Generator, shares: Sequence[tuple[Value, float]]) -> Value:
    return _choose_many(rng, shares, 1)[0]


def _choose_many(rng: np.random.Generator, shares: Sequence[tuple[Value, float]], count: int) -> list[Value]:
    weights = np.array([weight for _, weight in shares])
    indices = rng.choice(len(shares), size=count, p=weights / weights.sum())
    return [shares[index][0] for index in indices]

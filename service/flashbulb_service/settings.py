"""Every setting of the service, read once at start and passed on explicitly.

Each field is an environment variable with the prefix ``FLASHBULB_`` (``FLASHBULB_MODELS=/srv/models``);
an option of the command line wins over it.
"""

import os
import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict, SettingsError

from flashbulb_service.errors import InvalidRequest
from flashbulb_service.tenants.access import AuthMode
from flashbulb_service.webhooks import secret_key

BackendName = Literal["auto", "onnx", "tensorrt", "torch", "synthetic"]

SECRETS_DIR = (
    "FLASHBULB_SECRETS_DIR"  # folder of files named as settings (flashbulb_redis), as containers mount them
)


def state_folder() -> Path:
    """Return where a program may keep data of its own on this machine (XDG state folder)."""
    base = os.environ.get("XDG_STATE_HOME")
    return (Path(base) if base else Path.home() / ".local" / "state") / "flashbulb"


def check_names(
    environment: Iterable[str], *, others: Sequence[str] = ("FLASHBULB_API_KEY", SECRETS_DIR)
) -> None:
    """Refuse a variable with our prefix that is no setting; `others` belong to single commands.

    Raises:
        InvalidRequest: there is one; tells the nearest name that exists.
    """
    known = [f"FLASHBULB_{name.upper()}" for name in Settings.model_fields]
    for name in sorted(environment):
        if name.upper().startswith("FLASHBULB_") and name.upper() not in (*known, *others):
            near = get_close_matches(name.upper(), known, n=1)
            hint = f"did you mean {near[0]}?" if near else "unset it"
            raise InvalidRequest(f"unknown setting {name} in the environment: {hint}", param=name)


class Settings(BaseSettings):
    """Settings of the API, the worker and the all-in-one server."""

    model_config = SettingsConfigDict(
        env_prefix="FLASHBULB_", frozen=True, extra="forbid", hide_input_in_errors=True
    )

    # where things are
    models: Path = Field(
        default=Path("models"),
        description="model repository: <name>/<version>/ bundles; or what models_url takes",
    )
    models_url: str | None = Field(
        default=None,
        pattern=r"^[a-z0-9]+://",
        description="s3://bucket/prefix, https:// or file:// of a repository that is followed into <data>/models",
    )
    models_wanted: frozenset[str] = Field(
        default=frozenset(),
        description='["emoji", "sdxl@2"]: what to take of models_url; empty: all it lists',
    )
    models_poll_s: float = Field(
        default=60.0, ge=0, description="models_url is looked at again this often; 0: at the start only"
    )
    models_max_bytes: int = Field(
        default=64 << 30, gt=0, description="all bundles of models_url together; more are refused"
    )
    data: Path = Field(default_factory=state_folder, description="queue and results of the embedded mode")
    redis: str | None = Field(default=None, description="redis:// or unix:// URL; absent: embedded Valkey")
    namespace: str = Field(
        default="flashbulb",
        pattern=r"^[A-Za-z0-9_-]{1,64}$",
        description="prefix of every key in Redis; several services can share one server",
    )
    results_url: str | None = Field(default=None, description="obstore URL; absent: file://<data>/results")

    # the API
    host: str = Field(default="127.0.0.1", description="address that the API listens on")
    auth: AuthMode = Field(
        default="auto", description="keys: every request needs one; off: none; auto: keys but on loopback"
    )
    port: int = Field(default=8000, ge=0, le=65535, description="port of the API; 0: any free one")
    allowed_hosts: frozenset[str] = Field(
        default=frozenset(),
        description='["pictures.example"]: accepted in the Host header, on loopback besides its own names; '
        "elsewhere empty: any, and /livez, /readyz and /metrics take any",
    )
    public_url: str | None = Field(
        default=None,
        pattern=r"^https?://[A-Za-z0-9._\-\[\]:]+(/[A-Za-z0-9._~/-]*)?$",
        description="where clients reach the API, for addresses in answers; absent: the checked Host header",
    )
    default_model: str | None = Field(default=None, description="for requests without one; absent: the first")
    model_aliases: dict[str, str] = Field(default_factory=dict, description='{"gpt-image-1": "emoji"}')
    max_body_bytes: int = Field(default=1 << 20, gt=0, description="body of a request without pictures")
    head_timeout_s: float = Field(
        default=10.0, gt=0, description="time a client has for the headers of a request"
    )
    body_timeout_s: float = Field(
        default=30.0, gt=0, description="time a client has for the body of a request"
    )
    webhook_secret: str | None = Field(
        default=None, repr=False, description="whsec_<base64>; absent: no webhooks"
    )
    webhook_allow_private: bool = Field(default=False, description="webhooks may go to private addresses")
    openai_aliases: bool = Field(
        default=True,
        description="OpenAI's own model names mean the default model, where no model has the name",
    )
    max_upload_bytes: int = Field(default=32 << 20, gt=0, description="body of a request with pictures")
    max_prompt_chars: int = Field(default=2000, gt=0, description="longest prompt")
    request_timeout_s: float = Field(
        default=600.0, gt=0, description="longest wait of a request for its pictures"
    )
    slo_s: float = Field(default=60.0, gt=0, description="deadline of requests that name none")
    slo_long_s: float = Field(default=3600.0, gt=0, description="the same for long work, such as videos")

    # the worker
    backend: BackendName = Field(
        default="auto",
        description="what runs models; auto: by bundle and machine; synthetic: a device for drills",
    )
    synthetic: str = Field(
        default="", description="JSON options of the synthetic backend: see backends/synthetic.py"
    )
    threads: int = Field(
        default=0, ge=0, description="threads of one worker's operators; 0: one per core that it may use"
    )
    max_batch: int = Field(default=64, ge=1, description="upper limit on top of what each bundle allows")
    max_batch_tokens: int | None = Field(
        default=None,
        gt=0,
        description="of one batch on the device: patches of 16 x 16 pixels, times frames, times steps, of all rows; "
        "absent: max_batch alone decides",
    )
    determinism: Literal["strict", "fast"] = Field(
        default="strict", description="strict: equal bytes in any batch; fast: any batch size as it comes"
    )
    models_memory_bytes: int | None = Field(
        default=None, gt=0, description="memory of all loaded models of a worker; absent: no cap"
    )
    embedding_cache_mb: int = Field(default=64, ge=0, description="memory for embeddings of repeated prompts")
    lease_s: float = Field(
        default=10.0, gt=0, description="a batch whose worker is silent this long is retried"
    )
    drain_s: float = Field(default=30.0, ge=0, description="time a stopping worker has for the batch in hand")
    drain_notice_s: float = Field(
        default=0.0,
        ge=0,
        description="a stopping API says 503 on /readyz this long before it takes no more connections",
    )
    ready_without_workers: bool = Field(
        default=False,
        description="an API is ready on /readyz, and offers models, with no worker too: what waits starts one",
    )

    # what a picture says about itself (docs/safety.md)
    mark_pictures: bool = Field(
        default=True, description="AI-generated mark and receipt as XMP in every file"
    )
    mark_prompts: bool = Field(default=False, description="the mark also tells the prompt")
    c2pa_certificate: Path | None = Field(default=None, description="PEM chain; with c2pa_key: sign files")
    c2pa_key: Path | None = Field(default=None, description="PEM private key of the certificate")
    c2pa_algorithm: Literal["es256", "es384", "es512", "ps256", "ps384", "ps512", "ed25519"] = Field(
        default="es256", description="what the key signs with"
    )

    # what may be asked for and shown (docs/safety.md)
    blocked_words: Path | None = Field(default=None, description="file: prompts with one of them are refused")
    image_checker: str | None = Field(
        default=None, description="module:factory, such as flashbulb_service.nsfw:NsfwChecker"
    )
    image_threshold: float = Field(
        default=0.5, ge=0, le=1, description="score from which NsfwChecker holds pictures back"
    )

    # results
    results_ttl_s: float = Field(
        default=24 * 3600.0, gt=0, description="pictures in file:// stores live this long"
    )
    results_max_bytes: int = Field(
        default=2 << 30, gt=0, description="all pictures of a file:// store together; the oldest go first"
    )

    metrics_host: str = Field(default="127.0.0.1", description="address of a worker's own /metrics")
    metrics_port: int | None = Field(
        default=None, ge=0, le=65535, description="a worker's own /metrics; absent: only through the API's"
    )
    otlp_endpoint: str | None = Field(
        default=None,
        pattern=r"^https?://\S+$",
        description="OpenTelemetry collector that gets traces, such as http://127.0.0.1:4318; absent: no traces",
    )
    trace_share: float = Field(
        default=1.0,
        ge=0,
        le=1,
        description="share of requests that are traced, of those whose client did not decide",
    )
    log_format: Literal["console", "json"] = Field(
        default="console", description="console: for people; json: an object a line"
    )

    @model_validator(mode="before")
    @classmethod
    def _follow_store(cls, values: Any) -> Any:
        """Let `models` be a store too; the repository is then a folder of the data."""
        if isinstance(values, dict):
            given = str(values.get("models", ""))
            url = given if "://" in given else values.get("models_url")
            if not url:  # compose writes an empty variable for one that is not set
                return {name: value for name, value in values.items() if name != "models_url"}
            data = Path(values["data"]) if values.get("data") else state_folder()
            return {**values, "models_url": url, "models": data.expanduser() / "models"}
        return values

    @field_validator("webhook_secret")
    @classmethod
    def _check_secret(cls, value: str | None) -> str | None:
        if value is not None:
            secret_key(value)
        return value

    @field_validator("redis")
    @classmethod
    def _check_redis(cls, value: str | None) -> str | None:
        if value is not None and not value.startswith(("redis://", "rediss://", "unix://")):
            scheme = value.partition("://")[0] if "://" in value else ""
            raise ValueError(f"expected redis://, rediss:// or unix://, got the scheme {scheme!r}")
        return value

    @field_validator("allowed_hosts")
    @classmethod
    def _fold_hosts(cls, value: frozenset[str]) -> frozenset[str]:
        return frozenset(name.lower() for name in value)

    @property
    def results_location(self) -> str:
        """Return the obstore URL of the result store."""
        return self.results_url or (self.data.expanduser().resolve() / "results").as_uri()


def read_settings(**given: object) -> Settings:
    """Read secret files and the environment; the latter wins, and options that were given (are not None) over both.

    Raises:
        InvalidRequest: a setting has a value that it cannot have, or the folder of secrets is missing; names the first.
    """
    check_names(os.environ)
    secrets = os.environ.get(SECRETS_DIR)
    if secrets and not Path(secrets).is_dir():
        raise InvalidRequest(
            f"expected a folder in {SECRETS_DIR}, found none at {secrets}", param=SECRETS_DIR
        )
    try:
        values = {name: value for name, value in given.items() if value is not None}
        return Settings(_secrets_dir=secrets or None, **values)  # type: ignore[arg-type]
    except ValidationError as error:
        problem = error.errors()[0]
        name = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "value_error":  # our own words, which leave secrets out
            raise InvalidRequest(f"setting {name}: {problem['ctx']['error']}", param=name) from error
        raise InvalidRequest(
            f"setting {name}: {problem['msg']}, got {problem['input']!r}", param=name
        ) from error
    except SettingsError as error:
        found = re.search(r'field "(\w+)"', str(error))
        name = f"FLASHBULB_{found[1].upper()}" if found else "a setting"
        example = ': write {"gpt-image-1": "emoji"}' if name.endswith("_ALIASES") else ""
        raise InvalidRequest(
            f"expected JSON in {name}, got {os.environ.get(name, '')[:80]!r}{example}", param=name
        ) from error

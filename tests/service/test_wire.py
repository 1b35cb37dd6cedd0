"""Two versions share one queue: each says what the other understands, and leaves alone what it does not.

The forms of version 1 are written down here as that version had them; they are its readers.
"""

import hashlib
import json
from collections.abc import Callable
from typing import Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from redis.asyncio import Redis

from flashbulb_service import presence, wire
from flashbulb_service.api.plan import body_digest
from flashbulb_service.api.schemas import ImagesRequest
from flashbulb_service.errors import NewerMessage
from flashbulb_service.jobs import NewJob
from flashbulb_service.presence import LiveWorker
from flashbulb_service.queue import Queue, scripts
from flashbulb_service.tasks import ImageOutcome, ImageTask, Message, Preview, RequestRecord


class First(BaseModel):
    """A reader of version 1: a name that it does not know is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class FirstTask(First):
    prompt: str
    seed: int
    index: int
    width: int
    height: int
    steps: int | None = None
    partial_images: int = 0
    bundle_sha256: str | None = None
    image_format: Literal["png", "jpeg", "webp"] = "png"
    quality: int = 100
    request_id: str = ""
    traceparent: str = ""


class FirstPreview(First):
    file: str
    partial_image_index: int
    step: int
    steps: int


class FirstOutcome(First):
    file: str
    batch_size: int
    batch_ms: float
    encode_ms: float
    stages_ms: dict[str, float] = Field(default_factory=dict)
    bundle_sha256: str
    backend: str = "unknown"


class FirstRecord(First):
    task: Literal["text-to-image"]
    model: str
    prompt: str
    seed: int
    n: int
    width: int
    height: int
    steps: int
    response_format: Literal["b64_json", "url"]
    image_format: Literal["png", "jpeg", "webp"]
    quality: str
    metadata: dict[str, str] = Field(default_factory=dict)
    webhook_url: str | None = None
    webhook_events: tuple[str, ...] = ()


TASK = {"prompt": "red apple", "seed": 7, "index": 0, "width": 64, "height": 64}
RECORD = {
    **{name: TASK[name] for name in ("prompt", "seed", "width", "height")},
    "task": "text-to-image",
    "model": "emoji@1",
    "n": 1,
    "steps": 1,
    "quality": "auto",
    "response_format": "url",
    "image_format": "png",
}
OUTCOME = {"file": "a.png", "batch_size": 2, "batch_ms": 9.5, "encode_ms": 0.5, "bundle_sha256": "0" * 64}
PREVIEW = {"file": "p.png", "partial_image_index": 0, "step": 1, "steps": 4}
FULL_TASK = {
    **TASK,
    "steps": 4,
    "partial_images": 3,
    "bundle_sha256": "1" * 64,
    "image_format": "webp",
    "quality": 50,
    "request_id": "req_1",
    "traceparent": "00-ab-cd-01",
}
FULL_RECORD = {
    **RECORD,
    "metadata": {"a": "b"},
    "webhook_url": "https://x/",
    "webhook_events": ("job.failed",),
}
FULL_OUTCOME = {**OUTCOME, "stages_ms": {"text": 1.0}, "backend": "onnx"}

Pair = tuple[type[Message], type[First], dict[str, object]]
PAIRS: list[Pair] = [
    *[(ImageTask, FirstTask, fields) for fields in (TASK, FULL_TASK)],
    *[(RequestRecord, FirstRecord, fields) for fields in (RECORD, FULL_RECORD)],
    *[(ImageOutcome, FirstOutcome, fields) for fields in (OUTCOME, FULL_OUTCOME)],
    (Preview, FirstPreview, PREVIEW),
]


@pytest.mark.parametrize(
    ("now", "first", "fields"), PAIRS, ids=lambda value: getattr(value, "__name__", None)
)
def test_both_versions_read_what_either_wrote_in_the_same_sense(
    now: type[Message], first: type[First], fields: dict[str, object]
) -> None:
    written = now(**fields).to_bytes()
    theirs = first.model_validate_json(written).model_dump()
    assert theirs.items() <= now(**fields).model_dump().items()
    assert theirs == first(**fields).model_dump()
    assert now.from_bytes(first(**fields).model_dump_json().encode()) == now(**fields)


def test_a_new_field_is_not_told_to_version_1_until_somebody_uses_it() -> None:
    class NextTask(ImageTask):
        strength: float = 1.0

    FirstTask.model_validate_json(NextTask(**TASK).to_bytes())
    with pytest.raises(ValidationError, match="strength"):
        FirstTask.model_validate_json(NextTask(**TASK, strength=0.5).to_bytes())


def test_what_nobody_here_knows_is_ignored_unless_it_is_said_to_matter() -> None:
    sent = {**TASK, "sparkle": "lots"}
    assert ImageTask.from_bytes(json.dumps(sent).encode()) == ImageTask(**TASK)
    for number in (wire.WIRE, wire.WIRE + 1):
        data = json.dumps({**sent, "wire": number}).encode()
        if number > wire.WIRE:
            with pytest.raises(NewerMessage, match=f"{wire.WIRE} or before, got {number}"):
                ImageTask.from_bytes(data)
        else:
            assert ImageTask.from_bytes(data).wire == number


def test_a_worker_of_version_1_is_known_by_its_silence() -> None:
    words = {"id": "w", "models": ["emoji@1"], "backend": "onnx", "bundles": ["0"], "backends": ["onnx"]}
    assert presence._from_member(json.dumps(words).encode()).wire == 1
    own = LiveWorker("w", ("emoji@1",), "onnx")
    assert presence._from_member(presence._to_member(own).encode()) == own
    assert own.wire == wire.WIRE


@pytest.fixture
def later_queue(monkeypatch: pytest.MonkeyPatch, make_queue: Callable[..., Queue]) -> Queue:
    """A queue as the next version has it."""
    scripts.source.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(scripts, "WIRE", wire.WIRE + 1)
        queue = make_queue()
    scripts.source.cache_clear()
    return queue


async def test_a_worker_leaves_what_it_would_misread_to_a_later_version(
    queue: Queue, later_queue: Queue
) -> None:
    def new(payload: bytes, number: int) -> NewJob:
        return NewJob("emoji@1", "64x64", payload, wire=number)

    both = await queue.enqueue([new(b"later", wire.WIRE + 1), new(b"now", wire.WIRE)])
    assert [job.payload for job in await queue.claim("w", ["emoji@1"], 8, 60)] == [b"now"]
    assert await queue.claim("w", ["emoji@1"], 8, 60) == []
    left = await queue.get(both.ids[0])
    assert left is not None and (left.state, left.attempt) == ("queued", 0)
    assert [job.payload for job in await later_queue.claim("v", ["emoji@1"], 8, 60)] == [b"later"]


async def test_a_job_of_version_1_says_nothing_and_is_taken(queue: Queue, client: Redis) -> None:
    (job_id,) = (await queue.enqueue([NewJob("emoji@1", "64x64", b"old")])).ids
    assert await client.hdel(queue.keys.job(job_id), "wire") == 1
    assert [job.id for job in await queue.claim("w", ["emoji@1"], 8, 60)] == [job_id]


async def test_a_token_says_no_more_than_version_1_can_read(queue: Queue) -> None:
    await queue.enqueue([NewJob("emoji@1", "64x64", b"{}", wire=wire.WIRE)])
    wake = await queue.wait_for_work(["emoji@1"], 5)
    assert wake is not None and wake.lone is None
    assert len(await queue.claim("w", ["emoji@1"], 8, 60)) == 1
    await queue.enqueue([NewJob("emoji@1", "64x64", b"{}")])
    wake = await queue.wait_for_work(["emoji@1"], 5)
    assert wake is not None and wake.lone is not None
    assert len(await queue.claim("w", ["emoji@1"], 8, 60)) == 1


def test_a_request_for_pictures_has_the_digest_of_version_1_so_that_its_key_outlives_the_upgrade() -> None:
    asked = {"n": 2, "prompt": "dog"}
    first = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
    assert body_digest(ImagesRequest.model_validate({**asked, "idempotency_key": "k"}), None) == first

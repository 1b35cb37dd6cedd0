"""The unmodified OpenAI client against the real thing: uvicorn, Valkey, a worker, the tiny bundle."""

import base64
import hashlib
import io
from collections.abc import Awaitable, Callable
from pathlib import Path

import httpx2
import numpy as np
import openai
import pytest
from openai import OpenAI
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from flashbulb_service.wire import WIRE

WaitUntil = Callable[..., Awaitable[None]]


def pixels(b64: str | None) -> np.ndarray:
    assert b64 is not None
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(b64))).convert("RGB"))


def test_generate_returns_a_picture(openai_client: OpenAI) -> None:
    answer = openai_client.images.generate(model="tiny", prompt="red apple", size="64x64")
    assert answer.data is not None
    assert pixels(answer.data[0].b64_json).shape == (64, 64, 3)
    assert answer.created > 1_700_000_000


def test_only_the_prompt_is_required(openai_client: OpenAI) -> None:
    answer = openai_client.images.generate(prompt="red apple")
    assert answer.data is not None and len(answer.data) == 1
    assert answer.model_extra is not None and answer.model_extra["model"] == "tiny@2"  # the newest version


def test_n_images_differ_and_share_the_seed(openai_client: OpenAI) -> None:
    answer = openai_client.images.generate(prompt="red apple", n=4, extra_body={"seed": 7})
    assert answer.data is not None
    assert len({image.b64_json for image in answer.data}) == 4
    assert [(image.seed, image.index) for image in answer.data] == [(7, i) for i in range(4)]  # type: ignore[attr-defined]


def test_same_seed_gives_same_picture_and_another_seed_another(openai_client: OpenAI) -> None:
    def draw(seed: int, n: int) -> list[str | None]:
        answer = openai_client.images.generate(prompt="blue heart", n=n, extra_body={"seed": seed})
        assert answer.data is not None
        return [image.b64_json for image in answer.data]

    assert draw(7, 1)[0] == draw(7, 5)[0]
    assert draw(7, 3) == draw(7, 3)
    assert draw(7, 1) != draw(8, 1)


def test_absent_seed_is_random_and_echoed(openai_client: OpenAI) -> None:
    first, second = (openai_client.images.generate(prompt="dog").data for _ in range(2))
    assert first is not None and second is not None
    seed = first[0].seed  # type: ignore[attr-defined]
    assert seed != second[0].seed  # type: ignore[attr-defined]
    again = openai_client.images.generate(prompt="dog", extra_body={"seed": seed}).data
    assert again is not None and again[0].b64_json == first[0].b64_json


def test_url_serves_the_same_bytes_as_b64_json(openai_client: OpenAI) -> None:
    seed = {"seed": 3}
    by_url = openai_client.images.generate(prompt="rocket", response_format="url", extra_body=seed).data
    inline = openai_client.images.generate(prompt="rocket", response_format="b64_json", extra_body=seed).data
    assert by_url is not None and inline is not None and by_url[0].url is not None
    assert by_url[0].b64_json is None
    answer = httpx2.get(by_url[0].url)
    assert answer.headers["content-type"] == "image/png"
    assert answer.content == base64.b64decode(inline[0].b64_json or "")


@pytest.mark.parametrize(("name", "kind"), [("png", "PNG"), ("jpeg", "JPEG"), ("webp", "WEBP")])
def test_output_format(openai_client: OpenAI, name: str, kind: str) -> None:
    answer = openai_client.images.generate(prompt="red heart", output_format=name)  # type: ignore[call-overload]
    assert Image.open(io.BytesIO(base64.b64decode(answer.data[0].b64_json))).format == kind


def test_lower_output_compression_gives_a_smaller_file(openai_client: OpenAI) -> None:
    sizes = [
        len(
            openai_client.images.generate(
                prompt="dog", output_format="jpeg", output_compression=quality, extra_body={"seed": 1}
            )
            .data[0]
            .b64_json  # type: ignore[index, arg-type]
        )
        for quality in (10, 95)
    ]
    assert sizes[0] < sizes[1] / 2


def test_timings_are_told(http: httpx2.Client) -> None:
    answer = http.post("/v1/images/generations", json={"prompt": "dog", "n": 3})
    timings = answer.json()["timings"]
    assert 0 < timings["batch_ms"] < timings["total_ms"]
    assert set(timings) == {"queue_ms", "batch_ms", "encode_ms", "total_ms"}
    assert 1 <= answer.json()["batch_size"] <= 8
    assert f"total;dur={timings['total_ms']}" in answer.headers["server-timing"]


def test_the_receipt_says_what_drew_the_pictures(http: httpx2.Client, models_dir: Path) -> None:
    answer = http.post("/v1/images/generations", json={"model": "tiny@1", "prompt": "dog", "n": 3})
    receipt = answer.json()["receipt"]
    manifest = (models_dir / "tiny" / "1" / "manifest.json").read_bytes()
    assert receipt["sha256"] == hashlib.sha256(manifest).hexdigest()
    assert (receipt["model"], receipt["version"], receipt["backend"]) == ("tiny", 1, "onnx")
    assert receipt["timings"] == answer.json()["timings"]
    assert 0 < receipt["device_ms"] <= 3 * receipt["timings"]["batch_ms"]
    assert answer.headers["x-flashbulb-model"] == "tiny@1"
    assert answer.headers["x-flashbulb-sha256"] == receipt["sha256"]
    assert answer.headers["x-flashbulb-batch-size"] == str(receipt["batch_size"])
    assert answer.headers["x-flashbulb-device-ms"] == str(receipt["device_ms"])


@pytest.mark.parametrize(
    ("arguments", "error", "code", "param"),
    [
        ({"prompt": ""}, openai.BadRequestError, "empty_string", "prompt"),
        ({"prompt": " \n"}, openai.BadRequestError, "empty_string", "prompt"),
        ({"prompt": "a" * 2001}, openai.BadRequestError, "string_above_max_length", "prompt"),
        ({"model": "gpt-image-9"}, openai.NotFoundError, "model_not_found", "model"),
        ({"size": "512x512"}, openai.BadRequestError, "invalid_size", "size"),
        ({"n": 11}, openai.BadRequestError, "integer_above_max_value", "n"),
        ({"n": 0}, openai.BadRequestError, "integer_below_min_value", "n"),
        ({"n": "three"}, openai.BadRequestError, "invalid_type", "n"),
        ({"output_format": "svg"}, openai.BadRequestError, "invalid_value", "output_format"),
        ({"output_compression": 50}, openai.BadRequestError, "invalid_value", "output_compression"),
        ({"background": "transparent"}, openai.BadRequestError, "unsupported_value", "background"),
        ({"extra_body": {"seed": -1}}, openai.BadRequestError, "integer_below_min_value", "seed"),
        ({"extra_body": {"seed": 2**63}}, openai.BadRequestError, "integer_above_max_value", "seed"),
        ({"extra_body": {"sede": 1}}, openai.BadRequestError, "unknown_parameter", "sede"),
    ],
)
def test_bad_requests_are_typed(
    openai_client: OpenAI,
    arguments: dict[str, object],
    error: type[openai.APIStatusError],
    code: str,
    param: str,
) -> None:
    with pytest.raises(error) as caught:
        openai_client.images.generate(**{"prompt": "red apple", **arguments})  # type: ignore[call-overload]
    assert (caught.value.code, caught.value.param) == (code, param)
    assert caught.value.type == "invalid_request_error"
    assert caught.value.request_id is not None and caught.value.request_id.startswith("req_")


def test_unknown_field_gets_a_suggestion(http: httpx2.Client) -> None:
    answer = http.post("/v1/images/generations", json={"prompt": "dog", "respone_format": "url"})
    assert "did you mean 'response_format'?" in answer.json()["error"]["message"]


def test_ignored_openai_fields_are_named_in_a_header(http: httpx2.Client) -> None:
    body = {"prompt": "dog", "quality": "high", "style": "vivid", "moderation": None, "background": "auto"}
    answer = http.post("/v1/images/generations", json=body)
    assert answer.status_code == 200
    assert answer.headers["x-flashbulb-warning"] == "ignored: quality, style"


def test_models_are_listed_and_found(openai_client: OpenAI) -> None:
    assert [(model.id, model.object) for model in openai_client.models.list()] == [
        ("tiny", "model"),
        ("tiny-few", "model"),
    ]
    older = openai_client.models.retrieve("tiny@1")
    assert older.model_extra is not None and older.model_extra["version"] == 1
    with pytest.raises(openai.NotFoundError) as caught:
        openai_client.models.retrieve("other")
    assert caught.value.code == "model_not_found"


def test_versions_are_different_models(openai_client: OpenAI) -> None:
    def draw(model: str) -> str | None:
        answer = openai_client.images.generate(model=model, prompt="dog", extra_body={"seed": 1})
        assert answer.data is not None
        return answer.data[0].b64_json

    assert draw("tiny@1") != draw("tiny@2") == draw("tiny")


def test_idempotency_key_replays_the_first_answer(openai_client: OpenAI) -> None:
    def draw(prompt: str) -> str | None:
        answer = openai_client.images.generate(prompt=prompt, extra_headers={"Idempotency-Key": "order-17"})
        assert answer.data is not None
        return answer.data[0].b64_json

    assert draw("green rocket") == draw("green rocket")  # though no seed was given
    with pytest.raises(openai.ConflictError) as caught:
        draw("red rocket")
    assert caught.value.code == "idempotency_conflict"
    assert caught.value.response.headers["x-should-retry"] == "false"


async def test_metrics_count_pictures_and_requests(http: httpx2.Client, wait_until: WaitUntil) -> None:
    scraped = ""  # one instant: the worker publishes its numbers together, at its heartbeats

    def value(name: str) -> float:
        return sum(float(line.rpartition(" ")[2]) for line in scraped.splitlines() if line.startswith(name))

    def labelled(name: str, **labels: str) -> float:
        families = text_string_to_metric_families(scraped)
        samples = [sample for family in families for sample in family.samples if sample.name == name]
        return sum(s.value for s in samples if labels.items() <= s.labels.items())

    def images() -> float:
        nonlocal scraped
        scraped = http.get("/metrics").text
        return labelled("flashbulb_images_total", model="tiny@2")

    http.post("/v1/images/generations", json={"prompt": "dog", "n": 3})

    async def published() -> bool:
        return images() >= 3

    await wait_until(published)
    drawn_images = labelled("flashbulb_images_total", model="tiny@2")
    assert drawn_images >= 3
    assert value('flashbulb_requests_total{method="POST",route="/v1/images/generations",status="200"}') >= 1
    assert value("flashbulb_workers") == 1
    assert value('flashbulb_overhead_seconds_count{model="tiny@2"}') >= 1
    drawn = labelled("flashbulb_batch_size_count", model="tiny@2")
    assert labelled("flashbulb_stage_seconds_count", model="tiny@2", stage="denoise") == drawn >= 1
    assert labelled("flashbulb_stage_seconds_count", model="tiny@2", stage="store") == drawn_images
    assert labelled("flashbulb_queue_wait_seconds_count", model="tiny@2") >= drawn_images
    assert 0 < labelled("flashbulb_model_load_seconds", model="tiny@2") < 60


def test_ready_names_the_models(http: httpx2.Client) -> None:
    assert http.get("/readyz").json() == {
        "status": "ready",
        "models": ["tiny@1", "tiny@2", "tiny-few@1"],
        "workers": 1,
        "backends": {"tiny@1": ["onnx"], "tiny@2": ["onnx"], "tiny-few@1": ["onnx"]},
        "wire": {"api": WIRE, "workers": {str(WIRE): 1}},
    }
    assert http.get("/livez").status_code == 200

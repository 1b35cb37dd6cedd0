"""A worker with a student of pictures and one of videos, whose steps a test can watch and hold."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
from openai import OpenAI

from flashbulb_distill.bundle import Bundle, open_bundle
from flashbulb_service.backends import Backend, Embeddings, ImageRequest, OnStep, Student
from flashbulb_service.backends.onnx import OnnxBackend
from flashbulb_service.catalog import Model
from flashbulb_service.jobs import NewJob
from flashbulb_service.model_pool import LoadedModel, ModelPool
from flashbulb_service.presence import Presence
from flashbulb_service.queue import Queue
from flashbulb_service.results import ResultStore
from flashbulb_service.scheduler import LONG, bucket_name
from flashbulb_service.tasks import ImageTask
from flashbulb_service.worker import Worker
from support.serving import Serving
from support.tiny_bundle import FPS, FRAMES, make_tiny_bundle, make_tiny_video_bundle

STEPS = 4


@pytest.fixture(scope="session")
def models_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    make_tiny_bundle(folder)
    make_tiny_video_bundle(folder)
    return folder


@pytest.fixture(scope="session")
def bundles(models_dir: Path) -> dict[str, Bundle]:
    return {name: open_bundle(models_dir / name / "1") for name in ("tiny", "tiny-video")}


@dataclass
class Stepwise:
    """A backend that writes down what ran, and calls the test at the end of each step."""

    inner: Backend
    log: list[str]
    is_video: bool
    name: str = "onnx"
    at_step: Callable[[int, Sequence[ImageRequest]], None] = lambda step, requests: None
    sizes: list[int] = field(default_factory=list)
    step_s: float = 0.0

    def load(self, bundle: Bundle) -> None:
        self.inner.load(bundle)

    def encode_prompts(self, prompts: Sequence[str], pad_to: int | None = None) -> Embeddings:
        return self.inner.encode_prompts(prompts, pad_to)

    def denoise(
        self, requests: Sequence[ImageRequest], embeddings: Embeddings, on_step: OnStep | None = None
    ) -> np.ndarray:
        self.sizes.append(len(requests))

        def watch(step: int, num_steps: int, x0: np.ndarray) -> None:
            self.log.append(f"step {step + 1}" if self.is_video else "image")
            time.sleep(self.step_s)
            self.at_step(step + 1, requests)
            if on_step:
                on_step(step, num_steps, x0)

        return self.inner.denoise(requests, embeddings, watch)

    def decode(self, latents: np.ndarray) -> np.ndarray:
        return self.inner.decode(latents)

    def close(self) -> None:
        self.inner.close()


@dataclass
class Mixed:
    """What a test of both media needs."""

    queue: Queue
    results: ResultStore
    log: list[str]
    images: Stepwise
    videos: Stepwise
    start: Callable[..., Worker]


@pytest_asyncio.fixture
async def mixed(
    make_queue: Callable[..., Queue],
    redis_url: str,
    namespace: str,
    bundles: dict[str, Bundle],
    tmp_path: Path,
) -> AsyncIterator[Mixed]:
    presence = Presence.connect(redis_url, namespace=namespace)
    results = ResultStore((tmp_path / "results").as_uri(), ttl_s=3600)
    log: list[str] = []
    backends = {}
    for name, bundle in bundles.items():
        onnx = OnnxBackend(threads=1)
        onnx.load(bundle)
        backends[name] = Stepwise(onnx, log, bundle.manifest.is_video)
    stop, running = asyncio.Event(), []

    def start(**options: Any) -> Worker:
        models = [
            LoadedModel(Model(name, 1, bundle), Student(backends[name]), cap=8)
            for name, bundle in bundles.items()
        ]
        pool = ModelPool.holding(models)
        options = {"lease_s": 5.0, **options}
        worker = Worker(make_queue(), results, presence, pool, backend_name="onnx", **options)
        running.append(asyncio.create_task(worker.run(stop, drain_s=10)))
        return worker

    yield Mixed(make_queue(), results, log, backends["tiny"], backends["tiny-video"], start)
    stop.set()
    await asyncio.gather(*running)
    await presence.aclose()
    for backend in backends.values():
        backend.close()


def video_job(prompt: str = "red apple", seed: int = 7, **fields: object) -> NewJob:
    task = ImageTask(
        prompt=prompt, seed=seed, index=0, width=64, height=64, frames=FRAMES, fps=FPS, image_format="mp4"
    )
    bucket = bucket_name("tiny-video@1", 64, 64, STEPS, LONG, frames=FRAMES)
    given: dict[str, Any] = {"model": "tiny-video@1", "bucket": bucket, "payload": task.to_bytes()}
    return NewJob(**given | fields)


def image_job(prompt: str = "dog", seed: int = 7) -> NewJob:
    task = ImageTask(prompt=prompt, seed=seed, index=0, width=64, height=64)
    return NewJob(model="tiny@1", bucket=bucket_name("tiny@1", 64, 64, 1), payload=task.to_bytes())


@pytest.fixture(name="video_job")
def video_job_fixture() -> Callable[..., NewJob]:
    return video_job


@pytest.fixture(name="image_job")
def image_job_fixture() -> Callable[..., NewJob]:
    return image_job


@pytest.fixture(scope="session")
def server_url(models_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with Serving(models_dir, tmp_path_factory.mktemp("served") / "data") as serving:
        yield serving.url


SLOW = '{"floor_ms": 5, "base_ms": 4, "row_ms": 1, "frame_ms": 20}'  # a step of the video takes about 120 ms


@pytest.fixture(scope="session")
def slow_url(models_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server whose device sleeps: time to look at a video while it is made."""
    data = tmp_path_factory.mktemp("slow") / "data"
    with Serving(models_dir, data, "--backend", "synthetic", synthetic=SLOW, max_batch="2") as serving:
        yield serving.url


@pytest.fixture
def client(server_url: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server_url}/v1", api_key="none", max_retries=0) as openai:
        yield openai


@pytest.fixture
def slow_client(slow_url: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{slow_url}/v1", api_key="none", max_retries=0) as openai:
        yield openai

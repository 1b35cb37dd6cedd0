"""The tiny bundle, loaded once, and workers of this process on a real queue."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio

from flashbulb_distill.bundle import Bundle, open_bundle
from flashbulb_service.backends import Backend, Embeddings, ImageRequest, OnStep, Student
from flashbulb_service.backends.onnx import OnnxBackend
from flashbulb_service.catalog import Model
from flashbulb_service.head_start import WorkerEnd
from flashbulb_service.jobs import NewJob
from flashbulb_service.model_pool import LoadedModel, ModelPool
from flashbulb_service.presence import Presence
from flashbulb_service.queue import Queue
from flashbulb_service.results import ResultStore
from flashbulb_service.safety import ImageChecker
from flashbulb_service.tasks import ImageTask
from flashbulb_service.worker import Worker
from support.tiny_bundle import make_tiny_bundle


@pytest.fixture(scope="session")
def models_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    make_tiny_bundle(folder)
    return folder


@pytest.fixture(scope="session")
def bundle(models_dir: Path) -> Bundle:
    return open_bundle(models_dir / "tiny" / "1")


@pytest.fixture(scope="session")
def onnx(bundle: Bundle) -> Iterator[OnnxBackend]:
    backend = OnnxBackend(threads=1)
    backend.load(bundle)
    yield backend
    backend.close()


@dataclass
class Watched:
    """A backend that writes down its batches, and can be told to fail or to wait."""

    inner: Backend
    name: str = "onnx"
    batches: list[list[str]] = field(default_factory=list)
    before: Callable[[Sequence[ImageRequest]], None] = lambda requests: None

    def load(self, bundle: Bundle) -> None:
        self.inner.load(bundle)

    def encode_prompts(self, prompts: Sequence[str], pad_to: int | None = None) -> Embeddings:
        return self.inner.encode_prompts(prompts, pad_to)

    def denoise(
        self, requests: Sequence[ImageRequest], embeddings: Embeddings, on_step: OnStep | None = None
    ) -> np.ndarray:
        self.batches.append([request.prompt for request in requests])
        self.before(requests)
        return self.inner.denoise(requests, embeddings, on_step)

    def decode(self, latents: np.ndarray) -> np.ndarray:
        return self.inner.decode(latents)

    def close(self) -> None:
        """Leave the shared backend open."""


@pytest.fixture
def watched(onnx: OnnxBackend) -> Watched:
    return Watched(onnx)


@dataclass
class Running:
    """A worker at work."""

    worker: Worker
    stop: asyncio.Event
    task: "asyncio.Task[bool]"


StartWorker = Callable[..., Running]


@pytest_asyncio.fixture
async def start_worker(
    make_queue: Callable[..., Queue],
    redis_url: str,
    namespace: str,
    results: ResultStore,
    bundle: Bundle,
    watched: Watched,
) -> AsyncIterator[StartWorker]:
    presence = Presence.connect(redis_url, namespace=namespace)
    running: list[Running] = []

    def start(
        *,
        lease_s: float = 5.0,
        drain_s: float = 10.0,
        cap: int = 8,
        checker: ImageChecker | None = None,
        api: WorkerEnd | None = None,
    ) -> Running:
        loaded = LoadedModel(Model("tiny", 1, bundle), Student(watched), cap)
        worker = Worker(
            make_queue(),
            results,
            presence,
            ModelPool.holding([loaded]),
            backend_name="onnx",
            lease_s=lease_s,
            checker=checker,
            api=api,
        )
        stop = asyncio.Event()
        running.append(Running(worker, stop, asyncio.create_task(worker.run(stop, drain_s=drain_s))))
        return running[-1]

    yield start
    for one in running:
        one.stop.set()
    await asyncio.gather(*(one.task for one in running), return_exceptions=True)
    await presence.aclose()


@pytest.fixture
def results(tmp_path: Path) -> ResultStore:
    return ResultStore((tmp_path / "results").as_uri(), ttl_s=3600)


def picture_job(prompt: str = "red apple", seed: int = 7, index: int = 0, **fields: object) -> NewJob:
    task = ImageTask(prompt=prompt, seed=seed, index=index, width=64, height=64)
    return NewJob(
        **{"model": "tiny@1", "bucket": "tiny@1:64x64:1", "payload": task.to_bytes(), **fields}  # type: ignore[arg-type]
    )


@pytest.fixture(name="picture_job")
def picture_job_fixture() -> Callable[..., NewJob]:
    return picture_job


@pytest.fixture
def apple(onnx: OnnxBackend) -> np.ndarray:
    """The picture that `picture_job()` asks for."""
    return Student(onnx).generate([ImageRequest("red apple", 7, 0, 64, 64)])[0]

"""Models in memory: a cap that holds, the least recently used out first, nothing taken away from a batch that draws."""

import asyncio
import shutil
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from hypothesis import given
from hypothesis import strategies as st

from flashbulb_service import model_pool
from flashbulb_service import worker as worker_module
from flashbulb_service.backends import Student
from flashbulb_service.backends.embeddings import EmbeddingCache
from flashbulb_service.catalog import Model, open_model
from flashbulb_service.errors import ModelUnavailable
from flashbulb_service.jobs import JobState, NewJob
from flashbulb_service.model_book import ModelBook
from flashbulb_service.model_pool import LoadedModel, Loan, ModelPool, choose_evictions, resident_bytes
from flashbulb_service.presence import LiveWorker, Presence
from flashbulb_service.queue import Queue
from flashbulb_service.repository import Repository
from flashbulb_service.results import ResultStore
from flashbulb_service.settings import Settings
from flashbulb_service.tasks import ImageOutcome, ImageTask
from flashbulb_service.worker import Worker, load_model
from support.tiny_bundle import make_tiny_bundle

GROWTH = 100 << 20  # of the pretended memory with each load; the tiny bundles' files are far smaller


@given(st.lists(st.tuples(st.floats(0, 100), st.integers(1, 50)), max_size=8), st.integers(-20, 300))
def test_the_least_recently_used_go_and_no_more_than_needed(
    idle: list[tuple[float, int]], missing: int
) -> None:
    chosen = choose_evictions(idle, missing)
    if chosen is None:
        assert sum(size for _, size in idle) < missing
        return
    freed = sum(idle[position][1] for position in chosen)
    assert freed >= missing
    if chosen:
        assert freed - idle[chosen[-1]][1] < missing
    kept = [idle[position][0] for position in range(len(idle)) if position not in chosen]
    assert all(idle[position][0] <= at for position in chosen for at in kept)


class Device:
    """Pretends the memory and the time of loads, and writes down what happened."""

    def __init__(self) -> None:
        self.held: list[str] = []
        self.loads: list[str] = []
        self.most = 0
        self.broken: set[str] = set()
        self.failures: list[str] = []
        self.now = 0.0
        self.grown = 0  # by what is no model
        self.at_load: Callable[[], None] = lambda: None

    def load(self, model: Model) -> LoadedModel:
        if model.id in self.broken:
            self.failures.append(model.id)
            raise RuntimeError("no such operator")
        self.loads.append(model.id)
        self.held.append(model.id)
        self.at_load()
        self.most = max(self.most, len(self.held))
        self.now += 2.0
        device = self

        class Backend:
            name = "pretended"

            def close(self) -> None:
                device.held.remove(model.id)

        return LoadedModel(model, Student(Backend()), 4)  # type: ignore[arg-type]

    def clock(self) -> float:
        self.now += 0.001
        return self.now


@pytest.fixture
def device() -> Device:
    return Device()


@pytest.fixture(scope="session")
def three(tmp_path_factory: pytest.TempPathFactory) -> list[Model]:
    folder = tmp_path_factory.mktemp("three")
    return [
        open_model(make_tiny_bundle(folder, name=name), name, 1, verify=True)
        for name in ("ant", "bee", "cat")
    ]


def pool_of(device: Device, rooms: int | None) -> ModelPool:
    return ModelPool(
        device.load,
        capacity_bytes=None if rooms is None else rooms * GROWTH,
        measure=lambda: len(device.held) * GROWTH + device.grown,
        clock=device.clock,
    )


async def test_without_a_cap_everything_stays(device: Device, three: list[Model]) -> None:
    pool = pool_of(device, None)
    for model in three:
        await pool.add(model)
    assert device.held == ["ant@1", "bee@1", "cat@1"]
    assert pool.memory() == dict.fromkeys(device.held, GROWTH)
    await pool.aclose()
    assert device.held == []


async def test_the_least_recently_used_leaves_and_comes_back_when_wanted(
    device: Device, three: list[Model]
) -> None:
    pool = pool_of(device, 2)
    for model in three:
        await pool.add(model)
    assert device.held == ["bee@1", "cat@1"]
    assert list(pool.served) == ["ant@1", "bee@1", "cat@1"]
    assert [pool.swap_ms(name) > 2000 for name in pool.served] == [True, False, False]
    async with pool.use(pool.served["bee@1"]):
        pass
    async with pool.use(pool.served["ant@1"]) as lent:
        assert lent.model.id == "ant@1"
    assert device.held == ["bee@1", "ant@1"]
    for name in ("cat@1", "ant@1", "bee@1", "cat@1"):
        async with pool.use(pool.served[name]):
            assert pool.bytes <= 2 * GROWTH
    assert device.most == 2


async def test_a_model_that_draws_stays_and_its_next_batch_does_not_overtake_who_waits(
    device: Device, three: list[Model]
) -> None:
    pool = pool_of(device, 1)
    ant, bee = [await pool.add(model) for model in three[:2]]
    order: list[str] = []

    async def draw(name: str) -> None:
        async with pool.use(pool.served[name]):
            order.append(name)

    async with pool.use(bee):
        waiting = asyncio.create_task(draw("ant@1"))
        await asyncio.sleep(0)
        late = asyncio.create_task(draw("bee@1"))
        for _ in range(20):
            await asyncio.sleep(0)
        assert device.held == ["bee@1"] and order == []
    await asyncio.gather(waiting, late)
    assert order == ["ant@1", "bee@1"]
    assert ant.users == bee.users == 0


async def test_short_work_goes_on_while_a_loader_waits_for_a_video_and_for_nothing_else(
    device: Device, three: list[Model]
) -> None:
    """A model that needed the memory of a video's stopped the pictures of all others until the video was made."""
    pool = pool_of(device, 2)
    cat, ant, bee = [await pool.add(three[number]) for number in (2, 0, 1)]
    cat.bytes = 2 * GROWTH  # it needs the room of both
    video = Loan(pool, bee, is_long=True)
    await video.take()
    loading = asyncio.create_task(Loan(pool, cat).take())
    await asyncio.sleep(0)
    picture = Loan(pool, ant)
    assert picture.take_now() is not None
    picture.give_back()
    async with asyncio.timeout(10):
        await picture.take()
    assert Loan(pool, bee, is_long=True).take_now() is None  # another video would keep the room
    video.give_back()
    for _ in range(20):
        await asyncio.sleep(0)
    assert device.held == ["ant@1", "bee@1"]
    assert Loan(pool, ant).take_now() is None  # its batch in hand is short: the loader is not overtaken
    picture.give_back()
    assert (await loading).model.id == "cat@1"
    assert device.held == ["cat@1"]
    assert not ant.users and not bee.users and not bee.long_users


async def test_one_that_is_larger_than_the_cap_is_refused_in_one_line(
    device: Device, three: list[Model]
) -> None:
    pool = ModelPool(device.load, capacity_bytes=GROWTH - 1, measure=lambda: len(device.held) * GROWTH)
    for _ in range(2):
        with pytest.raises(ModelUnavailable, match="FLASHBULB_MODELS_MEMORY_BYTES=104857599: raise that"):
            await pool.add(three[0])
    assert device.held == [] and pool.served == {} and pool.bytes == 0


@pytest.mark.parametrize("begins", ["before the load", "during the load"])
async def test_the_memory_of_a_batch_is_not_booked_on_a_model_that_is_loaded_beside_it(
    device: Device, three: list[Model], begins: str
) -> None:
    """A model was said to take more than the cap from then on, and was refused to every batch without another look."""
    pool = pool_of(device, 2)
    ant, _, cat = [await pool.add(model) for model in three]
    is_loading, goes_on = threading.Event(), threading.Event()

    def grow() -> None:
        is_loading.set()
        assert goes_on.wait(10)
        device.grown += 2 * GROWTH

    device.at_load = grow
    batch = Loan(pool, cat)
    if begins == "before the load":
        assert batch.take_now() is not None
    loading = asyncio.create_task(Loan(pool, ant).take())
    await asyncio.to_thread(is_loading.wait, 10)
    if begins == "during the load":
        assert batch.take_now() is not None
    goes_on.set()
    assert (await loading).model.id == "ant@1"
    assert ant.bytes == GROWTH


async def test_a_model_that_took_more_than_the_cap_once_is_looked_at_again(
    device: Device, three: list[Model]
) -> None:
    pool = pool_of(device, 1)
    ant, _ = [await pool.add(model) for model in three[:2]]
    device.at_load = lambda: setattr(device, "grown", GROWTH)
    with pytest.raises(ModelUnavailable, match=f"it takes {2 * GROWTH} bytes"):
        await Loan(pool, ant).take()
    device.now += model_pool.LOAD_PAUSE_S
    await Loan(pool, ant).take()
    assert device.held == ["ant@1"] and ant.bytes == GROWTH


async def test_a_model_that_is_larger_than_the_cap_is_not_loaded_for_every_batch(
    device: Device, three: list[Model]
) -> None:
    """It was, each time in vain, and each time the others had to leave the memory."""
    pool = pool_of(device, 1)
    ant, bee = [await pool.add(model) for model in three[:2]]
    device.at_load = lambda: setattr(device, "grown", device.grown + GROWTH * (device.held[-1] == "ant@1"))
    tries = []
    for _ in range(8):
        begin = len(device.loads)
        with pytest.raises(ModelUnavailable, match=f"it takes {2 * GROWTH} bytes"):
            await Loan(pool, ant).take()
        async with pool.use(bee):
            pass
        tries.append(len(device.loads) - begin)
        device.now += model_pool.LOAD_PAUSE_S
    assert tries == [2, 2, 0, 2, 0, 0, 0, 2]


async def test_a_load_that_fails_is_tried_again_by_the_next_batch(device: Device, three: list[Model]) -> None:
    pool = pool_of(device, 1)
    ant, _ = [await pool.add(model) for model in three[:2]]
    device.broken.add("ant@1")
    with pytest.raises(ModelUnavailable, match="RuntimeError: no such operator"):
        async with pool.use(ant):
            pass
    device.broken.clear()
    async with pool.use(ant):
        assert device.held == ["ant@1"]
    assert pool.bytes == GROWTH


async def test_a_removed_model_is_given_back_when_its_last_batch_is_delivered(
    device: Device, three: list[Model]
) -> None:
    pool = pool_of(device, None)
    ant = await pool.add(three[0])
    async with pool.use(ant):
        assert pool.remove("ant@1") and pool.served == {}
        assert device.held == ["ant@1"]
    assert device.held == []
    assert not pool.remove("ant@1")


@pytest_asyncio.fixture
async def small_worker(
    queue: Queue,
    make_queue: Callable[..., Queue],
    redis_url: str,
    namespace: str,
    results: ResultStore,
    three: list[Model],
    tmp_path: Path,
) -> AsyncIterator[ModelPool]:
    """A worker with real students, and memory for one of three by the size of their files."""
    settings = Settings(data=tmp_path, threads=1)
    size = sum(file.bytes for file in three[0].bundle.manifest.files.values())
    pool = ModelPool(
        lambda model: load_model(model, settings, EmbeddingCache()),
        capacity_bytes=int(1.5 * size),
        measure=lambda: 0,
    )
    for model in three:
        await pool.add(model)
    presence = Presence.connect(redis_url, namespace=namespace)
    worker = Worker(make_queue(), results, presence, pool, backend_name="onnx", lease_s=5.0)
    stop = asyncio.Event()
    running = asyncio.create_task(worker.run(stop, drain_s=10.0))
    yield pool
    stop.set()
    await running
    await pool.aclose()
    await presence.aclose()


async def test_a_worker_draws_with_more_models_than_fit_its_memory(
    queue: Queue, small_worker: ModelPool, three: list[Model]
) -> None:
    def job(model: Model, seed: int) -> NewJob:
        task = ImageTask(prompt="dog", seed=seed, index=0, width=64, height=64)
        return NewJob(model=model.id, bucket=f"{model.id}:64x64:1", payload=task.to_bytes())

    ids = (await queue.enqueue([job(model, seed) for seed in range(4) for model in three])).ids
    views = await queue.wait(ids, 20)
    assert {view.state for view in views} == {JobState.DONE}
    drawn = [ImageOutcome.from_bytes(view.result or b"").bundle_sha256 for view in views]
    assert drawn == [model.bundle.sha256 for model in three] * 4
    assert sum(size > 0 for size in small_worker.memory().values()) == 1


@pytest.mark.parametrize("when", ["before the load", "during the load"])
async def test_a_replaced_bundle_is_not_loaded_under_the_name_of_the_one_that_was_verified(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """A model that came back into memory drew with the new files, and its receipts named the old bundle."""
    path = make_tiny_bundle(tmp_path / "models")
    tiny = open_model(path, "tiny", 1, verify=True)
    settings, load_student = Settings(data=tmp_path, threads=1), worker_module.load_student
    pool = ModelPool(lambda model: load_model(model, settings, EmbeddingCache()))
    served = await pool.add(tiny)
    await pool.aclose()

    def replace() -> None:
        shutil.rmtree(path)
        make_tiny_bundle(tmp_path / "models", licence="MIT")

    def load_and_replace(*args: Any) -> Any:
        loaded = load_student(*args)
        replace()
        return loaded

    if when == "before the load":
        replace()
    else:
        monkeypatch.setattr(worker_module, "load_student", load_and_replace)
    with pytest.raises(ModelUnavailable, match=f"expected the bundle {tiny.bundle.sha256[:12]}"):
        await Loan(pool, served).take()
    monkeypatch.undo()
    await pool.add(open_model(path, "tiny", 1, verify=True))
    await pool.aclose()


def test_the_memory_of_this_process_is_what_linux_says() -> None:
    before = resident_bytes()
    block: Any = bytearray(64 << 20)
    assert resident_bytes() - before > 60 << 20
    del block


Seen = Callable[[set[str], set[str]], Awaitable[bool]]


@pytest_asyncio.fixture
async def seen(
    queue: Queue,
    make_queue: Callable[..., Queue],
    redis_url: str,
    namespace: str,
    results: ResultStore,
    three: list[Model],
    device: Device,
    monkeypatch: pytest.MonkeyPatch,
) -> AsyncIterator[Seen]:
    """A worker of three models with memory for two, and ant unloaded; tells whether it serves and holds some."""
    monkeypatch.setattr(worker_module, "SCAN_INTERVAL_S", 0.02)
    pool = pool_of(device, 2)
    await ModelBook(queue).unload("ant@1")
    for model in three[1:]:
        await pool.add(model)
    presence = Presence.connect(redis_url, namespace=namespace)
    worker = Worker(
        make_queue(),
        results,
        presence,
        pool,
        backend_name="onnx",
        lease_s=5.0,
        repository=Repository(three[0].bundle.path.parent.parent, three),
        unloaded=three[:1],
    )
    stop = asyncio.Event()
    running = asyncio.create_task(worker.run(stop, drain_s=5.0))

    async def seen(models: set[str], held: set[str]) -> bool:
        workers = await presence.workers()
        own = {name for one in workers if one.id == worker.id for name in set(one.models) - set(one.paused)}
        return own == models and set(device.held) == held

    yield seen
    stop.set()
    await running
    await presence.aclose()


async def test_a_worker_follows_what_operators_say(
    queue: Queue, seen: Seen, wait_until: Callable[..., Any]
) -> None:
    book = ModelBook(queue)
    await wait_until(lambda: seen({"bee@1", "cat@1"}, {"bee@1", "cat@1"}))
    await book.unload("bee@1")
    await wait_until(lambda: seen({"cat@1"}, {"cat@1"}))
    await book.load("ant@1")
    await wait_until(lambda: seen({"ant@1", "cat@1"}, {"ant@1", "cat@1"}))
    await book.load("bee@1")
    await wait_until(lambda: seen({"ant@1", "bee@1", "cat@1"}, {"ant@1", "bee@1"}))
    await book.load("cat@1")  # served already, but not in memory
    await wait_until(lambda: seen({"ant@1", "bee@1", "cat@1"}, {"bee@1", "cat@1"}))


async def test_a_worker_whose_models_change_is_on_the_list_all_the_time(
    queue: Queue, seen: Seen, wait_until: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It took itself off before it said what it serves now: for a moment /readyz was 503, and models unknown."""
    await wait_until(lambda: seen({"bee@1", "cat@1"}, {"bee@1", "cat@1"}))
    listed, announce = [], Presence.announce

    async def look_before(presence: Presence, *args: Any, **kwargs: Any) -> None:
        listed.append(len(await presence.workers()))
        await announce(presence, *args, **kwargs)

    monkeypatch.setattr(Presence, "announce", look_before)
    await ModelBook(queue).unload("bee@1")
    await wait_until(lambda: seen({"cat@1"}, {"cat@1"}))
    assert listed and set(listed) == {1}


@pytest.mark.parametrize("cause", ["an operator's word", "time"])
async def test_a_model_whose_load_failed_is_loaded_again_after_a_pause_or_at_an_operators_word(
    queue: Queue,
    device: Device,
    seen: Seen,
    wait_until: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    cause: str,
) -> None:
    """Memory that was short for a moment took the model from a worker until its restart, whatever operators said."""
    monkeypatch.setattr(model_pool, "LOAD_PAUSE_S", 0.0 if cause == "time" else 3600.0)
    book = ModelBook(queue)
    device.broken.add("ant@1")
    await book.load("ant@1")

    async def has_failed() -> bool:
        return "ant@1" in device.failures

    await wait_until(has_failed)
    device.broken.clear()
    if cause != "time":
        assert device.failures == ["ant@1"]
        await book.load("ant@1")
    await wait_until(lambda: seen({"ant@1", "bee@1", "cat@1"}, {"ant@1", "cat@1"}))


async def test_the_work_of_a_model_whose_load_is_paused_is_left_to_other_workers(
    queue: Queue,
    device: Device,
    seen: Seen,
    wait_until: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    redis_url: str,
    namespace: str,
) -> None:
    """Its worker claimed it on and refused it at once: its jobs lost all attempts before another worker had them."""
    monkeypatch.setattr(worker_module, "IDLE_S", 0.02)
    monkeypatch.setattr(worker_module, "INTERVAL_S", 0.02)
    presence = Presence.connect(redis_url, namespace=namespace)
    await presence.announce(LiveWorker("other", ("ant@1", "bee@1"), "onnx", paused=("ant@1",)), ttl_s=60.0)
    everything = {"ant@1", "bee@1", "cat@1"}
    await ModelBook(queue).load("ant@1")  # bee leaves the memory
    await wait_until(lambda: seen(everything, {"ant@1", "cat@1"}))

    def grow() -> None:
        device.grown += 2 * GROWTH

    device.at_load = grow
    bee = NewJob(model="bee@1", bucket="bee@1:64x64:1", payload=b"p", max_attempts=2)
    await queue.enqueue([bee])
    await wait_until(lambda: seen({"ant@1", "cat@1"}, {"ant@1"}))

    async def is_drawn_elsewhere() -> bool:
        await queue.reap(now=time.time() + 60)  # its retry is due
        jobs = await queue.claim("other", ["bee@1"], 1, 60.0)
        return bool(jobs) and await queue.complete("other", jobs[0], b"r")

    await wait_until(is_drawn_elsewhere)
    device.at_load = lambda: None
    device.now += model_pool.LOAD_PAUSE_S
    await wait_until(lambda: seen(everything, {"ant@1"}))
    await queue.enqueue([bee])
    await wait_until(lambda: seen(everything, {"ant@1", "bee@1"}))
    await presence.aclose()


async def test_a_wake_that_a_paused_worker_hears_reaches_the_one_that_can_draw(
    queue: Queue, device: Device, seen: Seen, wait_until: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It had gone to sleep for the model before its load failed: another worker slept on beside the work."""
    await ModelBook(queue).load("ant@1")  # bee leaves the memory
    await wait_until(lambda: seen({"ant@1", "bee@1", "cat@1"}, {"ant@1", "cat@1"}))
    sleeps, wait_for_work = threading.Event(), Queue.wait_for_work

    async def watched(asleep: Queue, models: list[str], timeout_s: float) -> Any:
        if "bee@1" in models:
            sleeps.set()
        try:
            return await wait_for_work(asleep, models, timeout_s)
        finally:
            sleeps.clear()

    def grow() -> None:
        assert sleeps.wait(10)
        device.grown = 2 * GROWTH

    monkeypatch.setattr(Queue, "wait_for_work", watched)
    device.at_load = grow
    await queue.enqueue([NewJob(model="bee@1", bucket="bee@1:64x64:1", payload=b"p", max_attempts=2)])
    await wait_until(lambda: seen({"ant@1", "cat@1"}, {"ant@1"}))
    other = asyncio.create_task(wait_for_work(queue, ["bee@1"], worker_module.IDLE_S / 2))
    await queue.reap(now=time.time() + 60)  # its retry is due
    assert await other is not None


async def test_jobs_of_a_model_that_no_worker_can_load_end_with_the_reason(
    queue: Queue,
    device: Device,
    seen: Seen,
    wait_until: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The only worker left them to others: they waited for their deadline, and were told that no worker was free."""
    monkeypatch.setattr(worker_module, "INTERVAL_S", 0.02)
    await ModelBook(queue).load("ant@1")  # bee leaves the memory
    await wait_until(lambda: seen({"ant@1", "bee@1", "cat@1"}, {"ant@1", "cat@1"}))
    device.at_load = lambda: setattr(device, "grown", 2 * GROWTH)
    for max_attempts in (1, 2):  # in the pause of the first as well
        bee = NewJob(model="bee@1", bucket="bee@1:64x64:1", payload=b"p", max_attempts=max_attempts)
        (view,) = await queue.wait((await queue.enqueue([bee])).ids, 10)
        assert view.error is not None and view.error.code == "model_unavailable"
        assert "FLASHBULB_MODELS_MEMORY_BYTES" in view.error.message


async def test_a_model_whose_load_failed_is_left_to_others_for_a_while(
    device: Device, three: list[Model]
) -> None:
    """Its worker claimed its jobs on, and they lost all attempts while memory was short for a second."""
    pool = pool_of(device, 1)
    ant, _ = [await pool.add(model) for model in three[:2]]
    device.broken.add("ant@1")
    for _ in range(3):
        with pytest.raises(ModelUnavailable, match="no such operator"):
            await Loan(pool, ant).take()
    assert set(pool.offered) == {"bee@1"}, "nobody has said yet who else serves it"
    pool.elsewhere = {"bee@1"}
    assert set(pool.offered) == {"ant@1", "bee@1"}
    pool.elsewhere = {"ant@1"}
    device.now += model_pool.LOAD_PAUSE_S
    assert set(pool.offered) == {"ant@1", "bee@1"}

"""The models of one worker: all that it serves, of which as many lie in memory as the cap allows.

A model is loaded once when it is found: that shows that it can be, and measures its memory and its load time. After
that it may leave the memory when another one needs the room, the least recently used first, and comes back when a
batch wants it. One that draws is never taken away: whoever needs its room waits until its batches are delivered. While
that takes a video's time, short work of the models in memory goes on.
"""

import asyncio
import contextlib
import ctypes
import gc
import logging
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence, Set
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from flashbulb_service.backends import Student
from flashbulb_service.catalog import Model
from flashbulb_service.errors import ModelUnavailable

log = logging.getLogger(__name__)

# After a load that failed, and after many: it took time, and may have evicted others.
LOAD_PAUSE_S, MAX_LOAD_PAUSE_S = 60.0, 3600.0


@dataclass
class LoadPause:
    """The time in which a model is not loaded again after a load that failed, by a monotonic clock."""

    pause_s: float = 0.0  # the newest
    due_at: float = 0.0

    def begin(self, now: float) -> float:
        """Begin one that is twice as long as the last; return its length in seconds."""
        self.pause_s = min(max(LOAD_PAUSE_S, 2 * self.pause_s), MAX_LOAD_PAUSE_S)
        self.due_at = now + self.pause_s
        return self.pause_s


@dataclass(frozen=True)
class LoadedModel:
    """A model with the student that draws it, and the largest batch worth forming."""

    model: Model
    student: Student
    cap: int
    times_ms: Mapping[int, float] = field(default_factory=dict)  # its calibration; empty = unknown


@dataclass(eq=False)
class Served:
    """A model of the pool, in memory or not."""

    model: Model
    cap: int = 1
    times_ms: Mapping[int, float] = field(default_factory=dict)
    backend: str = ""  # what runs it
    bytes: int = 0  # of memory: the most that was measured while nothing else grew, at least its files
    load_s: float = 0.0  # newest
    refused_bytes: int = 0  # measured when it was larger than the cap, which holds until the pause is over
    pause: LoadPause = field(default_factory=LoadPause)
    loaded: LoadedModel | None = None
    loading: "asyncio.Task[LoadedModel] | None" = None
    users: int = 0
    long_users: int = 0  # those of them that keep it for long work
    last_used: float = 0.0
    removed: bool = False

    @property
    def takes_room(self) -> bool:
        """Tell whether its memory is in use, or about to be."""
        return self.loaded is not None or self.loading is not None


def choose_evictions(idle: Sequence[tuple[float, int]], missing_bytes: int) -> list[int] | None:
    """Choose which idle models make room for `missing_bytes`: (last used, bytes) each -> positions, or None.

    The least recently used go first, and no more than needed; None when all of them would not be enough.
    """
    chosen: list[int] = []
    for position in sorted(range(len(idle)), key=lambda number: idle[number][0]):
        if missing_bytes <= 0:
            break
        chosen.append(position)
        missing_bytes -= idle[position][1]
    return chosen if missing_bytes <= 0 else None


class ModelPool:
    """Loads, lends and evicts models. Use it from one event loop; `offer` and `Loan.take_now` from any thread."""

    def __init__(
        self,
        load: Callable[[Model], LoadedModel],
        *,
        capacity_bytes: int | None = None,
        measure: Callable[[], int] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start empty.

        Args:
            load: opens and warms up a model; runs in a thread.
            capacity_bytes: of all models in memory together; None: no cap.
            measure: the memory of this process in bytes; absent: as Linux tells it.
        """
        self._load_model = load
        self._capacity = capacity_bytes
        self._measure = measure or resident_bytes
        self._clock = clock
        self.elsewhere: Set[str] | None = None  # models that other live workers can draw, once we are told
        self._served: dict[str, Served] = {}
        self._room: set[Served] = set()  # those that take room, removed ones among them
        self._gate = asyncio.Lock()  # a loader that waits for room is not overtaken,
        self._waits_for_long = False  # but by short work while only the end of long work can make its room
        self._one_load = asyncio.Lock()  # so that memory that grows has one cause,
        self._num_lent = 0  # of models in memory, ever: unless a batch grows beside it
        self._lending = threading.Lock()  # held while it changes who uses a model, or whether it is in memory
        self._idle = asyncio.Event()

    @classmethod
    def holding(cls, models: Iterable[LoadedModel]) -> "ModelPool":
        """Make a pool of models that are in memory already and stay there."""
        ready = {one.model.id: one for one in models}
        pool = cls(lambda model: ready[model.id])
        for one in ready.values():
            served = Served(one.model, one.cap, one.times_ms, one.student.backend.name, loaded=one)
            pool._served[one.model.id] = served
            pool._room.add(served)
        return pool

    @property
    def served(self) -> dict[str, Served]:
        """Return the models by name@version."""
        return dict(self._served)

    @property
    def offered(self) -> dict[str, Served]:
        """Return those of them that work is claimed for: a paused one is left to another worker, where one serves it.

        Where we know that none does, its jobs are claimed, and end with the reason why it cannot be loaded.
        """
        paused = self.paused
        if self.elsewhere is not None:
            paused &= self.elsewhere
        return {name: served for name, served in self._served.items() if name not in paused}

    def offer(self, model_id: str) -> Served | None:
        """Return one of the models that work is claimed for, None when it is none of them."""
        served = self._served.get(model_id)
        if served is None or self._clock() >= served.pause.due_at:
            return served
        return None if self.elsewhere is None or model_id in self.elsewhere else served

    @property
    def paused(self) -> set[str]:
        """Return those of them whose newest load failed, for a while."""
        now = self._clock()
        return {name for name, served in self._served.items() if now < served.pause.due_at}

    @property
    def bytes(self) -> int:
        """Return the memory of the models that take room."""
        return sum(served.bytes for served in self._room)

    def swap_ms(self, model_id: str) -> float:
        """Return how long a batch of the model would wait for its load; 0 when it is in memory."""
        served = self._served.get(model_id)
        return 0.0 if served is None or served.takes_room else served.load_s * 1000

    def memory(self) -> dict[str, int]:
        """Return the memory in bytes of each model that is served; 0 for one that is not loaded now."""
        return {name: served.bytes if served.loaded else 0 for name, served in self._served.items()}

    async def add(self, model: Model) -> Served:
        """Load a model, and serve it from then on, in place of an older bundle of its name and version.

        Raises:
            ModelUnavailable: it cannot be loaded, or is larger than the cap.
        """
        served = Served(model, bytes=_file_bytes(model))
        async with self.use(served):
            pass
        if (older := self._served.get(model.id)) is not None:
            self._retire(older)
        self._served[model.id] = served
        return served

    def remove(self, model_id: str) -> bool:
        """Serve a model no longer; its memory is given back when its last batch is delivered."""
        served = self._served.pop(model_id, None)
        if served is None:
            return False
        self._retire(served)
        return True

    @asynccontextmanager
    async def use(self, served: Served) -> AsyncIterator[LoadedModel]:
        """Lend a model; it is loaded first if it must be, and stays in memory while this is open.

        Raises:
            ModelUnavailable: it cannot be loaded, or is larger than the cap.
        """
        loan = Loan(self, served)
        try:
            yield await loan.take()
        finally:
            loan.give_back()

    async def aclose(self) -> None:
        """Give all memory back."""
        for served in list(self._room):
            if served.loading is not None:
                await asyncio.wait({served.loading})
            self._evict(served, in_use_too=True)

    def _may_overtake(self, served: Served, is_long: bool) -> bool:
        return self._waits_for_long and served.takes_room and not is_long

    def _lend(self, served: Served, is_long: bool) -> None:
        with self._lending:
            self._count_use(served, is_long)

    def _count_use(self, served: Served, is_long: bool) -> None:
        served.users += 1
        served.long_users += is_long
        self._num_lent += served.loaded is not None

    def _begin_use(self, served: Served, is_long: bool) -> LoadedModel | None:
        with self._lending:
            if served.loaded is None or (self._gate.locked() and not self._may_overtake(served, is_long)):
                return None
            self._count_use(served, is_long)
            return served.loaded

    async def _wait_for_use(self, served: Served, is_long: bool) -> LoadedModel:
        async with contextlib.nullcontext() if self._may_overtake(served, is_long) else self._gate:
            self._lend(served, is_long)
            try:
                if not served.takes_room:
                    await self._make_room(served)
                    served.loading = asyncio.create_task(self._load(served))
                    self._room.add(served)
            except BaseException:
                self._release(served, is_long)
                raise
        loaded = served.loaded
        if loaded is None:
            assert served.loading is not None
            try:
                loaded = await asyncio.shield(served.loading)
            except BaseException:
                self._release(served, is_long)
                raise
        return loaded

    async def _load(self, served: Served) -> LoadedModel:
        known = served.bytes
        try:
            async with self._one_load:
                is_alone, lent_before = not self._is_drawing, self._num_lent
                before, start = self._measure(), self._clock()
                try:
                    loaded = await asyncio.to_thread(self._load_model, served.model)
                except Exception as error:
                    served.refused_bytes = 0
                    self._pause(served)
                    raise ModelUnavailable(served.model.id, f"{type(error).__name__}: {error}") from error
                served.load_s = self._clock() - start
                if is_alone and self._num_lent == lent_before:
                    served.bytes = max(known, self._measure() - before)
            served.loaded, served.cap, served.times_ms = loaded, loaded.cap, loaded.times_ms
            served.backend = loaded.student.backend.name
            if self._capacity is not None and served.bytes > self._capacity:
                self._evict(served, in_use_too=True)  # by those who wait for this load
                # What was measured does not hold for good: something else may have grown meanwhile.
                served.refused_bytes, served.bytes = served.bytes, known
                self._pause(served)
                raise self._too_large(served, served.refused_bytes)
            served.pause = LoadPause()
            self._shrink()
        except BaseException:
            self._room.discard(served)
            raise
        finally:
            served.loading = None
        return loaded

    async def _make_room(self, served: Served) -> None:
        """Evict until the model fits, by the memory that it is known to take; waits for those that draw."""
        if self._capacity is None:
            return
        if served.bytes > self._capacity:
            raise self._too_large(served, served.bytes)
        if served.refused_bytes and self._clock() < served.pause.due_at:
            raise self._too_large(served, served.refused_bytes)
        try:
            while (missing := self.bytes + served.bytes - self._capacity) > 0:
                self._idle.clear()
                idle = self._idle_ones()
                chosen = choose_evictions([(one.last_used, one.bytes) for one in idle], missing)
                if chosen is None:
                    soon = sum(one.bytes for one in self._room if not one.long_users)
                    self._waits_for_long = soon < missing
                    await self._idle.wait()
                    continue
                for position in chosen:
                    self._evict(idle[position])
        finally:
            self._waits_for_long = False

    def _pause(self, served: Served) -> None:
        """Leave a model to other workers for a while. Loads that are tried in a pause make it no longer."""
        if (now := self._clock()) >= served.pause.due_at:
            served.pause.begin(now)

    def _shrink(self) -> None:
        """Evict idle models while more is in memory than may be: a first load took more than its files."""
        while self._capacity is not None and self.bytes > self._capacity and (idle := self._idle_ones()):
            self._evict(min(idle, key=lambda one: one.last_used))

    @property
    def _is_drawing(self) -> bool:
        return any(one.users for one in self._room if one.loaded is not None)

    def _idle_ones(self) -> list[Served]:
        return [one for one in self._room if not one.users and one.loaded is not None]

    def _release(self, served: Served, is_long: bool) -> None:
        with self._lending:
            served.users -= 1
            served.long_users -= is_long
        served.last_used = self._clock()
        if not served.users:
            if served.removed:
                self._evict(served)
            self._shrink()
            self._idle.set()

    def _retire(self, served: Served) -> None:
        served.removed = True
        if not served.users:
            self._evict(served)

    def _evict(self, served: Served, *, in_use_too: bool = False) -> None:
        with self._lending:
            if (
                served.users and not in_use_too
            ):  # a thread has taken it since: it goes when that gives it back
                return
            self._room.discard(served)
            loaded, served.loaded = served.loaded, None
        if loaded is not None:
            loaded.student.backend.close()
            give_back_memory()
            log.info("model %s left the memory (%d MB)", served.model.id, served.bytes >> 20)

    def _too_large(self, served: Served, num_bytes: int) -> ModelUnavailable:
        return ModelUnavailable(
            served.model.id,
            f"it takes {num_bytes} bytes, more than FLASHBULB_MODELS_MEMORY_BYTES={self._capacity}: raise that",
        )


class Loan:
    """One use of a model; from when it is taken until it is given back, the model stays in memory."""

    def __init__(self, pool: ModelPool, served: Served, *, is_long: bool = False) -> None:
        """Take nothing yet. is_long: for long work, which may keep the model for minutes."""
        self._pool = pool
        self._served = served
        self._is_long = is_long
        self._is_taken = False

    def take_now(self) -> LoadedModel | None:
        """Take the model if it is in memory and nobody is to have the room before; otherwise return None."""
        loaded = self._pool._begin_use(self._served, self._is_long)
        self._is_taken = loaded is not None
        return loaded

    async def take(self) -> LoadedModel:
        """Take the model when it is in memory.

        Raises:
            ModelUnavailable: it cannot be loaded, or is larger than the cap.
        """
        loaded = await self._pool._wait_for_use(self._served, self._is_long)
        self._is_taken = True
        return loaded

    def give_back(self) -> None:
        """End the use, if it has begun."""
        if self._is_taken:
            self._is_taken = False
            self._pool._release(self._served, self._is_long)


def resident_bytes() -> int:
    """Return the memory that this process holds (Linux; elsewhere 0, and files are what counts)."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
    return 0


def give_back_memory() -> None:
    """Ask the C library to return what was freed to the system (glibc; elsewhere nothing)."""
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def _file_bytes(model: Model) -> int:
    return sum(file.bytes for file in model.bundle.manifest.files.values())

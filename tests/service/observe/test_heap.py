"""What lives since the start is not looked at again by Python's collector."""

import subprocess
import sys
from pathlib import Path

import pytest

from support.tiny_bundle import make_tiny_bundle

CODE = """
import gc
from flashbulb_service.garbage import YOUNG, settle_heap
loop = []
loop.append(loop)
del loop
settle_heap()
assert gc.get_freeze_count() > 1000, gc.get_freeze_count()
assert gc.get_threshold()[0] == YOUNG
before = gc.get_stats()[0]["collections"]
made = [[] for _ in range(YOUNG // 2)]
assert gc.get_stats()[0]["collections"] == before
"""


def test_the_heap_of_the_start_is_frozen_and_collections_are_rare() -> None:
    subprocess.run([sys.executable, "-c", CODE], check=True, timeout=60)


UNLOAD = """
import asyncio, gc, sys, weakref
from pathlib import Path
from flashbulb_service.backends import ImageRequest
from flashbulb_service.backends.embeddings import EmbeddingCache
from flashbulb_service.catalog import open_model
from flashbulb_service.garbage import settle_heap
from flashbulb_service.model_pool import ModelPool
from flashbulb_service.settings import Settings
from flashbulb_service.worker import load_model

async def main(folder, keep_a_cycle):
    settings, cache = Settings(threads=1, data=Path(folder)), EmbeddingCache(1 << 20)
    model = open_model(Path(folder) / "tiny" / "1", "tiny", 1, verify=True)
    pool = ModelPool(lambda model: load_model(model, settings, cache))
    served = await pool.add(model)
    async with pool.use(served) as loaded:
        student = loaded.student
        student.generate([ImageRequest("dog", 1, 0, 64, 64)])
        if keep_a_cycle:
            student.backend.itself = student.backend
    parts = [weakref.ref(part) for part in (loaded, student, student.backend)]
    del loaded, student
    settle_heap()
    pool.remove(model.id)
    del served
    await pool.aclose()
    for _ in range(9):  # what waited for the load lets go of its result
        await asyncio.sleep(0)
    gc.collect()
    left = [type(part()).__name__ for part in parts if part() is not None]
    if left:
        sys.exit("still in memory: " + ", ".join(left))

asyncio.run(main(sys.argv[1], sys.argv[2] == "cycle"))
"""


@pytest.mark.parametrize("plant", ["nothing", "cycle"])
def test_a_model_that_was_loaded_at_the_start_leaves_the_memory_when_it_is_unloaded(
    tmp_path: Path, plant: str
) -> None:
    """A frozen object is never found to be in a dead cycle: whatever is unloaded must die by its reference count."""
    make_tiny_bundle(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", UNLOAD, tmp_path, plant],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode == 0) == (plant == "nothing"), done.stderr
    assert ("still in memory" in done.stderr) == (plant == "cycle")

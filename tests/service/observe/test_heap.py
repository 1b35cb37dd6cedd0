"""What lives since the start is not looked at again by Python's collector."""

import subprocess
import sys

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

"""The least worker behind a queue: takes a job, draws it, keeps it, commits it. For `benchmarks/floor.py`.

It claims and draws at once, as the product does with a lone picture, and needs no event loop, no threads, no batches.
"""

import json
import sys
from pathlib import Path

import redis
from student import Ask, open_as_worker

from flashbulb_service.images import encode_image

CLAIM = "return redis.call('HSET', KEYS[1], 'state', 'running')"
COMMIT = """
redis.call('HSET', KEYS[1], 'state', 'done', 'result', ARGV[1])
redis.call('EXPIRE', KEYS[1], 60)
redis.call('PUBLISH', 'ends', KEYS[1] .. ' ' .. ARGV[2])
"""


def main(url: str, bundle: Path, folder: Path, threads: int) -> None:
    student = open_as_worker(bundle, threads=threads, batch=1)
    client = redis.Redis.from_url(url, socket_timeout=None)
    commit = client.register_script(COMMIT)
    claim = client.script_load(CLAIM)
    beside = client.connection_pool.make_connection()
    beside.connect()
    print("ready", flush=True)
    while True:
        _, token = client.blpop("waiting")
        job, _, payload = token.decode().partition(" ")
        beside.send_command("EVALSHA", claim, 1, job)
        body = json.loads(payload)
        (pixels,) = student.draw([Ask(body["prompt"], body["seed"])])
        data = encode_image(pixels, "png")
        draft = folder / f"{job}.new"
        draft.write_bytes(data)
        draft.rename(folder / f"{job}.png")
        beside.read_response()
        commit(keys=[job], args=[f"{job}.png", data])


if __name__ == "__main__":
    queue, bundle, folder, threads = sys.argv[1:]
    main(queue, Path(bundle), Path(folder), int(threads))

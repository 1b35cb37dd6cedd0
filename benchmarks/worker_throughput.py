"""Saturated throughput of a worker beside a bare onnxruntime loop at its best batch size, in one run, by turns.

    python benchmarks/worker_throughput.py [--bundle models/emoji/1] [--jobs 256] [--rounds 5] [--threads 2]

The bare loop has its token ids and noise ready and throws its pixels away; the worker claims, tokenises, draws noise
and latents, encodes PNGs, stores and commits. No prompt occurs twice, so that the worker's cache of embeddings helps
nowhere. The queue is a real Valkey server on this machine. A ratio of 1 means that all of that costs nothing.
"""

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from flashbulb_distill.bundle import open_bundle
from flashbulb_distill.core.noise import draw_noise
from flashbulb_service.backends import Student
from flashbulb_service.backends.embeddings import EmbeddingCache
from flashbulb_service.backends.onnx import OnnxBackend
from flashbulb_service.catalog import Model
from flashbulb_service.embedded import EmbeddedServer
from flashbulb_service.jobs import NewJob
from flashbulb_service.model_pool import LoadedModel, ModelPool
from flashbulb_service.presence import Presence
from flashbulb_service.queue import Queue
from flashbulb_service.results import ResultStore
from flashbulb_service.scheduler import bucket_name
from flashbulb_service.tasks import ImageTask
from flashbulb_service.worker import Worker


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bundle", type=Path, default=Path("models/emoji/1"))
    parser.add_argument("--jobs", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batches", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--out", type=Path, default=None, help="also write the result as JSON")
    args = parser.parse_args()
    bundle = open_bundle(args.bundle)
    backend = OnnxBackend(threads=args.threads, cache=EmbeddingCache(0))
    backend.load(bundle)
    model = Model(bundle.manifest.name, bundle.manifest.version, bundle)
    width, height = model.sizes[0]
    Student(backend).warm_up(width, height, args.batches)
    bare: dict[int, list[tuple[float, float]]] = {size: [] for size in args.batches}
    worker: dict[int, list[tuple[float, float]]] = {size: [] for size in args.batches}
    with tempfile.TemporaryDirectory() as folder, EmbeddedServer(Path(folder) / "queue") as server:
        for turn in range(args.rounds):
            for size in args.batches:
                loop = bare_loop(backend, width, height, args.jobs, size)
                bare[size].append(measure(loop))
                prompts = [f"dog {turn} {size} {row}" for row in range(args.jobs)]
                worker[size].append(
                    asyncio.run(drain(server.url, Path(folder), model, backend, prompts, size))
                )
    result = {
        "jobs": args.jobs,
        "threads": args.threads,
        "bare": {size: summary(times, args.jobs) for size, times in bare.items()},
        "worker": {size: summary(times, args.jobs) for size, times in worker.items()},
    }
    best = {
        side: max(result[side].values(), key=lambda row: row["pictures_per_s"]) for side in ("bare", "worker")
    }
    result["ratio_wall"] = round(best["worker"]["pictures_per_s"] / best["bare"]["pictures_per_s"], 3)
    result["ratio_cpu"] = round(best["bare"]["cpu_ms_per_picture"] / best["worker"]["cpu_ms_per_picture"], 3)
    print(json.dumps(result, indent=2))
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")


def bare_loop(backend: OnnxBackend, width: int, height: int, jobs: int, size: int):
    """Make a loop over the three graphs with all inputs ready."""
    latent = backend._bundle.manifest.latent
    (text,) = backend._bundle.manifest.text
    noise = np.stack(
        [
            draw_noise(row, 0, (latent.channels, height // latent.downscale, width // latent.downscale))
            for row in range(size)
        ]
    )
    ids = np.full((size, text.max_length), text.pad_id, dtype=np.int64)
    tokens = backend._tokenizers[0].encode("dog 0 16 99").ids[: text.max_length]
    ids[:, : len(tokens)] = tokens
    mask = (np.arange(text.max_length) < len(tokens)).astype(np.int64)[None].repeat(size, 0)
    time_step = np.full(size, backend._bundle.manifest.timestep_scale, dtype=np.float32)
    sessions = backend._sessions

    def run() -> None:
        for _ in range(jobs // size):
            embeds, pooled = sessions["text_encoder"].run(None, {"input_ids": ids, "attention_mask": mask})
            inputs = {
                "latents": noise,
                "timestep": time_step,
                "prompt_embeds": embeds,
                "pooled_prompt_embeds": pooled,
            }
            (x0,) = sessions["denoiser"].run(None, inputs)
            sessions["decoder"].run(None, {"latents": x0})

    return run


def measure(work) -> tuple[float, float]:
    """Return (wall, CPU) seconds of a call."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


async def drain(
    url: str, folder: Path, model: Model, backend: OnnxBackend, prompts: list[str], size: int
) -> tuple[float, float]:
    """Fill a queue, then run a worker until it is empty: (wall, CPU) seconds from its start to the last commit."""
    namespace = f"bench-{time.monotonic_ns()}"
    presence = Presence.connect(url, namespace=namespace)
    width, height = model.sizes[0]
    async with Queue.connect(url, namespace=namespace) as queue:
        jobs = []
        for row, prompt in enumerate(prompts):
            task = ImageTask(prompt=prompt, seed=row, index=0, width=width, height=height)
            jobs.append(
                NewJob(
                    model=model.id,
                    bucket=bucket_name(model.id, width, height, 1),
                    payload=task.to_bytes(),
                )
            )
        ids = (await queue.enqueue(jobs)).ids
        results = ResultStore((folder / "results").as_uri(), ttl_s=3600)
        loaded = LoadedModel(model, Student(backend), size)
        worker = Worker(
            queue, results, presence, ModelPool.holding([loaded]), backend_name="onnx", lease_s=10.0
        )
        stop = asyncio.Event()
        wall, cpu = time.perf_counter(), time.process_time()
        running = asyncio.create_task(worker.run(stop, drain_s=10.0))
        await queue.wait(ids, 600)
        taken = time.perf_counter() - wall, time.process_time() - cpu
        stop.set()
        await running
    await presence.aclose()
    return taken


def summary(times: list[tuple[float, float]], jobs: int) -> dict[str, float]:
    """Reduce rounds to medians."""
    wall, cpu = (statistics.median(values) for values in zip(*times, strict=True))
    return {"pictures_per_s": round(jobs / wall, 1), "cpu_ms_per_picture": round(cpu / jobs * 1000, 3)}


if __name__ == "__main__":
    main()

"""One picture's model time by runtime, on the same weights: the bundle's backend, bare onnxruntime, eager, inductor.

    python benchmarks/runtimes.py [--bundle models/emoji/1] [--rounds 15] [--batches 1 4] [--out FILE.json]

Text encoder, network and decoder of one batch, CPU time of this process on one thread, medians, all sides by turns.
Prompts are new in every round, so that no cache of embeddings helps. `bundle` is all that a worker's backend does:
tokenising, noise, sampler, graphs, conversion to 8 bits; the other sides have token ids and noise ready.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import onnxruntime
import torch

from flashbulb_distill.bundle import open_bundle
from flashbulb_distill.core.noise import draw_noise
from flashbulb_distill.export.bundle import component_cases
from flashbulb_distill.export.parity import open_session
from flashbulb_distill.teachers.emoji import TIMESTEP_SCALE, load_emoji_teacher
from flashbulb_distill.teachers.text import tokenise
from flashbulb_service.backends import ImageRequest, Student
from flashbulb_service.backends.embeddings import EmbeddingCache
from flashbulb_service.backends.onnx import OnnxBackend

Side = Callable[[list[str]], object]


def torch_side(modules: dict[str, torch.nn.Module], inputs: Callable[[list[str]], tuple]) -> Side:
    """Return one batch through torch modules."""

    @torch.inference_mode()
    def run(prompts: list[str]) -> object:
        ids, mask, noise, times = (torch.from_numpy(value) for value in inputs(prompts))
        tokens, pooled = modules["text_encoder"](ids, mask)
        return modules["decoder"](modules["denoiser"](noise, times, tokens, pooled))

    return run


def onnx_side(
    sessions: dict[str, onnxruntime.InferenceSession], inputs: Callable[[list[str]], tuple]
) -> Side:
    """Return one batch through bare sessions."""

    def run(prompts: list[str]) -> object:
        ids, mask, noise, times = inputs(prompts)
        tokens, pooled = sessions["text_encoder"].run(None, {"input_ids": ids, "attention_mask": mask})
        feeds = {"latents": noise, "timestep": times, "prompt_embeds": tokens, "pooled_prompt_embeds": pooled}
        return sessions["decoder"].run(None, {"latents": sessions["denoiser"].run(None, feeds)[0]})

    return run


def main() -> None:
    """Measure all sides by turns, print ratios, and write a file where asked to."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bundle", type=Path, default=Path("models/emoji/1"))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    bundle = open_bundle(options.bundle)
    teacher = load_emoji_teacher(options.bundle)  # a bundle has the layout of a teacher's folder
    modules = {
        name: module.eval() for name, (module, _) in component_cases(teacher, teacher.denoiser).items()
    }
    compiled = {name: torch.compile(module) for name, module in modules.items()}
    names = bundle.manifest.components.model_dump()
    sessions = {part: open_session(bundle.file(name)) for part, name in names.items()}
    backend = OnnxBackend(threads=1, cache=EmbeddingCache(0))
    backend.load(bundle)

    def inputs(prompts: list[str]) -> tuple:
        ids, mask = tokenise(teacher.tokenizer, prompts)
        noise = np.stack([draw_noise(i, 0, teacher.latent_shape) for i in range(len(prompts))])
        return ids.numpy(), mask.numpy(), noise, np.full(len(prompts), TIMESTEP_SCALE, np.float32)

    def whole(prompts: list[str]) -> object:
        shape = bundle.manifest.shapes[0]
        requests = [ImageRequest(p, i, 0, shape.width, shape.height) for i, p in enumerate(prompts)]
        return Student(backend).generate(requests)

    # The ready inputs are made once per round and shared; only `bundle` makes its own inside the clock.
    ready: dict[tuple[str, ...], tuple] = {}

    def prepared(prompts: list[str]) -> tuple:
        return ready[tuple(prompts)]

    sides: dict[str, Side] = {
        "bundle": whole,
        "onnxruntime": onnx_side(sessions, prepared),
        "eager": torch_side(modules, prepared),
        "inductor": torch_side(compiled, prepared),
    }
    result: dict[str, object] = {
        "machine": f"{platform.processor() or platform.machine()}, one thread, CPU time",
        "torch": torch.__version__,
        "onnxruntime": onnxruntime.__version__,
        "rounds": options.rounds,
    }
    for size in options.batches:
        times: dict[str, list[float]] = {side: [] for side in sides}
        for turn in range(options.rounds + 2):
            prompts = [f"red apple {turn} {row}" for row in range(size)]
            ready[tuple(prompts)] = inputs(prompts)
            for side, run in sides.items():
                started = time.process_time()
                run(prompts)
                if turn >= 2:  # the first turns compile and warm up
                    times[side].append((time.process_time() - started) * 1000)
        medians = {side: round(statistics.median(values), 3) for side, values in times.items()}
        fastest = min(value for side, value in medians.items() if side != "bundle")
        result[f"batch_{size}"] = {
            "cpu_ms": medians,
            "bundle_over_fastest_other": round(medians["bundle"] / fastest, 3),
        }
    print(json.dumps(result, indent=2))
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()

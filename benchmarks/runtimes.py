"""From prompts to 8-bit pixels by runtime, on the same weights: the bundle, bare onnxruntime, eager, inductor.

    python -m benchmarks runtimes [--bundle models/emoji/1] [--rounds 15] [--batches 1 4] [--write]

One batch, CPU time of this process on one thread, medians, all sides by turns, in an order drawn anew (seeded) each
time: what runs before leaves its traces in the processor's caches. Prompts are new in every round, so that no cache of
embeddings helps; each side has sessions of its own. `bundle` is a worker's backend. The other sides are loops in
the plainest code, without sampler, cache or checks, and do the same work: tokenise, draw the noise, run text encoder,
network and decoder, make 8 bits of the pixels. `graphs` is bare onnxruntime with inputs ready and pixels left as they
are: what three calls of `session.run` cost alone. All pictures of onnxruntime must be equal, byte for byte.
"""

import os
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import onnxruntime
import rig
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from flashbulb_distill.bundle import open_bundle
from flashbulb_distill.core.noise import draw_noise
from flashbulb_distill.export.bundle import torch_demo
from flashbulb_distill.export.generate import to_images
from flashbulb_distill.export.parity import open_session
from flashbulb_distill.teachers.emoji import TIMESTEP_SCALE, load_emoji_teacher
from flashbulb_distill.teachers.text import MAX_LENGTH
from flashbulb_service.backends import ImageRequest, Student
from flashbulb_service.backends.embeddings import EmbeddingCache
from flashbulb_service.backends.onnx import OnnxBackend, plain_tokenizers

NAME = "runtimes"
WARM_UP = 2  # turns that compile and fill memory
Side = Callable[[list[str]], NDArray[Any] | list[NDArray[Any]] | None]
Inputs = tuple[NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any]]  # ids, mask, noise, timesteps


def make_inputs(tokenizer: Tokenizer, shape: tuple[int, ...], prompts: list[str]) -> Inputs:
    """Tokenise prompts and draw the noise of seeds 0, 1, ..."""
    ids = np.zeros((len(prompts), MAX_LENGTH), np.int64)
    mask = np.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        tokens = tokenizer.encode(prompt).ids
        ids[row, : len(tokens)] = tokens
        mask[row, : len(tokens)] = 1
    noise = np.stack([draw_noise(seed, 0, shape) for seed in range(len(prompts))])
    return ids, mask, noise, np.full(len(prompts), TIMESTEP_SCALE, np.float32)


def torch_side(modules: dict[str, torch.nn.Module], inputs: Callable[[list[str]], Inputs]) -> Side:
    """Return one batch through torch modules."""

    @torch.inference_mode()
    def run(prompts: list[str]) -> NDArray[Any]:
        ids, mask, noise, times = (torch.from_numpy(value) for value in inputs(prompts))
        tokens, pooled = modules["text_encoder"](ids, mask)
        return to_images(modules["decoder"](modules["denoiser"](noise, times, tokens, pooled)))

    return run


def run_graphs(sessions: dict[str, onnxruntime.InferenceSession], inputs: Inputs) -> NDArray[Any]:
    """Run the three graphs: pixels as float."""
    ids, mask, noise, times = inputs
    tokens, pooled = sessions["text_encoder"].run(None, {"input_ids": ids, "attention_mask": mask})
    feeds = {"latents": noise, "timestep": times, "prompt_embeds": tokens, "pooled_prompt_embeds": pooled}
    pixels: NDArray[Any] = sessions["decoder"].run(
        None, {"latents": sessions["denoiser"].run(None, feeds)[0]}
    )[0]
    return pixels


def to_8_bits(pixels: NDArray[Any]) -> NDArray[np.uint8]:
    """Turn pixels [b, 3, h, w] into [b, h, w, 3], in the one line that one would write."""
    return np.rint((np.clip(pixels, -1, 1) + 1) * 127.5).astype(np.uint8).transpose(0, 2, 3, 1).copy()


def main(argv: Sequence[str] | None = None) -> None:
    """Measure all sides by turns, print ratios, and write a file where asked to."""
    parser = rig.plain_arguments(__doc__)
    parser.add_argument("--bundle", type=Path, default=Path("models/emoji/1"))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    bundle = open_bundle(options.bundle)
    teacher = load_emoji_teacher(options.bundle)  # a bundle has the layout of a teacher's folder
    modules = {
        one.name: one.module.eval() for one in torch_demo("emoji", teacher, teacher.denoiser).components
    }
    compiled = {name: torch.compile(module) for name, module in modules.items()}
    names = bundle.manifest.components.model_dump()

    def open_graphs() -> dict[str, onnxruntime.InferenceSession]:
        return {part: open_session(bundle.file(name)) for part, name in names.items()}

    bare, alone = open_graphs(), open_graphs()
    backend = OnnxBackend(threads=1, cache=EmbeddingCache(0))
    backend.load(bundle)

    tokenizer, latent_shape = plain_tokenizers(bundle)[0], teacher.latent_shape
    shape = bundle.manifest.shapes[0]

    def inputs(prompts: list[str]) -> Inputs:
        return make_inputs(tokenizer, latent_shape, prompts)

    def whole(prompts: list[str]) -> list[NDArray[Any]]:
        requests = [ImageRequest(p, i, 0, shape.width, shape.height) for i, p in enumerate(prompts)]
        return Student(backend).generate(requests)

    ready: dict[str, Inputs] = {}

    def graphs(prompts: list[str]) -> None:
        run_graphs(alone, ready[prompts[0]])

    sides: dict[str, Side] = {
        "bundle": whole,
        "onnxruntime": lambda prompts: to_8_bits(run_graphs(bare, inputs(prompts))),
        "eager": torch_side(modules, inputs),
        "inductor": torch_side(compiled, inputs),
        "graphs": graphs,
    }
    result: dict[str, Any] = {
        "torch": torch.__version__,
        "onnxruntime": onnxruntime.__version__,
        "rounds": options.rounds,
    }
    order = random.Random(0)
    for size in options.batches:
        times: dict[str, list[float]] = {side: [] for side in sides}
        for turn in range(options.rounds + WARM_UP):
            prompts = [f"red apple {turn} {row}" for row in range(size)]
            ready[prompts[0]] = inputs(prompts)
            made: dict[str, Any] = {}
            for side in order.sample(list(sides), len(sides)):
                started = time.process_time()
                made[side] = sides[side](prompts)
                if turn >= WARM_UP:
                    times[side].append((time.process_time() - started) * 1000)
            if not np.array_equal(made["bundle"], made["onnxruntime"]):
                raise SystemExit("expected the bundle's and the bare loop's pictures to be equal, got others")
        medians = {side: round(statistics.median(values), 3) for side, values in times.items()}
        fastest = min(medians[side] for side in ("onnxruntime", "eager", "inductor"))
        result[f"batch_{size}"] = {
            "cpu_ms": medians,
            "bundle_over_fastest_other": round(medians["bundle"] / fastest, 3),
            "bundle_over_graphs_alone": round(medians["bundle"] / medians["graphs"], 3),
        }
    rig.finish(NAME, result, write=options.write, out=options.out)


if __name__ == "__main__":
    main()

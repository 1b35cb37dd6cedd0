"""The three graphs of a bundle in onnxruntime sessions, and nothing of the service: what everything is compared with.

The peers serve this very code; `saturate` and `overhead` time it. It needs numpy, onnxruntime, tokenizers, pydantic.
Prompts are padded to the student's length, as a plain loop does it; `peers` and `overhead`, which ask what the server
adds to the same work, leave out padding as a worker does.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from flashbulb_distill.bundle import open_bundle
from flashbulb_distill.core.noise import draw_noise
from flashbulb_distill.core.sampler import sample
from flashbulb_service.backends.onnx import open_graph
from flashbulb_service.huge_pages import use_huge_pages
from flashbulb_service.images import to_uint8


@dataclass(frozen=True)
class Ask:
    """One picture."""

    prompt: str
    seed: int
    index: int = 0


@dataclass(frozen=True)
class Inputs:
    """A batch, ready to run."""

    ids: np.ndarray  # [b, l]
    mask: np.ndarray  # [b, l]
    noise: tuple[np.ndarray, ...]  # per step [b, c, h, w]


class BareStudent:
    """A bundle in three sessions, with the session options of the service."""

    def __init__(self, folder: Path, *, threads: int, cut: bool = False) -> None:
        """Open the sessions. cut: leave out the padding that all prompts of a batch have."""
        self.bundle = open_bundle(folder)
        self._cut = cut and self.bundle.manifest.text[0].padding == "zeros"
        components = self.bundle.manifest.components.model_dump()
        self._sessions = {
            part: open_graph(self.bundle.file(name), threads=threads) for part, name in components.items()
        }
        (text,) = self.bundle.manifest.text
        self._tokenizer = Tokenizer.from_file(str(self.bundle.file(text.tokenizer)))
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(text.max_length)

    def warm_up(self, size: int) -> None:
        """Draw a batch, and have on huge pages what is then in memory, as a worker has it."""
        self.draw([Ask(f"dog {row}", row) for row in range(size)])
        use_huge_pages()

    def prepare(self, asks: Sequence[Ask]) -> Inputs:
        """Tokenise, and draw the noise of every step."""
        manifest = self.bundle.manifest
        (text,), latent, size = manifest.text, manifest.latent, manifest.shapes[0]
        encodings = self._tokenizer.encode_batch([ask.prompt for ask in asks])
        length = max(len(encoding.ids) for encoding in encodings) if self._cut else text.max_length
        ids = np.full((len(asks), length), text.pad_id, dtype=np.int64)
        mask = np.zeros_like(ids)
        for row, encoding in enumerate(encodings):
            ids[row, : len(encoding.ids)] = encoding.ids
            mask[row, : len(encoding.ids)] = 1
        shape = (latent.channels, size.height // latent.downscale, size.width // latent.downscale)
        noise = tuple(
            np.stack([draw_noise(ask.seed, ask.index, shape, step) for ask in asks])
            for step in range(len(manifest.time_steps))
        )
        return Inputs(ids, mask, noise)

    def run(self, inputs: Inputs) -> np.ndarray:
        """Run the graphs: -> float [b, 3, h, w]."""
        manifest = self.bundle.manifest
        embeds, pooled = self._sessions["text_encoder"].run(
            ["prompt_embeds", "pooled_prompt_embeds"],
            {"input_ids": inputs.ids, "attention_mask": inputs.mask},
        )

        left_out = manifest.text[0].max_length - embeds.shape[1]
        if left_out:
            embeds = np.pad(embeds, ((0, 0), (0, left_out), (0, 0)))

        def denoise(latents: np.ndarray, t: float) -> np.ndarray:
            feed = {
                "latents": np.ascontiguousarray(latents, dtype=np.float32),
                "timestep": np.full(len(latents), t * manifest.timestep_scale, dtype=np.float32),
                "prompt_embeds": embeds,
                "pooled_prompt_embeds": pooled,
            }
            return self._sessions["denoiser"].run(None, feed)[0]

        latents = sample(
            denoise,
            inputs.noise[0],
            manifest.time_steps,
            prediction=manifest.prediction,
            schedule=manifest.schedule,
            renoise=lambda step: inputs.noise[step],
        )
        latents = np.asarray(latents, dtype=np.float32) / np.float32(manifest.latent.scaling)
        latents += np.float32(manifest.latent.shift)
        return self._sessions["decoder"].run(None, {"latents": latents})[0]

    def draw(self, asks: Sequence[Ask]) -> np.ndarray:
        """Make pictures: -> uint8 [b, h, w, 3]."""
        return to_uint8(self.run(self.prepare(asks)))


def open_as_worker(folder: Path, *, threads: int, batch: int) -> BareStudent:
    """Open the student as a worker has it: without needless padding, on huge pages after a batch."""
    student = BareStudent(folder, threads=threads, cut=True)
    student.warm_up(batch)
    return student

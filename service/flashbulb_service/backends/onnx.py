"""Student bundles on onnxruntime (CPU).

Three graphs come from the bundle (text encoder, denoiser, decoder); the loop over the student's time steps is
`flashbulb_distill.core.sampler`, the same function that training and export parity call.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from tokenizers import Tokenizer

from flashbulb_distill.bundle import DISABLED_OPTIMIZERS, Bundle, Text
from flashbulb_distill.core.noise import draw_noise
from flashbulb_distill.core.sampler import sample_steps
from flashbulb_service.backends import Embeddings, ImageRequest, OnStep
from flashbulb_service.backends.embeddings import EmbeddingCache
from flashbulb_service.cores import usable_cores
from flashbulb_service.images import to_uint8

_DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}


class OnnxBackend:
    """One bundle in three onnxruntime sessions on the CPU."""

    name = "onnx"
    takes_any_length = True  # of prompts, where the student can do without padding

    def __init__(self, *, threads: int = 0, cache: EmbeddingCache | None = None) -> None:
        """Remember the number of operator threads; 0 means one per core. Backends may share a cache."""
        self._threads = threads or usable_cores()
        self._bundle: Bundle | None = None
        self._sessions: dict[str, ort.InferenceSession] = {}
        self._takes: dict[str, Mapping[str, Any]] = {}  # part -> its inputs and their types
        self._tokenizers: tuple[Tokenizer, ...] = ()
        self.cache = EmbeddingCache() if cache is None else cache

    def load(self, bundle: Bundle) -> None:
        """Open the graphs and the tokenizers."""
        components = bundle.manifest.components
        for part in ("text_encoder", "denoiser", "decoder"):
            path = bundle.file(getattr(components, part))
            self._sessions[part] = open_graph(path, threads=self._threads)
            self._takes[part] = {node.name: _DTYPES[node.type] for node in self._sessions[part].get_inputs()}
        self._tokenizers = plain_tokenizers(bundle)
        self._bundle = bundle

    def encode_prompts(self, prompts: Sequence[str], pad_to: int | None = None) -> Embeddings:
        """Encode prompts, each distinct one once, and none that the cache still knows.

        Args:
            pad_to: run the text encoder in batches of exactly this size, where its bytes depend on the size.
        """
        bundle = self._ready()
        rows = {prompt: self.cache.get(bundle.sha256, prompt) for prompt in dict.fromkeys(prompts)}
        missing = [prompt for prompt, row in rows.items() if row is None]
        step = pad_to or max(1, len(missing))
        for start in range(0, len(missing), step):
            batch = missing[start : start + step]
            filled = batch + batch[-1:] * ((pad_to or 0) - len(batch))
            encoded = self._encode(bundle, filled, cut=self.takes_any_length and pad_to is None)
            for prompt, tokens, pooled in zip(batch, *encoded, strict=False):
                rows[prompt] = (tokens, pooled)
                self.cache.put(bundle.sha256, prompt, (tokens, pooled))
            if len(batch) == len(prompts):  # all were new, and each another
                return Embeddings(*(values[: len(batch)] for values in encoded))
        found = [row for prompt in prompts if (row := rows[prompt]) is not None]
        return Embeddings(
            np.stack([tokens for tokens, _ in found]), np.stack([pooled for _, pooled in found])
        )

    def denoise(
        self, requests: Sequence[ImageRequest], embeddings: Embeddings, on_step: OnStep | None = None
    ) -> np.ndarray:
        """Draw the latents of requests of one size and number of steps: -> [b, c, h, w], of videos [b, c, f, h, w].

        Args:
            on_step: called after each step with (step, num_steps, x0 latents); what it raises ends the batch.

        Raises:
            RuntimeError: no bundle is loaded.
            ValueError: the student was not trained for the requests' number of steps.
        """
        manifest = self._ready().manifest
        times = manifest.times(requests[0].num_steps)
        shape = manifest.latent_shape(requests[0].width, requests[0].height, requests[0].frames)

        def noise(step: int) -> np.ndarray:
            return np.stack([draw_noise(r.seed, r.index, shape, step) for r in requests])

        def network(xt: np.ndarray, t: float) -> np.ndarray:
            timestep = t * manifest.timestep_scale + manifest.timestep_offset
            inputs = {
                "latents": xt,
                "timestep": np.full(len(requests), timestep),
                "prompt_embeds": embeddings.tokens,
                "pooled_prompt_embeds": embeddings.pooled,
            }
            return _only(self._run("denoiser", inputs))

        steps = sample_steps(
            network,
            noise(0),
            times,
            prediction=manifest.prediction,
            schedule=manifest.schedule,
            renoise=noise,
        )
        for step, estimate in enumerate(steps):
            x0 = np.asarray(estimate, dtype=np.float32)
            if on_step is not None:
                on_step(step, len(times), x0)
        return x0

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """Turn latents into pictures, uint8 [b, h, w, 3], or videos, [b, f, h, w, 3].

        Raises:
            RuntimeError: no bundle is loaded.
        """
        latent = self._ready().manifest.latent
        scaled = latents / np.float32(latent.scaling) + np.float32(latent.shift)
        return to_uint8(_only(self._run("decoder", {"latents": scaled})))

    def close(self) -> None:
        """Drop the sessions."""
        self._sessions.clear()
        self._bundle = None

    def _ready(self) -> Bundle:
        if self._bundle is None:
            raise RuntimeError("expected a loaded bundle: call load() first")
        return self._bundle

    def _encode(self, bundle: Bundle, prompts: list[str], *, cut: bool) -> tuple[np.ndarray, np.ndarray]:
        """Run tokenizers and text encoders: -> [b, l, d], [b, d].

        Args:
            cut: leave out the padding that is common to all prompts, where the student does not need it.
        """
        inputs: dict[str, np.ndarray] = {}
        left_out = 0
        for number, (tokenizer, text) in enumerate(
            zip(self._tokenizers, bundle.manifest.text, strict=True), start=1
        ):
            suffix = "" if number == 1 else f"_{number}"
            # encode_batch hands prompts of microseconds to threads of its own, which a busy machine makes wait
            rows = [tokenizer.encode(prompt).ids[: text.max_length] for prompt in prompts]
            if cut and text.padding == "zeros":
                left_out = text.max_length - max(1, *map(len, rows))
            ids = np.full((len(prompts), text.max_length - left_out), text.pad_id, dtype=np.int64)
            mask = np.zeros_like(ids)
            for row, tokens in enumerate(rows):
                ids[row, : len(tokens)] = tokens
                mask[row, : len(tokens)] = 1
            inputs |= {f"input_ids{suffix}": ids, f"attention_mask{suffix}": mask}
        embeds, pooled = self._run("text_encoder", inputs, ["prompt_embeds", "pooled_prompt_embeds"])
        if left_out:
            whole = np.zeros((len(embeds), embeds.shape[1] + left_out, embeds.shape[2]), embeds.dtype)
            whole[:, : embeds.shape[1]] = embeds
            embeds = whole
        return embeds, pooled

    def _run(
        self, part: str, inputs: Mapping[str, np.ndarray], outputs: Sequence[str] | None = None
    ) -> list[np.ndarray]:
        """Run a graph on those of the inputs that it takes, in its types; what comes out is float32."""
        feed: dict[str, np.ndarray] = {
            name: np.ascontiguousarray(inputs[name], dtype=dtype) for name, dtype in self._takes[part].items()
        }
        found = self._sessions[part].run(outputs, feed)
        return [np.asarray(value, dtype=np.float32) for value in found]


def open_graph(path: Path, *, threads: int) -> ort.InferenceSession:
    """Open a graph as every student's is run: `threads` operators at a time, the same bytes every time."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.use_deterministic_compute = True
    # Batches of ever other sizes and lengths: an arena keeps room for the largest of each and gives nothing back, and
    # is no faster than malloc here (four pictures in .996 to 1.003 of the time).
    options.enable_cpu_mem_arena = False
    options.log_severity_level = 3  # errors only; ours are raised
    # Spinning threads of one worker take the cores of the next one while they wait.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return ort.InferenceSession(
        str(path), options, providers=["CPUExecutionProvider"], disabled_optimizers=[*DISABLED_OPTIMIZERS]
    )


def plain_tokenizers(bundle: Bundle) -> tuple[Tokenizer, ...]:
    """Open the bundle's tokenizers with their own padding and truncation off: the manifest says both."""
    return tuple(_plain_tokenizer(bundle, text) for text in bundle.manifest.text)


def _plain_tokenizer(bundle: Bundle, text: Text) -> Tokenizer:
    tokenizer = Tokenizer.from_file(str(bundle.file(text.tokenizer)))
    tokenizer.no_padding()
    tokenizer.enable_truncation(text.max_length)
    return tokenizer


def _only(outputs: Sequence[np.ndarray]) -> np.ndarray:
    """Return the single output of a graph that has exactly one."""
    (output,) = outputs
    return output

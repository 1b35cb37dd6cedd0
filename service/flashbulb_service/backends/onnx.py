"""Student bundles on onnxruntime (CPU).

Three graphs come from the bundle (text encoder, denoiser, decoder); the loop over the student's time steps is
`flashbulb_distill.core.sampler`, the same function that training and export parity call.
"""

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import onnxruntime as ort
from tokenizers import Tokenizer

from flashbulb_distill.bundle import Bundle
from flashbulb_distill.core.noise import draw_noise
from flashbulb_distill.core.sampler import sample
from flashbulb_service.backends import Generated, ImageRequest
from flashbulb_service.images import to_uint8


class OnnxBackend:
    """One bundle in three onnxruntime sessions on the CPU."""

    def __init__(self, *, threads: int = 0) -> None:
        """Remember the number of operator threads; 0 means one per core."""
        self._threads = threads or len(os.sched_getaffinity(0))
        self._bundle: Bundle | None = None
        self._sessions: dict[str, ort.InferenceSession] = {}
        self._tokenizer: Tokenizer | None = None

    def load(self, bundle: Bundle) -> None:
        """Open the graphs and the tokenizer, and run one picture: the first request shall not pay for it."""
        manifest = bundle.manifest
        components = manifest.components
        options = _session_options(self._threads)
        for part in ("text_encoder", "denoiser", "decoder"):
            path = bundle.file(getattr(components, part))
            self._sessions[part] = ort.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"]
            )
        self._tokenizer = _plain_tokenizer(bundle)
        self._bundle = bundle
        shape = manifest.shapes[0]
        self.generate([ImageRequest("", seed=0, index=0, width=shape.width, height=shape.height)])

    def generate(self, requests: Sequence[ImageRequest]) -> Generated:
        """Make one picture per request.

        Equal requests give equal bytes in any batch: noise belongs to the request, rows do not see each
        other, and where the bundle's exporter has not shown that its graphs are batch-invariant here, every
        row runs in a batch of one.

        Args:
            requests: 1..max_batch requests of one width and height.

        Raises:
            RuntimeError: no bundle is loaded.
            ValueError: the batch is empty or mixes sizes.
        """
        if self._bundle is None:
            raise RuntimeError("expected a loaded bundle: call load() before generate()")
        if len({(request.width, request.height) for request in requests}) != 1:
            raise ValueError("expected a batch of one size with at least one request")
        watch = _StageClock()
        if self._bundle.manifest.batch_invariant.get("onnx", False):
            pictures = list(self._run(requests, watch))
        else:
            pictures = [picture for request in requests for picture in self._run([request], watch)]
        return Generated(pictures, watch.stages_ms)

    def close(self) -> None:
        """Drop the sessions."""
        self._sessions.clear()
        self._bundle = None

    def _run(self, requests: Sequence[ImageRequest], watch: "_StageClock") -> np.ndarray:
        """Run one batch of the graphs: requests -> uint8 [b, h, w, 3]."""
        assert self._bundle is not None
        manifest = self._bundle.manifest
        with watch("text"):
            embeds, pooled = self._encode_prompts([request.prompt for request in requests])
        latent = manifest.latent
        shape = (
            latent.channels,
            requests[0].height // latent.downscale,
            requests[0].width // latent.downscale,
        )

        def noise(step: int) -> np.ndarray:
            return np.stack([draw_noise(r.seed, r.index, shape, step) for r in requests])

        def denoise(xt: np.ndarray, t: float) -> np.ndarray:
            inputs = {
                "latents": np.ascontiguousarray(xt, dtype=np.float32),
                "timestep": np.full(len(requests), t * manifest.timestep_scale, dtype=np.float32),
                "prompt_embeds": embeds,
                "pooled_prompt_embeds": pooled,
            }
            return _only(self._sessions["denoiser"].run(None, inputs))

        with watch("denoise"):
            latents = sample(
                denoise,
                noise(0),
                manifest.time_steps,
                prediction=manifest.prediction,
                schedule=manifest.schedule,
                renoise=noise,
            )
        with watch("decode"):
            latents = np.asarray(latents, dtype=np.float32) / np.float32(latent.scaling) + np.float32(
                latent.shift
            )
            pixels = _only(self._sessions["decoder"].run(None, {"latents": latents}))
            return to_uint8(pixels)

    def _encode_prompts(self, prompts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Encode each distinct prompt once: prompts -> [b, L, d], [b, d]."""
        assert self._bundle is not None and self._tokenizer is not None
        text = self._bundle.manifest.text
        distinct = list(dict.fromkeys(prompts))
        ids = np.full((len(distinct), text.max_length), text.pad_id, dtype=np.int64)
        mask = np.zeros_like(ids)
        for row, encoding in enumerate(self._tokenizer.encode_batch(distinct)):
            tokens = encoding.ids[: text.max_length]
            ids[row, : len(tokens)] = tokens
            mask[row, : len(tokens)] = 1
        embeds, pooled = self._sessions["text_encoder"].run(
            ["prompt_embeds", "pooled_prompt_embeds"], {"input_ids": ids, "attention_mask": mask}
        )
        rows = [distinct.index(prompt) for prompt in prompts]
        return embeds[rows], pooled[rows]


class _StageClock:
    """Adds up wall time by stage."""

    def __init__(self) -> None:
        self.stages_ms: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.stages_ms[stage] = self.stages_ms.get(stage, 0.0) + (time.perf_counter() - start) * 1000


def _session_options(threads: int) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.use_deterministic_compute = True
    options.log_severity_level = 3  # errors only; ours are raised
    # Spinning threads of one worker take the cores of the next one while they wait.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def _plain_tokenizer(bundle: Bundle) -> Tokenizer:
    """Open the bundle's tokenizer with its own padding and truncation off: the manifest says both."""
    tokenizer = Tokenizer.from_file(str(bundle.file(bundle.manifest.text.tokenizer)))
    tokenizer.no_padding()
    tokenizer.enable_truncation(bundle.manifest.text.max_length)
    return tokenizer


def _only(outputs: Sequence[np.ndarray]) -> np.ndarray:
    """Return the single output of a graph that has exactly one."""
    (output,) = outputs
    return output

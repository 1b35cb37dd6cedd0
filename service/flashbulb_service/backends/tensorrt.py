"""Student bundles on TensorRT: the engines of the bundle's engines/ folder that belong to this GPU.

All but the three networks is the ONNX backend: tokenizer, sampler, noise and pixels are the same code.
"""

import importlib
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from flashbulb_distill.bundle import Bundle
from flashbulb_distill.bundle.engines import (
    EngineManifest,
    Flavor,
    engine_file,
    list_engines,
    refusal,
)
from flashbulb_service.backends.choice import RUNTIMES
from flashbulb_service.backends.cuda import Cuda, Gpu
from flashbulb_service.backends.embeddings import EmbeddingCache
from flashbulb_service.backends.engine import EngineSession
from flashbulb_service.backends.onnx import OnnxBackend, plain_tokenizers
from flashbulb_service.errors import BackendUnavailable


class TensorRTBackend(OnnxBackend):
    """One bundle in three engines on one GPU."""

    takes_any_length = False  # an engine is built for one

    def __init__(
        self,
        *,
        cache: EmbeddingCache | None = None,
        cuda: Cuda | None = None,
        runtimes: dict[Flavor, Any] | None = None,
    ) -> None:
        """Find the device and the runtimes that are installed; nothing is loaded yet.

        Raises:
            BackendUnavailable: there is no device, or no runtime.
        """
        super().__init__(threads=1, cache=cache)
        self._cuda = cuda or Cuda()
        self._runtimes = installed_runtimes() if runtimes is None else runtimes
        if not self._runtimes:
            raise BackendUnavailable(
                "expected tensorrt or tensorrt_rtx, found neither; run: pip install 'flashbulb[tensorrt]'"
            )

    def load(self, bundle: Bundle) -> None:
        """Check and load the engines that belong to the bundle, the runtime and the GPU.

        Raises:
            BackendUnavailable: there are none; says in one line why each set of engines is refused.
            BundleError: an engine is not what its manifest says.
        """
        found = list_engines(bundle.path)
        versions = {flavor: str(trt.__version__) for flavor, trt in self._runtimes.items()}
        manifest = choose_engines([m for _, m in found], bundle.sha256, versions, self._cuda.gpu)
        folder = next(place for place, one in found if one is manifest)
        trt = self._runtimes[manifest.flavor]
        plans = {part: engine_file(folder, engine).read_bytes() for part, engine in manifest.engines.items()}
        try:
            for part, plan in plans.items():
                session = EngineSession(trt, self._cuda, plan, manifest.engines[part].profiles)
                self._sessions[part], self._takes[part] = session, session.takes
        except BaseException:
            self.close()
            raise
        self._tokenizers = plain_tokenizers(bundle)
        self._bundle = bundle

    def close(self) -> None:
        """Give the device's memory back."""
        for session in self._sessions.values():
            session.close()
        super().close()


def choose_engines(
    manifests: Sequence[EngineManifest], bundle_sha256: str, versions: dict[Flavor, str], gpu: Gpu
) -> EngineManifest:
    """Return the engines to load: those that nothing speaks against, the tuned flavour first.

    Raises:
        BackendUnavailable: there are none; the message says why, set by set.
    """
    reasons = []
    for flavor in RUNTIMES:
        for manifest in manifests:
            if manifest.flavor != flavor:
                continue
            if flavor not in versions:
                reasons.append(
                    f"expected the package {RUNTIMES[flavor]} for {flavor} engines, it is not installed"
                )
                continue
            reason = refusal(
                manifest,
                bundle_sha256=bundle_sha256,
                runtime_version=versions[flavor],
                capability=gpu.capability,
                gpu=gpu.name,
            )
            if reason is None:
                return manifest
            reasons.append(reason)
    told = "; ".join(reasons) or "the bundle has no engines"
    raise BackendUnavailable(
        f"no engine for {gpu.name} ({gpu.capability}): {told}; run: flashbulb export tensorrt"
    )


def installed_runtimes() -> dict[Flavor, Any]:
    """Import the TensorRT packages that are installed."""
    return {flavor: importlib.import_module(name) for flavor, name in RUNTIMES.items() if find_spec(name)}


def create(*, threads: int, cache: EmbeddingCache | None = None) -> TensorRTBackend:
    """Create the backend; the number of threads does not matter to a GPU."""
    return TensorRTBackend(cache=cache)

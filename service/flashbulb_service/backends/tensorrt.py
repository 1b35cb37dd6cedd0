"""Student bundles on TensorRT: the engines of the bundle's engines/ folder that belong to this GPU.

All but the three networks is the ONNX backend: tokenizer, sampler, noise and pixels are the same code.
"""

import importlib
import json
import logging
from dataclasses import asdict
from importlib.util import find_spec
from typing import Any

from flashbulb_distill.bundle import Bundle
from flashbulb_distill.bundle.engines import Flavor, engine_file, list_engines
from flashbulb_service.backends.choice import RUNTIMES, choose_engines
from flashbulb_service.backends.cuda import Cuda
from flashbulb_service.backends.embeddings import EmbeddingCache
from flashbulb_service.backends.engine import EngineSession
from flashbulb_service.backends.onnx import OnnxBackend, plain_tokenizers
from flashbulb_service.errors import BackendUnavailable

log = logging.getLogger(__name__)


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
        versions = runtime_versions(self._runtimes)
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


def installed_runtimes() -> dict[Flavor, Any]:
    """Import the TensorRT packages that are installed. One whose libraries are missing is left out."""
    found: dict[Flavor, Any] = {}
    for flavor, name in RUNTIMES.items():
        if find_spec(name):
            try:
                found[flavor] = importlib.import_module(name)
            except (ImportError, OSError) as error:
                log.warning("%s is installed and cannot be used: %s", name, " ".join(str(error).split()))
    return found


def runtime_versions(runtimes: dict[Flavor, Any]) -> dict[Flavor, str]:
    """Return the versions that engines have to be of."""
    return {flavor: str(trt.__version__) for flavor, trt in runtimes.items()}


def tell() -> None:
    """Print, as JSON, what engines have to fit here: versions and GPU; see `choice.this_machine`."""
    told = {"runtimes": runtime_versions(installed_runtimes()), "gpu": asdict(Cuda().gpu)}
    print(json.dumps(told))


def create(*, threads: int, cache: EmbeddingCache | None = None) -> TensorRTBackend:
    """Create the backend; the number of threads does not matter to a GPU."""
    return TensorRTBackend(cache=cache)

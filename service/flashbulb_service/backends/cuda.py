"""The few calls of CUDA that an engine needs, with errors raised: memory, copies, streams, captured graphs."""

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from flashbulb_service.errors import BackendUnavailable, OutOfMemory


@dataclass(frozen=True)
class Gpu:
    """A device, as CUDA calls it."""

    name: str
    capability: str  # such as sm_89


class Cuda:
    """One device through NVIDIA's own bindings; `driver` is the module `cuda.bindings.runtime`."""

    def __init__(self, driver: Any = None) -> None:
        """Open the first device.

        Raises:
            BackendUnavailable: the bindings are not installed, or there is no device.
        """
        if driver is None:
            try:
                driver = importlib.import_module("cuda.bindings.runtime")
            except ImportError as error:
                raise BackendUnavailable(
                    f"TensorRT needs the package cuda-bindings, got {error}; run: pip install 'flashbulb[tensorrt]'"
                ) from error
        self._driver = driver

    @property
    def gpu(self) -> Gpu:
        """The device at hand."""
        properties = self._call(self._driver.cudaGetDeviceProperties, 0)
        name = properties.name.decode() if isinstance(properties.name, bytes) else str(properties.name)
        return Gpu(name.rstrip("\0"), f"sm_{properties.major}{properties.minor}")

    def stream(self) -> Any:
        """Create a stream."""
        return self._call(self._driver.cudaStreamCreate)

    def device_memory(self, size: int) -> int:
        """Reserve `size` bytes on the device."""
        return int(self._call(self._driver.cudaMalloc, size))

    def host_memory(self, size: int) -> int:
        """Reserve `size` bytes of the host that the device reads and writes by itself."""
        return int(self._call(self._driver.cudaMallocHost, size))

    def free(self, device: list[int], host: list[int], streams: list[Any]) -> None:
        """Give memory and streams back."""
        for stream in streams:
            self._call(self._driver.cudaStreamDestroy, stream)
        for address in device:
            self._call(self._driver.cudaFree, address)
        for address in host:
            self._call(self._driver.cudaFreeHost, address)

    def to_device(self, target: int, source: int, size: int, stream: Any) -> None:
        """Queue a copy from host to device."""
        kind = self._driver.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call(self._driver.cudaMemcpyAsync, target, source, size, kind, stream)

    def to_host(self, target: int, source: int, size: int, stream: Any) -> None:
        """Queue a copy from device to host."""
        kind = self._driver.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call(self._driver.cudaMemcpyAsync, target, source, size, kind, stream)

    def capture(self, stream: Any, work: Callable[[], None]) -> Any:
        """Record what `work` queues on a stream; return a graph that `launch` repeats."""
        with self._recording(stream) as recorded:
            work()
        return self._call(self._driver.cudaGraphInstantiate, recorded[0], 0)

    def launch(self, graph: Any, stream: Any) -> None:
        """Queue a captured graph."""
        self._call(self._driver.cudaGraphLaunch, graph, stream)

    def forget(self, graph: Any) -> None:
        """Drop a captured graph."""
        self._call(self._driver.cudaGraphExecDestroy, graph)

    def wait(self, stream: Any) -> None:
        """Wait until all that was queued on a stream is done."""
        self._call(self._driver.cudaStreamSynchronize, stream)

    @contextmanager
    def _recording(self, stream: Any) -> Iterator[list[Any]]:
        mode = self._driver.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call(self._driver.cudaStreamBeginCapture, stream, mode)
        recorded: list[Any] = []
        try:
            yield recorded
        finally:  # a capture that is not ended leaves the stream unusable
            recorded.append(self._call(self._driver.cudaStreamEndCapture, stream))

    def _call(self, function: Any, *arguments: Any) -> Any:
        """Call, raise what went wrong, and return the single result if there is one."""
        status, *results = function(*arguments)
        if int(status) != 0:
            _, text = self._driver.cudaGetErrorString(status)
            message = f"CUDA: {text.decode() if isinstance(text, bytes) else text}"
            if int(status) == int(self._driver.cudaError_t.cudaErrorMemoryAllocation):
                raise OutOfMemory(message)
            raise BackendUnavailable(message)
        return results[0] if results else None

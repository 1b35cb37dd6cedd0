"""One TensorRT engine with fixed buffers, asked like an onnxruntime session.

Every batch size that was met once is a captured CUDA graph: copies in, network and copies out are queued by one call.
A batch is padded to the next power of two, so that there are few graphs and they are met while warming up.
"""

import ctypes
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from flashbulb_distill.bundle.engines import Profile
from flashbulb_service.backends.cuda import Cuda
from flashbulb_service.errors import BackendUnavailable, OutOfMemory

Shape = tuple[int, ...]


def padded_rows(rows: int, largest: int) -> int:
    """Return the batch size that is run for `rows`: the next power of two, at most the engine's largest.

    Raises:
        ValueError: there are no rows, or more than the engine takes.
    """
    if not 1 <= rows <= largest:
        raise ValueError(f"expected 1 to {largest} rows, which the engine was built for, got {rows}")
    return min(1 << (rows - 1).bit_length(), largest)


def find_profile(profiles: Sequence[Mapping[str, Profile]], shapes: Mapping[str, Shape]) -> int:
    """Return the index of the first profile that takes inputs of these shapes.

    Raises:
        ValueError: none does; the message tells the shapes.
    """
    for index, profile in enumerate(profiles):
        if all(name in profile and _fits(profile[name], shape) for name, shape in shapes.items()):
            return index
    told = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
    raise ValueError(
        f"expected shapes that the engine was built for, got {told}; build engines for this size"
    )


def _fits(profile: Profile, shape: Shape) -> bool:
    return len(shape) == len(profile.smallest) and all(
        low <= size <= high for low, size, high in zip(profile.smallest, shape, profile.largest, strict=True)
    )


class EngineSession:
    """An engine on a stream of its own. One thread at a time may run it."""

    def __init__(self, trt: Any, cuda: Cuda, plan: bytes, profiles: Sequence[Mapping[str, Profile]]) -> None:
        """Load an engine and reserve its buffers, as large as its largest profile needs.

        Raises:
            BackendUnavailable: the runtime refuses the engine.
            OutOfMemory: the device has too little memory.
        """
        self._trt, self._cuda, self._profiles = trt, cuda, profiles
        self._runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise BackendUnavailable(
                f"TensorRT {trt.__version__} refused an engine that its manifest allows; build the engines again"
            )
        self._context = self._engine.create_execution_context()
        if self._context is None:
            raise OutOfMemory(
                f"expected {self._engine.device_memory_size_v2} bytes of device memory for an engine to run in, found "
                "fewer; free some, or export engines with a smaller --max-batch"
            )
        self._stream = cuda.stream()
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        self._inputs = [n for n in names if self._engine.get_tensor_mode(n) == trt.TensorIOMode.INPUT]
        self._outputs = [n for n in names if n not in self._inputs]
        self._types = {name: np.dtype(trt.nptype(self._engine.get_tensor_dtype(name))) for name in names}
        self._device: dict[str, int] = {}
        self._host: dict[str, int] = {}
        self._graphs: dict[tuple[int, tuple[tuple[str, Shape], ...]], tuple[Any, dict[str, Shape]]] = {}
        self._profile = -1
        try:
            for name, size in self._largest().items():
                size = max(size, 1)  # a width of 0 has an address too: TensorRT takes none that is null
                self._device[name] = cuda.device_memory(size)
                self._host[name] = cuda.host_memory(size)
                self._context.set_tensor_address(name, self._device[name])
        except BaseException:
            self.close()
            raise

    def run(self, outputs: Sequence[str] | None, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """Run inputs of any batch size up to the largest; as onnxruntime's method of this name."""
        rows = len(next(iter(feeds.values())))
        shapes = {name: tuple(feeds[name].shape) for name in self._inputs}
        largest = max(profile[self._inputs[0]].largest[0] for profile in self._profiles)
        padded = padded_rows(rows, largest)
        shapes = {name: (padded, *shape[1:]) for name, shape in shapes.items()}
        for name, shape in shapes.items():
            held = self._view(name, shape)
            held[:rows] = feeds[name]
            held[rows:] = feeds[name][-1:]  # real rows: nothing may overflow in a row that nobody reads
        graph, produced = self._graph(shapes)
        self._cuda.launch(graph, self._stream)
        self._cuda.wait(self._stream)
        return [self._view(name, produced[name])[:rows].copy() for name in outputs or self._outputs]

    @property
    def takes(self) -> dict[str, np.dtype[Any]]:
        """Return the engine's inputs and their types."""
        return {name: self._types[name] for name in self._inputs}

    def close(self) -> None:
        """Give graphs, buffers and the stream back."""
        for graph, _ in self._graphs.values():
            self._cuda.forget(graph)
        self._graphs.clear()
        self._cuda.free([*self._device.values()], [*self._host.values()], [self._stream])
        self._device.clear()
        self._host.clear()
        self._context = self._engine = self._runtime = None

    def _graph(self, shapes: Mapping[str, Shape]) -> tuple[Any, dict[str, Shape]]:
        """Return the captured graph for these input shapes, captured now if it is met for the first time."""
        profile = find_profile(self._profiles, shapes)
        key = (profile, tuple(sorted(shapes.items())))
        if key not in self._graphs:
            if profile != self._profile:
                self._context.set_optimization_profile_async(profile, self._stream)
                self._profile = profile
            for name, shape in shapes.items():
                self._context.set_input_shape(name, shape)
            produced = {name: tuple(self._context.get_tensor_shape(name)) for name in self._outputs}

            def queue() -> None:
                for name, shape in shapes.items():
                    size = self._bytes(name, shape)
                    self._cuda.to_device(self._device[name], self._host[name], size, self._stream)
                if not self._context.execute_async_v3(self._stream):
                    raise BackendUnavailable("TensorRT could not queue the engine; see the log above")
                for name, shape in produced.items():
                    size = self._bytes(name, shape)
                    self._cuda.to_host(self._host[name], self._device[name], size, self._stream)

            queue()  # the first run sets an engine up, which must not be part of what is captured
            self._cuda.wait(self._stream)
            self._graphs[key] = self._cuda.capture(self._stream, queue), produced
        return self._graphs[key]

    def _largest(self) -> dict[str, int]:
        """Return the bytes that each input and output may need."""
        sizes = dict.fromkeys([*self._inputs, *self._outputs], 0)
        for index, profile in enumerate(self._profiles):
            if index:
                self._context.set_optimization_profile_async(index, self._stream)
            for name in self._inputs:
                self._context.set_input_shape(name, profile[name].largest)
                sizes[name] = max(sizes[name], self._bytes(name, profile[name].largest))
            for name in self._outputs:
                shape = tuple(self._context.get_tensor_shape(name))
                sizes[name] = max(sizes[name], self._bytes(name, shape))
        self._profile = len(self._profiles) - 1
        return sizes

    def _bytes(self, name: str, shape: Shape) -> int:
        return math.prod(shape) * int(self._types[name].itemsize)

    def _view(self, name: str, shape: Shape) -> np.ndarray:
        """Return the host's buffer as an array."""
        memory = (ctypes.c_byte * self._bytes(name, shape)).from_address(self._host[name])
        return np.frombuffer(memoryview(memory), dtype=self._types[name]).reshape(shape)

"""One TensorRT engine with fixed buffers, asked like an onnxruntime session.

Every batch size that was met once is a captured CUDA graph: copies in, network and copies out are queued by one call.
A batch is padded to the next power of two, so that there are few graphs and they are met while warming up. A graph
holds what its execution context was as it was captured, so each has a context of its own, whose shapes never change;
all contexts work in the same memory, one after another. What cannot be captured is queued call by call.
"""

import ctypes
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from flashbulb_distill.bundle.engines import Profile
from flashbulb_service.backends.cuda import Cuda
from flashbulb_service.errors import BackendUnavailable, OutOfMemory

Shape = tuple[int, ...]

MAX_CONTEXTS = 32  # with a graph, of one engine; shapes that are met later share another context

log = logging.getLogger(__name__)


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


@dataclass
class Call:
    """What runs inputs of certain shapes: a context that is set to them, and its graph, None where there is none."""

    context: Any
    inputs: Mapping[str, Shape]
    outputs: Mapping[str, Shape]
    graph: Any = None


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
        self._context = self._new_context()
        if self._context is None:
            raise OutOfMemory(
                "expected device memory for an engine to run in, TensorRT found too little; free some, or export "
                "engines with a smaller --max-batch"
            )
        self._stream = cuda.stream()
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        self._inputs = [n for n in names if self._engine.get_tensor_mode(n) == trt.TensorIOMode.INPUT]
        self._outputs = [n for n in names if n not in self._inputs]
        self._types = {name: np.dtype(trt.nptype(self._engine.get_tensor_dtype(name))) for name in names}
        self._device: dict[str, int] = {}
        self._host: dict[str, int] = {}
        self._calls: dict[tuple[tuple[str, Shape], ...], Call] = {}
        self._most_calls = MAX_CONTEXTS
        self._spare: Call | None = None
        self._scratch = 0
        try:
            self._scratch = cuda.device_memory(max(self._engine.device_memory_size_v2, 1))
            for name, size in self._largest().items():
                size = max(size, 1)  # a width of 0 has an address too: TensorRT takes none that is null
                self._device[name] = cuda.device_memory(size)
                self._host[name] = cuda.host_memory(size)
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
        call = self._call(shapes)
        if call.graph is None:
            self._queue(call)
        else:
            self._cuda.launch(call.graph, self._stream)
        self._cuda.wait(self._stream)
        return [self._view(name, call.outputs[name])[:rows].copy() for name in outputs or self._outputs]

    @property
    def takes(self) -> dict[str, np.dtype[Any]]:
        """Return the engine's inputs and their types."""
        return {name: self._types[name] for name in self._inputs}

    def close(self) -> None:
        """Give graphs, contexts, buffers and the stream back."""
        for call in self._calls.values():
            if call.graph is not None:
                self._cuda.forget(call.graph)
        self._calls.clear()
        self._context = self._spare = None
        self._cuda.free([self._scratch, *self._device.values()], [*self._host.values()], [self._stream])
        self._device.clear()
        self._host.clear()
        self._engine = self._runtime = None

    def _call(self, shapes: Mapping[str, Shape]) -> Call:
        """Return what runs these input shapes, captured now if they are met for the first time."""
        key = tuple(sorted(shapes.items()))
        if key in self._calls:
            return self._calls[key]
        context = self._new_context() if len(self._calls) < self._most_calls else None
        if context is None:  # no room for one more, nor later: the first context is set to what comes
            self._most_calls = len(self._calls)
            if self._spare is None or self._spare.inputs != shapes:
                self._spare = self._set(self._context, shapes)
            return self._spare
        call = self._set(context, shapes)
        self._queue(call)  # the first run sets an engine up, which must not be part of what is captured
        self._cuda.wait(self._stream)
        call.graph = self._capture(call)
        self._calls[key] = call
        return call

    def _new_context(self) -> Any:
        """Return a context without memory to work in, None where the device has none left for the context itself."""
        return self._engine.create_execution_context(
            self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        )

    def _set(self, context: Any, shapes: Mapping[str, Shape]) -> Call:
        """Set a context to shapes and to the memory that all of them share: one runs at a time."""
        context.set_optimization_profile_async(find_profile(self._profiles, shapes), self._stream)
        context.set_device_memory(self._scratch, self._engine.device_memory_size_v2)
        for name, address in self._device.items():
            context.set_tensor_address(name, address)
        for name, shape in shapes.items():
            context.set_input_shape(name, shape)
        return Call(context, shapes, {name: tuple(context.get_tensor_shape(name)) for name in self._outputs})

    def _queue(self, call: Call) -> None:
        """Queue copies in, network and copies out."""
        for name, shape in call.inputs.items():
            size = self._bytes(name, shape)
            self._cuda.to_device(self._device[name], self._host[name], size, self._stream)
        if not call.context.execute_async_v3(self._stream):
            raise BackendUnavailable("TensorRT could not queue the engine; see the log above")
        for name, shape in call.outputs.items():
            size = self._bytes(name, shape)
            self._cuda.to_host(self._host[name], self._device[name], size, self._stream)

    def _capture(self, call: Call) -> Any:
        """Return the graph of a call, None where the engine cannot be captured."""
        try:
            # Only RTX can be asked; standard TensorRT says so by failing.
            if getattr(call.context, "is_stream_capturable", lambda stream: True)(self._stream):
                return self._cuda.capture(self._stream, lambda: self._queue(call))
            reason = "TensorRT says that it cannot be"
        except (BackendUnavailable, OutOfMemory) as error:
            reason = str(error)
        log.warning("An engine runs without a CUDA graph for %s: %s", dict(call.inputs), reason)
        return None

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
        return sizes

    def _bytes(self, name: str, shape: Shape) -> int:
        return math.prod(shape) * int(self._types[name].itemsize)

    def _view(self, name: str, shape: Shape) -> np.ndarray:
        """Return the host's buffer as an array."""
        memory = (ctypes.c_byte * self._bytes(name, shape)).from_address(self._host[name])
        return np.frombuffer(memoryview(memory), dtype=self._types[name]).reshape(shape)

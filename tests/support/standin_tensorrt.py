"""Stand-ins of the interfaces of TensorRT's runtime and of CUDA's: engines are ONNX graphs, run by onnxruntime.

For the host's logic only: addresses, shapes, profiles, order of calls, capture and replay. They refuse what the real
ones refuse: unset shapes, addresses that are unset or null, copies beyond a buffer, work on a stream whose capture
was not ended; and a graph whose context was changed after the capture, which the real ones run wrongly.
"""

import ctypes
from types import SimpleNamespace

import numpy as np
import onnxruntime


class StandInCuda:
    """`cuda.bindings.runtime` over the host's memory; every call returns (status, results...)."""

    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice="in", cudaMemcpyDeviceToHost="out")
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)
    cudaError_t = SimpleNamespace(cudaErrorMemoryAllocation=2)

    def __init__(self, *, name=b"NVIDIA L4", major=8, minor=9, memory=1 << 30, can_capture=True):
        self.properties = SimpleNamespace(name=name, major=major, minor=minor)
        self.left, self.buffers, self.streams, self.capturing = memory, {}, {}, None
        self.can_capture = can_capture
        self.launches = self.captures = 0

    def cudaGetDeviceProperties(self, device):
        return 0, self.properties

    def cudaGetErrorString(self, status):
        return 0, {2: b"out of memory"}.get(status, b"invalid argument")

    def cudaStreamCreate(self):
        stream = object()
        self.streams[id(stream)] = stream
        return 0, stream

    def cudaStreamDestroy(self, stream):
        return (0 if self.streams.pop(id(stream), None) else 1,)

    def cudaMalloc(self, size):
        if size == 0:
            return 0, 0
        if size > self.left:
            return 2, 0
        self.left -= size
        memory = (ctypes.c_byte * size)(*b"\x7f" * size)  # what was never written shows
        self.buffers[ctypes.addressof(memory)] = memory
        return 0, ctypes.addressof(memory)

    cudaMallocHost = cudaMalloc

    def cudaFree(self, address):
        if address == 0:
            return (0,)
        memory = self.buffers.pop(address, None)
        self.left += len(memory or b"")
        return (0 if memory else 1,)

    cudaFreeHost = cudaFree

    def cudaMemcpyAsync(self, target, source, size, kind, stream):
        if min(len(self.buffers.get(target, b"")), len(self.buffers.get(source, b""))) < size:
            return (1,)
        self.do(lambda: ctypes.memmove(target, source, size))
        return (0,)

    def do(self, work):
        """Run, or record while a capture is on."""
        (work() if self.capturing is None else self.capturing.append(work))

    def cudaStreamBeginCapture(self, stream, mode):
        self.capturing = []
        return (0,)

    def cudaStreamEndCapture(self, stream):
        recorded, self.capturing = self.capturing, None
        if not self.can_capture:
            return 901, None  # cudaErrorStreamCaptureInvalidated
        self.captures += 1
        return 0, recorded

    def cudaGraphInstantiate(self, graph, flags):
        return 0, graph

    def cudaGraphExecDestroy(self, graph):
        return (0,)

    def cudaGraphLaunch(self, graph, stream):
        assert self.capturing is None
        self.launches += 1
        for work in graph:
            work()
        return (0,)

    def cudaStreamSynchronize(self, stream):
        return (0 if self.capturing is None else 1,)


CONTEXT_BYTES = 1024
TYPES = {"tensor(float)": np.float32, "tensor(int64)": np.int64}


class Engine:
    """An engine whose plan is an ONNX file."""

    def __init__(self, plan, driver):
        self.driver = driver
        self.session = onnxruntime.InferenceSession(plan, providers=["CPUExecutionProvider"])
        self.inputs = {node.name: node for node in self.session.get_inputs()}
        self.tensors = self.inputs | {node.name: node for node in self.session.get_outputs()}

    @property
    def num_io_tensors(self):
        return len(self.tensors)

    def get_tensor_name(self, index):
        return [*self.tensors][index]

    def get_tensor_mode(self, name):
        return "input" if name in self.inputs else "output"

    def get_tensor_dtype(self, name):
        return TYPES[self.tensors[name].type]

    device_memory_size_v2 = 4096

    def create_execution_context(self, strategy="static"):
        scratch = self.device_memory_size_v2 if strategy == "static" else 0
        return Context(self, scratch) if CONTEXT_BYTES + scratch <= self.driver.left else None


class Context:
    """Runs an engine on what lies at the addresses that were set."""

    def __init__(self, engine, scratch):
        self.engine, self.shapes, self.addresses, self.changes = engine, {}, {}, 0
        self.has_memory, self.taken = scratch > 0, CONTEXT_BYTES + scratch
        engine.driver.left -= self.taken

    def __del__(self):
        self.engine.driver.left += self.taken

    def set_device_memory(self, address, size):
        held = len(self.engine.driver.buffers[address])
        self.has_memory = held >= size >= self.engine.device_memory_size_v2

    def set_optimization_profile_async(self, index, stream):
        self.changes += 1
        self.shapes.clear()
        return True

    def set_input_shape(self, name, shape):
        self.changes += 1
        self.shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self, name, address):
        self.addresses[name] = address
        return True

    def get_tensor_shape(self, name):
        rows = next(iter(self.shapes.values()))[0]
        # An axis that a graph leaves open has one name in its inputs and outputs.
        known = {
            axis: size
            for given, shape in self.shapes.items()
            for axis, size in zip(self.engine.tensors[given].shape, shape, strict=True)
            if isinstance(axis, str)
        }
        return (rows, *(known.get(axis, axis) for axis in self.engine.tensors[name].shape[1:]))

    def execute_async_v3(self, stream):
        if set(self.shapes) != set(self.engine.inputs) or set(self.addresses) != set(self.engine.tensors):
            return False
        if not all(self.addresses.values()) or not self.has_memory:
            return False
        shapes, changes = dict(self.shapes), self.changes

        def work():
            assert changes == self.changes, "the context was changed after it was queued"
            feeds = {name: self._array(name, shape) for name, shape in shapes.items()}
            names = [name for name in self.engine.tensors if name not in shapes]
            for name, value in zip(names, self.engine.session.run(names, feeds), strict=True):
                self._array(name, value.shape)[...] = value

        self.engine.driver.do(work)
        return True

    def _array(self, name, shape):
        kind = np.dtype(self.engine.get_tensor_dtype(name))
        size = int(np.prod(shape)) * kind.itemsize
        memory = self.engine.driver.buffers[self.addresses[name]]
        return np.frombuffer(memory, dtype=kind, count=size // kind.itemsize).reshape(shape)


class RtxEngine(Engine):
    """An engine whose contexts tell whether they can be captured; they cannot."""

    def create_execution_context(self, strategy="static"):
        context = super().create_execution_context(strategy)
        context.is_stream_capturable = lambda stream: False
        return context


def standin_runtime(driver, version="11.4.0.106", engine=Engine):
    """Return what `import tensorrt` gives, as far as the backend uses it."""

    class Logger:
        ERROR = 1

        def __init__(self, severity):
            pass

    def runtime(logger):
        return SimpleNamespace(
            deserialize_cuda_engine=lambda plan: None if plan == b"refused" else engine(plan, driver)
        )

    return SimpleNamespace(
        __version__=version,
        Logger=Logger,
        Runtime=runtime,
        ExecutionContextAllocationStrategy=SimpleNamespace(USER_MANAGED="user managed"),
        TensorIOMode=SimpleNamespace(INPUT="input"),
        nptype=lambda kind: kind,
    )

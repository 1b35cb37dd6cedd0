"""Run code on the meta device and count: bytes that are alive at a time, and floating-point operations.

A meta tensor has a shape and no data, so the real training step runs as it is, in seconds and in no memory. Two things
have to be told: what a GPU's autocast and attention do, which the meta device does not have.
"""

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

_SCALAR = torch.ops.aten._local_scalar_dense.default
_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention
_AS = {  # attention on the CPU has no count of its own
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _ATTENTION,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        torch.ops.aten._scaled_dot_product_flash_attention_backward
    ),
}
_LOW = {F.linear, F.conv2d, F.conv3d, torch.conv2d, torch.conv3d, torch.matmul, Tensor.matmul, torch.bmm}
_HIGH = {F.layer_norm, F.group_norm, F.softmax, torch.softmax}


class Meter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Count what is alive on the meta device, and operations.

    A number that is read from a tensor, for the log, is 1 (a flag is False): meta tensors hold none.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.alive_bytes = 0
        self.peak_bytes = 0
        self.flops = 0
        self._sizes: dict[int, int] = {}
        self._shapes = _Shapes()

    def start(self) -> None:
        """Begin a new peak and a new count of operations."""
        self.peak_bytes, self.flops = self.alive_bytes, 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is _SCALAR and args[0].device.type == "meta":
            return False if args[0].dtype == torch.bool else 1
        out = self._shapes.of(func, args, kwargs)
        count: Callable[..., int] | None = flop_registry.get(
            _AS.get(func._overloadpacket, func._overloadpacket)
        )
        if count is not None:
            self.flops += _flops(count, func, args, kwargs, out)
        for value in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(value, Tensor) and value.device.type == "meta":
                self._see(value)
        return out

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        self.alive_bytes += storage.nbytes()
        self.peak_bytes = max(self.peak_bytes, self.alive_bytes)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.alive_bytes -= self._sizes.pop(key, 0)


class _Shapes:
    """What operations on meta tensors return: torch works a shape out in Python, here once for each kind of call."""

    def __init__(self) -> None:
        self._known: dict[
            Any, tuple[bool, list[Any]]
        ] = {}  # whether it is one value, and (size, stride, dtype) of each

    def of(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Return what `func` returns."""
        if not _is_fresh(func):
            return func(*args, **kwargs)
        try:
            key = (func, _key(args), _key(tuple(kwargs.items())))
            known = self._known.get(key)
        except TypeError:  # a value that no key can have
            return func(*args, **kwargs)
        if known is None:
            out = func(*args, **kwargs)
            values = list(out) if isinstance(out, (tuple, list)) else [out]
            given = {
                leaf.untyped_storage()._cdata
                for leaf in tree_leaves((args, kwargs))
                if isinstance(leaf, Tensor)
            }
            if all(_is_plain(value, given) for value in values):
                kinds = [(value.size(), value.stride(), value.dtype) for value in values]
                self._known[key] = not isinstance(out, (tuple, list)), kinds
            return out
        alone, kinds = known
        made = [torch.empty_strided(*kind[:2], dtype=kind[2], device="meta") for kind in kinds]
        return made[0] if alone else tuple(made)


_FRESH: dict[Any, bool] = {}


def _is_fresh(func: Any) -> bool:
    """Tell whether an operation returns tensors of its own: no views, nothing that it was given."""
    if func not in _FRESH:
        schema = func._schema
        _FRESH[func] = not any(value.alias_info for value in [*schema.arguments, *schema.returns])
    return _FRESH[func]


def _key(value: Any) -> Any:
    if isinstance(value, Tensor):
        if value.device.type != "meta":
            raise TypeError("a tensor with values")
        return value.size(), value.stride(), value.dtype
    if isinstance(value, (tuple, list)):
        return tuple(map(_key, value))
    return type(value), value  # 1 is no 1.0


def _is_plain(value: Any, given: set[int]) -> bool:
    """Tell whether a value is a tensor with memory of its own, and no more of it than it shows."""
    if not isinstance(value, Tensor) or value.device.type != "meta" or value.storage_offset() != 0:
        return False
    like = torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device="meta")
    storage = value.untyped_storage()
    return storage._cdata not in given and storage.nbytes() == like.untyped_storage().nbytes()


def _flops(count: Callable[..., int], func: Any, args: Any, kwargs: Any, out: Any) -> int:
    packet = func._overloadpacket
    if packet in _AS and "backward" in str(func):  # the GPU's takes the log-sum-exp and lengths besides
        grad_out, query, key, value = args[:4]
        return int(
            count(
                grad_out,
                query,
                key,
                value,
                out,
                args[5],
                None,
                None,
                None,
                None,
                0.0,
                False,
                None,
                None,
                out_val=out,
            )
        )
    if packet in _AS:
        return int(count(*args[:3], out_val=out))
    return int(count(*args, **kwargs, out_val=out))


class Compute(TorchFunctionMode):
    """Do on the meta device what autocast to bfloat16 and fused attention do.

    Args:
        norms_in_float32: as CUDA's autocast has it; the CPU's leaves them in the input's dtype.
    """

    def __init__(self, *, norms_in_float32: bool = True) -> None:
        super().__init__()
        self.norms_in_float32 = norms_in_float32

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.autograd.backward:
            # A mode is off while it handles a call, and checkpointed blocks run again inside this one.
            with self, _without_check():
                return func(*args, **kwargs)
        attention = func is F.scaled_dot_product_attention
        if torch.is_autocast_enabled("cpu") and _on_meta(args):
            dtype = None
            if func in _LOW or attention:
                dtype = torch.bfloat16
            elif func in _HIGH and self.norms_in_float32:
                dtype = torch.float32
            if dtype is not None:
                args = [_cast(value, dtype) for value in args]
                kwargs = {name: _cast(value, dtype) for name, value in kwargs.items()}
        if attention and _on_meta(args) and kwargs.get("attn_mask") is None and len(args) == 3:
            fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
            return fused(*args, kwargs.get("dropout_p", 0.0), kwargs.get("is_causal", False))[0]
        return func(*args, **kwargs)


@contextmanager
def _without_check() -> Iterator[None]:
    """Let torch.autograd.backward run under a function mode without handing itself to the mode again."""
    name = "has_torch_function"  # as torch.autograd itself calls it
    check = getattr(torch.autograd, name)
    setattr(torch.autograd, name, lambda args: False)
    try:
        yield
    finally:
        setattr(torch.autograd, name, check)


def _on_meta(args: Sequence[Any]) -> bool:
    return any(isinstance(value, Tensor) and value.device.type == "meta" for value in args)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

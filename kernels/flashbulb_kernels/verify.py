"""Are the kernels right on this machine? Values and gradients against the definition in fp64, before any speed.

Where there are kernels for values alone, the values are compared.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from .attention import Preparation, attention
from .attention.availability import DTYPES
from .attention.reference import attention_reference
from .attention.tolerance import Closeness, closeness, plain_attention
from .tiles import HEAD_DIMS, has_backward, has_tile

Prepared = Literal["", "rms of two segments", "layer and rotation"]


@dataclass(frozen=True, slots=True)
class Case:
    """Sizes of one comparison, as in `attention`; gradients: compare them too."""

    n: int
    m: int
    d: int
    dtype: torch.dtype
    masked: bool = False
    prepared: Prepared = ""
    gradients: bool = True

    def __str__(self) -> str:
        told = ("masked" if self.masked else "", self.prepared, "" if self.gradients else "values alone")
        extras = [text for text in told if text]
        return " ".join((f"{self.n}x{self.m} d{self.d} {str(self.dtype).removeprefix('torch.')}", *extras))


@dataclass(frozen=True, slots=True)
class Verdict:
    """How close each result of a case is: o and, of gradients, dq, dk, dv."""

    case: Case
    found: dict[str, Closeness] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Say whether every result is close enough."""
        return all(closeness.ok for closeness in self.found.values())

    def __str__(self) -> str:
        worst = max(self.found, key=lambda name: self.found[name].share)
        return f"{self.case}: {worst} {self.found[worst]}"


def cases(dtypes: Sequence[torch.dtype], arch: str = "interpreter") -> list[Case]:
    """List what is compared for each dtype: odd lengths, every head dimension, masks, norms and rotations.

    Left out are cases for which there is no kernel on the architecture; where there is none for gradients, values are
    compared alone.
    """
    listed = []
    for dtype in dtypes:
        listed += [Case(n, m, 64, dtype) for n, m in ((1, 1), (63, 77), (200, 77), (77, 333), (333, 333))]
        listed += [Case(63, 77, d, dtype) for d in HEAD_DIMS if d != 64]
        listed.append(Case(63, 200, 64, dtype, masked=True))
        listed += [
            Case(200, 200, 64, dtype, prepared=p) for p in ("rms of two segments", "layer and rotation")
        ]
    return [
        replace(case, gradients=has_backward(DTYPES[case.dtype], case.d, arch))
        for case in listed
        if has_tile("fused" if case.prepared else "forward", DTYPES[case.dtype], case.d, arch)
    ]


def verify(device: torch.device, listed: Sequence[Case]) -> Iterator[Verdict]:
    """Compare the Triton kernels with the definition, case by case.

    Raises:
        KernelUnavailable: the kernels cannot run on the device.
    """
    for case in listed:
        q, k, v, grad_o = _draw(case, device)
        mask = _mask(case, device)
        preparation = _preparation(case, device)
        leaves = [x.clone().requires_grad_(case.gradients) for x in (q, k, v)]
        o = attention(*leaves, key_padding_mask=mask, preparation=preparation, impl="triton")
        results = o.detach(), *(torch.autograd.grad(o, leaves, grad_o) if case.gradients else ())
        truths = differentiated(q, k, v, grad_o, mask, preparation, exact=True)
        plains = differentiated(q, k, v, grad_o, mask, preparation, exact=False)
        lse = _largest_lse(q.double(), k.double(), v.double(), mask, preparation)
        compared = zip(("o", "dq", "dk", "dv"), results, truths, plains, strict=False)
        yield Verdict(case, {name: closeness(a, b, c, 1.0, lse) for name, a, b, c in compared})


def differentiated(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad_o: Tensor,
    mask: Tensor | None,
    preparation: Preparation | None = None,
    *,
    exact: bool,
) -> tuple[Tensor, ...]:
    """Return o, dq, dk, dv by autograd: of the definition in fp64 (exact), or of plain torch in the inputs' dtype."""
    scale = q.shape[-1] ** -0.5
    leaves = [(x.double() if exact else x).detach().clone().requires_grad_() for x in (q, k, v)]
    q_, k_, v_ = leaves
    if preparation is not None:
        q_, k_ = preparation.prepare(q_, k_) if exact else rounded_steps(preparation, q_, k_)
    o = attention_reference(q_, k_, v_, mask, scale)[0] if exact else plain_attention(q_, k_, v_, mask, scale)
    return o.detach(), *torch.autograd.grad(o, leaves, grad_o.to(o.dtype))


def _largest_lse(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, preparation: Preparation | None
) -> float:
    if preparation is not None:
        q, k = preparation.prepare(q, k)
    _, lse = attention_reference(q, k, v, mask, q.shape[-1] ** -0.5)
    return float(lse.abs().max())


def rounded_steps(preparation: Preparation, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Prepare q and k as plain torch does: rounded after the norm and again after the rotation."""
    norm = replace(preparation, cos=None, sin=None, rope_start=0)
    rope = Preparation(cos=preparation.cos, sin=preparation.sin, rope_start=preparation.rope_start)
    return rope.prepare(*norm.prepare(q, k))


def _draw(case: Case, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(case.n * case.m + case.d)
    shapes = [(2, 2, length, case.d) for length in (case.n, case.m, case.m, case.n)]
    q, k, v, grad_o = (torch.randn(shape, generator=generator).to(device, case.dtype) for shape in shapes)
    return q, k, v, grad_o


def _mask(case: Case, device: torch.device) -> Tensor | None:
    """Draw scattered holes, and leave each sample one key at least."""
    if not case.masked:
        return None
    mask = torch.rand(2, case.m, generator=torch.Generator().manual_seed(case.m)) > 0.5
    mask[:, -1] = True
    return mask.to(device)


def _preparation(case: Case, device: torch.device) -> Preparation | None:
    """Draw what SD3.5 ("rms of two segments") or CogVideoX ("layer and rotation") does to q and k."""
    generator = torch.Generator().manual_seed(case.d)

    def near(value: float, *shape: int) -> Tensor:
        return (value + 0.3 * torch.randn(shape, generator=generator)).to(device, case.dtype)

    if case.prepared == "rms of two segments":
        split = case.n - 77
        return Preparation("rms", q_weight=near(1, 2, case.d), k_weight=near(1, 2, case.d), split=split)
    if case.prepared == "layer and rotation":
        angle = (3 * torch.randn(case.n - 77, case.d // 2, generator=generator)).to(device)
        weight, bias = near(1, case.d), near(0, case.d)
        return Preparation(
            "layer", 1e-6, weight, bias, weight, bias, cos=angle.cos(), sin=angle.sin(), rope_start=77
        )
    return None

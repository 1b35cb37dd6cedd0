"""What architectures allow and what GPUs promise on paper: limits, occupancy, rooflines. Numbers and pure functions.

Nothing here is measured. A roofline bounds a time from below: it says what cannot be beaten, never what is reached.

Sources:
    Limits: NVIDIA, "CUDA C++ Programming Guide", table "Technical Specifications per Compute Capability", and the
    tuning guides of Ampere, Ada, Hopper and Blackwell (shared memory; 1 KiB of every block's is the system's).
    Granularity: the occupancy calculator of Nsight Compute. Tensor memory: PTX ISA, "Tensor Memory", 512 columns.
    GPUs: the vendor's datasheets and architecture whitepapers, named per row; dense rates, accumulation in fp32.
"""

from dataclasses import dataclass
from typing import Literal

Unit = Literal["mma.sync", "wgmma", "tcgen05"]
THREADS_PER_WARP = 32
REGISTERS_PER_SM = 65536
RESERVED_SHARED_BYTES = 1024  # per block, by the system
TENSOR_MEMORY_COLUMNS = 512


@dataclass(frozen=True, slots=True)
class Limits:
    """What a streaming multiprocessor of an architecture holds, and its tensor-core instruction."""

    warps: int
    blocks: int
    shared_bytes: int
    shared_bytes_per_block: int
    unit: Unit


_KIB = 1024
LIMITS: dict[str, Limits] = {
    "sm_80": Limits(64, 32, 164 * _KIB, 163 * _KIB, "mma.sync"),
    "sm_86": Limits(48, 16, 100 * _KIB, 99 * _KIB, "mma.sync"),
    "sm_89": Limits(48, 24, 100 * _KIB, 99 * _KIB, "mma.sync"),
    "sm_90": Limits(64, 32, 228 * _KIB, 227 * _KIB, "wgmma"),
    "sm_100": Limits(64, 32, 228 * _KIB, 227 * _KIB, "tcgen05"),
    "sm_120": Limits(48, 24, 100 * _KIB, 99 * _KIB, "mma.sync"),
}


@dataclass(frozen=True, slots=True)
class Occupancy:
    """Blocks that an SM holds at once, the share of its warps that they fill, and what keeps it from more."""

    blocks: int
    fraction: float
    limiter: str


def occupancy(
    arch: str, num_warps: int, registers: int, shared_bytes: int, tensor_columns: int = 0
) -> Occupancy:
    """Estimate how many blocks of a kernel an SM holds.

    Args:
        arch: a key of LIMITS.
        num_warps: warps per block.
        registers: 32-bit registers per thread.
        shared_bytes: static and dynamic shared memory of a block, without the system's share.
        tensor_columns: columns of tensor memory of a block, on sm_100.
    """
    limits = LIMITS[arch]
    # Registers are handed out to warps by 256, and an SM is four quarters with a register file each.
    registers_per_warp = _round_up(registers * THREADS_PER_WARP, 256)
    warps_by_registers = REGISTERS_PER_SM // 4 // registers_per_warp * 4
    shared_per_block = _round_up(shared_bytes + RESERVED_SHARED_BYTES, 128)
    bounds = {
        "warps": limits.warps // num_warps,
        "blocks": limits.blocks,
        "registers": warps_by_registers // num_warps,
        "shared memory": limits.shared_bytes // shared_per_block,
    }
    if tensor_columns:
        bounds["tensor memory"] = TENSOR_MEMORY_COLUMNS // tensor_columns
    limiter = min(bounds, key=lambda name: bounds[name])
    return Occupancy(bounds[limiter], bounds[limiter] * num_warps / limits.warps, limiter)


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


@dataclass(frozen=True, slots=True)
class Gpu:
    """A product on paper: dense FLOP/s in fp16 or bf16 and in tf32, and bytes/s of its memory."""

    name: str
    arch: str
    flops_16: float
    flops_tf32: float
    bytes_per_s: float
    source: str

    def flops(self, dtype: str) -> float:
        """Return the peak for a dtype of the kernels; fp32 is three tf32 products."""
        return self.flops_tf32 / 3 if dtype == "fp32" else self.flops_16


GPUS = (
    Gpu("A100 SXM 80 GB", "sm_80", 312e12, 156e12, 2039e9, "A100 datasheet, 2021"),
    Gpu("A10", "sm_86", 125e12, 62.5e12, 600e9, "A10 datasheet, 2021"),
    Gpu("RTX 3090", "sm_86", 71e12, 35.6e12, 936e9, "GA102 whitepaper, appendix A"),
    Gpu("L4", "sm_89", 121e12, 60e12, 300e9, "L4 datasheet, half of the sparse rates"),
    Gpu("RTX 4090", "sm_89", 165.2e12, 82.6e12, 1008e9, "Ada whitepaper, appendix A"),
    Gpu("H100 SXM", "sm_90", 989.4e12, 494.7e12, 3350e9, "H100 datasheet, half of the sparse rates"),
    Gpu(
        "B200", "sm_100", 2250e12, 1125e12, 8000e9, "DGX B200 datasheet, an eighth; half of the sparse rates"
    ),
    Gpu("RTX 5090", "sm_120", 209.5e12, 104.8e12, 1792e9, "RTX Blackwell whitepaper, appendix A"),
)


@dataclass(frozen=True, slots=True)
class Work:
    """One attention: b samples, h heads, nq queries over nk keys, head dimension d, bytes per element."""

    b: int
    h: int
    nq: int
    nk: int
    d: int
    element_bytes: int

    @property
    def flops(self) -> int:
        """Multiplications and additions of q k^T and p v."""
        return 4 * self.b * self.h * self.nq * self.nk * self.d

    @property
    def memory_bytes(self) -> int:
        """What must cross the memory once: q, k, v in, o and the fp32 log-sum-exp out."""
        rows = self.b * self.h
        return rows * ((2 * self.nq + 2 * self.nk) * self.d * self.element_bytes + 4 * self.nq)

    @property
    def intensity(self) -> float:
        """FLOP per byte of memory traffic."""
        return self.flops / self.memory_bytes


@dataclass(frozen=True, slots=True)
class Bound:
    """A time that no kernel can beat on a GPU, and what sets it."""

    seconds: float
    by: Literal["tensor cores", "memory"]


def roofline(work: Work, gpu: Gpu, dtype: str) -> Bound:
    """Bound the time of an attention from below. Williams et al. 2009, "Roofline"; the exponentials are left out."""
    compute_s = work.flops / gpu.flops(dtype)
    memory_s = work.memory_bytes / gpu.bytes_per_s
    return Bound(max(compute_s, memory_s), "tensor cores" if compute_s >= memory_s else "memory")


def tile_intensity(rows: int, products: float, streamed: float, element_bytes: int) -> float:
    """FLOP per byte that one program streams.

    A program keeps `rows` queries or keys; every row of `streamed` other matrices (k and v, or q and dO: two) passes by
    once, from L2 at best, and takes part in `products` matrix products: 2 * products * rows * d FLOP for
    streamed * d elements.
    """
    return 2 * products * rows / (streamed * element_bytes)

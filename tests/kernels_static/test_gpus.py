"""Occupancy and rooflines against examples worked by hand."""

import pytest

from flashbulb_kernels.gpus import GPUS, LIMITS, Work, occupancy, roofline, tile_intensity


def test_registers_bound_the_blocks_of_an_a100() -> None:
    """168 registers: 5376 a warp, three warps in a quarter of 16384, twelve in an SM, three blocks of four."""
    held = occupancy("sm_80", num_warps=4, registers=168, shared_bytes=40960)
    assert (held.blocks, held.limiter) == (3, "registers")
    assert held.fraction == 12 / 64


def test_shared_memory_bounds_the_blocks_of_an_ada_card() -> None:
    """40960 bytes and 1024 of the system's: two of 41984 in 102400."""
    held = occupancy("sm_89", num_warps=4, registers=64, shared_bytes=40960)
    assert (held.blocks, held.limiter) == (2, "shared memory")
    assert held.fraction == 8 / 48


def test_registers_are_handed_out_by_256_a_warp() -> None:
    """33 registers cost a warp 1056, rounded to 1280: twelve warps in a quarter where 32 registers allow sixteen."""
    assert occupancy("sm_80", num_warps=4, registers=32, shared_bytes=0).blocks == 16
    assert occupancy("sm_80", num_warps=4, registers=33, shared_bytes=0).blocks == 12


def test_tensor_memory_bounds_the_blocks_of_a_b200() -> None:
    held = occupancy("sm_100", num_warps=4, registers=64, shared_bytes=1024, tensor_columns=256)
    assert (held.blocks, held.limiter) == (2, "tensor memory")


def test_more_shared_memory_than_an_sm_has_leaves_no_block() -> None:
    assert occupancy("sm_86", num_warps=4, registers=64, shared_bytes=101 * 1024).blocks == 0


def test_attention_of_many_keys_is_bound_by_tensor_cores_and_a_roofline_is_its_flops_over_the_peak() -> None:
    """4 * 2 * 10 * 4096^2 * 64 = 85.9 GFLOP; at 312 TFLOP/s 275 us; 84 MB of memory take 41 us."""
    work = Work(b=2, h=10, nq=4096, nk=4096, d=64, element_bytes=2)
    assert work.flops == 85_899_345_920
    assert work.memory_bytes == 20 * (4 * 4096 * 64 * 2 + 4 * 4096)
    bound = roofline(work, GPUS[0], "fp16")
    assert bound.by == "tensor cores"
    assert bound.seconds == pytest.approx(275.3e-6, rel=1e-3)


def test_attention_of_few_keys_is_bound_by_memory() -> None:
    """One key per query row: 4 FLOP per element against two elements read and written."""
    work = Work(b=1, h=1, nq=1 << 20, nk=1, d=64, element_bytes=2)
    bound = roofline(work, GPUS[0], "fp16")
    assert bound.by == "memory"
    assert bound.seconds == pytest.approx(((2 << 20) * 64 * 2 + 2 * 64 * 2 + (4 << 20)) / 2039e9)


def test_fp32_costs_three_tf32_products() -> None:
    assert GPUS[0].flops("fp32") == pytest.approx(52e12)


def test_a_programs_intensity_is_its_rows_per_byte_and_product() -> None:
    """64 queries in fp16, d = 64: a key and a value, 256 bytes, bring 2 * 2 * 64 * 64 = 16384 FLOP."""
    assert tile_intensity(rows=64, products=2, streamed=2, element_bytes=2) == 16384 / 256


def test_every_gpu_is_of_an_architecture_with_limits_and_every_architecture_has_a_gpu() -> None:
    assert {gpu.arch for gpu in GPUS} == set(LIMITS)

"""What is read from PTX and logs, and what the gate objects to: planted faults, without a compiler."""

import ast
from dataclasses import replace

import pytest

from flashbulb_kernels.aot import Variant, shipped_variants
from flashbulb_kernels.inspect import Row, faults, loops, ptxas_usage, refused, scalar_loads_in_loops
from flashbulb_kernels.signatures import ENTRIES, jitted_functions
from flashbulb_kernels.static_table import markdown, read_csv, roofline_markdown, write_csv
from flashbulb_kernels.tiles import Tile

GREEN = Row(
    entry="forward",
    form="plain",
    dtype="fp16",
    head_dim=64,
    arch="sm_80",
    block_m=64,
    block_n=64,
    num_warps=4,
    num_stages=3,
    reload=False,
    columns=0,
    owned=0,
    key="0123456789ab",
    registers=168,
    spill_bytes=0,
    stack_bytes=0,
    shared_bytes=40960,
    tensor=64,
    tensor_sass=128,
    async_copies=32,
    bulk_copies=0,
    scalar_loads=0,
    blocks=3,
    occupancy=0.188,
    limiter="registers",
    intensity=64.0,
)

PTX = """
$L__BB0_1:
	ld.global.b16 	%rs1, [ %rd1 + 0 ];
	@%p1 bra 	$L__BB0_3;
$L__BB0_2:
	@%p2 ld.global.b16 	%rs2, [ %rd2 + 0 ];
	@%p2 ld.global.L1::evict_last.b16 	{ %rs3 }, [ %rd2 + 2 ];
	ld.global.v4.b16 	{ %rs4, %rs5, %rs6, %rs7 }, [ %rd3 + 0 ];
	ld.global.v4.b32 	{ %r4, %r5, %r6, %r7 }, [ %rd3 + 0 ];
	ld.shared.b16 	%rs8, [ %r1 ];
	@%p3 bra 	$L__BB0_2;
$L__BB0_3:
	ret;
"""


def test_a_loop_is_what_lies_between_a_label_and_the_branch_back() -> None:
    (loop,) = loops(PTX)
    assert loop.startswith("$L__BB0_2:") and loop.endswith("bra \t$L__BB0_2;")


def test_scalar_16_bit_loads_are_counted_in_loops_alone_and_vectors_are_none() -> None:
    assert scalar_loads_in_loops(PTX) == 2


def test_ptxas_names_registers_and_both_ways_of_a_spill() -> None:
    log = (
        "ptxas info    : Function properties for forward_kernel\n"
        "    8 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads\n"
        "ptxas info    : Used 255 registers, used 1 barriers, 528 bytes cmem[0]\n"
    )
    assert ptxas_usage(log) == {"registers": 255, "stack_bytes": 8, "spill_bytes": 28}


def test_a_log_without_numbers_is_refused() -> None:
    with pytest.raises(ValueError, match="expected ptxas -v to name registers"):
        ptxas_usage("ptxas fatal")


def test_the_green_row_is_green() -> None:
    assert faults(GREEN) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"spill_bytes": 4}, "4 bytes of registers spilled"),
        ({"shared_bytes": 163 * 1024 + 1}, "bytes of shared memory"),
        ({"blocks": 0}, "no block fits"),
        ({"tensor": 0}, "no mma.sync"),
        ({"tensor_sass": 0}, "no mma.sync"),
        ({"arch": "sm_100", "tensor": 0}, "no tcgen05"),
        ({"async_copies": 0}, "no asynchronous copies"),
        ({"scalar_loads": 96}, "96 scalar 16-bit loads"),
    ],
)
def test_each_fault_alone_turns_a_row_red(change: dict[str, int], words: str) -> None:
    (fault,) = faults(replace(GREEN, **change))  # type: ignore[arg-type]
    assert words in fault


def test_delta_needs_neither_tensor_cores_nor_asynchronous_copies() -> None:
    bare = replace(GREEN, entry="delta", tensor=0, tensor_sass=0, async_copies=0)
    assert faults(bare) == []
    assert faults(replace(bare, spill_bytes=4)) != []


def test_the_table_survives_writing_and_reading() -> None:
    red = replace(
        GREEN, arch="sm_90", reload=True, spill_bytes=4, faults=("4 bytes of registers spilled", "no wgmma")
    )
    assert read_csv(write_csv([red, GREEN])) == [GREEN, red]


def test_a_table_of_other_columns_is_refused() -> None:
    with pytest.raises(ValueError, match="expected the columns entry, form"):
        read_csv("entry,form\n")


def test_a_variant_that_did_not_compile_is_a_red_row_that_says_why() -> None:
    row = refused(Variant("forward", "plain", "fp16", 64, "sm_80", Tile(64, 64, 4, 3)), "ptxas said no")
    assert row.faults == ("ptxas said no",)
    assert "ptxas said no" in markdown([row])


def test_the_roofline_names_every_gpu_and_layer() -> None:
    shown = roofline_markdown()
    assert "B200" in shown and "CogVideoX" in shown and "tensor cores" in shown and "memory" in shown


def test_comments_and_docstrings_do_not_change_what_is_compiled_and_code_does() -> None:
    def seen(text: str) -> list[str]:
        return [ast.unparse(function) for function in jitted_functions(text).values()]

    plain = "@triton.jit\ndef f(x):\n    return x + 1\n"
    told = '# why\n@triton.jit\ndef f(x):\n    """What."""\n    return x + 1  # one\n\n\ndef host(y):\n    return y\n'
    assert seen(plain) == seen(told)
    assert seen(plain) != seen(plain.replace("1", "2"))


@pytest.mark.parametrize(
    ("entry", "reached", "others"),
    [
        ("delta", "load_rows", "dq_step"),
        ("dq", "dq_step", "dkdv_step"),
        ("forward", "softmax_step", "prepare_rows"),
    ],
)
def test_a_kernel_is_hashed_with_the_functions_it_reaches_and_no_others(
    entry: str, reached: str, others: str
) -> None:
    """So that a change to one kernel asks for no other to be compiled again."""
    source = ENTRIES[entry].source
    assert f"def {reached}(" in source
    assert f"def {others}(" not in source


def test_an_unknown_architecture_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown architecture sm_75: expected some of sm_80"):
        shipped_variants(archs=("sm_75",))

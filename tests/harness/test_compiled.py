import re

import pytest
import torch

import compiled_kernels as kernels
from harness import compiled, pretend
from harness.compiled import compile_launches, programs_per_sm


def only(arch=90, **changes):
    (row,) = compile_launches(lambda: kernels.call(**changes), arch)
    return row


@pytest.mark.parametrize(
    ("arch", "opcode"),
    [(80, "HMMA"), (90, "HGMMA"), (100, "UTCHMMA")],
    ids=("a100", "h100", "b200"),
)
def test_a_product_uses_the_tensor_cores_of_each_gpu(arch, opcode):
    row = only(arch, M=128)
    assert row.opcodes[opcode] > 0
    assert row.remarks == ()
    assert row.spills == row.spills_in_loops == row.stack_bytes == 0
    assert row.arch == arch
    assert 32 < row.registers <= 255
    assert row.shared_bytes > 0
    assert row.instructions > 100
    assert row.programs_per_sm >= 1


def test_what_identifies_a_configuration():
    row = only(M=64, K=32)
    assert row.kernel == "product"
    assert row.launches == 1
    assert row.constants == {"M": 64, "K": 32, "PRECISION": "tf32"}
    assert (row.warps, row.stages) == (4, 3)
    assert only(M=128, warps=8).warps == 8


def test_a_configuration_is_compiled_once_however_often_it_is_launched():
    def twice_and_another():
        kernels.call()
        kernels.call()
        kernels.call(K=32)

    rows = compile_launches(twice_and_another, 90)
    assert [(row.constants["K"], row.launches) for row in rows] == [(64, 2), (32, 1)]


def test_nothing_runs():
    c = torch.full((64, 64), 7.0)
    a = torch.ones(64, 64)

    def launch():
        kernels.product[(1,)](a, a, c, 64, M=64, K=64, PRECISION="tf32")

    assert len(compile_launches(launch, 90)) == 1
    assert torch.equal(c, torch.full((64, 64), 7.0))


def test_a_tile_too_large_spills_and_says_so():
    good, bad = only(), only(M=256)
    assert good.spills == 0
    assert bad.spills > 0
    assert bad.spills == bad.opcodes["LDL"] + bad.opcodes["STL"]
    assert bad.spills_in_loops > 0
    assert bad.stack_bytes > 0
    assert f"{bad.spills} spills, {bad.spills_in_loops} in loops" in bad.remarks


def test_an_exact_dot_is_named():
    good, bad = only(dtype=torch.float32), only(dtype=torch.float32, precision="ieee")
    assert good.remarks == ()
    assert good.opcodes["HGMMA"] > 0
    assert "1 of 1 dots ieee" in bad.remarks
    assert bad.opcodes["HGMMA"] == bad.opcodes["HMMA"] == 0
    assert bad.opcodes["FFMA"] > 100 > good.opcodes["FFMA"]


def test_a_tile_too_small_falls_back_to_older_instructions():
    row = only(M=32)
    assert row.remarks == ("HMMA instead of sm_90's own",)
    assert row.opcodes["HGMMA"] == 0
    assert only(80, M=32).remarks == ()


def test_a_dropped_tensor_core_path_changes_the_table():
    row = only(kernel=kernels.product_without_dot)
    assert row.opcodes["HGMMA"] == row.opcodes["HMMA"] == 0
    assert row.opcodes["FFMA"] > only().opcodes["FFMA"]
    (remark,) = row.remarks
    assert re.fullmatch(r"no tensor cores, (\d+) FFMA in loops", remark)
    assert 32 <= int(remark.split()[3]) <= row.opcodes["FFMA"]


def test_dots_that_found_no_tensor_core():
    ttir = "%9 = tt.dot %7, %8, %6, inputPrecision = tf32 : tensor<16x16xf32> * tensor<16x16xf32>"
    opcodes = compiled.Counter({"FFMA": 9})
    assert list(compiled.remarks(90, opcodes, opcodes, ttir, 1)) == [
        "no tensor cores, 9 FFMA in loops"
    ]
    assert list(compiled.remarks(90, opcodes, opcodes, "", 1)) == []


def test_too_much_shared_memory_is_named():
    row = only(M=128, K=256, dtype=torch.float32, n=4096)
    assert row.shared_bytes > 227 << 10
    assert row.programs_per_sm == 0
    assert "does not fit: too much shared memory" in row.remarks


def test_descriptors_become_bulk_copies():
    def launch():
        x = torch.zeros(64, 64, dtype=torch.float16)
        kernels.copy_by_descriptor[(1,)](x, x, M=64)

    (row,) = compile_launches(launch, 90)
    assert row.opcodes["UTMALDG"] > 0
    (row,) = compile_launches(launch, 80)
    assert row.opcodes["UTMALDG"] == 0


def test_of_an_autotuned_kernel_the_largest_tiles():
    (row,) = compile_launches(lambda: kernels.tuned[(1,)](torch.ones(9), torch.ones(9), 9), 90)
    assert row.constants["BLOCK"] == 16384
    assert [c.kwargs["BLOCK"] for c in kernels.tuned.configs] == [1024, 16384, 256]


def test_of_an_autotuned_kernel_the_largest_tiles_that_fit():
    a, c = torch.ones(128, 1024, dtype=torch.float16), torch.ones(128, 128)

    def launch():
        kernels.tuned_product[(1,)](a, a, c, 1024, M=128)

    (row,) = compile_launches(launch, 90)
    assert row.constants["K"] == 64
    assert row.remarks == ()


def test_a_call_sees_the_gpu_it_is_compiled_for():
    before = torch.cuda.get_device_capability
    for arch in pretend.ARCHS:
        with pretend.gpu(arch):
            assert torch.cuda.get_device_capability(0) == divmod(arch, 10)
            properties = torch.cuda.get_device_properties("cuda")
            assert 10 * properties.major + properties.minor == arch
            assert properties.multi_processor_count > 100
    assert torch.cuda.get_device_capability is before


@pytest.mark.parametrize(
    ("limit", "arch", "registers", "shared_kb", "warps", "programs"),
    [
        ("registers", 90, 255, 0, 8, 1),
        ("registers", 90, 128, 40, 4, 4),
        ("registers, in units of 256 a warp", 90, 33, 0, 4, 12),
        ("warps", 90, 32, 0, 8, 8),
        ("programs", 90, 16, 0, 1, 32),
        ("shared memory, 1 KB of it the system's", 90, 32, 113, 4, 2),
        ("shared memory", 90, 32, 114, 4, 1),
        ("shared memory of the A100", 80, 32, 81, 4, 2),
        ("nothing fits", 90, 32, 228, 4, 0),
    ],
)
def test_programs_per_sm(limit, arch, registers, shared_kb, warps, programs):
    assert programs_per_sm(arch, registers, shared_kb << 10, warps) == programs


LISTING = """
.text.kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   STL [R1], R2 ;
.L_x_1:
        /*0020*/              @!P0 LDL.LU R2, [R1] ;
        /*0030*/                   HGMMA.64x64x16.F32 R24, gdesc[UR4], R24 ;
        /*0040*/               @P1 BRA `(.L_x_2) ;
        /*0050*/              @!P0 BRA `(.L_x_1) ;
.L_x_2:
        /*0060*/                   LDL R3, [R1+0x4] ;
.L_x_3:
        /*0070*/                   BRA `(.L_x_3);
"""


def test_instructions_and_spills_inside_loops():
    opcodes, in_loops = compiled._instructions(LISTING)
    assert opcodes == {"LDC": 1, "STL": 1, "LDL": 2, "HGMMA": 1, "BRA": 3}
    assert in_loops == {"LDL": 1, "HGMMA": 1, "BRA": 2}


def test_a_tool_that_fails_says_what_it_said(tmp_path):
    with pytest.raises(compiled.ToolFailedError, match="nvdisasm"):
        compiled._tool("nvdisasm", str(tmp_path / "none.cubin"))

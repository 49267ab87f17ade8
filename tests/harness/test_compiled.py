import multiprocessing
import re
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from types import ModuleType

import pytest
import torch
import triton

import compiled_kernels as kernels
from harness import compiled, pretend
from harness.compiled import programs_per_sm


@pytest.fixture(scope="module")
def compiler():
    """Calls a function in a process that compiles kernels: this one interprets them."""
    with (
        pytest.MonkeyPatch.context() as patch,
        ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool,
    ):
        patch.delenv("TRITON_INTERPRET", raising=False)
        yield lambda function, *arguments: pool.submit(function, *arguments).result()


@pytest.fixture
def only(compiler):
    """What one call of `kernels.call` compiles."""

    def compile_one(arch=90, **changes):
        (row,) = compiler(kernels.rows, arch, [changes])
        return row

    return compile_one


@pytest.mark.parametrize(
    ("arch", "opcode"),
    [(80, "HMMA"), (90, "HGMMA"), (100, "UTCHMMA")],
    ids=("a100", "h100", "b200"),
)
def test_a_product_uses_the_tensor_cores_of_each_gpu(only, arch, opcode):
    row = only(arch, M=128)
    assert row.opcodes[opcode] > 0
    assert row.remarks == ()
    assert row.spills == row.spills_in_loops == row.stack_bytes == 0
    assert row.arch == arch
    assert 32 < row.registers <= 255
    assert row.shared_bytes > 0
    assert row.instructions > 100
    assert row.programs_per_sm >= 1


def test_what_identifies_a_configuration(only):
    row = only(M=64, K=32)
    assert row.kernel == "product"
    assert row.launches == 1
    assert row.constants == {"M": 64, "K": 32, "PRECISION": "tf32"}
    assert (row.warps, row.stages) == (4, 3)
    assert only(M=128, warps=8).warps == 8


def test_a_configuration_is_compiled_once_however_often_it_is_launched(compiler):
    rows = compiler(kernels.rows, 90, [{}, {}, {"K": 32}])
    assert [(row.constants["K"], row.launches) for row in rows] == [(64, 2), (32, 1)]


def test_nothing_runs(compiler):
    rows, result = compiler(kernels.rows_and_result, 90)
    assert len(rows) == 1
    assert torch.equal(result, torch.full((64, 64), 7.0))


def test_a_tile_too_large_spills_and_says_so(only):
    good, bad = only(), only(M=256)
    assert good.spills == 0
    assert bad.spills > 0
    assert bad.spills == bad.opcodes["LDL"] + bad.opcodes["STL"]
    assert bad.spills_in_loops > 0
    assert bad.stack_bytes > 0
    assert f"{bad.spills} spills, {bad.spills_in_loops} in loops" in bad.remarks


def test_an_exact_dot_is_named(only):
    good, bad = only(dtype=torch.float32), only(dtype=torch.float32, precision="ieee")
    assert good.remarks == ()
    assert good.opcodes["HGMMA"] > 0
    assert "1 of 1 dots ieee" in bad.remarks
    assert bad.opcodes["HGMMA"] == bad.opcodes["HMMA"] == 0
    assert bad.opcodes["FFMA"] > 100 > good.opcodes["FFMA"]


def test_a_tile_too_small_falls_back_to_older_instructions(only):
    row = only(M=32)
    assert row.remarks == ("HMMA instead of sm_90's own",)
    assert row.opcodes["HGMMA"] == 0
    assert only(80, M=32).remarks == ()


def test_a_dropped_tensor_core_path_changes_the_table(only):
    row = only(kernel="product_without_dot")
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


def test_too_much_shared_memory_is_named(only):
    row = only(M=128, K=256, dtype=torch.float32, n=4096)
    assert row.shared_bytes > 227 << 10
    assert row.programs_per_sm == 0
    assert "does not fit: too much shared memory" in row.remarks


def test_descriptors_become_bulk_copies(compiler):
    (row,) = compiler(kernels.rows_of_a_copy_by_descriptor, 90)
    assert row.opcodes["UTMALDG"] > 0
    (row,) = compiler(kernels.rows_of_a_copy_by_descriptor, 80)
    assert row.opcodes["UTMALDG"] == 0


def test_of_an_autotuned_kernel_the_largest_tiles(compiler):
    (row,), blocks = compiler(kernels.rows_of_tuned, 90)
    assert row.constants["BLOCK"] == 16384
    assert row.warps == 4  # among equals, Triton's default
    assert blocks == [1024, 16384, 16384, 16384, 256]


def test_of_an_autotuned_kernel_the_largest_tiles_that_fit(compiler):
    (row,) = compiler(kernels.rows_of_a_tuned_product, 90)
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
            driver = triton.runtime.driver.active
            assert driver.get_current_target().arch == arch
            shared = driver.utils.get_device_properties(0)["max_shared_mem"]
            assert shared == {80: 163, 90: 227, 100: 227}[arch] << 10
    assert torch.cuda.get_device_capability is before


def test_fla_hears_of_the_shared_memory_of_each_gpu(monkeypatch):
    """As it asks: by a tensor's device, which none on the CPU has, keeping the answer for good."""
    library = ModuleType("fla.utils.hardware")
    library.get_all_max_shared_mem = lambda: [-1]
    library.check_shared_mem = cache(lambda device: library.get_all_max_shared_mem()[device])
    monkeypatch.setitem(sys.modules, library.__name__, library)
    assert library.check_shared_mem(0) == -1
    for arch, kilobytes in ((90, 227), (80, 163)):
        with pretend.gpu(arch):
            for device in (None, 0):
                assert library.check_shared_mem(device) == kilobytes << 10
    assert library.check_shared_mem(0) == -1


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

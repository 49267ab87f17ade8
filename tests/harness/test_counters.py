import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from harness import compiled, correctness, counted, counters, peers, pretend, tally
from harness.run import child_environment

interpreted = pytest.mark.skipif(
    torch.cuda.is_available(), reason="where there is a GPU, kernels are compiled"
)


@pytest.fixture(scope="module")
def ssd():
    """SSD counted and compiled for the H100, by every implementation."""
    said = []
    document = counters.count(["ssd"], archs=[90], on_finish=said.append)
    assert sorted(said) == ["ssd compiled", "ssd traffic"]
    return document


@pytest.fixture(scope="module")
def wkv7():
    """WKV-7, likewise."""
    return counters.count(["wkv7"], archs=[90])


LONG_CONV = {"B": 8, "D": 2, "T": 2048}  # as counted, with fewer channels


@pytest.fixture(scope="module")
def long_conv():
    """Our kernels of the long convolution, by phase."""
    ours, *_ = counted._calls("long_conv", LONG_CONV, torch.float16)
    rows = tally._traffic(ours, {})
    return {found["phase"]: found for found in rows}


@pytest.fixture(scope="module")
def long_conv_compiled():
    """Both kernels compiled for the H100, by name, in a process that does not interpret them."""
    job = {"kind": "compiled", "ops": ["long_conv"], "archs": [90], "implementations": None}
    rows = counters._result(counters._start(job, None), lambda job: None)["compiled"]
    return {found["kernel"]: found for found in rows}


def row(document, implementation, phase, variant=""):
    (found,) = (
        r
        for r in document["traffic"]
        if (r["implementation"], r["phase"]) == (implementation, phase)
        and r["shape"].endswith(variant or ("G 1" if r["op"] == "ssd" else ""))
    )
    return found


# Counted independently, by sets of addresses: mamba_ssm 2.3.2 at B 1, T 1024, H 8, P 64, N 128,
# G 1, chunk 256, x, B and C of two bytes, dt of four.
@pytest.mark.parametrize(
    ("phase", "launches", "unique_bytes", "floors"),
    [("forward", 5, 9_666_720, 3.31), ("backward", 14, 46_776_416, 10.98)],
)
def test_mamba_ssm_as_counted_before(ssd, phase, launches, unique_bytes, floors):
    found = row(ssd, "mamba_ssm", phase)
    assert found["launches"] == launches
    assert found["kernel_bytes"] == pytest.approx(unique_bytes, rel=0.05)
    assert found["kernel_bytes"] / found["floor_bytes"] == pytest.approx(floors, rel=0.05)
    assert not counters.is_wrong(found)


def test_what_mamba_ssm_does_outside_its_kernels_is_in_the_sum(ssd):
    found = row(ssd, "mamba_ssm", "backward")
    outside = sum(o["unique_bytes"] for o in found["operations"])
    assert found["unique_bytes"] == found["kernel_bytes"] + outside
    assert {"sum", "cumsum", "flip"} <= {o["name"] for o in found["operations"]}
    assert outside > 0.2 * found["kernel_bytes"]
    assert row(ssd, "mamba_ssm", "forward")["operation_calls"] == 0


def test_floors(ssd):
    B, T, H, P, N, G = 1, 1024, 8, 64, 128, 1
    x, bc, dt, state = 2 * B * T * H * P, 2 * 2 * B * T * G * N, 4 * B * T * H, 4 * B * H * P * N
    theirs = x + bc + dt + 4 * H
    assert row(ssd, "mamba_ssm", "forward")["floor_bytes"] == theirs + x + state
    assert row(ssd, "mamba_ssm", "backward")["floor_bytes"] == 2 * theirs + x
    ours = x + bc + 2 * dt + state  # log_decay is an input, and so is the state before
    assert row(ssd, "torch", "forward")["floor_bytes"] == ours + x + state
    assert row(ssd, "torch", "backward")["floor_bytes"] == 2 * ours + x


def test_main_tensors_are_read_side_by_side(ssd):
    found = row(ssd, "mamba_ssm", "forward")
    assert 1 <= found["sector_bytes"] / found["requested_bytes"] < 1.01
    scan = next(k for k in found["kernels"] if k["name"] == "_chunk_scan_fwd_kernel")
    assert scan["arguments"]["x_ptr"]["unique_bytes"] == 2 * 1024 * 8 * 64
    assert scan["dot_flops"]["fp16"] > 1e9


def test_autotuned_kernels_have_their_largest_tiles(ssd):
    kernels = row(ssd, "mamba_ssm", "forward")["kernels"]
    programs = {k["name"]: k["programs"] for k in kernels}
    assert programs["_state_passing_fwd_kernel"] == 8 * (128 * 64 // 2048)
    assert programs["_chunk_cumsum_fwd_kernel"] == 4


def test_every_result_is_right(ssd):
    assert {r["implementation"] for r in ssd["traffic"]} == {
        "triton", "torch", "mamba_ssm", "ssd-minimal"
    }  # fmt: skip
    assert all(r["relative_error"] < 1e-3 for r in ssd["traffic"])
    assert counters.faults(ssd) == []


def test_its_kernels_are_compiled(ssd):
    kernels = {r["kernel"]: r for r in ssd["compiled"]}
    assert {k["name"] for k in row(ssd, "mamba_ssm", "backward")["kernels"]} <= set(kernels)
    assert all(r["arch"] == 90 and r["programs_per_sm"] > 0 for r in ssd["compiled"])
    assert kernels["_chunk_scan_fwd_kernel"]["opcodes"]["HGMMA"] > 0


@pytest.mark.parametrize(
    ("variant", "phase", "launches"),
    [("", "forward", 1), ("", "backward", 2), ("4 segments", "forward", 2)],
)
def test_our_kernels_are_few_and_read_side_by_side(ssd, variant, phase, launches):
    found = row(ssd, "triton", phase, variant)
    assert found["launches"] == launches
    for kernel in found["kernels"]:
        for name in {"X", "Y", "DY", "DX", "K", "Q", "DK", "DQ", "U"} & set(kernel["arguments"]):
            moved = kernel["arguments"][name]
            assert moved["sector_bytes"] <= 1.1 * moved["requested_bytes"]


def test_our_kernels_use_the_tensor_cores_and_do_not_spill(ssd):
    ours = [r for r in ssd["compiled"] if r["implementation"] == "triton"]
    assert {r["kernel"] for r in ours} == {
        f"ssd_{name}_kernel" for name in ("fold", "forward", "backward", "gradients")
    }
    for found in ours:
        assert found["opcodes"]["HGMMA"] > 0 == found["opcodes"]["HMMA"]
        assert found["spills_in_loops"] == 0
        assert found["spills"] <= (32 if "forward" in found["kernel"] else 64)
        assert found["programs_per_sm"] >= 1


# Derived from the source of fla-core 0.6.0: bytes a token and channel that its launches are given,
# with chunks as long as a head is wide; then what is kept once a chunk or once, in bytes.
B, T, H, K, CHUNK = 1, 1024, 8, 64, 64
ROWS, STATE = 4 * B * T // CHUNK * H * K, 4 * B * H * K * K  # last decays of chunks; a state
FLA_FORWARD = {
    "chunk_rwkv6_fwd_cumsum_kernel": (4 + 8, 0),  # log-decay; its sums with and without itself
    "chunk_dplr_fwd_A_kernel_intra_tensorcore": (8 + 8 + 8 + 12, 0),  # inputs, sums; scaled, A
    "prepare_wy_repr_fwd_kernel_safe": (4 * 10 / 16 + 4, 0),  # the lower blocks of 16; all
    "wu_fwd_kernel": (4 + 4 + 2 + 2 + 2 + 2, 0),
    "chunk_dplr_fwd_kernel_h": (5 * 2 + 2 + 2, ROWS + 2 * STATE),  # a state a chunk, as wide as v
    "chunk_dplr_fwd_kernel_o": (6 * 2 + 2, 0),
}
FLA_BACKWARD = {
    **FLA_FORWARD,  # all but the output is computed again
    "chunk_dplr_fwd_kernel_h": (5 * 2 + 2 + 2, ROWS + STATE),
    "chunk_dplr_bwd_kernel_dAu": (4 * 2 + 2 + 4 + 4, 0),
    "chunk_dplr_bwd_kernel_dhu": (5 * 2 + 2 + 2, ROWS + 2 * STATE),
    "chunk_dplr_bwd_kernel_dv": (4 * 2 + 2, 0),
    "chunk_dplr_bwd_o_kernel": (8 * 2 + 4 * 2, 2 * ROWS),
    "prepare_wy_repr_bwd_kernel": (2 * 4 + 5 * 2 + 2 * 4 + 2 * 2, 0),
    "chunk_dplr_bwd_kernel_intra_tensorcore": (8 + 8 + 16 + 8 + 8 + 8, 0),
    "chunk_dplr_bwd_dgk_kernel": (4 + 4 + 4, ROWS),
}
del FLA_BACKWARD["chunk_dplr_fwd_kernel_o"]


@pytest.mark.parametrize(
    ("phase", "launches"), [("forward", FLA_FORWARD), ("backward", FLA_BACKWARD)]
)
def test_fla_moves_what_its_source_says(wkv7, phase, launches):
    found = row(wkv7, "fla", phase)
    moved = {k["name"]: k["unique_bytes"] for k in found["kernels"]}
    assert moved == {
        name: bytes_an_element * B * T * H * K + rest
        for name, (bytes_an_element, rest) in launches.items()
    }
    assert found["launches"] == len(launches)
    assert found["kernel_bytes"] == sum(moved.values())


@pytest.mark.parametrize(
    ("phase", "floors", "our_launches"), [("forward", 6.97, 1), ("backward", 8.98, 1)]
)
def test_fla_beside_ours(wkv7, phase, floors, our_launches):
    theirs, ours = (row(wkv7, name, phase) for name in ("fla", "triton"))
    assert theirs["floor_bytes"] == ours["floor_bytes"]
    assert theirs["unique_bytes"] / theirs["floor_bytes"] == pytest.approx(floors, abs=0.01)
    assert ours["unique_bytes"] / ours["floor_bytes"] < 1.2
    assert ours["launches"] == our_launches
    assert theirs["relative_error"] < 1e-3
    assert counters.faults(wkv7) == []


def test_fla_takes_the_tiles_of_an_h100(wkv7):
    """One program a head: where shared memory is less, several share its values."""
    kernels = {k["name"]: k["programs"] for k in row(wkv7, "fla", "forward")["kernels"]}
    assert kernels["chunk_dplr_fwd_kernel_h"] == B * H
    compiled = {r["kernel"]: r for r in wkv7["compiled"] if r["implementation"] == "fla"}
    assert set(compiled) == set(FLA_FORWARD) | set(FLA_BACKWARD)
    assert compiled["chunk_dplr_fwd_kernel_h"]["constants"]["BV"] == K
    assert compiled["chunk_dplr_fwd_kernel_h"]["opcodes"]["HGMMA"] > 0


N1, N2 = 64, 32  # of a transform of 2,048
TABLES = 2 * 2 * (N1 * N1 + N2 * N2) + 2 * 4 * N1 * N2  # bytes: float16 and, of twiddles, float32
TRANSFORM_FLOPS = 2 * (2 * N1 * N1 * N2 + 4 * N1 * N2 * N2)
KEPT = 9 * 4  # bytes a channel and token: three spectra and three signals of a row, in float32


@interpreted
@pytest.mark.parametrize(
    ("phase", "beyond_the_floor", "transforms", "torch_operations"),
    [
        ("forward", 0, 1 + 2 * LONG_CONV["B"], 0),
        # Gradients of taps and biases are float32 in the kernel, and the skip's is the filter's.
        (
            "backward",
            LONG_CONV["D"] * (KEPT * LONG_CONV["T"] + 4 * 12 - 2 * 13),
            2 + 4 * LONG_CONV["B"],
            4,  # a sum over splits, three conversions
        ),
    ],
)
def test_the_long_convolution_moves_what_its_source_says(
    long_conv, phase, beyond_the_floor, transforms, torch_operations
):
    found = long_conv[phase]
    (kernel,) = found["kernels"]
    assert (kernel["name"], kernel["launches"]) == (f"long_conv_{phase}_kernel", 1)
    assert found["kernel_bytes"] == found["floor_bytes"] + TABLES + beyond_the_floor
    assert found["sector_bytes"] <= 1.01 * found["requested_bytes"]
    assert kernel["dot_flops"] == {"fp16": LONG_CONV["D"] * transforms * TRANSFORM_FLOPS}
    assert found["operation_calls"] == torch_operations
    assert found["relative_error"] < 1e-3


def test_the_long_convolution_uses_the_tensor_cores(long_conv_compiled):
    names = {f"long_conv_{phase}_kernel" for phase in ("forward", "backward")}
    assert set(long_conv_compiled) == names
    for found in long_conv_compiled.values():
        assert found["opcodes"]["HGMMA"] > 0 == found["opcodes"]["HMMA"]
        assert found["programs_per_sm"] >= 2
        assert found["spills"] == 0


@pytest.fixture(scope="module")
def attention():
    """Attention counted and compiled for the H100."""
    return counters.count(["attention"], archs=[90])


@pytest.mark.parametrize("K", [64, 128])
@pytest.mark.parametrize(
    ("phase", "launches", "floors", "asked"), [("forward", 1, 1.1, 2.8), ("backward", 2, 1.75, 3.8)]
)
def test_attention_moves_little_more_than_it_must(attention, K, phase, launches, floors, asked):
    found = row(attention, "triton", phase, f"K {K}")
    assert (found["launches"], found["operation_calls"]) == (launches, 0)
    assert found["unique_bytes"] <= floors * found["floor_bytes"]
    # Tiles of queries each read the keys before them: test_attention_kernel.py has the exact sum.
    assert found["requested_bytes"] <= asked * found["floor_bytes"]
    assert found["sector_bytes"] == found["requested_bytes"]
    assert found["relative_error"] < 1e-3


def test_decoding_reads_every_key_once(attention):
    found = row(attention, "triton", "forward", "decode in 8 splits")
    assert found["launches"] == 1
    assert {o["name"] for o in found["operations"]} == {"zeros"}
    (kernel,) = found["kernels"]
    for name in ("KEYS", "VALUES"):
        moved = kernel["arguments"][name]
        assert moved["requested_bytes"] == moved["unique_bytes"] == 2 * 2 * 8192 * 2 * 128
    assert found["unique_bytes"] < 1.02 * found["floor_bytes"]
    assert found["relative_error"] < 1e-3


def test_attention_uses_the_tensor_cores_and_does_not_spill(attention):
    rows = attention["compiled"]
    backward = {"attention_dq_kernel", "attention_dkv_kernel"}
    for K in (64, 128):
        tiles, hopper = (
            [r for r in rows if r["shape"].endswith(f"H 4, K {K}{name}")]
            for name in ("", ", hopper")
        )
        assert {r["kernel"] for r in tiles} == {"attention_forward_kernel"} | backward
        assert {r["kernel"] for r in hopper} == {"attention_hopper_forward_kernel"} | backward
        for found in tiles:
            assert found["opcodes"]["HGMMA"] > 0 == found["opcodes"]["HMMA"]
            assert found["spills"] == 0
            assert found["programs_per_sm"] >= 1
    for found in (r for r in rows if "hopper" in r["kernel"]):
        assert found["opcodes"]["UTMALDG"] > 0 == found["opcodes"]["HMMA"]
        assert found["opcodes"]["USETMAXREG"] > 0
        assert found["spills"] <= 8
    (decode,) = (r for r in rows if r["kernel"] == "attention_decode_kernel")
    assert decode["opcodes"]["HMMA"] > 0 == decode["spills"]
    assert decode["programs_per_sm"] >= 3


def test_a_library_that_is_not_installed_is_left_out(monkeypatch):
    def load():
        raise ModuleNotFoundError("No module named 'fla'")

    monkeypatch.setitem(peers.PEERS, "fla", replace(peers.PEERS["fla"], load=load))
    (call,) = (c for c in counted.calls("wkv7", torch.float16) if c.implementation == "fla")
    rows, reason, failed = tally._attempt(call, {"kind": "traffic"})
    assert rows == []
    assert reason.endswith("No module named 'fla'; run: pip install fla-core")
    assert not failed


def test_tables(ssd, capsys):
    from rich.console import Console

    for table in counters.tables(ssd):
        Console(width=120).print(table)
    said = capsys.readouterr().out
    assert "…" not in said
    assert {line[-1] for line in said.splitlines() if line[0] == "│"} == {"│"}  # none is cut off
    for words in ("9.67", "3.31", "predicted", "_chunk_scan_fwd_kernel", "HGMMA", "no GPU"):
        assert words in said


def seqscale(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "harness", "counters", *arguments],
        capture_output=True,
        env={**child_environment(), "COLUMNS": "150"},
        check=False,
    )


def test_json_is_the_same_to_the_byte():
    first, second = (seqscale("--op", "short_conv", "--sm", "90", "--json") for _ in range(2))
    assert first.returncode == second.returncode == 0
    assert first.stdout == second.stdout
    document = json.loads(first.stdout)
    assert {r["op"] for r in document["traffic"]} == {"short_conv"}
    assert document["left_out"] == []
    assert "done: short_conv traffic" in first.stderr.decode()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--op", "sdd"], "unknown operation 'sdd'"),
        (["--op", "sdd"], "did you mean 'ssd'?"),
        (["--sm", "70"], "sm_70"),
        (["--triton", "nowhere"], "pip install --no-deps --target nowhere triton==3.6.0"),
    ],
)
def test_what_does_not_exist_is_one_line(arguments, words):
    done = seqscale(*arguments)
    assert done.returncode == 2
    assert words in done.stderr.decode()
    assert len(done.stderr.decode().splitlines()) == 1
    assert done.stdout == b""


def test_another_triton_compiles_and_counts_nothing(tmp_path):
    """A folder with a Triton of another version: here ours under another name."""
    import triton

    folder = Path(triton.__file__).parent
    other = tmp_path / "triton"
    other.mkdir()
    for part in folder.iterdir():
        if part.name != "__init__.py":
            (other / part.name).symlink_to(part)
    text = (folder / "__init__.py").read_text()
    (other / "__init__.py").write_text(text + "\n__version__ = '3.6.0'\n")
    document = counters.count(["short_conv"], archs=[90], triton=tmp_path)
    assert document["versions"]["triton"] == "3.6.0"
    assert document["traffic"] == []


def test_a_process_that_dies_is_one_line(monkeypatch, tmp_path):
    broken = tmp_path / "triton"
    broken.mkdir()
    (broken / "__init__.py").write_text("raise RuntimeError('not this one')")
    with pytest.raises(counters.CountingFailedError, match="code 1: RuntimeError: not this one"):
        counters.count(["short_conv"], triton=tmp_path)


def test_faults_are_named_and_no_table_hides_them():
    good = {"op": "ssd", "implementation": "a", "phase": "forward", "shape": "T 1"}
    document = {
        "traffic": [
            {**good, "relative_error": 3e-4},
            {**good, "implementation": "b", "relative_error": 5e-3},
            {**good, "implementation": "c", "relative_error": None},
        ],
        "left_out": [{**good, "implementation": "d", "reason": "ValueError: no", "failed": True}],
    }
    assert counters.faults(document) == [
        "ssd d (T 1): ValueError: no",
        "ssd b forward (T 1): the result is wrong",
        "ssd c forward (T 1): the result is wrong",
    ]
    assert sum("FAULT" in note for note in counters.notes(document)) == 3


def test_a_prediction_is_the_slowest_of_bytes_dots_and_exponentials():
    rates = {"bytes": 1e9, "fp16": 1e12, "fp32 ieee": 1e10, "exponentials": 1e8}
    nothing = {"unique_bytes": 0, "dot_flops": {}, "exponentials": 0}
    kernels = [
        {**nothing, "unique_bytes": 3e6},  # 3 ms
        {**nothing, "dot_flops": {"fp16": 1e9, "fp32 ieee": 1e7}, "unique_bytes": 1e6},  # 2 ms
        {**nothing, "exponentials": 5e5, "unique_bytes": 4e6},  # 5 ms
    ]
    operations = [{"unique_bytes": 1e6, "flops": 7e9}]  # 7 ms
    row = {"kernels": kernels, "operations": operations}
    assert counters.predicted_ms(row, rates) == 17


def test_what_the_command_repeats_so_that_it_starts_without_torch():
    assert tuple(counted.SHAPES) == counters.OPS
    assert pretend.ARCHS == tuple(compiled.MULTIPROCESSORS) == counters.ARCHS
    assert correctness.ALLOWED_ERROR["float16"] == counters.ALLOWED_ERROR

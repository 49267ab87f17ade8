import time
from types import SimpleNamespace

import pytest
import torch

from harness import ceilings, timing

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
GIVEN = {"copy_bytes_per_s": 1e9, "matmul_flops_per_s_float32": 1e12, "exp2_per_s": 1e9}


@pytest.mark.parametrize(
    ("flops", "floor_bytes", "cache_bytes", "ms"),
    [
        (5e9, 1e6, 1e3, 5.0),  # arithmetic bounds
        (5e9, 2e7, 1e3, 20.0),  # traffic bounds
        (5e9, 2e7, 1e7, 5.0),  # twice the cache: may be served from it
        (5e9, 2e7, 5e6, 5.0),  # four times: likewise
        (5e9, 2e7, 4.9e6, 20.0),
        (5e9, 2e7, None, 5.0),
    ],
)
def test_the_roofline_is_the_slower_of_arithmetic_and_traffic(flops, floor_bytes, cache_bytes, ms):
    got = ceilings.roofline_ms(flops, floor_bytes, "float32", GIVEN, cache_bytes)
    assert got == pytest.approx(ms)


@pytest.mark.parametrize(("flops", "floor_bytes"), [(1e10, 0), (1e6, 1e7)])
def test_an_op_of_known_work_and_time_gets_its_fraction(flops, floor_bytes):
    metrics, _ = timing.observe(lambda: time.sleep(0.02), min_time_s=0.2)
    fraction = ceilings.check_roofline(
        metrics["time_ms_p50"],
        flops=flops,
        floor_bytes=floor_bytes,
        dtype="float32",
        ceilings=GIVEN,
        cache_bytes=1000,
    )
    assert fraction == pytest.approx(0.5, rel=0.05)  # 10 ms of 20


def test_faster_than_the_roofline_is_an_error():
    work = {"flops": 1e10, "floor_bytes": 0, "dtype": "float32"}
    given = {"ceilings": GIVEN, "cache_bytes": 1000}
    assert ceilings.check_roofline(9.6, **work, **given) == pytest.approx(10 / 9.6)
    with pytest.raises(ceilings.FasterThanRooflineError, match=r"9.4 ms .* 10 ms for 1e\+10 FLOPs"):
        ceilings.check_roofline(9.4, **work, **given)


def test_a_dtype_without_a_ceiling_is_an_error():
    with pytest.raises(ValueError, match="bfloat16"):
        ceilings.roofline_ms(1e9, 0, "bfloat16", GIVEN, None)


def test_drift_is_the_largest_relative_difference():
    assert ceilings.drift(GIVEN, GIVEN) == 0
    slower = {**GIVEN, "copy_bytes_per_s": 0.97e9, "exp2_per_s": 1.01e9}
    assert ceilings.drift(GIVEN, slower) == ceilings.drift(slower, GIVEN) == pytest.approx(0.03)
    with pytest.raises(ValueError, match="differ"):
        ceilings.drift(GIVEN, {})


def test_rates_count_the_work(monkeypatch):
    def second(function, device):
        function()
        return 1.0

    monkeypatch.setattr(ceilings, "_best_s", second)
    monkeypatch.setattr(ceilings, "COPY_BYTES", {"cpu": (1 << 20, 1 << 20)})
    assert ceilings.measure("cpu", ["float32", "bfloat16"]) == {
        "copy_bytes_per_s": 2 << 20,  # read and written
        "matmul_flops_per_s_float32": 2 * 512**3,
        "matmul_flops_per_s_bfloat16": 2 * 512**3,
        "exp2_per_s": 1 << 18,
    }


def test_the_best_repetition_counts():
    waits = iter([0.0, 0.06, 0.02])  # the first one warms up
    assert 0.02 <= ceilings._best_s(lambda: time.sleep(next(waits, 0.06)), "cpu") < 0.05


def test_ceilings_of_this_machine():
    start = time.perf_counter()
    rates = ceilings.measure("cpu")
    assert time.perf_counter() - start < 10  # 1.1 s on two quiet cores
    assert 1e8 < rates["copy_bytes_per_s"] < 1e13
    assert 1e8 < rates["matmul_flops_per_s_float32"] < 1e15
    assert 1e7 < rates["exp2_per_s"] < 1e14


def test_the_last_level_cache_is_every_distinct_one(monkeypatch, tmp_path):
    def cache(cpu, index, level, shared, size):
        folder = tmp_path / f"cpu{cpu}" / "cache" / f"index{index}"
        folder.mkdir(parents=True)
        for name, text in (("level", level), ("shared_cpu_list", shared), ("size", size)):
            (folder / name).write_text(f"{text}\n")

    monkeypatch.setattr(ceilings, "SYSFS_CPUS", tmp_path)
    assert ceilings.cache_bytes("cpu") is None
    for cpu in range(4):
        cache(cpu, 0, 1, cpu, "32K")
        cache(cpu, 1, 2, cpu, "2048K")
        cache(cpu, 2, 3, "0-1" if cpu < 2 else "2-3", "16384K")
    assert ceilings.cache_bytes("cpu") == 2 * 16384 * 1024


def test_the_cache_of_a_gpu_is_its_l2(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=50 << 20)
    )
    assert ceilings.cache_bytes("cuda") == 50 << 20


@pytest.mark.gpu
@needs_cuda
def test_ceilings_of_this_gpu():
    before = torch.backends.cuda.matmul.allow_tf32
    rates = ceilings.measure("cuda", ["float32", "bfloat16"])
    assert torch.backends.cuda.matmul.allow_tf32 == before
    assert rates["matmul_flops_per_s_bfloat16"] > rates["matmul_flops_per_s_float32"]
    assert rates["exp2_per_s"] > rates["copy_bytes_per_s"] / 8  # not bound by memory

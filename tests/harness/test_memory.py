import sys

import pytest
import torch

from harness import memory, timing

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
MAKERS = {"bytes": lambda n: b"\1" * n, "tensor": lambda n: torch.ones(n // 4)}


@linux
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_a_planted_allocation_is_found_to_5_percent(make):
    timing.prepare_process()
    for function in (lambda: make(30_000_000), lambda: make(10_000_000)):
        function()  # memory kept in the process counts again, an earlier higher peak does not
    for _ in range(3):
        peak = memory.peak(lambda: make(10_000_000))
        assert peak.bytes == pytest.approx(10e6, rel=0.05)
        assert peak.source == "VmHWM"


@linux
def test_two_that_live_at_once_add_and_one_after_another_do_not():
    def at_once():
        return MAKERS["bytes"](10_000_000), MAKERS["bytes"](10_000_001)

    def in_turn():
        MAKERS["bytes"](10_000_000)
        MAKERS["bytes"](10_000_000)

    at_once()
    assert memory.peak(at_once).bytes == pytest.approx(20e6, rel=0.05)
    assert memory.peak(in_turn).bytes == pytest.approx(10e6, rel=0.05)


@linux
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_live_memory_follows_what_is_kept(make):
    make(5_000_000)
    before = memory.live_bytes()
    kept = make(5_000_000)
    assert memory.live_bytes() - before == pytest.approx(5e6, rel=0.05)
    del kept
    assert abs(memory.live_bytes() - before) < timing.LEAK_NOISE_BYTES


@linux
def test_garbage_is_not_live():
    before = memory.live_bytes()
    cycle = [bytearray(5_000_000)]
    cycle.append(cycle)
    del cycle
    assert abs(memory.live_bytes() - before) < timing.LEAK_NOISE_BYTES


def test_what_cannot_be_read_is_none_with_the_reason(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "PROCESS", tmp_path)
    calls = []
    assert memory.live_bytes() is None
    assert memory.peak(lambda: calls.append(1)).bytes is None
    assert "clear_refs" in memory.peak(lambda: calls.append(1)).source
    (tmp_path / "clear_refs").write_text("")
    (tmp_path / "status").write_text("VmRSS:\t 12 kB\n")
    assert memory.peak(lambda: calls.append(1)) == (None, f"{tmp_path}/status has no VmHWM")


@pytest.mark.gpu
@needs_cuda
def test_allocations_on_cuda_are_exact():
    kept = torch.empty(1 << 24, dtype=torch.uint8, device="cuda")
    before = memory.live_bytes("cuda")
    peak = memory.peak(
        lambda: torch.empty(10_000_000, dtype=torch.uint8, device="cuda"), device="cuda"
    )
    assert peak.bytes == pytest.approx(10e6, rel=0.001)
    assert peak.source == "cuda allocator"
    assert memory.live_bytes("cuda") == before >= kept.numel()

import ctypes
import gc
import os
import time
from pathlib import Path

import pytest

from harness import sweep, workload
from harness.estimate import estimate
from harness.record import Case

ARCHS = ("transformer", "mamba2", "rwkv7", "hyena")
CLEAR = Path("/proc/self/clear_refs")
QUICK = sweep.cells(sweep.preset("quick"))


def some(level, phase, length):
    return [
        c
        for c in QUICK
        if (c.kind, c.level, c.phase) == ("cost", level, phase)
        and length in (c.seq_len, c.position)
    ]


CHEAP = [
    *some("op", "forward", 1024),
    *some("block", "train_step", 512),
    *some("model", "decode", 1024),
]


@pytest.mark.parametrize("cell", CHEAP, ids=lambda c: c.label)
def test_seconds_are_within_a_factor_of_five(cell):
    """Processor time, which other processes do not lengthen."""
    workload.build(cell).function()  # what the process does once
    start = time.process_time()
    built = workload.build(cell)
    built.check()
    for _ in range(2):
        built.function()
    samples, begun = 0, time.process_time()
    while samples < 5 or time.process_time() - begun < 0.3:
        built.function()
        samples += 1
    built.check()
    measured = time.process_time() - start
    assert measured / 5 < estimate(cell).seconds < measured * 5


def resident(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])


@pytest.mark.skipif(not os.access(CLEAR, os.W_OK), reason="no high-water mark to reset here")
@pytest.mark.parametrize(
    "cell",
    [*some("op", "forward", 4096), *some("block", "train_step", 1024)],
    ids=lambda c: c.label,
)
def test_bytes_are_within_a_factor_of_four(cell):
    workload.build(cell).function()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    CLEAR.write_text("5")
    before = resident("VmRSS")
    workload.build(cell).function()
    measured = resident("VmHWM") - before
    assert measured / 4 < estimate(cell).bytes < measured * 4


def test_every_cell_of_quick_has_an_estimate():
    for cell in QUICK:
        guess = estimate(cell)
        assert 0.3 < guess.seconds < 120
        assert 2**20 < guess.bytes < 2**30


@pytest.mark.parametrize("arch", [*ARCHS, "mamba2*2+transformer"])
def test_longer_takes_longer_and_more(arch):
    for phase in ("forward", "backward", "train_step", "prefill", "decode"):
        for backend in ("torch", "reference"):
            guesses = []
            for n in (1000, 100000):
                place = {"seq_len": None, "position": n} if phase == "decode" else {"seq_len": n}
                guesses.append(
                    estimate(
                        Case(
                            kind="cost",
                            arch=arch,
                            level="model",
                            phase=phase,
                            batch=1,
                            size="d64",
                            backend=backend,
                            **place,
                        )
                    )
                )
            short, long = guesses
            constant = phase == "decode" and arch in ("mamba2", "rwkv7")
            assert (long.seconds > short.seconds) != constant
            assert (long.bytes > short.bytes) != constant


def test_a_faster_device_is_faster():
    cell = some("op", "forward", 4096)[0]
    assert estimate(cell, 1e15).seconds < estimate(cell, 1e10).seconds


def test_nothing_is_run(monkeypatch):
    """Not even a block of a size that would not fit any memory."""
    huge = Case(
        kind="cost",
        arch="transformer",
        level="model",
        phase="train_step",
        batch=64,
        seq_len=2**20,
        size="d65536",
        dtype="bfloat16",
    )
    start = time.process_time()
    guess = estimate(huge)
    assert guess.bytes > 2**40
    assert guess.seconds > 1e6
    assert time.process_time() - start < 2

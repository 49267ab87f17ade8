import sys
import time

import numpy as np
import pytest
import torch

from harness import timing


def test_measure_reports_milliseconds_a_call():
    samples = timing.measure(lambda: time.sleep(0.01), min_time_s=0.05)
    assert len(samples) >= 5
    assert 10 <= np.median(samples) < 20


def test_slow_calls_still_get_their_samples():
    calls = []
    samples = timing.measure(lambda: calls.append(time.sleep(0.03)), min_time_s=0.01, min_samples=4)
    assert len(samples) >= 4
    assert len(calls) > len(samples)  # one at least warms up


def test_quantiles_are_ordered_and_named():
    got = timing.quantiles([float(i) for i in range(101)])
    assert got == {"time_ms_p20": 20.0, "time_ms_p50": 50.0, "time_ms_p80": 80.0}


def test_interleaving_runs_each_once_a_round_in_changing_order():
    order = []
    timing.measure_interleaved(
        {name: lambda name=name: order.append(name) for name in "ab"}, rounds=20
    )
    rounds = [tuple(order[i : i + 2]) for i in range(2, len(order), 2)]  # after the warm-up
    assert len(rounds) == 20
    assert set(rounds) == {("a", "b"), ("b", "a")}


def test_speedup_is_paired_and_its_interval_holds_the_truth():
    generator = np.random.default_rng(0)
    machine = np.exp(generator.normal(0, 0.5, 40))  # drifts by half from round to round
    ours = 10 * machine * np.exp(generator.normal(0, 0.02, 40))
    theirs = 15 * machine * np.exp(generator.normal(0, 0.02, 40))
    ratio = timing.speedup(list(ours), list(theirs))
    assert ratio.low < 1.5 < ratio.high
    assert ratio.high - ratio.low < 0.05
    assert timing.speedup(list(theirs), list(ours)).estimate == pytest.approx(1 / ratio.estimate)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self")
@pytest.mark.parametrize("mebibytes", [64, 256])
def test_peak_bytes_sees_a_temporary(mebibytes):
    timing.prepare_process()

    def function(times=1):
        return torch.ones(times * mebibytes, 2**18).sum()  # float32

    function()  # memory kept in the process from an earlier call must count again
    function(times=3)  # and an earlier call's higher peak must not
    peak = timing.peak_bytes(function)
    assert mebibytes - 2 <= peak / 2**20 < mebibytes + 24


@pytest.mark.parametrize("threads", [1, 2])
def test_prepare_process_sets_threads(threads):
    before = torch.get_num_threads()
    try:
        assert timing.prepare_process(threads)["threads"] == threads == torch.get_num_threads()
    finally:
        torch.set_num_threads(before)

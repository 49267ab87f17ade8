import contextlib
import math
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from harness import memory, nvml, timing

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def nothing():
    pass


# One observation.


def test_a_known_sleep_is_measured_to_5_percent():
    metrics, samples = timing.observe(lambda: time.sleep(0.02), min_time_s=0.2)
    assert metrics["time_ms_p50"] == pytest.approx(20, rel=0.05)
    assert metrics["time_ms_p20"] == pytest.approx(20, rel=0.05)
    assert metrics["calls_per_sample"] == 1
    assert metrics["sample_count"] == len(samples["time_ms"]) >= 5
    assert metrics["timing_contract"] == "blocked_autorange"


def test_short_calls_are_timed_in_blocks():
    metrics, samples = timing.observe(nothing, min_time_s=0.01)
    assert metrics["calls_per_sample"] >= 1000
    assert np.median(samples["time_ms"]) < 0.01


def test_slow_calls_still_get_five_samples():
    calls = []
    metrics, _ = timing.observe(lambda: calls.append(time.sleep(0.03)), min_time_s=0.01)
    windows = 1 + metrics["retries"]
    assert metrics["sample_count"] == 5
    assert len(calls) == 2 + windows * 6  # two before the windows, one more sizes each one's block


def test_the_first_call_is_timed_apart():
    waits = iter([0.2, 0.2])
    assert 200 <= timing.first_call_ms(lambda: time.sleep(next(waits))) < 300
    metrics, _ = timing.observe(lambda: time.sleep(next(waits, 0.005)), min_time_s=0.02)
    assert metrics["time_ms_p80"] < 100


@pytest.mark.parametrize("threads", [1, 2])
def test_calls_run_at_the_threads_that_are_recorded(threads):
    before, seen = torch.get_num_threads(), set()
    try:
        assert timing.prepare_process(threads)["threads"] == threads
        timing.observe(lambda: seen.add(torch.get_num_threads()), min_time_s=0.001)
    finally:
        torch.set_num_threads(before)
    assert seen == {threads}


def test_quantiles_are_ordered_and_named():
    got = timing.quantiles([float(i) for i in range(101)])
    assert got == {"time_ms_p20": 20.0, "time_ms_p50": 50.0, "time_ms_p80": 80.0}


# Memory.


@linux
@pytest.mark.parametrize("leaked", [1_000_000, 100_000])
@pytest.mark.parametrize("make", [lambda n: b"\1" * n, lambda n: torch.ones(n // 4)])
def test_a_planted_leak_is_found_to_5_percent(leaked, make):
    timing.prepare_process()
    kept = []

    def leak():
        kept.append(make(leaked))
        time.sleep(0.003)

    metrics, _ = timing.observe(leak, min_time_s=0.03)
    assert metrics["leak_bytes_per_call"] == pytest.approx(leaked, rel=0.05)


@linux
def test_a_call_that_keeps_nothing_leaks_nothing():
    timing.prepare_process()
    layers = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(4)))
    x = torch.randn(64, 64)

    def train():
        layers(x).square().mean().backward()
        layers.zero_grad()
        cycle = [bytearray(10_000)]
        cycle.append(cycle)  # garbage until collected

    assert timing.observe(train, min_time_s=0.1).metrics["leak_bytes_per_call"] == 0


@linux
def test_a_planted_allocation_is_the_peak():
    timing.prepare_process()
    metrics, _ = timing.observe(lambda: b"\1" * 10_000_000, min_time_s=0.01)
    assert metrics["peak_bytes"] == pytest.approx(10e6, rel=0.05)
    assert metrics["peak_source"] == "VmHWM"


# What went on meanwhile.

STAT = """\
cpu  1000 0 1000 9000 0 0 0 0 0 0
cpu0 100 20 300 7000 900 4 50 6000 70 80
cpu1 1 1 1 1 1 1 1 1 1 1
cpu10 5000 0 0 0 0 0 0 0 0 0
intr 1 2 3
"""


def test_busy_time_counts_our_cores_and_neither_idle_nor_guests_twice():
    second = timing.os.sysconf("SC_CLK_TCK")  # in ticks
    assert timing._busy_seconds(STAT, {0}) * second == pytest.approx(100 + 20 + 300 + 4 + 50 + 6000)
    assert timing._busy_seconds(STAT, {0, 1}) * second == pytest.approx(6474 + 6)


def test_own_time_is_not_foreign(monkeypatch):
    clock = iter([(100.0, 7.0), (102.0, 8.5)])  # 2 s on our cores, 1.5 s of them ours
    monkeypatch.setattr(timing, "cpu_seconds", lambda: next(clock))
    window = timing._window(lambda: time.sleep(0.02), "cpu", 0.01)
    assert window.foreign_load == pytest.approx(0.5 / window.seconds)


@linux
def test_own_work_counts_as_own():
    def clock():
        deadline = time.perf_counter() + 0.2
        while time.perf_counter() < deadline:
            pass

    (_, before), _, (_, after) = timing.cpu_seconds(), clock(), timing.cpu_seconds()
    assert 0.02 < after - before < 0.25


@linux
def test_another_process_is_foreign_and_the_window_is_tried_again():
    spin = [sys.executable, "-c", "while True: pass"]
    others = [subprocess.Popen(spin) for _ in range(2)]
    try:
        time.sleep(0.2)
        metrics, _ = timing.observe(lambda: time.sleep(0.01), min_time_s=0.3)
    finally:
        for other in others:
            other.kill()
            other.wait()
    assert 0.5 < metrics["foreign_load"] < 1.1 * len(timing.os.sched_getaffinity(0))
    assert metrics["retries"] == timing.MAX_RETRIES


def windows(monkeypatch, *of):
    """`timing._window` replaced by these (milliseconds, seconds, load or throttle reasons)."""
    made = [
        timing._Window(
            timed=timing._Timed(
                times_ms=[ms] * 5,
                calls_per_sample=1,
                contract="blocked_autorange",
                calls=6,
                device=nvml.Reading(1980, 600.0, 60, why) if isinstance(why, str) else None,
            ),
            seconds=seconds,
            foreign_load=0.1 if isinstance(why, str) else why,
            leak_bytes_per_call=0.0,
        )
        for ms, seconds, why in of
    ]
    left = iter(made)
    monkeypatch.setattr(timing, "_window", lambda *_: next(left))


@pytest.mark.parametrize(
    ("of", "ms", "retries"),
    [
        ([(1, 0.3, 0.4), (2, 0.3, 0.0)], 1, 0),  # quiet enough
        ([(1, 0.3, 0.9), (2, 0.3, 0.2), (3, 0.3, 0.0)], 2, 1),
        ([(1, 0.3, 0.9), (2, 0.3, 0.6), (3, 0.3, 0.8)], 2, 2),  # the least disturbed one
        ([(1, 6.0, 0.9), (2, 6.0, 0.0)], 1, 0),  # too long to repeat
        ([(1, 0.3, None)], 1, 0),
        ([(1, 0.3, "none")], 1, 0),
        ([(1, 0.3, "hw_slowdown+hw_thermal"), (2, 0.3, "hw_thermal"), (3, 0.3, "none")], 3, 2),
    ],
)
def test_disturbed_windows_are_timed_again(monkeypatch, of, ms, retries):
    windows(monkeypatch, *of)
    metrics, _ = timing.observe(nothing)
    assert metrics["time_ms_p50"] == ms
    assert metrics["retries"] == retries


def test_the_state_of_the_device_is_in_the_metrics(monkeypatch):
    windows(monkeypatch, (1, 0.3, "none"))
    metrics, _ = timing.observe(nothing)
    assert metrics["sm_clock_mhz"] == 1980
    assert metrics["power_w"] == 600
    assert metrics["temperature_c"] == 60
    assert metrics["throttle"] == "none"


def test_without_proc_there_are_reasons_and_no_numbers(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "PROCESS", tmp_path / "absent")
    monkeypatch.setattr(timing, "cpu_seconds", lambda: None)
    metrics, _ = timing.observe(nothing, min_time_s=0.001, energy=True)
    for name in ("peak_bytes", "leak_bytes_per_call", "foreign_load", "energy_mj_per_call"):
        assert metrics[name] is None, name
    assert "cannot be written" in metrics["peak_source"]
    assert "CPU" in metrics["energy_note"]


# Side by side.


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
    assert ratio.high - ratio.low < 0.06
    assert timing.speedup(list(theirs), list(ours)).estimate == pytest.approx(1 / ratio.estimate)


@pytest.mark.parametrize(("rounds", "critical"), [(8, 0), (10, 3), (20, 37), (30, 109)])
def test_critical_values_are_those_of_the_tables(rounds, critical):
    # Two-sided 1 % of the signed-rank test: Wilcoxon and Wilcox (1964), table 2.
    assert timing.excluded_means(rounds, (1 - timing.LEVEL) / 2) == critical


def test_too_few_or_unpaired_rounds_have_no_ratio():
    for ours, theirs in (([1.0] * 7, [1.0] * 7), ([1.0] * 9, [1.0] * 8)):
        with pytest.raises(ValueError, match="8 paired"):
            timing.speedup(ours, theirs)


def machine_noise(kind, calls, generator):
    """Log-times of consecutive calls on a machine of that kind."""
    if kind == "heavy tails":
        return 0.02 * generator.standard_t(2, calls)
    noise = generator.normal(0, 0.02, calls)
    if kind == "spikes":
        return noise + (generator.random(calls) < 0.05) * generator.exponential(2, calls)
    if kind == "drift":
        for i in range(1, calls):
            noise[i] += 0.95 * noise[i - 1]
        return noise + np.linspace(0, 0.5, calls)
    loaded = False  # bursts of load that last for some calls
    for i in range(calls):
        loaded = generator.random() < (0.8 if loaded else 0.05)
        noise[i] += loaded * generator.exponential(0.3)
    return noise


def simulated(kind, rounds, ratio, generator):
    """Times of both sides over rounds in random order, the second `ratio` times the first's."""
    log_times = machine_noise(kind, 2 * rounds, generator).reshape(rounds, 2)
    order = generator.random(rounds) < 0.5
    ours = np.where(order, log_times[:, 0], log_times[:, 1])
    theirs = np.where(order, log_times[:, 1], log_times[:, 0])
    return np.exp(ours), ratio * np.exp(theirs)


@pytest.mark.parametrize("kind", ["heavy tails", "spikes", "drift", "bursts"])
def test_simulated_intervals_hold_the_truth_and_see_10_percent(kind):
    generator, runs = np.random.default_rng(1), 400
    same = [timing.speedup(*simulated(kind, 20, 1.0, generator)) for _ in range(runs)]
    assert sum(r.low <= 1 <= r.high for r in same) >= 0.98 * runs
    slower = [timing.speedup(*simulated(kind, 40, 1.1, generator)) for _ in range(100)]
    assert sum(r.low > 1 for r in slower) >= 80
    assert np.median([r.estimate for r in slower]) == pytest.approx(1.1, abs=0.01)


def test_of_100_real_pairs_of_equals_95_hold_one():
    a = torch.randn(320, 320)
    ratios = []
    for seed in range(100):
        samples = timing.measure_interleaved(
            {"ours": lambda: a @ a, "ours again": lambda: a @ a}, rounds=24, seed=seed
        )
        ratios.append(timing.speedup(samples["ours"], samples["ours again"]))
    assert sum(r.low <= 1 <= r.high for r in ratios) >= 95


# CUDA: the choice of a contract, on a stand-in whose work takes the time it says.


class StandIn:
    """As much of torch.cuda as timing uses: a clock that work moves; graphs that replay it."""

    def __init__(self, capturable):
        self.now_ms, self.graph, self.capturable, self.flushes = 0.0, None, capturable, 0

    def work(self, ms):
        if self.graph is None:
            self.now_ms += ms + self.launch_ms
        elif self.capturable:
            self.graph.ms += ms
        else:
            raise RuntimeError("operation not permitted when stream is capturing")

    launch_ms = 0.02

    def install(self, monkeypatch):
        stand_in = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = stand_in.now_ms

            def elapsed_time(self, end):
                return end.at - self.at

        class CUDAGraph:
            ms = 0.0

            def replay(self):
                stand_in.now_ms += self.ms

        @contextlib.contextmanager
        def graph(it):
            stand_in.graph = it
            try:
                yield
            finally:
                stand_in.graph = None

        class Flush:
            def zero_(self):
                stand_in.flushes += 1
                stand_in.now_ms += 0.08

        stream = SimpleNamespace(wait_stream=lambda other: None)
        cuda = SimpleNamespace(
            Event=Event,
            CUDAGraph=CUDAGraph,
            graph=graph,
            Stream=lambda: stream,
            stream=lambda it: contextlib.nullcontext(),
            current_stream=lambda: stream,
            current_device=lambda: 0,
            synchronize=nothing,
            get_device_properties=lambda device: SimpleNamespace(L2_cache_size=50 << 20),
        )
        torch_stand_in = SimpleNamespace(
            cuda=cuda,
            int32=torch.int32,
            empty=lambda size, dtype, device: Flush(),
            zeros=lambda size, device: SimpleNamespace(add_=lambda x: None),
        )
        monkeypatch.setattr(timing, "torch", torch_stand_in)
        monkeypatch.setattr(nvml, "read", lambda: nvml.Reading(1980, 500.0, 50, "none"))


@pytest.mark.parametrize(
    ("ms", "capturable", "contract", "expected_ms"),
    [
        (0.5, True, "cuda-events", 0.52),
        (0.005, True, "cuda-graph", 0.005),  # without the queue's 0.02 ms
        (0.005, False, "cuda-events-batched", 0.025),
    ],
)
def test_the_contract_on_cuda_follows_the_call(monkeypatch, ms, capturable, contract, expected_ms):
    device = StandIn(capturable)
    device.install(monkeypatch)
    calls = []
    timed = timing._time_cuda(lambda: calls.append(device.work(ms)), min_time_s=0.02)
    assert timed.contract == contract
    assert timed.times_ms == pytest.approx([expected_ms] * len(timed.times_ms))
    assert device.flushes == len(timed.times_ms) >= 20
    assert device.graph is None
    assert timed.calls_per_sample == (40 if contract == "cuda-events-batched" else 1)
    assert timed.calls == len(calls)


def test_very_slow_calls_on_cuda_get_fewer_samples(monkeypatch):
    device = StandIn(capturable=True)
    device.install(monkeypatch)
    assert len(timing._time_cuda(lambda: device.work(6000), min_time_s=0.3).times_ms) == 9
    assert len(timing._time_cuda(lambda: device.work(60000), min_time_s=0.3).times_ms) == 5


def test_energy_is_net_of_idle_power(monkeypatch):
    device = StandIn(capturable=True)
    device.install(monkeypatch)
    monkeypatch.setattr(timing, "ENERGY_WINDOW_S", 0.2)
    start = time.perf_counter()
    calls, uses = [], 50

    def function():
        calls.append(time.sleep(0.01))
        device.work(10)

    def millijoules():  # 100 W idle and `uses` mJ a call
        return 1e5 * (time.perf_counter() - start) + uses * len(calls)

    monkeypatch.setattr(nvml, "energy_mj", millijoules)
    energy, note = timing._energy(function, "cuda")
    assert note is None
    assert energy == pytest.approx(50, rel=0.05)
    uses = -20
    assert timing._energy(function, "cuda") == (None, "no more than idle power")
    monkeypatch.setattr(nvml, "energy_mj", lambda: None)
    assert timing._energy(function, "cuda") == (None, "NVML or its energy counter is missing")


# CUDA itself.

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


@pytest.mark.gpu
@needs_cuda
def test_a_sleep_twice_as_long_takes_twice_the_time_on_cuda():
    def asleep(cycles):
        return timing.observe(lambda: torch.cuda._sleep(cycles), device="cuda").metrics

    short, long = asleep(10_000_000), asleep(20_000_000)
    assert short["timing_contract"] == "cuda-events"
    assert short["sample_count"] >= 20
    assert long["time_ms_p50"] == pytest.approx(2 * short["time_ms_p50"], rel=0.05)


@pytest.mark.gpu
@needs_cuda
def test_contracts_on_cuda_and_random_numbers_after_a_refused_capture():
    x = torch.randn(1024, device="cuda")

    def synchronising():
        return torch.rand_like(x).sum().item()

    replayed = timing.observe(lambda: x + 1, device="cuda").metrics
    assert replayed["timing_contract"] == "cuda-graph"
    assert 0 < replayed["time_ms_p50"] < timing.EVENT_FLOOR_MS
    batched = timing.observe(synchronising, device="cuda", min_time_s=0.05).metrics
    assert batched["timing_contract"] in ("cuda-events-batched", "cuda-events")  # a slow host
    assert torch.isfinite(torch.randn(8, device="cuda")).all()


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("leaked", [1_000_000, 100_000])
def test_leak_and_peak_on_cuda(leaked):
    kept = []

    def leak():
        torch.empty(10_000_000, dtype=torch.uint8, device="cuda")
        kept.append(torch.empty(leaked, dtype=torch.uint8, device="cuda"))

    metrics = timing.observe(leak, device="cuda", min_time_s=0.01).metrics
    assert metrics["leak_bytes_per_call"] == pytest.approx(leaked, rel=0.05)
    assert metrics["peak_bytes"] == pytest.approx(10e6 + leaked, rel=0.05)
    assert metrics["peak_source"] == "cuda allocator"


@pytest.mark.gpu
@needs_cuda
def test_pairs_of_equals_on_cuda_hold_one():
    a = torch.randn(1024, 1024, device="cuda")
    held = 0
    for seed in range(100):
        samples = timing.measure_interleaved(
            {"ours": lambda: a @ a, "again": lambda: a @ a}, rounds=24, seed=seed, device="cuda"
        )
        ratio = timing.speedup(samples["ours"], samples["again"])
        assert math.isfinite(ratio.estimate)
        held += ratio.low <= 1 <= ratio.high
    assert held >= 95

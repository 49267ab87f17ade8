"""Time of a callable, with what was going on meanwhile, by rules that make the numbers comparable.

Inputs are built outside the window; the callable is warmed first; the process is set up once by
`prepare_process`, whose settings are stored with every record. Which clock was used is the metric
`timing_contract`:

    blocked_autorange    CPU: torch.utils.benchmark.Timer, blocks of calls, at PyTorch's threads
    cuda-events          a pair of device events around each call, L2 flushed before it
    cuda-graph           likewise around the replay of a CUDA graph of the call: in calls shorter
                         than EVENT_FLOOR_MS a pair of events times the launch queue
    cuda-events-batched  likewise around several calls, where the call cannot be captured; only the
                         first of them finds L2 flushed
    single-calls         CPU, side by side: the wall time of each call by itself
"""

import ctypes
import itertools
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.benchmark import Timer

from harness import memory, nvml
from harness.environment import FOREIGN_LOAD

# glibc's mallopt parameters (malloc.h): without them every large temporary is a fresh mapping,
# and its page faults dominate FFTs and bend linear curves.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
KEEP_BYTES = 1 << 30

MIN_SAMPLES = {"cpu": 5, "cuda": 20}
MAX_SAMPLES = 2000  # CUDA: each costs a flush and two events as well
LONGEST_WINDOW_S = 60.0  # CUDA: slower calls get fewer than 20 samples, at least 5
EVENT_FLOOR_MS = 0.1
BATCH_MS = 1.0
FLUSH_FACTOR = 5  # times the size of L2
MAX_RETRIES = 2
RETRY_BELOW_S = 5.0
# Growth of live memory up to this much over a window is noise of the C library's heap.
LEAK_NOISE_BYTES = 128 << 10
ENERGY_WINDOW_S = 2.0
# Level of `speedup`'s interval: see there why a 95 % interval asks for 99 %.
LEVEL = 0.99
MIN_ROUNDS = 8  # fewer sign patterns than 2 / (1 - LEVEL) bound nothing
# Rounds side by side: so long in all, but so many at least and at most; fewer than that, and never
# under MIN_ROUNDS, where they would take over LONGEST_WINDOW_S.
ROUNDS_S, LEAST_ROUNDS, MOST_ROUNDS = 3.0, 20, 200


class Observation(NamedTuple):
    """What was seen of one callable: `metrics` and `samples` as `record.Measurement` takes them."""

    metrics: dict[str, float | int | str | None]
    samples: dict[str, list[float]]  # "time_ms": milliseconds a call


class Ratio(NamedTuple):
    """How many times faster one callable is than another, with a 95 % interval."""

    estimate: float
    low: float
    high: float


class _Timed(NamedTuple):
    """Samples, how they were taken, and how often the callable ran in all."""

    times_ms: list[float]
    calls_per_sample: int
    contract: str
    calls: int
    device: nvml.Reading | None  # CUDA: while the queue was still running


class _Window(NamedTuple):
    """One attempt at timing, with what disturbed it."""

    timed: _Timed
    seconds: float
    foreign_load: float | None
    leak_bytes_per_call: float | None

    @property
    def disturbance(self) -> float:
        """0 for a quiet window; the more the worse."""
        if self.timed.device is not None:
            throttle = self.timed.device.throttle or nvml.NOT_THROTTLED
            return 0 if throttle == nvml.NOT_THROTTLED else 1 + throttle.count("+")
        load = self.foreign_load or 0
        return load if load > FOREIGN_LOAD else 0


def prepare_process(threads: int | None = None) -> dict[str, int | bool]:
    """Set threads and keep freed memory in the process; the settings, for the record."""
    if threads is not None:
        torch.set_num_threads(threads)
    kept = False
    try:
        mallopt = ctypes.CDLL(None).mallopt
        kept = all(mallopt(name, KEEP_BYTES) == 1 for name in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD))
    except (OSError, AttributeError):
        pass  # not glibc: the record says so
    return {"threads": torch.get_num_threads(), "malloc_keeps_memory": kept}


def first_call_ms(function: Callable[[], object], device: str = "cpu") -> float:
    """Wall time of a callable's very first call, with all it compiles, plans and loads."""
    start = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)


def observe(
    function: Callable[[], object],
    *,
    device: str = "cpu",
    min_time_s: float = 0.3,
    energy: bool = False,
) -> Observation:
    """Warm `function` up, then take its peak memory, its time and what went on meanwhile.

    A window that others' load (CPU) or throttling (CUDA) disturbed is timed again up to MAX_RETRIES
    times where it took under RETRY_BELOW_S; the least disturbed one counts.

    Args:
        function: does the whole work, clears its gradients itself; what it returns is dropped.
        device: "cpu" or "cuda".
        min_time_s: time to spend on the samples; slow calls take longer.
        energy: read the energy counter over two more windows of ENERGY_WINDOW_S (CUDA).

    Returns:
        Metrics, null where they cannot be had:
        peak_bytes and peak_source, of one warm call (`memory.peak`);
        time_ms_p20, _p50, _p80, sample_count, calls_per_sample, timing_contract;
        leak_bytes_per_call, growth of live memory over all calls of the window, 0 where it grew by
        at most LEAK_NOISE_BYTES in all (CPU);
        foreign_load, how many of our cores' worth of CPU time others used in the window (Linux);
        retries, windows thrown away;
        energy_mj_per_call, net of idle power, or energy_note saying why not;
        CUDA: sm_clock_mhz, power_w, temperature_c, throttle, read while the samples ran.
        Samples: "time_ms".
    """
    function()
    peak = memory.peak(function, device)
    windows = [_window(function, device, min_time_s)]
    while (
        windows[-1].disturbance
        and windows[-1].seconds < RETRY_BELOW_S
        and len(windows) <= MAX_RETRIES
    ):
        windows.append(_window(function, device, min_time_s))
    best = min(windows, key=lambda window: window.disturbance)
    energy_mj, energy_note = _energy(function, device) if energy else (None, "not asked for")
    metrics: dict[str, float | int | str | None] = {
        **quantiles(best.timed.times_ms),
        "sample_count": len(best.timed.times_ms),
        "calls_per_sample": best.timed.calls_per_sample,
        "timing_contract": best.timed.contract,
        "peak_bytes": peak.bytes,
        "peak_source": peak.source,
        "leak_bytes_per_call": best.leak_bytes_per_call,
        "foreign_load": best.foreign_load,
        "retries": len(windows) - 1,
        "energy_mj_per_call": energy_mj,
        "energy_note": energy_note,
    }
    if best.timed.device is not None:
        metrics |= best.timed.device._asdict()
    return Observation(metrics, {"time_ms": best.timed.times_ms})


def quantiles(samples: Sequence[float]) -> dict[str, float]:
    """The 20th, 50th and 80th percentile, named as metrics."""
    low, middle, high = np.quantile(samples, (0.2, 0.5, 0.8))
    return {"time_ms_p20": float(low), "time_ms_p50": float(middle), "time_ms_p80": float(high)}


def measure_interleaved(
    functions: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    seed: int = 0,
    device: str = "cpu",
) -> dict[str, list[float]]:
    """Milliseconds a call: every round runs each callable once, in random order.

    On CUDA all of them are timed by one contract, the one that the fastest needs.
    """
    seen = observe_interleaved(functions, rounds=rounds, seed=seed, device=device)
    return {name: observation.samples["time_ms"] for name, observation in seen.items()}


def observe_interleaved(
    functions: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    seed: int = 0,
    device: str = "cpu",
) -> dict[str, Observation]:
    """`measure_interleaved` with metrics, named as by `observe`.

    Those of the machine (foreign_load, clocks, power) are of the window that all of them share.
    """
    generator = np.random.default_rng(seed)
    for function in functions.values():
        function()
    cpu, start = cpu_seconds(), time.perf_counter()
    reading, contract, calls = None, "single-calls", 1
    if device == "cuda":
        nvml.read()  # the first reading opens NVML, too slowly for the window
        launch = _launch(functions)
        contract, calls = launch.contract, launch.calls
        samples, reading = _sample_cuda(launch, rounds, generator)
    else:
        samples = {name: [] for name in functions}
        for name in _shuffled(functions, rounds, generator):
            began = time.perf_counter()
            functions[name]()
            samples[name].append(1e3 * (time.perf_counter() - began))
    shared: dict[str, float | int | str | None] = {
        "sample_count": rounds,
        "calls_per_sample": calls,
        "timing_contract": contract,
        "foreign_load": foreign_load(cpu, time.perf_counter() - start),
        **({} if reading is None else reading._asdict()),
    }
    return {
        name: Observation({**quantiles(times), **shared}, {"time_ms": times})
        for name, times in samples.items()
    }


def affordable_rounds(functions: Mapping[str, Callable[[], object]], device: str = "cpu") -> int:
    """How many rounds of these callables, all warm, fit the time for a comparison."""
    if device == "cuda":
        round_s = sum(map(_device_ms, functions.values())) / 1e3
    else:
        start = time.perf_counter()
        for function in functions.values():
            function()
        round_s = time.perf_counter() - start
    wanted = min(max(LEAST_ROUNDS, int(ROUNDS_S / round_s)), MOST_ROUNDS)
    return min(wanted, max(MIN_ROUNDS, int(LONGEST_WINDOW_S / round_s)))


def speedup(ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
    """Paired ratio theirs/ours over rounds, and an interval that holds the truth 95 times in 100.

    The estimate is Hodges and Lehmann's, the median of the means of all pairs of log-ratios; the
    interval inverts Wilcoxon's signed-rank test (Hollander, Wolfe and Chicken, Nonparametric
    Statistical Methods, 3rd edition, sections 3.2 and 3.3). `measure_interleaved` draws each
    round's order, so under equal callables each log-ratio is as likely to carry one sign as the
    other, independently, whatever the machine does: the level is exact for any number of rounds,
    with spikes, drift and load that lasts over rounds. Bootstraps of the mean have no such
    guarantee. Simulated coverage of A/A pairs, nominally 95 %, 20 rounds of normal noise, bursts
    of load, and 5 % of calls with spikes: BCa 0.92, 0.79, 0.73; studentised 0.93, 0.90, 0.91.

    The level is LEVEL = 99 %, so that of 100 intervals 95 hold the truth with probability 0.999
    (at 95 % it would be 0.6), and 95 % are left where log-ratios of neighbouring rounds correlate
    by 0.3, which no random order prevents if the callables differ. It costs 1.3 times the width.

    Args:
        ours: milliseconds, one a round.
        theirs: milliseconds of the same rounds.

    Raises:
        ValueError: fewer than MIN_ROUNDS rounds, or not as many on both sides.
    """
    if len(ours) != len(theirs) or len(ours) < MIN_ROUNDS:
        raise ValueError(
            f"{len(ours)} and {len(theirs)} rounds: a ratio needs {MIN_ROUNDS} paired ones"
        )
    logs = np.log(np.asarray(theirs)) - np.log(np.asarray(ours))  # (rounds,)
    means = np.sort(means_of_pairs(logs))
    outside = excluded_means(len(logs), (1 - LEVEL) / 2)
    return Ratio(*(math.exp(x) for x in (np.median(means), means[outside], means[-1 - outside])))


def means_of_pairs(differences: NDArray[np.float64]) -> NDArray[np.float64]:
    """The mean of every two differences (..., n), and of each with itself: (..., n (n + 1) / 2)."""
    first, second = np.triu_indices(differences.shape[-1])
    return (differences[..., first] + differences[..., second]) / 2


@cache
def excluded_means(rounds: int, share: float) -> int:
    """How many of the sorted means of pairs lie outside the interval on each side.

    The largest c with P(signed-rank statistic <= c) <= share: the means from the (c + 1)th on are
    inside. The distribution counts the subsets of 1..rounds by their sum.
    """
    subsets = [1]  # by sum
    for rank in range(1, rounds + 1):
        longer = [0] * rank + subsets
        subsets = [a + b for a, b in itertools.zip_longest(subsets, longer, fillvalue=0)]
    allowed = share * 2**rounds
    return sum(total <= allowed for total in itertools.accumulate(subsets)) - 1


def _window(function: Callable[[], object], device: str, min_time_s: float) -> _Window:
    """Time `function` once, watching memory and the machine."""
    live = memory.live_bytes(device)
    cpu = cpu_seconds()
    start = time.perf_counter()
    timed = (_time_cuda if device == "cuda" else _time_cpu)(function, min_time_s)
    seconds = time.perf_counter() - start
    foreign = foreign_load(cpu, seconds)
    leak = None
    if live is not None and (after := memory.live_bytes(device)) is not None:
        grown = after - live
        leak = grown / timed.calls if device == "cuda" or grown > LEAK_NOISE_BYTES else 0.0
    return _Window(timed, seconds, foreign, leak)


def _time_cpu(function: Callable[[], object], min_time_s: float) -> _Timed:
    calls = itertools.count()
    timer = Timer(
        "function(); next(calls)",  # counting costs some 20 ns
        globals={"function": function, "calls": calls},
        num_threads=torch.get_num_threads(),  # the Timer's own default is 1
    )
    measured = timer.blocked_autorange(min_run_time=min_time_s)
    block, times = measured.number_per_run, list(measured.times)
    while len(times) < MIN_SAMPLES["cpu"]:
        start = time.perf_counter()
        for _ in range(block):
            function()
            next(calls)
        times.append((time.perf_counter() - start) / block)
    return _Timed([1e3 * t for t in times], block, "blocked_autorange", next(calls), None)


def foreign_load(before: tuple[float, float] | None, seconds: float) -> float | None:
    """How many of our cores' worth of CPU time others used in the last `seconds`."""
    if before is None or (now := cpu_seconds()) is None:
        return None
    return max(0.0, (now[0] - before[0]) - (now[1] - before[1])) / seconds


def cpu_seconds() -> tuple[float, float] | None:
    """CPU time spent on our cores by anyone, and by this process and its ended children."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return None
    times = os.times()
    own = time.process_time() + times.children_user + times.children_system
    return _busy_seconds(stat.read_text(), os.sched_getaffinity(0)), own


def _busy_seconds(stat: str, cpus: Iterable[int]) -> float:
    """Seconds that `cpus` were not idle, from the text of /proc/stat (proc(5)).

    user (guests are in it), nice, system, irq, softirq and steal: what a hypervisor gave to
    others counts as load.
    """
    names = {f"cpu{i}" for i in cpus}
    ticks = 0
    for line in stat.splitlines():
        name, *fields = line.split()
        if name in names:
            user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, fields[:8])
            ticks += user + nice + system + irq + softirq + steal
    return ticks / os.sysconf("SC_CLK_TCK")


class _Launch(NamedTuple):
    """How callables are put on the device between two events."""

    contract: str
    calls: int  # a launch
    launchers: dict[str, Callable[[], object]]


def _time_cuda(function: Callable[[], object], min_time_s: float) -> _Timed:
    calls = itertools.count()

    def counted() -> None:
        function()
        next(calls)

    nvml.read()  # the first reading opens NVML, too slowly for the window
    launch = _launch({"it": counted})
    sample_s = _device_ms(launch.launchers["it"]) / 1e3
    wanted = min(max(MIN_SAMPLES["cuda"], math.ceil(min_time_s / sample_s)), MAX_SAMPLES)
    affordable = max(MIN_SAMPLES["cpu"], int(LONGEST_WINDOW_S / sample_s))
    samples, reading = _sample_cuda(launch, min(wanted, affordable), np.random.default_rng(0))
    return _Timed(samples["it"], launch.calls, launch.contract, next(calls), reading)


def _launch(functions: Mapping[str, Callable[[], object]]) -> _Launch:
    """The contract that the fastest of `functions` needs, and their launchers under it."""
    fastest_ms = min(_device_ms(function) for function in functions.values())
    if fastest_ms >= EVENT_FLOOR_MS:
        return _Launch("cuda-events", 1, dict(functions))
    graphs = {name: _capture(function) for name, function in functions.items()}
    if all(graphs.values()):
        return _Launch("cuda-graph", 1, {name: g.replay for name, g in graphs.items() if g})
    calls = math.ceil(BATCH_MS / fastest_ms)

    def batch(function: Callable[[], object]) -> Callable[[], object]:
        def launch() -> None:
            for _ in range(calls):
                function()

        return launch

    return _Launch("cuda-events-batched", calls, {n: batch(f) for n, f in functions.items()})


def _sample_cuda(
    launch: _Launch, rounds: int, generator: np.random.Generator
) -> tuple[dict[str, list[float]], nvml.Reading]:
    """Milliseconds a call of each launcher in random order, and the device's state meanwhile."""
    l2_bytes = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    flush = torch.empty(FLUSH_FACTOR * l2_bytes // 4, dtype=torch.int32, device="cuda")
    pairs = {name: [] for name in launch.launchers}
    for name in _shuffled(launch.launchers, rounds, generator):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        start.record()
        launch.launchers[name]()
        end.record()
        pairs[name].append((start, end))
    reading = nvml.read()
    torch.cuda.synchronize()
    return {
        name: [start.elapsed_time(end) / launch.calls for start, end in events]
        for name, events in pairs.items()
    }, reading


def _device_ms(function: Callable[[], object]) -> float:
    """Rough milliseconds a warm call; five of them unless one is slow enough."""
    ms = 0.0
    for calls in (1, 5):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            function()
        end.record()
        torch.cuda.synchronize()
        ms = start.elapsed_time(end) / calls
        if ms > 10:
            break
    return max(ms, 1e-3)


def _capture(function: Callable[[], object]) -> torch.cuda.CUDAGraph | None:
    """A CUDA graph of one call; None where it cannot be captured (it synchronises, say)."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        function()  # PyTorch's notes on CUDA graphs: warm up on a side stream first
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            function()
    except RuntimeError:
        torch.cuda.synchronize()
        _end_capture_of_random_state()
        return None
    graph.replay()
    torch.cuda.synchronize()
    return graph


def _end_capture_of_random_state() -> None:
    """Capture something trivial, which ends what a failed capture leaves behind.

    The default generator still counts as capturing then, and the next random number raises
    "Offset increment outside graph capture encountered unexpectedly".
    """
    x = torch.zeros(1, device="cuda")
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        x.add_(1)


def _energy(function: Callable[[], object], device: str) -> tuple[float | None, str | None]:
    """Millijoules a call above idle power, or None and why.

    Calls follow each other without a flush; the counter moves some ten times a second, so that
    windows of ENERGY_WINDOW_S are good to about 5 %.
    """
    if device != "cuda":
        return None, "a CPU has no counter that this reads"
    torch.cuda.synchronize()
    start, before = time.perf_counter(), nvml.energy_mj()
    if before is None:
        return None, "NVML or its energy counter is missing"
    time.sleep(ENERGY_WINDOW_S)
    idle_mw = (_energy_now() - before) / (time.perf_counter() - start)
    burst = max(1, int(50 / _device_ms(function)))  # 50 ms between looks at the clock
    start, before, calls = time.perf_counter(), _energy_now(), 0
    while time.perf_counter() - start < ENERGY_WINDOW_S:
        for _ in range(burst):
            function()
        torch.cuda.synchronize()
        calls += burst
    used = _energy_now() - before - idle_mw * (time.perf_counter() - start)
    if used <= 0:
        return None, "no more than idle power"
    return used / calls, None


def _energy_now() -> int:
    """The counter where it was there a moment ago; RuntimeError if it is gone."""
    if (now := nvml.energy_mj()) is None:
        raise RuntimeError("NVML's energy counter stopped answering")
    return now


def _shuffled(names: Iterable[str], rounds: int, generator: np.random.Generator) -> Iterable[str]:
    """All of `names` once a round, in an order drawn for each round."""
    order = list(names)
    for _ in range(rounds):
        generator.shuffle(order)
        yield from order

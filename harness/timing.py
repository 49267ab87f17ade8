"""Time and memory of a callable, by rules that make the numbers comparable.

Inputs are built outside the window; the callable is warmed first; the process is set up once by
`prepare_process`, whose settings are stored with every record.
"""

import ctypes
import gc
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.benchmark import Timer

# glibc's mallopt parameters (malloc.h): without them every large temporary is a fresh mapping,
# and its page faults dominate FFTs and bend linear curves.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
KEEP_BYTES = 1 << 30


class Ratio(NamedTuple):
    """How many times faster one callable is than another, with a 95 % interval."""

    estimate: float
    low: float
    high: float


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


def measure(
    function: Callable[[], object], *, min_time_s: float = 0.3, min_samples: int = 5
) -> list[float]:
    """Milliseconds a call: blocks of calls for at least `min_time_s`, at least `min_samples`."""
    function()
    timer = Timer("function()", globals={"function": function})
    times = list(timer.blocked_autorange(min_run_time=min_time_s).times)
    while len(times) < min_samples:
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return [1e3 * t for t in times]


def quantiles(samples: Sequence[float]) -> dict[str, float]:
    """The 20th, 50th and 80th percentile, named as metrics."""
    low, middle, high = np.quantile(samples, (0.2, 0.5, 0.8))
    return {"time_ms_p20": float(low), "time_ms_p50": float(middle), "time_ms_p80": float(high)}


def measure_interleaved(
    functions: Mapping[str, Callable[[], object]], *, rounds: int, seed: int = 0
) -> dict[str, list[float]]:
    """Milliseconds a call: every round runs each callable once, in random order."""
    order = list(functions)
    generator = np.random.default_rng(seed)
    for function in functions.values():
        function()
    samples: dict[str, list[float]] = {name: [] for name in order}
    for _ in range(rounds):
        generator.shuffle(order)
        for name in order:
            start = time.perf_counter()
            functions[name]()
            samples[name].append(1e3 * (time.perf_counter() - start))
    return samples


def speedup(ours: Sequence[float], theirs: Sequence[float], *, seed: int = 0) -> Ratio:
    """Paired ratio theirs/ours: geometric mean over rounds and its bootstrap 95 % interval."""
    from scipy.stats import bootstrap

    logs = np.log(np.asarray(theirs)) - np.log(np.asarray(ours))
    interval = bootstrap(
        (logs,), np.mean, n_resamples=9999, rng=np.random.default_rng(seed)
    ).confidence_interval
    return Ratio(*(math.exp(x) for x in (logs.mean(), interval.low, interval.high)))


def peak_bytes(function: Callable[[], object]) -> int | None:
    """Most resident memory during one call above what was resident before it; None off Linux.

    The kernel's high-water mark is reset by writing 5 to /proc/self/clear_refs.
    """
    clear = Path("/proc/self/clear_refs")
    if not os.access(clear, os.W_OK):
        return None
    gc.collect()
    _return_free_memory()
    clear.write_text("5")
    before = _status_bytes("VmRSS")
    function()
    return max(0, _status_bytes("VmHWM") - before)


def _return_free_memory() -> None:
    """Hand freed pages back, so that memory reused from an earlier cell counts again."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        return


def _status_bytes(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {name}")

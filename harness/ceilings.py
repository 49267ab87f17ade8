"""What the device can do at best, measured here and now, and the lower bound it sets to a time.

Copy bandwidth, matrix-product rate and exp2 rate are measured at the start and the end of a run;
where the two differ by more than UNSTABLE_DRIFT the run is unstable. Attainment (the roofline of
Williams, Waterman and Patterson, CACM 52(4), 2009) uses these rates, never a data sheet's.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

UNSTABLE_DRIFT = 0.02
# A time may undercut its bound by this much: the ceilings' own noise.
TOLERANCE = 0.05
# Data below this many times the last-level cache may be served at the cache's rate.
CACHES_EXCEEDED = 4
# A rate is the best of the repetitions that fit this time, at least MIN_REPEATS.
REPEAT_S, MIN_REPEATS = 0.12, 3
MATMUL_SIZES = {"cpu": (512, 1024, 2048, 4096), "cuda": (4096, 8192)}
SLOWEST_MATMUL_S = 0.1  # a larger size that would take longer is left out
COPY_BYTES = {"cpu": (64 << 20, 512 << 20), "cuda": (1 << 30, 1 << 30)}  # least and most
EXP2_BLOCK, EXP2_PROGRAMS, EXP2_STEPS = 1024, 1 << 14, 512
SYSFS_CPUS = Path("/sys/devices/system/cpu")


class FasterThanRooflineError(ValueError):
    """A time is below what the device could do: the work was not done, or was miscounted."""


def measure(device: str, dtypes: Sequence[str] = ("float32",)) -> dict[str, float]:
    """The best rate seen in several short repetitions, which others' load can only lower.

    Returns:
        copy_bytes_per_s, bytes read plus bytes written, in buffers above the last-level cache;
        matmul_flops_per_s_<dtype> for each of `dtypes`, on CUDA with tf32 allowed for float32;
        exp2_per_s, float32, data in cache (CPU) or in registers (CUDA).
    """
    return {
        "copy_bytes_per_s": _copy_rate(device),
        **{f"matmul_flops_per_s_{name}": _matmul_rate(device, name) for name in dtypes},
        "exp2_per_s": _exp2_rate(device),
    }


def drift(start: Mapping[str, float], end: Mapping[str, float]) -> float:
    """The largest relative difference between two measurements of the same ceilings.

    Raises:
        ValueError: they are not of the same ceilings.
    """
    if start.keys() != end.keys():
        raise ValueError(f"ceilings differ: {sorted(start)} and {sorted(end)}")
    return max(abs(start[name] - end[name]) / max(start[name], end[name]) for name in start)


def cache_bytes(device: str) -> int | None:
    """Size of the last-level cache: every distinct one of a CPU, from sysfs; None if unknown."""
    if device == "cuda":
        return torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    found: dict[tuple[int, str], int] = {}  # (level, CPUs that share it) -> bytes
    for index in SYSFS_CPUS.glob("cpu[0-9]*/cache/index[0-9]*"):
        try:
            level, shared, size = (
                (index / name).read_text().strip() for name in ("level", "shared_cpu_list", "size")
            )
        except OSError:
            continue
        found[int(level), shared] = int(size.removesuffix("K")) << 10
    if not found:
        return None
    last = max(level for level, _ in found)
    return sum(size for (level, _), size in found.items() if level == last)


def roofline_ms(
    flops: float,
    floor_bytes: float,
    dtype: str,
    ceilings: Mapping[str, float],
    cache_bytes: int | None,
) -> float:
    """Least milliseconds the device can take: the slower of arithmetic and memory traffic.

    Args:
        flops: floating-point operations of the work.
        floor_bytes: bytes that must move at least; they count only above CACHES_EXCEEDED times
            `cache_bytes`, since smaller data may legally stay in cache.
        dtype: whose matrix-product rate bounds the arithmetic.
        ceilings: from `measure`.
        cache_bytes: from the function of that name; None (unknown) leaves the bytes out.

    Raises:
        ValueError: no ceiling was measured for `dtype`.
    """
    if (rate := ceilings.get(f"matmul_flops_per_s_{dtype}")) is None:
        raise ValueError(f"no matrix-product ceiling for {dtype} among {', '.join(ceilings)}")
    seconds = flops / rate
    if cache_bytes is not None and floor_bytes > CACHES_EXCEEDED * cache_bytes:
        seconds = max(seconds, floor_bytes / ceilings["copy_bytes_per_s"])
    return 1e3 * seconds


def check_roofline(
    time_ms: float,
    *,
    flops: float,
    floor_bytes: float,
    dtype: str,
    ceilings: Mapping[str, float],
    cache_bytes: int | None,
) -> float:
    """The fraction of the roofline that was reached: its lower bound over `time_ms`.

    Raises:
        FasterThanRooflineError: the time is below the bound by more than TOLERANCE.
        ValueError: no ceiling was measured for `dtype`.
    """
    bound = roofline_ms(flops, floor_bytes, dtype, ceilings, cache_bytes)
    if time_ms < (1 - TOLERANCE) * bound:
        raise FasterThanRooflineError(
            f"{time_ms:.4g} ms is faster than the roofline, {bound:.4g} ms for {flops:.4g} FLOPs "
            f"and {floor_bytes:.4g} bytes in {dtype}"
        )
    return bound / time_ms


def _best_s(function: Callable[[], object], device: str) -> float:
    """Fewest seconds a call took."""
    function()
    best, deadline, repeats = float("inf"), time.perf_counter() + REPEAT_S, 0
    while repeats < MIN_REPEATS or time.perf_counter() < deadline:
        best = min(best, _seconds(function, device))
        repeats += 1
    return best


def _seconds(function: Callable[[], object], device: str) -> float:
    if device == "cpu":
        start = time.perf_counter()
        function()
        return time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    function()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def _copy_rate(device: str) -> float:
    least, most = COPY_BYTES[device]
    size = min(max(cache_bytes(device) or 0, least), most)
    source = torch.ones(size // 4, device=device)  # zeros that were never written share one page
    target = torch.ones_like(source)
    return 2 * 4 * source.numel() / _best_s(lambda: target.copy_(source), device)


def _matmul_rate(device: str, dtype: str) -> float:
    best = 0.0
    for n in MATMUL_SIZES[device]:
        if best and 2 * n**3 / best > SLOWEST_MATMUL_S:
            break
        a, b = (torch.randn(n, n, device=device).to(getattr(torch, dtype)) for _ in range(2))
        product = torch.empty_like(a)
        with _tf32_allowed() if device == "cuda" else nullcontext():
            seconds = _best_s(lambda a=a, b=b, c=product: torch.mm(a, b, out=c), device)
        best = max(best, 2 * n**3 / seconds)
    return best


@contextmanager
def _tf32_allowed() -> Iterator[None]:
    """A bound has to be the device's fastest product of a dtype; Triton's tl.dot takes tf32."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def _exp2_rate(device: str) -> float:
    if device == "cpu":
        x = torch.rand(1 << 18)  # 1 MiB in, 1 MiB out
        y = torch.empty_like(x)
        return x.numel() / _best_s(lambda: torch.exp2(x, out=y), device)
    kernel = _exp2_kernel()
    x = torch.rand(EXP2_PROGRAMS * EXP2_BLOCK, device=device)

    def launch() -> None:
        kernel[(EXP2_PROGRAMS,)](x, STEPS=EXP2_STEPS, BLOCK=EXP2_BLOCK)

    return x.numel() * EXP2_STEPS / _best_s(launch, device)


def _exp2_kernel() -> Any:
    """A chain of x = 2^-x in registers: an elementwise op would time the memory instead."""
    import triton
    import triton.language as tl

    @triton.jit
    def chain(x, STEPS: tl.constexpr, BLOCK: tl.constexpr):  # noqa: ANN001, ANN202
        o_x = x + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        b_x = tl.load(o_x)
        for _ in range(STEPS):
            b_x = tl.exp2(-b_x)
        tl.store(o_x, b_x)

    return chain

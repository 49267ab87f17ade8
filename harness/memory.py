"""How much memory a call needs, and how much it keeps.

On a CPU the kernel counts: resident pages, with freed ones handed back first, so that memory reused
from an earlier cell counts again. On a GPU PyTorch's allocator counts.
"""

import ctypes
import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

PROCESS = Path("/proc/self")


class Peak(NamedTuple):
    """The most memory one call held at once, and who counted it."""

    bytes: int | None
    source: str  # "VmHWM" | "cuda allocator" | why there is no number


def peak(function: Callable[[], object], device: str = "cpu") -> Peak:
    """Most memory held during one call of `function` above what was held before it.

    Call it warm: what a first call loads or compiles would count. On a CPU the high-water mark of
    resident memory (VmHWM, proc(5)) is reset by writing 5 to /proc/self/clear_refs; holes that the
    C library cannot use again count, as they do for whoever needs the memory. So does the rest of a
    huge page (2 MB), where NumPy has asked for such ones (NUMPY_MADVISE_HUGEPAGE).
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return Peak(torch.cuda.max_memory_allocated() - before, "cuda allocator")
    clear = PROCESS / "clear_refs"
    if not os.access(clear, os.W_OK):
        return Peak(None, f"{clear} cannot be written")
    _return_free_memory()
    clear.write_text("5")
    before = _kilobytes("status", "VmHWM")
    function()
    after = _kilobytes("status", "VmHWM")
    if before is None or after is None:
        return Peak(None, f"{PROCESS}/status has no VmHWM")
    return Peak(1024 * (after - before), "VmHWM")


def live_bytes(device: str = "cpu") -> int | None:
    """Memory held now, garbage collected first; None off Linux.

    On a CPU: resident anonymous pages (/proc/self/smaps_rollup), exact where VmRSS may lag behind
    by some pages a core, after malloc_trim(3).
    """
    if device == "cuda":
        gc.collect()
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()
    _return_free_memory()
    kilobytes = _kilobytes("smaps_rollup", "Anonymous")
    return None if kilobytes is None else 1024 * kilobytes


def _return_free_memory() -> None:
    """Collect garbage and hand freed pages back to the kernel."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        return  # not glibc: freed pages stay resident


def _kilobytes(file: str, name: str) -> int | None:
    try:
        lines = (PROCESS / file).read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith(name + ":")), None)

"""`seqscale doctor`: what works on this machine, and why the rest does not."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from harness.environment import environment, installed_version
from harness.worker import one_line

KERNEL = """
import torch, triton, triton.language as tl

@triton.jit
def double(x, y, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < n
    tl.store(y + offsets, 2 * tl.load(x + offsets, mask=inside), mask=inside)

x = torch.arange(100.0, device=DEVICE)
y = torch.zeros_like(x)
double[(2,)](x, y, 100, BLOCK=64)
assert torch.equal(y, 2 * x), "a kernel computed wrongly"
"""


class Check(NamedTuple):
    """One thing that can work or not."""

    name: str
    works: bool
    found: str
    remedy: str | None = None  # what to do where it does not work and can


def examine() -> list[Check]:
    """All checks, in order, then one a peer; none of them raises."""
    from harness.peers import PEERS

    peers = {f"peer {name}": _peer(name) for name in PEERS}
    return [_guarded(name, check) for name, check in {**CHECKS, **peers}.items()]


def _guarded(name: str, check: Callable[[], Check]) -> Check:
    try:
        return check()
    except Exception as error:
        return Check(name, False, one_line(f"{type(error).__name__}: {error}"))


def _python() -> Check:
    return Check("Python", True, f"{platform.python_version()} on {platform.platform()}")


def _torch() -> Check:
    import torch

    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
    return Check(
        "PyTorch", True, f"{torch.__version__}, {build}, {torch.get_num_threads()} threads"
    )


def _cuda() -> Check:
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        capability = "{}.{}".format(*torch.cuda.get_device_capability(0))
        return Check("CUDA", True, f"{', '.join(names)}, compute capability {capability}")
    driver = Path("/proc/driver/nvidia/version").exists()
    if not driver:
        return Check("CUDA", False, "this machine has no NVIDIA driver: everything runs on the CPU")
    if not torch.version.cuda:
        remedy = "install PyTorch's CUDA build: https://pytorch.org/get-started/locally"
        return Check("CUDA", False, "there is a driver, but PyTorch is built for the CPU", remedy)
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return Check("CUDA", False, one_line(str(error)), "compare nvidia-smi with torch's CUDA")
    return Check("CUDA", False, "PyTorch sees no device", "look at CUDA_VISIBLE_DEVICES")


def _triton() -> Check:
    import torch

    from archs.ops import interpreted

    if installed_version("triton") is None:
        return Check("Triton", False, "not installed", "pip install triton (Linux only)")
    found = f"{installed_version('triton')}"
    if not torch.cuda.is_available():
        return Check("Triton", False, f"{found}; its kernels need an NVIDIA GPU to run at speed")
    if interpreted():
        said = f"{found}; TRITON_INTERPRET is set: kernels are interpreted, and never measured"
        return Check("Triton", False, said, "unset TRITON_INTERPRET")
    return _kernel_runs("Triton", "cuda", {}, f"{found}, compiles and runs")


def _interpreter() -> Check:
    from archs.ops import interpreted

    if installed_version("triton") is None:
        return Check("Triton interpreter", False, "Triton is not installed", "pip install triton")
    said = "runs kernels on the CPU, slowly"
    if interpreted():
        said += "; TRITON_INTERPRET is set: backend triton runs there, and is never measured"
    return _kernel_runs("Triton interpreter", "cpu", {"TRITON_INTERPRET": "1"}, said)


def _kernel_runs(name: str, device: str, variables: dict[str, str], good: str) -> Check:
    """Run a small kernel in a process of its own: the interpreter cannot be turned off again."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:  # Triton reads a kernel's source from its file
        path = Path(folder, "double.py")
        path.write_text(KERNEL.replace("DEVICE", repr(device)))
        done = subprocess.run(
            [sys.executable, str(path)],
            capture_output=True,
            text=True,
            timeout=120,
            env={**os.environ, **variables},
        )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return Check(name, False, one_line(last))
    return Check(name, True, good)


def _backends() -> Check:
    import torch

    from archs.ops import BackendUnavailableError, interpreted
    from archs.ops.ssd import ssd
    from harness.sweep import CHOICES

    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, b = torch.randn(2, 1, 4, 1, 16, device=device)
    heads = -torch.rand(1, 4, 1, device=device)
    said = []
    for backend in CHOICES["backend"]:
        try:
            ssd(x, heads, b, b, backend=backend)
            slowly = " (interpreted)" if backend == "triton" and interpreted() else ""
            said.append(backend + slowly)
        except BackendUnavailableError as error:
            said.append(f"not {backend} ({one_line(str(error))})")
    return Check("backends", True, "of ssd: " + "; ".join(said))


def _peer(name: str) -> Callable[[], Check]:
    """A library's implementation, which nothing needs but a run that asks for it."""

    def check() -> Check:
        import torch

        from harness.peers import PEERS

        peer = PEERS[name]
        reason = peer.unavailable("cuda" if torch.cuda.is_available() else "cpu")
        said = f"{peer.op} by {peer.package} {peer.version or '(not installed)'}"
        return Check(f"peer {name}", reason is None, said if reason is None else reason)

    return check


def _nvml() -> Check:
    from harness import nvml

    remedy = "pip install nvidia-ml-py"
    if installed_version("nvidia-ml-py") is None:
        return Check("NVML", False, "not installed: no clocks, power or energy", remedy)
    driver = nvml.driver_version()
    if driver is None:
        return Check("NVML", False, "finds no NVIDIA driver: no clocks, power or energy")
    return Check("NVML", True, f"driver {driver}: clocks, power, energy")


def _memory() -> Check:
    here = environment("cpu")
    return Check("cores and memory", True, f"{here['cores']} cores, {here['memory_gib']} GiB")


def _peak() -> Check:
    from harness import timing

    kept = timing.prepare_process(None)["malloc_keeps_memory"]
    writable = os.access("/proc/self/clear_refs", os.W_OK)
    said = "peak memory by the kernel's high-water mark" if writable else "no peak memory"
    said += ", freed memory kept between calls" if kept else ", page faults are part of the times"
    return Check("CPU measuring", writable and bool(kept), said)


def _load() -> Check:
    cores = os.cpu_count() or 1
    load = os.getloadavg()[0]
    said = f"{load:.1f} on {cores} cores in the last minute"
    if load > 0.5:
        return Check("load", False, said, "stop what else runs: it disturbs timings on the CPU")
    return Check("load", True, said)


def _parquet() -> Check:
    found = installed_version("pyarrow")
    return Check("Parquet", found is not None, found or "not installed", "pip install pyarrow")


def _datasets() -> Check:
    found = installed_version("datasets")
    said = f"{found}: corpora hf:NAME" if found else "not installed: no corpora hf:NAME"
    return Check("datasets", found is not None, said, "pip install datasets")


CHECKS: dict[str, Callable[[], Check]] = {
    "Python": _python,
    "PyTorch": _torch,
    "CUDA": _cuda,
    "Triton": _triton,
    "Triton interpreter": _interpreter,
    "backends": _backends,
    "NVML": _nvml,
    "cores and memory": _memory,
    "CPU measuring": _peak,
    "load": _load,
    "Parquet": _parquet,
    "datasets": _datasets,
}


def as_json(checks: list[Check]) -> list[dict[str, Any]]:
    """The checks as plain dictionaries."""
    return [check._asdict() for check in checks]


def lines(checks: list[Check]) -> list[str]:
    """The checks for people, a line each."""
    width = max(len(check.name) for check in checks)
    said = []
    for check in checks:
        remedy = f" -> {check.remedy}" if check.remedy and not check.works else ""
        said.append(f"{'ok' if check.works else '--'}  {check.name:{width}}  {check.found}{remedy}")
    return said

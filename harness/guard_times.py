"""One number of a guarded cell in this process: the median of its calls, once it is known right.

Anchors are operations of PyTorch alone, a matrix product and a copy. Timed in turn with the cell,
they tell how fast the machine is just then: the ratio to the nearer of them carries over to another
day better than milliseconds do.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from harness import guards, timing
from harness.worker import WrongResultError

SECONDS = 0.25  # of samples for a cell
FEWEST_ROUNDS, MOST_ROUNDS = 5, 200
ANCHOR = {"cpu": 512, "cuda": 4096}  # width of the square matrix of the product
COPIED = {"cpu": 1 << 20, "cuda": 1 << 26}  # numbers


def measure(
    name: str,
    device: str,
    path: Path | None = None,
    tree: Path | None = None,
    *,
    anchors: bool,
    checked: bool,
    slowed: float = 0.0,
) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """Metrics time_ms and, with anchors, theirs; no samples.

    Args:
        name: of a cell of `harness.guards.names`.
        device: "cpu" or "cuda".
        path: a file of guards, or None.
        tree: as of `harness.guards.names`.
        anchors: time them in turn with the cell.
        checked: compare the result before and after the timing.
        slowed: share of its own time that every call is made longer by: what a check must find.

    Raises:
        WrongResultError: the cell does not return what it should.
        Exception: what the code that is guarded raises.
    """
    cell = guards.prepare(name, device, path, tree)
    _refuse(cell, checked)
    function = _slowed(cell.function, slowed, device) if slowed else cell.function
    functions: dict[str, Callable[[], Any]] = {"cell": function}
    if anchors:
        functions |= anchors_of(device)
    function()
    rounds = _rounds(function, device)
    seen = timing.measure_interleaved(functions, rounds=rounds, device=device)
    _refuse(cell, checked)
    return {f"{of}_ms": statistics.median(ms) for of, ms in seen.items()}, {}


def anchors_of(device: str) -> dict[str, Callable[[], Any]]:
    """The anchors: "matmul" is bound by arithmetic, "copy" by memory."""
    generator = torch.Generator(device).manual_seed(0)
    width = ANCHOR[device]
    a, b = (torch.randn(width, width, generator=generator, device=device) for _ in range(2))
    source = torch.randn(COPIED[device], generator=generator, device=device)
    target = torch.empty_like(source)
    return {"matmul": lambda: a @ b, "copy": lambda: target.copy_(source)}


def _refuse(cell: guards.Prepared, checked: bool) -> None:
    if checked and (fault := cell.fault()) is not None:
        raise WrongResultError(fault)


def _rounds(function: Callable[[], Any], device: str) -> int:
    """How many calls fill `SECONDS`."""
    start = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    taken = time.perf_counter() - start
    return min(max(FEWEST_ROUNDS, int(SECONDS / taken)), MOST_ROUNDS)


def _slowed(function: Callable[[], Any], share: float, device: str) -> Callable[[], Any]:
    """The same, longer by a share of its time: CPU by spinning, CUDA by a kernel that waits."""
    if device == "cpu":

        def slow() -> Any:
            start = time.perf_counter()
            result = function()
            until = time.perf_counter() + share * (time.perf_counter() - start)
            while time.perf_counter() < until:
                pass
            return result

        return slow
    cycles = int(share * _ms(function) / _ms(lambda: torch.cuda._sleep(1_000_000)) * 1_000_000)

    def slow_on_gpu() -> Any:
        result = function()
        torch.cuda._sleep(cycles)
        return result

    return slow_on_gpu


def _ms(function: Callable[[], Any]) -> float:
    """Median milliseconds of a call on the GPU."""
    samples = timing.measure_interleaved({"it": function}, rounds=FEWEST_ROUNDS, device="cuda")
    return statistics.median(samples["it"])

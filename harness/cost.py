"""`seqscale cost`: what the cells of a sweep cost in time and memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.record import Case, Measurement, RunDirectory
from harness.run import Settings, into
from harness.worker import WrongResultError

if TYPE_CHECKING:
    import pandas as pd

    from harness.plans import Plans
    from harness.sweep import Grid

CEILING_RETRIES = 6  # before a time is called faster than possible
Metrics = dict[str, Any]
Samples = dict[str, list[float]]


def run(
    sweep: str | Path | Sequence[Grid] | Sequence[Case],
    out: Path | str = "runs/cost",
    *,
    device: str = "auto",
    threads: int | None = None,
    time_limit_s: float = 600.0,
    energy: bool = False,
    peers: str | Sequence[str] = (),
    on_open: Callable[[RunDirectory], None] = lambda directory: None,
    on_start: Callable[[Case], None] = lambda case: None,
    on_finish: Callable[[Measurement, bool], None] = lambda measurement, known: None,
) -> pd.DataFrame:
    """Measure every cell that `out` does not hold yet; one row a cell, all cells of `out`.

    Args:
        sweep: name of a preset, path of a TOML file, grids, or cells of `harness.sweep.cells`.
        out: run directory; records go to `out`/records, the table to `out`/cells.csv.
        device: "cpu", "cuda", or "auto": an NVIDIA GPU where there is one.
        threads: CPU threads for PyTorch; default: as it is.
        time_limit_s: for one cell; one that takes longer is recorded as "timeout".
        energy: measure energy too (GPU only, 2 s longer a cell; not in a comparison).
        peers: names of libraries' implementations, or "all": each operation is measured side by
            side with itself and with those that can be imported here (`harness.versus.joined`
            says which cannot).
        on_open: called once with the opened run directory.
        on_start: called before each cell that is measured.
        on_finish: called for each cell with its measurement, and whether it was there before.

    Raises:
        ValueError: something in the sweep does not exist, or a number cannot be.
        DirectoryInUseError: another sweep writes into `out`.
        OSError: `out` cannot be written.
        WorkerFailedError: no process that measures can be started.
    """
    from harness import versus
    from harness.sweep import as_cells, resolve_device

    device = resolve_device(device)
    cells, _ = versus.joined(as_cells(sweep, device), peers, device)
    settings = Settings(device, threads, time_limit_s, energy)
    return into(Path(out), cells, settings, on_open, on_start=on_start, on_finish=on_finish)


def measure(
    case: Case,
    device: str,
    ceilings: Mapping[str, float],
    *,
    energy: bool = False,
    plans: Plans | None = None,
) -> tuple[Metrics, Samples]:
    """Metrics and samples of one cell, measured in this process.

    Args:
        case: what is asked.
        device: "cpu" or "cuda".
        ceilings: the device's, of `harness.ceilings`.
        energy: measure energy too.
        plans: takes what the operations' plans chose, also where the cell then fails.

    Raises:
        BackendUnavailableError: the backend cannot run here, or only in Triton's interpreter.
        WrongResultError: the result differs from the reference.
        FasterThanRooflineError: the time is below what the device can do.
        NotImplementedError: there is no such cell.
    """
    from harness.plans import recorded

    refuse_interpreter(case)
    plans = {} if plans is None else plans
    from harness import timing
    from harness.workload import ALLOWED_ERROR, build

    allowed = ALLOWED_ERROR[case.dtype]
    with recorded(plans):  # of a backward pass the forward pass plans, while it is built
        workload = build(case, device)
        compile_ms = timing.first_call_ms(workload.function, device)  # the check warms it up
    before = checked(workload.check(), allowed)
    metrics, samples = timing.observe(workload.function, device=device, energy=energy)
    after = checked(workload.check(), allowed)
    error = max(before, after)
    metrics |= {**workload.counted, "compile_ms": compile_ms, "relative_error": error}
    metrics["roofline_fraction"] = attainment(case, metrics, device, ceilings)
    return metrics, samples


def refuse_interpreter(case: Case) -> None:
    """Raise for a cell whose kernels Triton's interpreter would run.

    Raises:
        BackendUnavailableError: it would.
    """
    from archs.ops import BackendUnavailableError, interpreted
    from harness.peers import PEERS

    peer = PEERS.get(case.implementation)
    in_triton = case.backend == "triton" or (peer is not None and peer.in_triton)
    if in_triton and interpreted():
        raise BackendUnavailableError(
            "times in Triton's interpreter mean nothing: unset TRITON_INTERPRET"
        )


def attainment(case: Case, metrics: Metrics, device: str, measured: Mapping[str, float]) -> float:
    """The lower bound of a cell's time over its time.

    Before a time is called impossible, the ceilings are measured again some times: others' load
    lowers them, and a cell may have run in a better moment than they did.

    Raises:
        FasterThanRooflineError: the time is below its bound by the best of these ceilings too.
    """
    from harness import ceilings

    def fraction(rates: Mapping[str, float]) -> float:
        return ceilings.check_roofline(
            metrics["time_ms_p50"],
            flops=metrics["work_flops"],
            floor_bytes=metrics["floor_bytes"],
            dtype=case.dtype,
            ceilings=rates,
            cache_bytes=ceilings.cache_bytes(device),
        )

    best = dict(measured)
    for _ in range(CEILING_RETRIES):
        try:
            return fraction(best)
        except ceilings.FasterThanRooflineError:
            now = ceilings.measure(device, [case.dtype])
            best |= {name: max(rate, best.get(name, 0)) for name, rate in now.items()}
    return fraction(best)


def checked(error: float, allowed: float) -> float:
    """The error of a result, if it is one that is allowed.

    Raises:
        WrongResultError: it is not.
    """
    if not error <= allowed:  # NaN is wrong too
        raise WrongResultError(f"relative error {error:.1e} against the reference, not {allowed:g}")
    return error

"""Ours beside libraries': cells that differ in implementation alone, measured in one process.

Every round runs each of them once, in random order, so that whatever the machine does meets all
alike; ratios are paired by round. Ours takes part twice: what the second run's ratio to the first
strays from 1 is the noise.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from harness.record import AGAIN, OURS, Case
from harness.sweep import operations, unknown
from harness.worker import attempt

if TYPE_CHECKING:
    import pandas as pd
    from rich.table import Table

    from harness.plans import Plans
    from harness.workload import Workload

ALL = "all"  # every peer
LEAST_MARGIN = 0.01  # of a ratio from 1 that means anything
NOISES = 2  # margin over the noise of ours against ours
Metrics = dict[str, Any]


def joined(
    cells: Sequence[Case], names: str | Sequence[str], device: str
) -> tuple[list[Case], dict[str, str]]:
    """The cells, each of an operation of ours followed by itself once more and by its peers.

    Args:
        cells: of a sweep.
        names: of peers, or "all"; with none the cells stay as they are.
        device: "cpu" or "cuda".

    Returns:
        The cells; and of each peer left out, since it cannot run here, the reason.

    Raises:
        ValueError: there is no such peer, or no cell that it could be measured beside.
    """
    if not names:
        return list(cells), {}
    from harness.peers import PEERS

    names = [names] if isinstance(names, str) else list(names)
    for name in names:
        if name not in (ALL, *PEERS):
            raise ValueError(unknown("peer", name, [ALL, *PEERS]))
    asked = [peer for name, peer in PEERS.items() if ALL in names or name in names]
    concerned = {op for case in cells for op in _compared_operations(case)}
    for name in names:
        if not concerned or (name != ALL and PEERS[name].op not in concerned):
            what = "an operation" if name == ALL else PEERS[name].op
            raise ValueError(f"peers {name}: the sweep has no cell of {what} at level op")
    found = {p.name: p.unavailable(device) for p in asked if p.op in concerned}
    left_out = {name: reason for name, reason in found.items() if reason is not None}
    together: list[Case] = []
    for case in cells:
        together.append(case)
        if ops := _compared_operations(case):
            theirs = [
                peer.name
                for peer in asked
                if peer.op in ops
                and peer.name not in left_out
                and (peer.has_step or case.phase != "decode")
            ]
            together += [replace(case, implementation=name) for name in (AGAIN, *theirs)]
    return list({case.key: case for case in together}.values()), left_out


def _compared_operations(case: Case) -> set[str]:
    """The operation of a cell that peers can join; none but for an operation of ours."""
    if case.level != "op" or case.implementation != OURS or case.backend == "reference":
        return set()
    return operations(case.arch)


def groups(cells: Iterable[Case]) -> list[list[Case]]:
    """The cells in order, those of a comparison together, the others each alone.

    A comparison are all cells that differ in implementation alone, where ours again is among them.
    """
    alike: dict[str, list[Case]] = {}
    for case in cells:
        alike.setdefault(replace(case, implementation=OURS).key, []).append(case)
    found = []
    for group in alike.values():
        compared = any(case.implementation == AGAIN for case in group)
        found += [group] if compared else [[case] for case in group]
    return found


@dataclass(frozen=True, kw_only=True)
class _Entrant:
    """A cell that was right and is ready to be timed."""

    case: Case
    workload: Workload
    error: float  # of the check before
    metrics: Metrics


def measure(
    cases: Sequence[Case], device: str, ceilings: Mapping[str, float]
) -> list[dict[str, Any]]:
    """What came of each cell of a comparison, as `harness.worker.attempt` says it, and its plans.

    One that is wrong, unsupported or out of memory, or raises, leaves the others to go on. Those
    that are measured have ratio_to_ours with its interval ratio_low, ratio_high, and a verdict.

    Raises:
        Exception: the process can do no more: a kernel left the device in an error, say, or one
            cell failed while all of them were timed.
    """
    from harness import timing

    results: dict[str, dict[str, Any]] = {}
    plans: dict[str, Plans] = {case.key: {} for case in cases}
    entrants: list[_Entrant] = []
    for case in cases:

        def enter(case: Case = case) -> tuple[Metrics, dict]:
            entrants.append(_enter(case, device, plans[case.key]))
            return {}, {}

        results[case.key] = attempt(enter)
        _settle(device)
    functions = {entrant.case.key: entrant.workload.function for entrant in entrants}
    if functions:
        rounds = timing.affordable_rounds(functions, device)
        seen = timing.observe_interleaved(functions, rounds=rounds, device=device)
        for entrant in entrants:
            key = entrant.case.key
            results[key] = attempt(lambda e=entrant, o=seen[key]: _leave(e, o, device, ceilings))
    _add_ratios({case.implementation: results[case.key] for case in cases})
    return [{**results[case.key], "plans": plans[case.key]} for case in cases]


def _enter(case: Case, device: str, plans: Plans) -> _Entrant:
    """Build, warm up and check one cell, and take its peak memory and its `plans`.

    Raises:
        BackendUnavailableError: the backend cannot run here, or only in Triton's interpreter.
        WrongResultError: the result differs from the reference.
    """
    from harness import cost, memory, timing
    from harness.plans import recorded
    from harness.workload import ALLOWED_ERROR, build

    cost.refuse_interpreter(case)
    with recorded(plans):
        workload = build(case, device)
        compile_ms = timing.first_call_ms(workload.function, device)
    error = cost.checked(workload.check(), ALLOWED_ERROR[case.dtype])
    peak = memory.peak(workload.function, device)
    metrics = {
        "compile_ms": compile_ms,
        "peak_bytes": peak.bytes,
        "peak_source": peak.source,
        "energy_mj_per_call": None,
        "energy_note": "not measured side by side",
    }
    return _Entrant(case=case, workload=workload, error=error, metrics=metrics)


def _leave(
    entrant: _Entrant, observation: Any, device: str, ceilings: Mapping[str, float]
) -> tuple[Metrics, dict[str, list[float]]]:
    """Check a timed cell once more; its metrics and samples, of which number i is round i.

    Raises:
        WrongResultError: the result differs from the reference by now.
        FasterThanRooflineError: the time is below what the device can do.
    """
    from harness import cost
    from harness.workload import ALLOWED_ERROR

    case, workload = entrant.case, entrant.workload
    after = cost.checked(workload.check(), ALLOWED_ERROR[case.dtype])
    metrics = {**entrant.metrics, **observation.metrics, **workload.counted}
    metrics["relative_error"] = max(entrant.error, after)
    metrics["roofline_fraction"] = cost.attainment(case, metrics, device, ceilings)
    return metrics, observation.samples


def _settle(device: str) -> None:
    """Wait for the device, and give back what a failed cell held; raises what a kernel left."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def _add_ratios(results: Mapping[str, dict[str, Any]]) -> None:
    """To the metrics of those measured beside ours: their time over ours, and a verdict."""
    from harness.timing import speedup

    timed = {name: found for name, found in results.items() if found["status"] == "ok"}
    if OURS not in timed:
        return
    ours = timed.pop(OURS)["samples"]["time_ms"]
    ratios = {name: speedup(ours, found["samples"]["time_ms"]) for name, found in timed.items()}
    for name, ratio in ratios.items():
        timed[name]["metrics"] |= {
            "ratio_to_ours": ratio.estimate,
            "ratio_low": ratio.low,
            "ratio_high": ratio.high,
        }
        if name != AGAIN and AGAIN in ratios:
            noise = noise_of(ratios[AGAIN].low, ratios[AGAIN].high)
            timed[name]["metrics"]["verdict"] = verdict(ratio.low, ratio.high, noise)


def noise_of(low: float, high: float) -> float:
    """How far the interval of ours again over ours reaches from 1."""
    return max(high - 1, 1 - low)


def verdict(low: float, high: float, noise: float) -> str:
    """Where ours stands, "ahead", "level" or "behind", by the interval of theirs over ours.

    Args:
        low: lower end of the interval of the ratio.
        high: its upper end.
        noise: `noise_of` ours again over ours.
    """
    margin = 1 + max(LEAST_MARGIN, NOISES * noise)
    if low > margin:
        return "ahead"
    return "behind" if high < 1 / margin else "level"


# Cells of one table; its sections are the comparisons.
TABLE = ("arch", "phase", "size", "dtype", "backend")
COLUMNS = (
    "ms",
    "of roofline",
    "peak, MiB",
    "theirs / ours",
    "95 % interval",
    "ours is",
)


def tables(cells: pd.DataFrame) -> list[Table]:
    """A table for each operation and phase of the cells that were measured side by side."""
    compared = cells[cells["comparison"].notna()]
    return [
        _table("{} op {}, {}, {}, {}".format(*common), part)
        for common, part in compared.groupby(list(TABLE), sort=False)
    ]


def _table(title: str, part: pd.DataFrame) -> Table:
    """Ours and ours again first, then the others, the fastest first, in every comparison."""
    from rich.table import Table

    table = Table(title=f"{title}: side by side")
    for name in ("shape", "implementation", *COLUMNS):
        table.add_column(name, justify="left" if name in ("implementation", "ours is") else "right")
    for _, group in part.groupby("comparison", sort=False):
        rank = group["implementation"].map({OURS: 0, AGAIN: 1}).fillna(2)
        rows = group.assign(rank=rank).sort_values(["rank", "time_ms_p50"]).to_dict("records")
        for i, row in enumerate(rows):
            shape = _shape(row) if i == 0 else ""
            last = i == len(rows) - 1
            table.add_row(shape, row["implementation"], *_row(row), end_section=last)
    return table


def _shape(row: Mapping[Hashable, Any]) -> str:
    decode = row["phase"] == "decode"
    place = f"at {row['position']:,.0f}" if decode else f"T {row['seq_len']:,.0f}"
    again = f" #{row['replicate']}" if row["replicate"] else ""
    return f"B {row['batch']:,} {place}{again}"


def _row(row: Mapping[Hashable, Any]) -> list[str]:
    """The cells under COLUMNS: a status where there is no time."""
    from harness.report import mebibytes, number

    if row["status"] != "ok":
        return [row["status"]]
    shown = [
        number(row["time_ms_p50"]),
        f"{row['roofline_fraction']:.1%}",
        mebibytes(row["peak_bytes"]),
    ]
    low, high = row.get("ratio_low", math.nan), row.get("ratio_high", math.nan)
    if math.isnan(low):  # ours itself, or beside an ours that was not measured
        return shown
    shown += [f"{row['ratio_to_ours']:.3f}", f"{low:.3f} … {high:.3f}"]
    if row["implementation"] == AGAIN:
        return [*shown, f"(noise {noise_of(low, high):.1%})"]
    found = row.get("verdict")  # none where ours again was not measured
    return [*shown, found if isinstance(found, str) else "-"]

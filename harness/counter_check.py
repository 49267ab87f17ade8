"""Kernels against committed counts: nothing is timed, so nothing is noise, and any growth counts.

What `harness.counters` counts (bytes, dots, exponentials, launches) and compiles (registers,
spills, shared memory, tensor-core instructions) is compared cell by cell with a file of
`seqscale counters --json`, made with the same versions.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from harness import counters
from harness.baseline import BaselineError, read_document
from harness.judged import Report, Row, worst_first
from harness.verdicts import Verdict
from harness.worker import one_line

OURS = ("triton", "torch")
LEAST_GROWTH = 0.01
Document = Mapping[str, Any]
Amounts = dict[str, float]

COUNTED = (
    "launches", "operation_calls", "unique_bytes", "requested_bytes", "sector_bytes",
)  # fmt: skip
COMPILED = ("registers", "spills", "spills_in_loops", "stack_bytes", "shared_bytes")
# Instructions of the tensor cores, newest first; the newest of a kernel must not become fewer.
TENSOR_CORES = ("UTCHMMA", "HGMMA", "HMMA")
MOST = 1e18  # of anything that is counted


def check(
    path: Path,
    ops: Sequence[str] = counters.OPS,
    *,
    archs: Sequence[int] = counters.ARCHS,
    on_finish: Callable[[str], None] = lambda job: None,
) -> Report:
    """Count and compile our operations, and compare with a committed document.

    Args:
        path: a file of `seqscale counters --json`, or a folder with one for each Triton,
            as `triton-3.7.1.json`.
        ops: names in `counters.OPS`.
        archs: of `counters.ARCHS`.
        on_finish: called with what was just counted.

    Raises:
        BaselineError: there is no such file, it is none, or it is of other versions.
        ValueError, CountingFailedError: as `counters.count`.
    """
    old = _load(path)
    new = counters.count(ops, archs=archs, implementations=OURS, on_finish=on_finish)
    return compare(old, new, ops, archs)


def compare(old: Document, new: Document, ops: Sequence[str], archs: Sequence[int]) -> Report:
    """Two documents of the same versions.

    Raises:
        BaselineError: their versions differ.
    """
    if old["versions"] != new["versions"]:
        raise BaselineError(
            f"the baseline is of {_said(old['versions'])}, here are {_said(new['versions'])}: "
            "what compilers make is not compared across them"
        )
    try:
        before = _cells(old, ops, archs)
    except (KeyError, TypeError, AttributeError) as error:
        raise BaselineError(f"the baseline is only part of one: {error!r}") from None
    after = _cells(new, ops, archs)
    wrong = _faults(new)
    rows = [_row(name, before.get(name), after.get(name), wrong) for name in {**before, **after}]
    failed = [
        Row(name=name, verdict=Verdict.FAILED, why=why)
        for name, why in wrong.items()
        if name not in after and name not in before
    ]
    return Report(f"counted, with {_said(new['versions'])}", worst_first([*rows, *failed]))


def _load(path: Path) -> Document:
    from harness.environment import installed_version

    if path.is_dir():
        path = path / f"triton-{installed_version('triton')}.json"
    found = read_document(
        path,
        missing=f"there is no {path}: seqscale counters --json > {path} makes it",
        damaged="holds no counts",
    )
    kinds = {"traffic": list, "compiled": list, "versions": dict}
    if any(not isinstance(found.get(name), kind) for name, kind in kinds.items()):
        raise BaselineError(f"{path} holds no counts of seqscale counters --json")
    for name in ("traffic", "compiled"):
        if not found[name]:
            raise BaselineError(f"{path} holds no {name}: seqscale counters --json makes it whole")
    return found


def _cells(document: Document, ops: Sequence[str], archs: Sequence[int]) -> dict[str, Amounts]:
    """The amounts of every pass, and of every kernel on every GPU, by name."""
    found: dict[str, Amounts] = {}
    for row in document["traffic"]:
        if row["op"] in ops and row["implementation"] in OURS:
            found[f"{_named(row)} {row['phase']}"] = _counted(row)
    times: dict[str, int] = defaultdict(int)
    for row in document["compiled"]:
        if row["op"] in ops and row["implementation"] in OURS and row["arch"] in archs:
            name = f"{_named(row)} {row['kernel']} sm_{row['arch']}"
            times[name] += 1
            found[f"{name} #{times[name]}"] = _compiled(row)
    return found


def _named(row: Document) -> str:
    return f"{row['op']} {row['implementation']} ({row['shape']})"


def _counted(row: Document) -> Amounts:
    amounts: Amounts = {name: row[name] for name in COUNTED}
    amounts["operations' FLOPs"] = sum(operation["flops"] for operation in row["operations"])
    for kernel in row["kernels"]:
        for name in ("exponentials", "atomics"):
            amounts[name] = amounts.get(name, 0) + kernel[name]
        for operands, flops in kernel["dot_flops"].items():
            amounts[f"{operands} dot FLOPs"] = amounts.get(f"{operands} dot FLOPs", 0) + flops
    return amounts


def _compiled(row: Document) -> Amounts:
    opcodes = {name: row["opcodes"][name] for name in TENSOR_CORES}
    return {**{name: row[name] for name in COMPILED}, **opcodes}


def _faults(document: Document) -> dict[str, str]:
    """Why passes are wrong, and calls failed, by name."""
    wrong = {
        f"{_named(row)} {row['phase']}": f"the result is wrong: error {row['relative_error']}"
        for row in document["traffic"]
        if row["implementation"] in OURS and counters.is_wrong(row)
    }
    failed = {
        _named(row): row["reason"]
        for row in document["left_out"]
        if row["failed"] and row["implementation"] in OURS
    }
    return {**wrong, **failed}


def _row(name: str, old: Amounts | None, new: Amounts | None, wrong: Mapping[str, str]) -> Row:
    if name in wrong:
        return Row(name=name, verdict=Verdict.FAILED, why=wrong[name])
    if new is None:
        return Row(
            name=name, verdict=Verdict.MISSING, why="the baseline has it, and now it is gone"
        )
    if old is None:
        return Row(name=name, verdict=Verdict.NEW, why="the baseline has it not")
    for amount, value in old.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= MOST:
            why = f"the baseline has {one_line(repr(value), 40)} {amount}"
            return Row(name=name, verdict=Verdict.FAILED, why=why)
    worse, better = [], []
    for amount in {**old, **new}:
        before, after = old.get(amount, 0), new.get(amount, 0)
        if abs(after - before) > LEAST_GROWTH * before and amount not in TENSOR_CORES:
            (worse if after > before else better).append(_moved(amount, before, after))
    newest = next((name for name in TENSOR_CORES if old.get(name) or new.get(name)), None)
    if newest is not None and old.get(newest) != new.get(newest):
        before, after = old.get(newest, 0), new.get(newest, 0)
        (worse if after < before else better).append(_moved(newest, before, after))
    verdict = Verdict.SAME
    if worse or better:
        verdict = Verdict.REGRESSION if worse else Verdict.IMPROVEMENT
    return Row(name=name, verdict=verdict, why="; ".join(worse + better))


def _moved(amount: str, before: float, after: float) -> str:
    return f"{amount} {before:,.0f} -> {after:,.0f}"


def _said(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))

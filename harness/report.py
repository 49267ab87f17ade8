"""Tables of what a run directory holds."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich.table import Table

from harness import record
from harness.environment import FOREIGN_LOAD
from harness.fit import local_exponents
from harness.record import AGAIN, OURS
from harness.sweep import CHOICES, in_order

# What tables and figures read of a cost cell.
METRICS = ("time_ms_p20", "time_ms_p50", "time_ms_p80", "peak_bytes", "state_bytes")
# Cells that differ in one of these are never on one curve.
CURVE = ("level", "phase", "size", "dtype", "backend", "implementation", "device", "threads")


def frame(source: Path) -> pd.DataFrame:
    """All cells of a run directory or packed file, one row each, by menu and length.

    The column stable says whether the device kept its speed from start to end of the sweep that
    measured the cell: null where the sweep did not end.
    """
    table = pd.DataFrame(record.rows(source))
    if table.empty:
        return table
    for metric in {*METRICS} - {*table.columns}:  # no cell reached it
        table[metric] = math.nan
    if source.is_dir():
        table["stable"] = table["session"].map(stability(source))
    implementations = [OURS, AGAIN, *sorted({*table["implementation"]} - {OURS, AGAIN})]
    ranks = {**CHOICES, "arch": in_order(table["arch"]), "implementation": implementations}

    def rank(column: pd.Series) -> pd.Series:
        return column.map(ranks[name].index) if (name := str(column.name)) in ranks else column

    order = ["kind", "level", "phase", "size", "dtype", "backend", "arch", "seq_len", "position"]
    order += ["batch", "replicate", "implementation"]
    return table.sort_values(order, key=rank, ignore_index=True)


def stability(source: Path) -> dict[str, bool]:
    """For each finished session of a run directory: did its ceilings stay where they were?"""
    found = {}
    for path in (source / "sessions").glob("*.json"):
        with contextlib.suppress(OSError, ValueError):  # a damaged one says nothing
            session = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(session, dict) and isinstance(session.get("stable"), bool):
                found[path.stem] = session["stable"]
    return found


def documents(table: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows as plain dictionaries for JSON: null where a cell has no such value."""
    return json.loads(table.to_json(orient="records"))


def notes(table: pd.DataFrame) -> list[str]:
    """What a reader of the tables must know: broken, disturbed and unstable cells."""
    said = []
    for status, part in table[table["status"] != "ok"].groupby("status"):
        reason = str(part["reason"].iloc[0])
        said.append(f"{len(part)} {status}: {reason}" + (" (the first)" if len(part) > 1 else ""))
    if count := int(disturbed(table).sum()):
        said.append(f"{_cells(count)} timed while other processes used the CPU (foreign_load)")
    if count := int((table["stable"] == False).sum()):  # noqa: E712 (null is neither)
        said.append(
            f"{_cells(count)} from a sweep whose device did not keep its speed from start to "
            "end (stable = False; figures in sessions/)"
        )
    return said


def _cells(count: int) -> str:
    return "1 cell was" if count == 1 else f"{count} cells were"


def disturbed(cells: pd.DataFrame) -> pd.Series:
    """Which cells others disturbed."""
    if "foreign_load" not in cells:
        return pd.Series(data=False, index=cells.index)
    return cells["foreign_load"] > FOREIGN_LOAD


def curves(cells: pd.DataFrame) -> Iterator[tuple[dict[str, Any], pd.DataFrame]]:
    """The cost cells that belong on one set of axes, with what they have in common.

    Besides `CURVE` that is the batch, or the number of tokens B * T where the batch varies: a
    constant token budget.
    """
    cost = cells[(cells["kind"] == "cost") & (cells["implementation"] != AGAIN)]
    for values, part in cost.groupby(list(CURVE), sort=False, dropna=False):
        common = dict(zip(CURVE, values, strict=True))
        for batch, same in schemes(part):
            yield {**common, "batch": batch}, same


def schemes(part: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """Cells by token budget or by batch, whichever makes the longest curve, as often as it takes.

    A directory may hold several of both.
    """
    while len(part):
        tokens = part["batch"] * part["seq_len"]
        found = []
        for batch, same in part.groupby("batch"):
            lengths = same[["seq_len", "position"]].drop_duplicates()
            found.append((len(lengths), False, -float(str(batch)), same))
        for budget, same in part.groupby(tokens):
            if same["batch"].nunique() > 1:
                found.append((same["seq_len"].nunique(), True, float(str(budget)), same))
        _, is_budget, number, same = max(found, key=lambda one: one[:3])
        yield f"B·T = {number:,.0f}" if is_budget else f"B = {-number:.0f}", same
        part = part.drop(same.index)


def tables(cells: pd.DataFrame) -> list[Table]:
    """The summary for a terminal: a table a curve, then the training runs.

    What was measured side by side has tables of its own: `harness.versus.tables`.
    """
    from harness import learned, learned_tables  # which read what is above

    found = []
    for common, part in curves(cells[cells["comparison"].isna()]):
        along = "position" if common["phase"] == "decode" else "seq_len"
        what = "{level} {phase}, {size}, {batch}, {dtype}, {backend}".format(**common)
        if common["implementation"] != OURS:
            what += f", {common['implementation']}"
        found.append(_growth_table(what, part, along))
    return found + learned_tables.tables(learned.studies(cells))


def _growth_table(title: str, part: pd.DataFrame, along: str) -> Table:
    """Time a sequence with the local exponent up to it, peak memory and state, by length.

    Replicates are shown by their median, times by the geometric mean of the processes.
    """
    lengths = sorted(part[along].unique())
    table = Table(title=f"{title}: by {'position' if along == 'position' else 'length T'}")
    table.add_column("architecture")
    table.add_column("quantity")
    for length in lengths:
        table.add_column(f"{int(length):,}", justify="right")
    for arch in in_order(part["arch"].unique()):
        mine = part[part["arch"] == arch]
        groups = mine.groupby(along)
        numbers = groups[["batch", "peak_bytes", "state_bytes"]].median()
        logs = mine.assign(log=np.log(mine["time_ms_p50"].astype(float))).groupby(along)["log"]
        numbers["time_ms_p50"] = np.exp(logs.mean())
        numbers = numbers.astype(float).reindex(lengths)
        failed = mine[mine["status"] != "ok"].groupby(along)["status"].first().to_dict()
        times = numbers["time_ms_p50"] / numbers["batch"]
        shown = [
            str(failed[length]) if length in failed else number(time)
            for length, time in zip(lengths, times, strict=True)
        ]
        table.add_row(arch, "ms a token" if along == "position" else "ms a sequence", *shown)
        table.add_row("", "local exponent", *_exponent_cells(lengths, times.tolist()))
        table.add_row("", "peak memory (batch), MiB", *map(mebibytes, numbers["peak_bytes"]))
        state = numbers["state_bytes"] / numbers["batch"]
        table.add_row("", "state a sequence, MiB", *map(mebibytes, state), end_section=True)
    return table


def _exponent_cells(lengths: Sequence[float], times: Sequence[float]) -> list[str]:
    cells = [""]
    for i in range(1, len(lengths)):
        pair = times[i - 1 : i + 1]
        known = all(math.isfinite(t) for t in pair)
        slope = local_exponents(lengths[i - 1 : i + 1], pair)[0].value if known else math.nan
        cells.append(f"{slope:.2f}" if known else "-")
    return cells


def mebibytes(value: float) -> str:
    """A number of bytes in MiB, as `number` shows it."""
    return number(value / 2**20)


def number(value: float) -> str:
    """Three digits, and never an exponent for a large number; "-" where there is none."""
    if not math.isfinite(value):
        return "-"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"

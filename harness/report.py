"""Tables of what a run directory holds."""

import math
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from rich.table import Table

from harness import record
from harness.fit import local_exponents
from harness.sweep import CHOICES, in_order

# What tables and figures read of a cost cell.
METRICS = ("time_ms_p20", "time_ms_p50", "time_ms_p80", "peak_bytes", "state_bytes")


def frame(out: Path) -> pd.DataFrame:
    """All cells recorded under `out`, one row each, in the order of the menu and of length."""
    table = pd.DataFrame(record.rows(record.read(out)))
    if table.empty:
        return table
    for metric in {*METRICS} - {*table.columns}:  # no cell reached it
        table[metric] = math.nan
    ranks = {**CHOICES, "arch": in_order(table["arch"])}

    def rank(column: pd.Series) -> pd.Series:
        return column.map(ranks[name].index) if (name := str(column.name)) in ranks else column

    order = ["kind", "level", "phase", "size", "arch", "seq_len", "position"]
    return table.sort_values(order, key=rank, ignore_index=True)


def tables(cells: pd.DataFrame) -> list[Table]:
    """The summary for a terminal: a table a level and phase, then the training runs."""
    found = []
    cost = cells[cells["kind"] == "cost"]
    for (level, phase, size), part in cost.groupby(["level", "phase", "size"], sort=False):
        along = "position" if phase == "decode" else "seq_len"
        found.append(_growth_table(f"{level} {phase}, {size}", part, along))
    runs = cells[cells["kind"] == "loss"]
    if len(runs):
        found.append(_loss_table(runs))
    return found


def _growth_table(title: str, part: pd.DataFrame, along: str) -> Table:
    """Time a sequence with the local exponent up to it, peak memory and state, by length."""
    lengths = sorted(part[along].unique())
    table = Table(title=f"{title}: by {'position' if along == 'position' else 'length T'}")
    table.add_column("architecture")
    table.add_column("quantity")
    for length in lengths:
        table.add_column(f"{int(length):,}", justify="right")
    for arch in in_order(part["arch"].unique()):
        mine = part[part["arch"] == arch].set_index(along).reindex(lengths)
        times = mine["time_ms_p50"] / mine["batch"]
        shown = [
            _number(time) if status == "ok" else str(status)
            for time, status in zip(times, mine["status"], strict=True)
        ]
        table.add_row(arch, "ms a token" if along == "position" else "ms a sequence", *shown)
        table.add_row("", "local exponent", *_exponent_cells(lengths, times.tolist()))
        table.add_row("", "peak memory, MiB", *map(_mebibytes, mine["peak_bytes"]))
        table.add_row("", "state, MiB", *map(_mebibytes, mine["state_bytes"]), end_section=True)
    return table


def _exponent_cells(lengths: Sequence[float], times: Sequence[float]) -> list[str]:
    cells = [""]
    for i in range(1, len(lengths)):
        pair = times[i - 1 : i + 1]
        known = all(math.isfinite(t) for t in pair)
        cells.append(f"{local_exponents(lengths[i - 1 : i + 1], pair)[0]:.2f}" if known else "-")
    return cells


def _mebibytes(value: float) -> str:
    return _number(value / 2**20) if math.isfinite(value) else "-"


def _number(value: float) -> str:
    """Three digits, and never an exponent for a large number."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _loss_table(runs: pd.DataFrame) -> Table:
    table = Table(title="training on real bytes, bits a byte")
    for name in ("architecture", "parameters", "first step", "last step", "validation", "seconds"):
        table.add_column(name, justify="left" if name == "architecture" else "right")
    runs = runs.set_index("arch", drop=False).loc[in_order(runs["arch"])]
    for _, row in runs.iterrows():
        if row["status"] != "ok":
            table.add_row(row["arch"], row["status"])
            continue
        table.add_row(
            row["arch"],
            f"{row['params']:,.0f}",
            f"{row['train_loss_bits_per_byte_first']:.3f}",
            f"{row['train_loss_bits_per_byte_last']:.3f}",
            f"{row['val_loss_bits_per_byte']:.3f}",
            f"{row['train_s']:.1f}",
        )
    return table

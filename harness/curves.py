"""The curves of a run: what each architecture was measured to take, by length or position."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from harness import fit, record, report
from harness.laws import FEWEST, Array
from harness.points import Exponent, Points
from harness.sweep import in_order

# A curve ends where even one process ended so: the others' times would be those of the lucky.
ENDS = ("oom", "timeout")
JUDGED = 3  # processes from which on noise is known well enough for intervals and departures
# Columns of `Curve.cells` and the metrics behind them.
PER_SEQUENCE = {
    "flops": "work_flops",
    "bytes": "floor_bytes",
    "peak": "peak_bytes",
    "state": "state_bytes",
    "low": "time_ms_p20",
    "high": "time_ms_p80",
}


@dataclass(frozen=True)
class Curve:
    """One architecture on one set of axes; every list goes by length (decode: by position).

    Attributes:
        arch: its name.
        lengths: those that were measured.
        ms: time of a sequence (decode: of a token): a list of samples for each process.
        cells: by length, of a sequence: flops, bytes (the least that must be moved), peak and state
            in bytes; low and high: the 20th and 80th percentile of one process's samples, or the
            medians of the fastest and slowest process; disturbed: whether others used the CPU.
        censored: lengths without a time, and why: "oom", "timeout", "timeout (1 of 3)" …
        decides: "flops", or for decode "bytes": what is counted against the time.
    """

    arch: str
    lengths: list[float]
    ms: list[list[list[float]]]
    cells: pd.DataFrame
    censored: list[tuple[float, str]]
    decides: str

    @cached_property
    def points(self) -> Points:
        """The times in log space."""
        return Points(self.lengths, self.ms, fewest=1)

    @property
    def times(self) -> Array:
        """Milliseconds of a sequence (decode: of a token)."""
        return np.exp(self.points.centre)

    @property
    def fits(self) -> bool:
        """Whether there are lengths enough for a fit."""
        return len(self.lengths) >= FEWEST

    @property
    def judged(self) -> bool:
        """Whether processes enough measured every length."""
        return bool(self.lengths) and self.points.processes >= JUDGED

    @property
    def tail(self) -> Exponent:
        """The exponent of the time over the longer half of the lengths."""
        return self.points.exponent(self.points.tail)

    @property
    def counted(self) -> list[float]:
        """What should decide the time; empty where it is unknown."""
        return self.known(self.decides)

    def known(self, name: str) -> list[float]:
        """A column of `cells`; empty where a value is missing or zero."""
        values = self.cells[name]
        return values.tolist() if (values > 0).all() else []


@dataclass(frozen=True)
class Comparison:
    """The curves that belong on one set of axes.

    Attributes:
        common: what they have in common: `harness.report.CURVE`, and batch.
        along: "seq_len" or "position".
        curves: one an architecture that was measured, by menu.
        part: the rows of `harness.report.frame` behind them.
    """

    common: Mapping[str, Any]
    along: str
    curves: list[Curve]
    part: pd.DataFrame

    @property
    def title(self) -> str:
        """One line."""
        said = "{level} {phase}, {size}, {batch}, {dtype}, {backend}".format(**self.common)
        theirs = self.common["implementation"]
        return said if theirs == "ours" else f"{said}, {theirs}"

    @property
    def origin(self) -> str:
        """Device, versions and commit behind the curves, in one line."""
        return origin(self.part)

    @property
    def lengths(self) -> list[float]:
        """Every length of a curve, measured or not."""
        found = {n for curve in self.curves for n in curve.lengths}
        return sorted(found | {n for curve in self.curves for n, _ in curve.censored})

    @cached_property
    def crossovers(self) -> list[tuple[Curve, Curve, fit.Crossover]]:
        """Every two architectures with enough common lengths, and where they cross.

        The verdict is "not judged" under `JUDGED` processes: their noise is unknown.
        """
        found = []
        for a, b in combinations(self.curves, 2):
            lengths = [n for n in a.lengths if n in b.lengths]
            if len(lengths) < FEWEST:
                continue
            if not (a.judged and b.judged):
                found.append((a, b, fit.Crossover("not judged")))
            else:
                first, second = ([c.ms[c.lengths.index(n)] for n in lengths] for c in (a, b))
                found.append((a, b, fit.crossover(lengths, first, second)))
        return found


def origin(part: pd.DataFrame) -> str:
    """Device, versions and commit of some cells; several of one are all named."""
    commits = sorted({str(commit or "none")[:10] for commit in part["commit"]})
    dirty = " (uncommitted changes)" if (part["dirty"] == True).any() else ""  # noqa: E712
    threads = named(part, "threads")
    return (
        f"{named(part, 'device')}, {threads} {'thread' if threads == '1' else 'threads'} · "
        f"torch {named(part, 'torch')} · Python {named(part, 'python')} · "
        f"commit {', '.join(commits)}{dirty} · "
        f"seqscale {named(part, 'kind')}, seqscale plot"
    )


def named(part: pd.DataFrame, column: str) -> str:
    """The different values of a column."""
    if column not in part:
        return ""
    values = part[column].dropna()
    if pd.api.types.is_float_dtype(values):  # whole numbers beside nulls
        values = values.astype(int)
    return ", ".join(sorted(set(values.astype(str))))


def load(source: Path) -> list[Comparison]:
    """The comparisons of a run directory or packed file.

    Raises:
        FileNotFoundError: there is neither.
    """
    return comparisons(report.frame(source), record.load(source)[0])


def comparisons(
    cells: pd.DataFrame, measurements: Sequence[record.Measurement]
) -> list[Comparison]:
    """The comparisons of `harness.report.frame`, with the samples of the measurements behind it."""
    if cells.empty:
        return []
    samples = {m.case.key: m.samples.get("time_ms", []) for m in measurements}
    found = []
    for common, part in report.curves(cells):
        along = "position" if common["phase"] == "decode" else "seq_len"
        curves = [
            _curve(arch, part[part["arch"] == arch], along, samples)
            for arch in in_order(part["arch"])
        ]
        found.append(Comparison(common, along, curves, part))
    return found


def _curve(arch: str, mine: pd.DataFrame, along: str, samples: Mapping[str, list[float]]) -> Curve:
    lengths, ms, rows = [], [], []
    ends = mine[mine["status"].isin(ENDS)][along]
    measured = mine[(mine["status"] == "ok") & ~mine[along].isin(ends)]
    for length, cells in measured.groupby(along):
        batch = int(cells["batch"].iloc[0])
        times = [
            [value / batch for value in samples.get(key) or [median]]
            for key, median in zip(cells["key"], cells["time_ms_p50"], strict=True)
        ]
        row = {
            name: float(cells[metric].median()) / batch if metric in cells else np.nan
            for name, metric in PER_SEQUENCE.items()
        }
        if len(times) > 1:
            medians = [float(np.median(of_process)) for of_process in times]
            row.update(low=min(medians), high=max(medians))
        lengths.append(float(str(length)))
        ms.append(times)
        rows.append({**row, "disturbed": bool(report.disturbed(cells).any())})
    censored = [
        (float(str(length)), _why(cells["status"]))
        for length, cells in mine[~mine[along].isin(lengths)].groupby(along)
    ]
    return Curve(
        arch,
        lengths,
        ms,
        pd.DataFrame(rows, columns=pd.Index([*PER_SEQUENCE, "disturbed"])),
        censored,
        "bytes" if along == "position" else "flops",
    )


def _why(statuses: pd.Series) -> str:
    """Why a length has no time: the status of what failed, and of how many where not all did."""
    failed = statuses[statuses != "ok"]
    said = str(failed.iloc[0])
    return said if len(failed) == len(statuses) else f"{said} ({len(failed)} of {len(statuses)})"

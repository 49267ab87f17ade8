"""What the curves of a run say: how each architecture grows with length, and where two cross."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
from rich.table import Table

from harness import fit
from harness.curves import JUDGED, Comparison, Curve
from harness.laws import FEWEST, simplest

NAMES = {"transformer": "Transformer", "mamba2": "Mamba-2", "rwkv7": "RWKV-7", "hyena": "Hyena"}
MISFIT = 0.15  # root mean square of the log residuals from which on a law is said to miss
GROWTH = ("architecture", "counted", "measured", "tail exponent", "counted", "hardware departure")
CROSSOVERS = ("architectures", "crossover", "95 % interval", "faster beyond it")
# What a reader of the tables must know.
LEGEND = (
    f"counted: class of the FLOPs (decode: bytes) of a sequence. measured: of its time, by AICc; "
    f"'cannot separate': evidence ratio under 10. tail exponent: slope over the longer half of the "
    f"lengths, with its 95 % interval over processes (none under {JUDGED} processes), then that of "
    f"the count. hardware departure: where the slope of the time is not that of the count, beyond "
    f"noise and by more than {fit.DEPARTURE}."
)


def growth(found: Sequence[Comparison]) -> pd.DataFrame:
    """How each curve grows, one row each: counted and measured class, tail, departures, cliffs.

    Exponents of one or two processes come with an interval, too; it holds for these only.
    """
    return pd.DataFrame(
        [{**c.common, **_growth(curve)} for c in found for curve in c.curves if curve.lengths]
    )


def crossovers(found: Sequence[Comparison]) -> pd.DataFrame:
    """Where each pair of curves crosses, one row a pair; see `harness.fit.Crossover`."""
    rows = []
    for comparison in found:
        for a, b, where in comparison.crossovers:
            after = where.smaller_after
            faster = None if after is None else (a, b)[after].arch
            processes = min(a.points.processes, b.points.processes)
            row = {"a": a.arch, "b": b.arch, "processes": processes, **vars(where)}
            rows.append({**comparison.common, **row, "faster_after": faster})
    return pd.DataFrame(rows).drop(columns="smaller_after", errors="ignore")


def _growth(curve: Curve) -> dict[str, Any]:
    row: dict[str, Any] = {
        "arch": curve.arch,
        "lengths": len(curve.lengths),
        "first": curve.lengths[0],
        "last": curve.lengths[-1],
        "processes": curve.points.processes,
        "censored": ", ".join(f"{status} at {n:,.0f}" for n, status in curve.censored),
    }
    if not curve.fits:
        return {**row, "measured": f"no fit: {len(curve.lengths)} of {FEWEST} lengths"}
    laws = curve.points.growth()
    cliffs = fit.cliffs(curve.lengths, curve.ms)
    return {
        **row,
        "counted_flops": _counted_class(curve, "flops"),
        "counted_bytes": _counted_class(curve, "bytes"),
        "measured": laws.name,
        "evidence_ratio": laws.evidence_ratio,
        "misfit": laws.law.misfit,
        **{f"tail_{k}": v for k, v in vars(fit.tail_exponent(curve.lengths, curve.ms)).items()},
        "tail_counted": _tail(curve, curve.decides),
        "tail_memory": _tail(curve, "peak"),
        "departure": _departure(curve),
        "cliffs": ", ".join(f"{c.length:,.0f} (x {c.factor:.2f})" for c in cliffs),
    }


def _counted_class(curve: Curve, name: str) -> str | None:
    values = curve.cells[name]
    return simplest(curve.points.lengths, values.tolist()).name if (values > 0).all() else None


def _tail(curve: Curve, name: str) -> float | None:
    values = curve.cells[name]
    if not (values > 0).all():
        return None
    return fit.tail_exponent(curve.lengths, values.tolist()).value


def _departure(curve: Curve) -> str:
    """Where the measured exponent is not the counted one, the longest lengths first."""
    if not curve.counted:
        return "not counted"
    if not curve.judged:
        return f"not judged under {JUDGED} processes"
    runs = fit.departures(curve.lengths, curve.ms, curve.counted)
    said = [_run(run, curve) for run in reversed(runs)]
    more = [f"{len(said) - 2} more"] if len(said) > 2 else []
    return "; ".join(said[:2] + more) or "none"


def _run(run: fit.Departure, curve: Curve) -> str:
    where = f"{run.first:,.0f} to {run.last:,.0f}"
    if run.last == curve.lengths[-1]:
        where = f"from {run.first:,.0f}"
    elif run.first == curve.lengths[0]:
        where = f"to {run.last:,.0f}"
    return f"{where}: {run.measured:.2f}, counted {run.counted:.2f}"


def tables(found: Sequence[Comparison]) -> list[Table]:
    """The summary for a terminal."""
    made = []
    for comparison in found:
        for title, header, rows in _rows(comparison):
            table = Table(title=f"{comparison.title}: {title}", title_justify="left")
            for name in header:
                table.add_column(name, overflow="fold")
            for row in rows:
                table.add_row(*row)
            made.append(table)
    return made


def markdown(found: Sequence[Comparison]) -> str:
    """The summary as Markdown."""
    parts = [f"# How the times grow\n\n{LEGEND}\n"]
    for comparison in found:
        parts.append(f"## {comparison.title}\n\n{comparison.origin}\n")
        for _, header, rows in _rows(comparison):
            lines = [header, ["---"] * len(header), *rows]
            parts += [f"| {' | '.join(_escaped(cell) for cell in line)} |" for line in lines]
            parts.append("")
    return "\n".join(parts)


def _escaped(cell: str) -> str:
    return " ".join(cell.replace("|", "\\|").split())


def _rows(comparison: Comparison) -> list[tuple[str, tuple[str, ...], list[list[str]]]]:
    """Title, header and rows of a comparison's tables: growth and crossovers."""
    made = []
    if rows := [_growth_row(_growth(curve), curve) for curve in comparison.curves if curve.lengths]:
        along = "position" if comparison.along == "position" else "length T"
        made.append((f"growth with {along}", GROWTH, rows))
    if rows := [_crossover_row(a, b, where) for a, b, where in comparison.crossovers]:
        made.append(("crossovers", CROSSOVERS, rows))
    return made


def _growth_row(row: dict[str, Any], curve: Curve) -> list[str]:
    name = NAMES.get(curve.arch, curve.arch)
    censored = f" ({row['censored']})" if row["censored"] else ""
    if not curve.fits:
        return [name, "", row["measured"] + censored, "", "", ""]
    misses = f", off by {row['misfit']:.0%}" if row["misfit"] > MISFIT else ""
    tail = f"{row['tail_value']:.2f}"
    if curve.judged:
        tail += f" [{row['tail_low']:.2f}, {row['tail_high']:.2f}]"
    counted = row["tail_counted"]
    return [
        name,
        row[f"counted_{curve.decides}"] or "-",
        row["measured"] + misses + censored,
        tail,
        "-" if counted is None else f"{counted + 0:.2f}",
        row["departure"],
    ]


def _crossover_row(a: Curve, b: Curve, where: fit.Crossover) -> list[str]:
    names = [NAMES.get(curve.arch, curve.arch) for curve in (a, b)]
    faster = "" if where.smaller_after is None else names[where.smaller_after]
    if where.length is None or where.low is None or where.high is None:
        return [", ".join(names), where.verdict, "", faster and f"{faster} throughout"]
    length = f"{where.length:,.0f}" + (" (extrapolated)" if where.verdict != "in range" else "")
    sure = a.judged and b.judged
    return [
        ", ".join(names),
        length,
        f"{where.low:,.0f} to {where.high:,.0f}" if sure else f"none under {JUDGED} processes",
        faster,
    ]

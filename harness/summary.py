"""What the curves of a run say: how each architecture grows with length, and where two cross."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
from rich.table import Table

from harness import fit
from harness.curves import JUDGED, Comparison, Curve
from harness.laws import EVIDENCE, FEWEST, simplest

NAMES = {"transformer": "Transformer", "mamba2": "Mamba-2", "rwkv7": "RWKV-7", "hyena": "Hyena"}
MISFIT = 0.15  # root mean square of the log residuals from which on a law is said to miss
GROWTH = (
    "architecture",
    "counted",
    "measured",
    "tail exponent",
    "counted tail",
    "hardware departure",
)
CROSSOVERS = ("architectures", "crossover", "95 % interval", "faster beyond it")
# What a reader of the tables must know.
LEGEND = (
    "counted: class of the FLOPs (decode: bytes) of a sequence; c is a constant. measured: class "
    f"of the time, by AICc; 'cannot separate': evidence ratio under {EVIDENCE:.0f}; 'off by': how "
    "far the best law misses. tail exponent: slope over the longer half of the lengths, with its "
    f"95 % interval over processes (none under {JUDGED}); counted tail: that of the count. "
    "hardware departure: where the slope of the time is not that of the count, beyond noise and by "
    f"more than {fit.DEPARTURE}; cliff: a length off the law of its neighbours."
)


def growth(found: Sequence[Comparison]) -> pd.DataFrame:
    """How each curve grows, one row each: counted and measured class, tail, departures, cliffs.

    Exponents of one or two processes come with an interval, too; it holds for these only.
    """
    return pd.DataFrame([{**c.common, **_growth(curve)} for c in found for curve in c.curves])


def crossovers(found: Sequence[Comparison]) -> pd.DataFrame:
    """Where each pair of curves crosses, one row a pair; see `harness.fit.Crossover`."""
    rows = []
    for comparison in found:
        for a, b, where in comparison.crossovers:
            after = where.smaller_after
            faster = None if after is None else (a, b)[after].arch
            row = {"a": a.arch, "b": b.arch, **vars(where)}
            rows.append({**comparison.common, **row, "faster_after": faster})
    return pd.DataFrame(rows).drop(columns="smaller_after", errors="ignore")


def _growth(curve: Curve) -> dict[str, Any]:
    row: dict[str, Any] = {
        "arch": curve.arch,
        "lengths": len(curve.lengths),
        "first": min(curve.lengths, default=None),
        "last": max(curve.lengths, default=None),
        "processes": curve.points.processes if curve.lengths else 0,
        "censored": ", ".join(f"{status} at {n:,.0f}" for n, status in curve.censored),
    }
    if not curve.fits:
        short = f"no fit: {len(curve.lengths)} of {FEWEST} lengths"
        return {**row, "measured": short if curve.lengths else "no time"}
    laws = curve.points.growth()
    cliffs = fit.cliffs(curve.lengths, curve.ms) if curve.judged else []
    return {
        **row,
        "counted_flops": _counted_class(curve, "flops"),
        "counted_bytes": _counted_class(curve, "bytes"),
        "measured": laws.name,
        "evidence_ratio": laws.evidence_ratio,
        "misfit": laws.law.misfit,
        **{f"tail_{k}": v for k, v in vars(curve.tail).items()},
        "tail_counted": _tail(curve, curve.decides),
        "tail_memory": _tail(curve, "peak"),
        "departure": _departure(curve),
        "cliffs": ", ".join(f"{c.length:,.0f} (x {c.factor:.2f})" for c in cliffs),
    }


def _counted_class(curve: Curve, name: str) -> str | None:
    values = curve.known(name)
    return simplest(curve.points.lengths, values).name if values else None


def _tail(curve: Curve, name: str) -> float | None:
    values = curve.known(name)
    return fit.tail_exponent(curve.lengths, values).value if values else None


def _departure(curve: Curve) -> str:
    """Where the measured exponent is not the counted one, the longest lengths first."""
    if not curve.counted:
        return "not counted"
    if not curve.judged:
        return f"not judged under {JUDGED} processes"
    runs = fit.departures(curve.lengths, curve.ms, curve.counted)
    said = [_run(run, curve) for run in reversed(runs)]
    more = [f"{len(said) - 2} more"] if len(said) > 2 else []
    coarse = curve.tail.high is not None and curve.tail.high - curve.tail.value > fit.DEPARTURE
    return "; ".join(said[:2] + more) or ("none beyond noise" if coarse else "none")


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
    rows = [_growth_row(_growth(curve), curve) for curve in comparison.curves]
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
    counted = row["tail_counted"]
    tail = _exponent(row["tail_value"])
    if curve.judged:
        tail += f" [{_exponent(row['tail_low'])}, {_exponent(row['tail_high'])}]"
    cliffs = f"; cliff at {row['cliffs']}" if row["cliffs"] else ""
    return [
        name,
        row[f"counted_{curve.decides}"] or "-",
        row["measured"] + _doubts(row) + censored,
        tail,
        "-" if counted is None else _exponent(counted),
        row["departure"] + cliffs,
    ]


def _doubts(row: dict[str, Any]) -> str:
    """How sure the class is, where it is not."""
    count = row["processes"]
    said = "" if count >= JUDGED else f" ({count} process{'es' if count > 1 else ''})"
    if row["measured"].startswith("cannot separate"):
        said += f" (evidence ratio {row['evidence_ratio']:.1f})"
    return said + (f", off by {row['misfit']:.0%}" if row["misfit"] > MISFIT else "")


def _exponent(value: float) -> str:
    return f"{round(value, 2) + 0:.2f}"  # never -0.00


def _crossover_row(a: Curve, b: Curve, where: fit.Crossover) -> list[str]:
    names = [NAMES.get(curve.arch, curve.arch) for curve in (a, b)]
    faster = "" if where.smaller_after is None else names[where.smaller_after]
    if where.length is None or where.low is None or where.high is None:
        judged = "" if a.judged and b.judged else f" under {JUDGED} processes"
        at = "throughout" if where.verdict == "none in range" else "where it can be told"
        return [", ".join(names), where.verdict + judged, "", faster and f"{faster} {at}"]
    length = f"{where.length:,.0f}"
    if where.verdict == "extrapolated":
        length += " (extrapolated)"
    elif where.crossings > 1:
        length += f" (last of {where.crossings})"
    return [
        ", ".join(names),
        length,
        f"{where.low:,.0f} to {where.high:,.0f}",
        faster or "neither for sure",
    ]

"""The figures of a comparison: what each draws on its axes.

Colours are Okabe and Ito's, which colour-blind readers can tell apart; markers and dashes differ
too. Everything fits 6.9 inches, the text width of a two-column page.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from harness import fit
from harness.curves import Comparison, Curve
from harness.laws import LAWS, positive_terms
from harness.summary import NAMES

WIDTH = 6.9  # inches
HEIGHT = 3.6  # inches, of a figure with one row of panels
FURTHER_ROW = 2.2  # inches
LEGEND_BELOW = 0.144  # inches from the top: the title is above
SETTINGS: dict[Any, Any] = {
    "svg.hashsalt": "seqscale",
    "svg.fonttype": "none",
    "text.parse_math": False,  # a dollar in a name is a dollar
    "font.size": 8,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.handlelength": 3.2,
    "lines.markersize": 4.5,
    "lines.linewidth": 1.2,
}
STYLES: dict[str, dict[str, Any]] = {
    "transformer": {"color": "#D55E00", "marker": "o", "ls": "-"},
    "mamba2": {"color": "#0072B2", "marker": "s", "ls": "--"},
    "rwkv7": {"color": "#009E73", "marker": "^", "ls": "-."},
    "hyena": {"color": "#CC79A7", "marker": "D", "ls": (0, (5, 1, 1, 1, 1, 1))},
}
OTHER_STYLES: list[dict[str, Any]] = [
    {"color": "#000000", "marker": "v", "ls": (0, (8, 2))},
    {"color": "#56B4E9", "marker": "P", "ls": (0, (3, 1))},
    {"color": "#E69F00", "marker": "X", "ls": (0, (1, 1))},
    {"color": "#666666", "marker": "*", "ls": (0, (6, 1, 1, 1))},
]
MIB = 2**20


def time(comparison: Comparison) -> Figure:
    """Time a sequence with tails, reference slopes and crossovers; time a token."""
    figure, (left, right) = panels(2)
    for curve, style in _styled(comparison):
        _points(left, curve, style, curve.times, _tail_label(curve))
        _points(right, curve, style, 1e3 * curve.times / np.array(curve.lengths))
        if curve.fits:
            _tail_line(left, curve, style)
    _reference_slopes(left, comparison)
    _crossings(left, comparison)
    return _finished(figure, comparison, "time a sequence, ms", "time a token, µs")


def exponent(comparison: Comparison) -> Figure:
    """The local exponent of the time between neighbouring lengths, and that of the count."""
    figure, (axes,) = panels(1)
    drawn = [(curve, style) for curve, style in _styled(comparison) if len(curve.lengths) > 1]
    for i, (curve, style) in enumerate(drawn):
        slopes = fit.local_exponents(curve.lengths, curve.ms)
        # Side by side, so that no bar hides another.
        aside = 2 ** (0.08 * (i - (len(drawn) - 1) / 2))
        middles = [aside * (e.first * e.last) ** 0.5 for e in slopes]
        values = np.array([e.value for e in slopes])
        bars = values - np.array([e.low for e in slopes], dtype=float) if curve.judged else None
        axes.errorbar(
            middles, values, yerr=bars, label=_name(curve), capsize=2, elinewidth=0.8, **style
        )
        if curve.counted:
            counted = fit.local_exponents(curve.lengths, curve.counted)
            law = [e.value for e in counted]
            axes.plot(middles, law, color=style["color"], lw=3, alpha=0.25, zorder=1)
    axes.plot([], [], color="0.5", lw=3, alpha=0.4, label=f"counted {_decides(comparison)}")
    axes.set_ylabel("local exponent of the time")
    _length_axis(axes, comparison)
    legend(figure, axes)
    return figure


def memory(comparison: Comparison) -> Figure:
    """Peak memory of the batch, and state bytes of a sequence."""
    figure, (left, right) = panels(2)
    for curve, style in _styled(comparison):
        batches = comparison.part.groupby(comparison.along)["batch"].first()
        batch = np.array([float(batches[n]) for n in curve.lengths])
        peak = curve.cells["peak"].where(curve.cells["peak"] > 0)
        left.plot(curve.lengths, peak * batch / MIB, label=_name(curve), **style)
        right.plot(curve.lengths, curve.cells["state"] / MIB, **style)
    return _finished(figure, comparison, "peak memory of the batch, MiB", "state a sequence, MiB")


def decode(comparison: Comparison) -> Figure:
    """Time a token and state bytes against the position in the sequence."""
    figure, (left, right) = panels(2)
    for curve, style in _styled(comparison):
        _points(left, curve, style, curve.times, _name(curve))
        right.plot(curve.lengths, curve.cells["state"] / MIB, **style)
    return _finished(figure, comparison, "time a token, ms", "state a sequence, MiB")


def panels(count: int, columns: int = 2) -> tuple[Figure, list[Axes]]:
    """A figure with room above for title and legend and below for a footer."""
    columns = min(count, columns)
    rows = math.ceil(count / columns)
    size = (WIDTH, HEIGHT + (rows - 1) * FURTHER_ROW)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    found = list(axes.flat)
    for empty in found[count:]:
        empty.remove()
    return figure, found[:count]


def legend(figure: Figure, *drawn: Axes) -> None:
    """One legend for all panels, above them, where it hides nothing; each label once."""
    shown: dict[str, Any] = {}
    for axes in drawn:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            shown.setdefault(label, handle)
    labels, handles = list(shown), list(shown.values())
    order = sorted(range(len(labels)), key=lambda i: labels[i].startswith("counted"))
    longest = max(map(len, labels))
    columns = 5 if longest < 16 else 3 if longest < 28 else 2
    figure.legend(
        [handles[i] for i in order],
        [labels[i] for i in order],
        loc="upper center",
        bbox_to_anchor=(0.5, 1 - LEGEND_BELOW / figure.get_figheight()),
        ncols=columns,
    )


def _name(curve: Curve) -> str:
    return label_of(curve.arch)


def label_of(arch: str) -> str:
    """The name of an architecture in a legend."""
    name = NAMES.get(arch, arch)
    return f" {name}" if name.startswith("_") else name  # a legend leaves out what starts so


def _tail_label(curve: Curve) -> str:
    """The name with the tail exponent, and its interval where it is known."""
    if not curve.fits:
        return _name(curve)
    tail = curve.tail
    shown = f"{_name(curve)}: tail {tail.value:.2f}"
    return f"{shown} [{tail.low:.2f}, {tail.high:.2f}]" if curve.judged else shown


def _decides(comparison: Comparison) -> str:
    return "bytes" if comparison.along == "position" else "FLOPs"


def styles_of(archs: Sequence[str]) -> dict[str, dict[str, Any]]:
    """A style for each architecture; those outside the menu share out what is left, in order."""
    others = [arch for arch in archs if arch not in STYLES]
    spare = {arch: OTHER_STYLES[i % len(OTHER_STYLES)] for i, arch in enumerate(others)}
    return {**STYLES, **spare}


def tint(color: str, share: float) -> str:
    """A colour with so much white in it; the same where that is none."""
    if share == 0:
        return color
    red, green, blue = (share + (1 - share) * part for part in to_rgb(color))
    return to_hex((red, green, blue))


def _styled(comparison: Comparison) -> list[tuple[Curve, dict[str, Any]]]:
    styles = styles_of([curve.arch for curve in comparison.curves])
    return [(curve, styles[curve.arch]) for curve in comparison.curves if curve.lengths]


def _points(
    axes: Axes, curve: Curve, style: dict[str, Any], values: Any, label: str | None = None
) -> None:
    """Values with bars in proportion to those of the time; cells that others disturbed hollow."""
    scale = values / curve.times
    bars = [
        np.maximum(values - curve.cells["low"] * scale, 0),
        np.maximum(curve.cells["high"] * scale - values, 0),
    ]
    x = np.array(curve.lengths)
    axes.errorbar(x, values, yerr=bars, label=label, capsize=2, elinewidth=0.8, **style)
    hollow = curve.cells["disturbed"].to_numpy(dtype=bool)
    axes.plot(x[hollow], values[hollow], **{**style, "ls": ""}, mfc="white", zorder=3)


def _tail_line(axes: Axes, curve: Curve, style: dict[str, Any]) -> None:
    """The power law of the tail, broad and pale behind its points."""
    points = curve.points
    x, y = points.x[points.tail], points.centre[points.tail]
    line = np.exp(y.mean() + curve.tail.value * (x - x.mean()))
    axes.plot(np.exp(x), line, color=style["color"], lw=5, alpha=0.25, zorder=1)


def _reference_slopes(axes: Axes, comparison: Comparison) -> None:
    """Dotted lines of slope n, n log n and n squared from below the fastest first point."""
    curves = [curve for curve in comparison.curves if curve.lengths]
    lengths = comparison.lengths
    start = 0.6 * min(curve.times[0] for curve in curves)
    top = 1.5 * max(float(curve.cells["high"].max()) for curve in curves)
    fine = np.exp(np.linspace(np.log(lengths[0]), np.log(lengths[-1]), 200))
    for name in [law for law in positive_terms(lengths) if law != "1"]:
        line = start * LAWS[name](fine) / LAWS[name](fine[0])
        inside = line <= top
        axes.plot(fine[inside], line[inside], color="0.55", lw=0.9, ls=":", zorder=0)
        end = (fine[inside][-1], line[inside][-1])
        offset = {"xytext": (6, 0), "textcoords": "offset points"}
        axes.annotate(name, end, **offset, color="0.4", fontsize=7, va="center")


def _crossings(axes: Axes, comparison: Comparison) -> None:
    """A ring where two curves cross in range, a bar for its interval, and the length."""
    for a, _, where in comparison.crossovers:
        if where.verdict != "in range" or not (where.length and where.low and where.high):
            continue
        height = float(np.exp(np.interp(np.log(where.length), a.points.x, a.points.centre)))
        axes.plot([where.low, where.high], [height] * 2, color="k", lw=0.8, zorder=4)
        axes.axvline(where.length, color="k", lw=0.5, ls=":", zorder=0)
        axes.plot(where.length, height, "o", ms=7, mfc="none", mec="k", mew=0.9, zorder=4)
        axes.annotate(
            f"{where.length:,.0f}",
            (where.length, 1),
            xycoords=axes.get_xaxis_transform(),
            xytext=(-1, -2),
            textcoords="offset points",
            fontsize=6.5,
            rotation=90,
            ha="right",
            va="top",
        )


def _finished(figure: Figure, comparison: Comparison, *labels: str) -> Figure:
    """A figure of logarithmic panels with their labels, axes and one legend."""
    for axes, label in zip(figure.axes, labels, strict=True):
        axes.set_ylabel(label)
        _logarithmic(axes, comparison)
    legend(figure, figure.axes[0])
    return figure


def _logarithmic(axes: Axes, comparison: Comparison) -> None:
    axes.set_yscale("log")
    _length_axis(axes, comparison)
    mark_logarithmic(axes.yaxis, axes.get_ylim())
    _censored(axes, comparison)


def mark_logarithmic(axis: Axis, limits: tuple[float, float]) -> None:
    """Round numbers on a logarithmic axis between two values, the fewer the more it spans."""
    low, high = limits
    decades = np.log10(high / low)
    subs = (1, 2, 3, 5, 7) if decades < 1 else (1, 2, 5) if decades < 3 else (1,)
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axis.set_minor_formatter(NullFormatter())


def _length_axis(axes: Axes, comparison: Comparison) -> None:
    decoding = comparison.along == "position"
    label = "position, tokens already read" if decoding else "sequence length T, tokens"
    length_axis(axes, comparison.lengths, label)


def length_axis(axes: Axes, lengths: Sequence[float], label: str) -> None:
    """A horizontal axis by powers of two with these lengths on it."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{int(n):,}" for n in lengths], rotation=30, ha="right")
    axes.minorticks_off()
    axes.set_xlabel(label)


def _censored(axes: Axes, comparison: Comparison) -> None:
    """At the top, lengths that have no value, and why: the curve ends there."""
    styles = styles_of([curve.arch for curve in comparison.curves])
    transform = axes.get_xaxis_transform()
    ends = [curve for curve in comparison.curves if curve.censored]
    for row, curve in enumerate(ends):
        color, height = styles[curve.arch]["color"], 0.97 - 0.06 * row
        for i, (length, status) in enumerate(curve.censored):
            axes.plot(length, height, "x", color=color, transform=transform, clip_on=False)
            if i == 0:
                axes.annotate(
                    f"{_name(curve)}: {status} ",
                    (length, height),
                    xycoords=transform,
                    xytext=(-5, 0),
                    textcoords="offset points",
                    ha="right",
                    va="center",
                    fontsize=6.5,
                    color=color,
                )

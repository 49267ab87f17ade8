"""The figures of training runs: what each draws on its axes, and how it was made.

Styles are those of `harness.figures`. A panel of one point is left out where it says nothing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from harness.environment import FOREIGN_LOAD
from harness.figures import (
    label_of,
    legend,
    length_axis,
    mark_logarithmic,
    panels,
    styles_of,
    tint,
)
from harness.laws import Array
from harness.learned import Point, Study, model_size, said_block, said_size
from harness.learned_laws import FEWEST, length_law
from harness.loss_laws import LossLaw
from harness.report import number
from harness.sweep import in_order

MOST = 9  # panels of a figure: what a page has room for
COLUMNS = 3  # of panels that go by length or setting
SMOOTHED = 50  # a training loss is averaged over a run's steps / 50
LABEL = {"loss": "validation loss, bits a byte", "recall": "accuracy"}
ENTROPY = "bigram entropy of the text"
PALEST = 0.75
FILLS = ("full", "left", "bottom", "right", "top")  # of an architecture's several heads and states
TERA = 1e12
Series = tuple[str, str, str]  # architecture, size, variant
ROOM = 0.1  # least share of the loss that is shown above the trained models

CURVES = "Lines: means over seeds at the best learning rate; dots: seeds; bars: 95 %, Student's t."
LAW = "Broad: the law E + A·T^-alpha, where losses fall; alpha, where the lengths determine it."
SAID = {
    "lengths": CURVES,
    "pareto": (
        "Markers: means over seeds at the best learning rate. Thin: the loss on the way, on a part "
        "of the validation text. Hollow: other processes used the CPU meanwhile."
    ),
    "beyond": "Means over seeds at the best learning rate. Hollow: longer than trained at.",
    "rates": "Lines: means over seeds; dots: seeds. A ring is round the best rate.",
    "steps": "Pale: the first seed at its best learning rate; dark: its mean over 2 % of the run.",
    "against": CURVES,
    "cost": (
        "Means over seeds at the best learning rate. Hollow: other processes used the CPU while "
        "the forward pass was timed."
    ),
}


class Picture(NamedTuple):
    """A figure, how its file is called, and what stands above and below it."""

    name: str
    title: str
    footer: str
    figure: Figure


class Panel(NamedTuple):
    """The points on one set of axes, and what they have in common."""

    title: str
    points: list[Point]


def drawn(study: Study) -> Iterator[Picture]:
    """Every figure that the runs of a study allow, each made when it is asked for."""
    if study.finished:
        yield from _of_losses(study) if study.kind == "loss" else _of_recall(study)


def _of_losses(study: Study) -> Iterator[Picture]:
    about = f": {said_size(study)}, {study.common['corpus']}"
    whole: dict[str, tuple[str, Callable[[Study], Figure | None]]] = {
        "lengths": ("Validation loss by context length and by position", lengths),
        "pareto": ("Validation loss by training time and by training FLOPs", pareto),
    }
    for name, (title, draw) in whole.items():
        if figure := draw(study):
            yield Picture(name, title + about, _footer(study, name), figure)
    by_length = [
        Panel(f"T = {n:,}", [p for p in study.points if p.seq_len == n])
        for n in sorted({point.seq_len for point in study.points})
    ]
    yield from _paged(study, by_length, about)


def _of_recall(study: Study) -> Iterator[Picture]:
    task = f": {study.common['task']}"
    for axis, held, members in _slices(study):
        title = f"Accuracy by {_in_words(axis)}{task}{_comma(held)}"
        figure = against(study, axis, members)
        yield Picture(_file_name("by", axis, held), title, _footer(study, "against"), figure)
    alike = _by_setting(study, study.finished)
    for setting, members in alike:
        figure = cost(study, members) if len(members) > 1 else None
        if figure is not None:
            said = setting if len(alike) > 1 else ""
            title = f"Accuracy by state and by time{task}{_comma(setting)}"
            yield Picture(_file_name("cost", said), title, _footer(study, "cost"), figure)
    sizes = _by_size(study.points)
    for size, members in sizes:
        said = f"{task}{_comma(size)}"
        yield from _paged(study, _by_setting(study, members), said, size if len(sizes) > 1 else "")


def _paged(study: Study, found: Sequence[Panel], about: str, apart: str = "") -> Iterator[Picture]:
    """The figures with a panel for each length or setting, as many as a page holds in each."""
    what = "Validation loss" if study.kind == "loss" else "Accuracy"
    kinds: dict[str, tuple[str, Callable[[Study, Sequence[Panel]], Figure | None]]] = {
        "beyond": (f"{what} beyond the trained length", beyond),
        "rates": (f"{what} by learning rate", rates),
    }
    if study.kind == "loss":
        kinds["steps"] = ("Training loss of every step", steps)
    for name, (title, draw) in kinds.items():
        for page, start in enumerate(range(0, len(found), MOST), start=1):
            if figure := draw(study, found[start : start + MOST]):
                file = _file_name(name, apart, str(page) if len(found) > MOST else "")
                yield Picture(file, title + about, _footer(study, name), figure)


def lengths(study: Study) -> Figure | None:
    """Loss against context length, with its law; and against the position in the longest context.

    None where there is neither a second length nor a loss by position.
    """
    longest = max(study.lengths)
    names = ("position", "position_loss_bits_per_byte")
    at_longest = {
        point: study.samples_of(point, *names)
        for point in study.finished
        if point.seq_len == longest
    }
    placed = {point: found for point, found in at_longest.items() if found}
    several = len(study.lengths) > 1
    if not several and not placed:
        return None
    figure, axes = panels(several + bool(placed))
    looks = _looks(study, study.finished)
    if several:
        _by_length(axes[0], study, looks)
    if placed:
        last = axes[-1]
        for point, found in placed.items():
            places, losses = np.mean(found, axis=0)
            label = None if several else looks[_series(point)]["label"]
            last.plot(places, losses, **{**looks[_series(point)], "label": label, "markevery": 4})
        ticks = [4**k for k in range(math.ceil(math.log(longest, 4))) if 3 * 4**k < longest]
        length_axis(last, [*ticks, longest], f"position in a context of T = {longest:,} tokens")
        last.set_ylabel(LABEL["loss"])
    for panel in axes:
        _entropy_line(panel, study)
    legend(figure, *axes)
    return figure


def _by_length(axes: Axes, study: Study, looks: Mapping[Any, dict[str, Any]]) -> None:
    """Loss against context length: points, intervals, and the law where there is one."""
    for series, members in _joined(study.finished).items():
        look = dict(looks[series])
        fitted = length_law(study, series[0])
        law = fitted.law if fitted is not None else None
        if isinstance(law, LossLaw) and law.falls:
            fine = np.geomspace(members[0].seq_len, members[-1].seq_len, 100)
            axes.plot(fine, law(fine), color=look["color"], lw=5, alpha=0.25, zorder=1)
            if not law.flags:
                alpha = law.exponent
                look["label"] += f": alpha {alpha.value:.2f}"
                if alpha.low is not None and alpha.high is not None:
                    look["label"] += f" [{alpha.low:.2f}, {alpha.high:.2f}]"
        _curve(axes, [point.seq_len for point in members], members, look)
    length_axis(axes, study.lengths, "training length T, tokens")
    axes.set_ylabel(LABEL["loss"])


def pareto(study: Study) -> Figure | None:
    """Loss against measured seconds and counted FLOPs of the training, and on the way there."""
    columns = {"train_s": "training time, s", "train_flops": "training FLOPs, 10¹²"}
    known = {column: [p for p in study.finished if p.mean_of(column) > 0] for column in columns}
    kept = [column for column, points in known.items() if len(points) > 1]
    if not kept:
        return None
    figure, axes = panels(len(kept))
    looks = _looks(study, study.finished)
    sizes = [f"T = {n:,}" for n in study.lengths]
    for panel, column in zip(axes, kept, strict=True):
        unit = TERA if column == "train_flops" else 1.0
        for point in known[column]:
            look = looks[_series(point)]
            for x, losses in _on_the_way(study, point, column):
                panel.plot(x / unit, losses, color=look["color"], lw=0.5, alpha=0.5, zorder=1)
            size = _marker_size(sizes, f"T = {point.seq_len:,}")
            hollow = column == "train_s" and _disturbed(point, "foreign_load")
            at = point.mean_of(column) / unit
            face = {"mfc": "white"} if hollow else {}
            panel.plot(at, point.interval.value, **{**look, "ls": "", "ms": size, **face})
        losses = [point.interval.value for point in known[column]]
        # The first looks would take all of it.
        room = max(2 * (max(losses) - min(losses)), ROOM * max(losses))
        top = min(max(losses) + room, panel.get_ylim()[1])
        panel.set_ylim(min(losses) - 0.1 * (top - min(losses)), top)
        _log_axis(panel, columns[column])
        panel.set_ylabel(LABEL["loss"])
    _size_legend(axes[0], sizes)
    legend(figure, *axes)
    return figure


def _on_the_way(study: Study, point: Point, column: str) -> Iterator[tuple[Array, Array]]:
    """Seconds or FLOPs, and loss, at the looks during each run of a point."""
    watched = "watched_loss_bits_per_byte"
    if column == "train_s":
        yield from ((x, losses) for x, losses in study.samples_of(point, "watched_s", watched))
        return
    for at, losses in study.samples_of(point, "watched_step", watched):
        yield at / at[-1] * point.mean_of("train_flops"), losses


def beyond(study: Study, found: Sequence[Panel]) -> Figure | None:
    """Loss or accuracy at every length that a model was evaluated at; None where it was one."""
    value = "evaluated_loss_bits_per_byte" if study.kind == "loss" else "evaluated_accuracy"
    measured: list[tuple[str, list[tuple[Point, Array, Array]]]] = []
    for title, members in found:
        curves = []
        for point in members:
            if samples := study.samples_of(point, "evaluated_at", value):
                at, values = np.mean(samples, axis=0)
                curves.append((point, at, values))
        if any(len(at) > 1 for _, at, _ in curves):
            measured.append((title, curves))
    if not measured:
        return None
    figure, axes = _grid(len(measured))
    looks = _looks(study, [point for _, curves in measured for point, _, _ in curves])
    for panel, (title, curves) in zip(axes, measured, strict=True):
        for point, at, values in curves:
            look = looks[_series(point)]
            further = at > point.seq_len
            panel.plot(at, values, **look)
            hollow = {**look, "ls": "", "label": None, "fillstyle": "full", "mfc": "w"}
            panel.plot(at[further], values[further], **hollow)
        for n in sorted({point.seq_len for point, _, _ in curves}):
            panel.axvline(n, color="0.4", lw=0.8, ls=":", label="trained at", zorder=0)
        _chance_line(panel, [point for point, _, _ in curves])
        panel.set_title(title, fontsize=8)
        length_axis(
            panel, sorted({n for _, at, _ in curves for n in at}), "length evaluated at, tokens"
        )
    axes[0].plot([], [], "o", color="0.4", mfc="w", label="extrapolated")
    _label_rows(axes, LABEL[study.kind])
    legend(figure, *axes)
    return figure


def rates(study: Study, found: Sequence[Panel]) -> Figure | None:
    """Loss or accuracy against the learning rate; None where one was tried everywhere."""
    shown = [panel for panel in found if any(len(p.tried) > 1 for p in panel.points)]
    if not shown or not any(point.best for panel in shown for point in panel.points):
        return None
    figure, axes = _grid(len(shown))
    looks = _looks(study, [point for _, points in shown for point in points])
    any_diverged = False
    for panel, (title, points) in zip(axes, shown, strict=True):
        for point in points:
            look = looks[_series(point)]
            finished = [rate for rate in point.rates if rate.values]
            means = [rate.mean for rate in finished]
            panel.plot([rate.learning_rate for rate in finished], means, **look)
            for rate in finished:
                _seed_dots(panel, rate.learning_rate, list(rate.values.values()), look)
            if point.best is not None:
                ring = {"ms": 9, "mfc": "none", "mec": look["color"], "mew": 0.8, "zorder": 4}
                panel.plot(point.best.learning_rate, point.best.mean, "o", **ring)
        gone = [p for p in points if any(rate.diverged for rate in p.rates)]
        for row, point in enumerate(gone):
            at = [rate.learning_rate for rate in point.rates if rate.diverged]
            cross = {"color": looks[_series(point)]["color"], "ls": "", "marker": "x"}
            height = [0.98 - 0.04 * row] * len(at)
            panel.plot(at, height, **cross, transform=panel.get_xaxis_transform())
        any_diverged = any_diverged or bool(gone)
        _chance_line(panel, points)
        panel.set_title(title, fontsize=8)
        panel.set_xscale("log")
        tried = sorted({rate for point in points for rate in point.tried})
        panel.set_xticks(tried, [f"{rate:g}" for rate in tried], rotation=30, ha="right")
        panel.minorticks_off()
        panel.set_xlabel("peak learning rate")
    if any_diverged:
        axes[0].plot([], [], "x", color="0.4", label="a seed diverged")
    _label_rows(axes, LABEL[study.kind])
    legend(figure, *axes)
    return figure


def steps(study: Study, found: Sequence[Panel]) -> Figure | None:
    """The training loss of every step of one run a point, and its mean over some steps."""
    name = "train_loss_bits_per_byte"
    traced = [
        (title, [(p, runs[0][0]) for p in points if (runs := study.samples_of(p, name))])
        for title, points in found
    ]
    traced = [(title, traces) for title, traces in traced if traces]
    if not traced:
        return None
    figure, axes = _grid(len(traced))
    looks = _looks(study, [point for _, traces in traced for point, _ in traces])
    for panel, (title, traces) in zip(axes, traced, strict=True):
        for point, losses in traces:
            look = {**looks[_series(point)], "marker": ""}
            at = np.arange(1, 1 + len(losses))
            few = max(1, len(losses) // SMOOTHED)
            smooth = np.convolve(losses, np.ones(few) / few, "valid")
            panel.plot(at, losses, color=look["color"], lw=0.6, alpha=0.25, zorder=1)
            panel.plot(at[few - 1 :], smooth, **look)
        panel.set_title(title, fontsize=8)
        panel.set_xlabel("training step")
    _label_rows(axes, "training loss, bits a byte")
    legend(figure, *axes)
    return figure


def against(study: Study, axis: str, points: Sequence[Point]) -> Figure:
    """Accuracy against length or a setting of the task, a panel a size."""
    by_size = _by_size(points)
    figure, axes = _grid(len(by_size))
    looks = _looks(study, points)
    for panel, (title, members) in zip(axes, by_size, strict=True):
        for series, mine in _joined(members, axis).items():
            _curve(panel, [_value(point, axis) for point in mine], mine, looks[series])
        along = {_value(point, axis): point.mean_of("chance") for point in members}
        ticks = sorted(along)
        panel.plot(ticks, [along[x] for x in ticks], color="0.3", ls=":", lw=1, label="chance")
        panel.set_title(title, fontsize=8)
        length_axis(panel, ticks, _in_words(axis) + _with_it(study, axis, points))
        panel.set_ylim(-0.03, 1.05)
    _label_rows(axes, LABEL["recall"])
    legend(figure, *axes)
    return figure


def cost(study: Study, points: Sequence[Point]) -> Figure | None:
    """Accuracy against the state and the forward time of a sequence, a marker a model.

    None where neither is known. A line joins the sizes of an architecture with the same fields of
    its blocks, by rising state.
    """
    timed = "forward_time_ms_p50_a_sequence"
    columns = {"state_bytes": "state a sequence, KiB", timed: "forward pass, ms a sequence"}
    known = {c: [p for p in points if p.mean_of(c) > 0] for c in columns}
    kept = [column for column in columns if known[column]]
    if not kept:
        return None
    figure, axes = panels(len(kept))
    styles = styles_of(study.archs)
    sizes = list(dict.fromkeys(model_size(p.size) for p in sorted(points, key=_params)))
    blocks: dict[str, list[str]] = {}
    for arch, given in _by_block(points):
        blocks.setdefault(arch, []).append(given)
    for panel, column in zip(axes, kept, strict=True):
        unit = 1024 if column == "state_bytes" else 1
        for (arch, given), mine in _by_block(known[column]).items():
            mine.sort(key=lambda p: (p.mean_of("state_bytes"), p.mean_of(column)))
            x = [point.mean_of(column) / unit for point in mine]
            y = [point.interval.value for point in mine]
            fill = FILLS[blocks[arch].index(given) % len(FILLS)]
            look = {**styles[arch], "lw": 0.7, "fillstyle": fill}
            panel.plot(x, y, **{**look, "marker": ""})
            panel.plot([], [], label=label_of(arch) + _comma(given), **look)
            for at, height, point in zip(x, y, mine, strict=True):
                size = _marker_size(sizes, model_size(point.size))
                hollow = column == timed and _disturbed(point, "forward_foreign_load")
                face = {"mfc": "white"} if hollow else {}
                panel.plot(at, height, **{**look, "ls": "", "ms": size, **face})
        _chance_line(panel, points)
        _log_axis(panel, columns[column], base=2 if column == "state_bytes" else 10)
        panel.set_ylim(-0.03, 1.08)
        panel.set_ylabel(LABEL["recall"])
    _size_legend(axes[0], sizes)
    legend(figure, *axes)
    return figure


def _by_block(points: Sequence[Point]) -> dict[tuple[str, str], list[Point]]:
    """The points of each architecture, by the fields of its blocks that were given."""
    found: dict[tuple[str, str], list[Point]] = {}
    for arch in in_order(point.arch for point in points):
        for point in points:
            if point.arch == arch:
                found.setdefault((arch, said_block(point.block)), []).append(point)
    return found


def _params(point: Point) -> float:
    return point.mean_of("params")


def _marker_size(found: Sequence[str], one: str) -> float:
    """The later among what was found the larger."""
    return 3.5 + 4.5 * found.index(one) / max(1, len(found) - 1)


def _size_legend(axes: Axes, found: Sequence[str]) -> None:
    """What the smallest and the largest markers are, where they differ."""
    if len(found) > 1:
        for one in (found[0], found[-1]):
            size = _marker_size(found, one)
            axes.plot([], [], "o", color="0.5", ms=size, label=one)


def _curve(
    axes: Axes, x: Sequence[float], points: Sequence[Point], look: Mapping[str, Any]
) -> None:
    """The points' means in a line, their intervals as bars, and their seeds as dots."""
    intervals = [point.interval for point in points]
    axes.plot(x, [interval.value for interval in intervals], **look)
    for at, point, interval in zip(x, points, intervals, strict=True):
        if interval.low is not None and interval.high is not None:
            bar = [[interval.value - interval.low], [interval.high - interval.value]]
            style = {"ecolor": look["color"], "elinewidth": 0.8, "capsize": 2}
            axes.errorbar(at, interval.value, yerr=bar, fmt="none", **style)
        if point.best is not None:
            _seed_dots(axes, at, list(point.best.values.values()), look)


def _seed_dots(axes: Axes, at: float, values: Sequence[float], look: Mapping[str, Any]) -> None:
    if len(values) > 1:
        dots = {"color": look["color"], "ms": 2, "alpha": 0.6, "zorder": 1.5}
        axes.plot([at] * len(values), values, ".", **dots)


def _entropy_line(axes: Axes, study: Study) -> None:
    if study.bigram_entropy is not None:
        axes.axhline(study.bigram_entropy, color="0.3", ls="--", lw=0.9, label=ENTROPY, zorder=0)


def _chance_line(axes: Axes, points: Sequence[Point]) -> None:
    """At the chance of a panel's points, where they have one in common."""
    chances = {point.mean_of("chance") for point in points if point.best is not None}
    known = [chance for chance in chances if math.isfinite(chance)]
    if len(known) == 1:
        axes.axhline(known[0], color="0.3", ls=":", lw=1, label="chance", zorder=0)


def _log_axis(axes: Axes, label: str, base: int = 10) -> None:
    axes.set_xscale("log", base=base)
    low, high = axes.get_xlim()
    if base == 2:
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,g}")
        axes.minorticks_off()
    else:
        mark_logarithmic(axes.xaxis, (low, high))
    axes.tick_params(axis="x", labelrotation=30)
    axes.set_xlabel(label)


def _grid(count: int) -> tuple[Figure, list[Axes]]:
    """Panels of one scale."""
    figure, axes = panels(count, _columns(count))
    for panel in axes[1:]:
        panel.sharey(axes[0])
    return figure, axes


def _columns(count: int) -> int:
    """Two by two rather than three and one."""
    return 2 if count == 4 else COLUMNS


def _label_rows(axes: Sequence[Axes], label: str) -> None:
    for panel in axes[:: _columns(len(axes))]:
        panel.set_ylabel(label)


def _looks(study: Study, points: Sequence[Point]) -> dict[Series, dict[str, Any]]:
    """Style and label of each architecture, size and variant.

    Models of one width are told apart by tint and by the filling of their markers; other sizes look
    alike. Fields of blocks that were given are always named: such a model is not its paper's.
    """
    styles = styles_of(study.archs)
    looks = {}
    for arch in in_order(point.arch for point in points):
        mine = [point for point in points if point.arch == arch]
        variants = list(dict.fromkeys(point.variant for point in mine))
        several = len(variants) > 1
        for point in mine:
            label = label_of(arch) + _comma(point.variant if several else said_block(point.block))
            place = variants.index(point.variant)
            looks[_series(point)] = {
                **styles[arch],
                "color": tint(styles[arch]["color"], PALEST * place / len(variants)),
                "label": label,
                "fillstyle": FILLS[place % len(FILLS)],
            }
    return looks


def _series(point: Point) -> Series:
    return point.arch, point.size, point.variant


def _joined(points: Sequence[Point], axis: str = "seq_len") -> dict[Series, list[Point]]:
    """The points of each architecture, size and variant, along an axis."""
    found: dict[Series, list[Point]] = {}
    for point in sorted(points, key=lambda point: _value(point, axis)):
        found.setdefault(_series(point), []).append(point)
    return found


def _value(point: Point, axis: str) -> float:
    return float(point.seq_len if axis == "seq_len" else point.settings[axis])


def _slices(study: Study) -> Iterator[tuple[str, str, list[Point]]]:
    """Each quantity that varies, what is held beside it in words, and the points along it.

    Where all vary together, the first setting of the task stands for them.
    """
    points = study.finished
    axes = [
        name
        for name in (*study.varying, "seq_len")
        if len({str(_setting(p, name)) for p in points}) > 1
        and all(_is_number(_setting(p, name)) for p in points)
    ]
    found = []
    for axis in axes:
        others = [name for name in ("seq_len", *study.varying) if name != axis]
        for held, members in _split(study, points, others):
            if len({_value(point, axis) for point in members}) > 1:
                found.append((axis, held, members))
    yield from found or [(axis, "", points) for axis in axes[:1]]


def _with_it(study: Study, axis: str, points: Sequence[Point]) -> str:
    """What else is not the same at the points of an axis, in words."""
    others = [name for name in ("seq_len", *study.varying) if name != axis]
    together = [n for n in others if len({str(_setting(p, n)) for p in points}) > 1]
    return f" ({', '.join(map(_symbol, together))} with it)" if together else ""


def _by_setting(study: Study, points: Sequence[Point]) -> list[Panel]:
    """Points of the same length and settings of the task."""
    return [Panel(*one) for one in _split(study, points, ["seq_len", *study.varying])]


def _split(
    study: Study, points: Sequence[Point], names: Sequence[str]
) -> list[tuple[str, list[Point]]]:
    """Points by the values of some settings; in words only those that vary in the study."""
    varying = [n for n in names if len({str(_setting(p, n)) for p in study.points}) > 1]
    found: dict[str, list[Point]] = {}
    for point in points:
        said = ", ".join(f"{_symbol(n)} = {_setting(point, n)}" for n in varying)
        found.setdefault(said, []).append(point)
    return list(found.items())


def _setting(point: Point, name: str) -> Any:
    return point.seq_len if name == "seq_len" else point.settings.get(name)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _symbol(name: str) -> str:
    return "T" if name == "seq_len" else name.replace("_", " ")


def _in_words(axis: str) -> str:
    return "training length T" if axis == "seq_len" else _symbol(axis)


def _by_size(points: Sequence[Point]) -> list[Panel]:
    """Points of one width and depth, or one parameter count, whatever their heads and states."""
    found: dict[str, list[Point]] = {}
    for point in points:
        found.setdefault(model_size(point.size), []).append(point)
    return [Panel(*one) for one in found.items()]


def _disturbed(point: Point, column: str) -> bool:
    """Whether other processes used the CPU while a seed of the best rate was measured."""
    if point.best is None:
        return False
    return bool((pd.to_numeric(point.best.finished[column]) > FOREIGN_LOAD).any())


def _footer(study: Study, name: str) -> str:
    """How a figure was made."""
    seeds = _span(len(point.best.values) for point in study.finished if point.best)
    tried = _span(len(point.tried) for point in study.finished)
    with_law = name == "lengths" and len(study.lengths) >= FEWEST
    said = [
        SAID[name],
        *([LAW] if with_law else []),
        f"Seeds a point: {seeds}; learning rates tried: {tried}.",
    ]
    if failed := int(study.runs["value"].isna().sum()):
        said.append(f"{failed} of {len(study.runs)} runs did not finish.")
    if study.kind == "loss":
        hashes = study.runs["corpus_sha256"].dropna()
        named = f", SHA-256 {str(hashes.iloc[0])[:8]}" if len(hashes) else ""
        tokens = f"{number(study.common['tokens'])} tokens"
        said.append(f"Corpus {study.common['corpus']}{named}; {tokens} a run.")
    else:
        said.append(f"At most {number(study.common['steps'])} steps.")
    return f"{' '.join(said)}\n{study.origin}"


def _span(counts: Iterable[int]) -> str:
    """A count, or from the least to the most."""
    found = set(counts)
    return " to ".join(str(n) for n in sorted({min(found), max(found)}))


def _comma(text: str) -> str:
    return f", {text}" if text else ""


def _file_name(*parts: str) -> str:
    """Words fit for a file's name."""
    return "_".join(re.sub(r"[^\w.-]", "", part) for part in parts if part)

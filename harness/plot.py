"""`seqscale plot`: figures of a run directory, as SVG and PNG.

Colours are Okabe and Ito's, which colour-blind readers can tell apart; markers differ too.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from harness import record
from harness.environment import FOREIGN_LOAD
from harness.record import Damaged, Measurement
from harness.report import curves, frame
from harness.sweep import in_order

STYLES: dict[str, dict[str, Any]] = {
    "transformer": {"color": "#D55E00", "marker": "o"},
    "mamba2": {"color": "#0072B2", "marker": "s"},
    "rwkv7": {"color": "#009E73", "marker": "^"},
    "hyena": {"color": "#CC79A7", "marker": "D"},
}
OTHER_STYLE: dict[str, Any] = {"color": "#000000", "marker": "x"}
NAMES = {"transformer": "Transformer", "mamba2": "Mamba-2", "rwkv7": "RWKV-7", "hyena": "Hyena"}
LEVELS = {"op": "sequence operation", "block": "one block", "model": "whole model"}
PHASES = {
    "forward": "forward",
    "train_step": "training step (forward, backward, AdamW)",
    "backward": "backward",
    "prefill": "prefill",
    "decode": "decoding one token",
}
SETTINGS: dict[Any, Any] = {
    "svg.hashsalt": "seqscale",
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}


class NothingToDrawError(Exception):
    """The run directory holds no record that can be drawn; the message says what to run."""


def draw(
    source: Path,
    out: Path | None = None,
    on_damaged: Callable[[Damaged], None] = lambda damaged: None,
) -> list[Path]:
    """Draw every figure that the records of a run directory or packed file allow; their paths.

    Args:
        source: run directory, or JSONL file of `seqscale export`.
        out: folder for the figures; default: figures beside the records.
        on_damaged: called for each file that is no record, and is left out.

    Raises:
        NothingToDrawError: `source` holds no record that can be drawn.
        FileNotFoundError: `source` is not there.
    """
    measurements, damaged = record.load(source)
    for file in damaged:
        on_damaged(file)
    cells = frame(source)
    if cells.empty:
        raise NothingToDrawError(f"{source} holds no records: run seqscale cost first")
    out = out or (source if source.is_dir() else source.parent) / "figures"
    paths: list[Path] = []
    with plt.rc_context(SETTINGS):
        for common, part in curves(cells[cells["status"] == "ok"]):
            level, phase, size = common["level"], common["phase"], common["size"]
            figure = _decode(part) if phase == "decode" else _growth(part)
            title = (
                f"{LEVELS[level].capitalize()}, {PHASES[phase]}: {_size(size)}, "
                f"{common['batch']}, {common['dtype']}, backend {common['backend']}"
            )
            paths += _save(figure, out, _file_name(common), title, _how_timed(part), part)
        runs = [m for m in measurements if m.case.kind == "loss" and m.status == "ok"]
        if runs:
            title = "Training on real bytes, matched parameters"
            said = "Loss of each training step, in bits, on the bytes of that step."
            part = cells[cells["kind"] == "loss"]
            paths += _save(_losses(runs), out, "training_loss", title, said, part)
    if not paths:
        raise NothingToDrawError(f"{source} holds no finished cell to draw")
    return paths


def _file_name(common: dict[str, Any]) -> str:
    """What tells one figure from the others of a run, fit for a file's name."""
    batch = common["batch"].replace("·", "").replace(",", "").replace(" = ", "")
    return "_".join([*(common[k] for k in ("level", "phase", "size", "dtype", "backend")), batch])


def _growth(part: pd.DataFrame) -> Figure:
    """Time a sequence and peak memory against length, with reference slopes."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.2, 4.2))
    for arch, mine in _by_arch(part):
        style = STYLES.get(arch, OTHER_STYLE)
        _times(left, mine, "seq_len", arch)
        right.plot(mine["seq_len"], mine["peak_bytes"] / 2**20, ms=5, label=_name(arch), **style)
    _reference_slopes(left, part)
    left.set_ylabel("time a sequence, ms")
    right.set_ylabel("peak memory of the batch, MiB")
    for axes in (left, right):
        _length_axis(axes, sorted(part["seq_len"].unique()), "sequence length T, tokens")
        axes.set_yscale("log")
        _plain_numbers(axes)
    left.legend()
    return figure


def _times(axes: Axes, mine: pd.DataFrame, along: str, arch: str) -> None:
    """Medians of the time a sequence (or token), with bars from the 20th to the 80th percentile.

    Cells that others disturbed are hollow.
    """
    low, middle, high = (mine[f"time_ms_p{q}"] / mine["batch"] for q in (20, 50, 80))
    style = STYLES.get(arch, OTHER_STYLE)
    axes.errorbar(
        mine[along],
        middle,
        yerr=[middle - low, high - middle],
        label=_name(arch),
        capsize=2,
        ms=5,
        **style,
    )
    hollow = mine["disturbed"]
    axes.plot(mine[along][hollow], middle[hollow], ls="", ms=5, mfc="white", zorder=3, **style)


def _reference_slopes(axes: Axes, part: pd.DataFrame) -> None:
    """Dotted lines of slope n, n log n and n squared from below the fastest first point."""
    lengths = np.array(sorted(part["seq_len"].unique()), dtype=float)
    first = part[part["seq_len"] == lengths[0]]
    start = 0.6 * float((first["time_ms_p50"] / first["batch"]).min())
    top = 1.5 * float((part["time_ms_p80"] / part["batch"]).max())
    laws = {
        "n": lengths,
        "n log n": lengths * np.log(lengths),
        "n²": lengths**2,
    }
    for name, law in laws.items():
        line = start * law / law[0]
        inside = line <= top
        axes.plot(lengths[inside], line[inside], color="0.55", lw=0.9, ls=":", zorder=0)
        axes.annotate(
            name,
            (lengths[inside][-1], line[inside][-1]),
            xytext=(4, 0),
            textcoords="offset points",
            color="0.4",
            fontsize=8,
            va="center",
        )


def _decode(part: pd.DataFrame) -> Figure:
    """Time a token and state bytes against the position in the sequence."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.2, 4.2))
    for arch, mine in _by_arch(part):
        style = STYLES.get(arch, OTHER_STYLE)
        _times(left, mine, "position", arch)
        state = mine["state_bytes"] / mine["batch"] / 2**20
        right.plot(mine["position"], state, label=_name(arch), ms=5, **style)
    left.set_ylabel("time a token, ms")
    right.set_ylabel("state a sequence, MiB")
    for axes in (left, right):
        _length_axis(axes, sorted(part["position"].unique()), "position, tokens already read")
        axes.set_yscale("log")
        _plain_numbers(axes)
    left.legend()
    return figure


def _losses(runs: list[Measurement]) -> Figure:
    """The training loss of every step."""
    figure, axes = plt.subplots(figsize=(6.4, 4.2))
    order = in_order(run.case.arch for run in runs)
    for run in sorted(runs, key=lambda run: order.index(run.case.arch)):
        losses = run.samples["train_loss_bits_per_byte"]
        style = STYLES.get(run.case.arch, OTHER_STYLE)
        params = float(run.metrics["params"] or 0) / 1e6
        label = f"{_name(run.case.arch)}, {params:.3f} M parameters"
        axes.plot(range(1, 1 + len(losses)), losses, label=label, markevery=10, ms=5, **style)
    case = runs[0].case
    axes.set_xlabel(f"training step ({case.batch} sequences of {case.seq_len} bytes each)")
    axes.set_ylabel("training loss, bits a byte")
    axes.legend()
    return figure


def _save(
    figure: Figure, out: Path, name: str, title: str, said: str, part: pd.DataFrame
) -> list[Path]:
    """Title, footer and both file types; the SVG is the same for the same records."""
    figure.suptitle(title, fontsize=10)
    footer = f"{said}\n{_origin(part)}"
    figure.text(0.01, 0.005, footer, fontsize=6, color="0.35", va="bottom")
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    out.mkdir(parents=True, exist_ok=True)
    paths = [out / f"{name}.{kind}" for kind in ("svg", "png")]
    figure.savefig(paths[0], metadata={"Date": None})
    figure.savefig(paths[1], dpi=150)
    plt.close(figure)
    return paths


def _how_timed(part: pd.DataFrame) -> str:
    """What the marks of a figure of times mean, and what disturbed them."""
    said = "Times: medians, bars from the 20th to the 80th percentile. "
    if part["phase"].iloc[0] == "decode":
        said += "State: exact. "
    elif sources := _named(part, "peak_source"):
        said += f"Peak memory: {sources}, above inputs and weights. "
    if _disturbed(part).any():
        said += "Hollow: other processes used the CPU meanwhile. "
    if (part["stable"] == False).any():  # noqa: E712 (null is neither)
        said += "The device's speed changed by more than 2 % during the sweep."
    return said


def _disturbed(part: pd.DataFrame) -> pd.Series:
    """Which cells others disturbed."""
    if "foreign_load" not in part:
        return pd.Series(data=False, index=part.index)
    return part["foreign_load"] > FOREIGN_LOAD


def _origin(part: pd.DataFrame) -> str:
    """Device, versions and commit of the cells; several of one are all named."""
    commits = sorted({str(commit or "none")[:10] for commit in part["commit"]})
    dirty = " (uncommitted changes)" if (part["dirty"] == True).any() else ""  # noqa: E712
    return (
        f"{_named(part, 'device')}, {_named(part, 'threads')} threads · "
        f"torch {_named(part, 'torch')} · Python {_named(part, 'python')} · "
        f"commit {', '.join(commits)}{dirty} · seqscale cost, seqscale plot"
    )


def _named(part: pd.DataFrame, column: str) -> str:
    """The different values of a column."""
    if column not in part:
        return ""
    values = part[column].dropna()
    if pd.api.types.is_float_dtype(values):  # whole numbers beside nulls
        values = values.astype(int)
    return ", ".join(sorted(set(values.astype(str))))


def _by_arch(cells: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """Each architecture's cells by length or position; replicates as their median."""
    along = "position" if cells["position"].notna().any() else "seq_len"
    shown = ["batch", "time_ms_p20", "time_ms_p50", "time_ms_p80", "peak_bytes", "state_bytes"]
    cells = cells.assign(disturbed=_disturbed(cells))
    found = []
    for arch in in_order(cells["arch"]):
        groups = cells[cells["arch"] == arch].groupby(along)
        mine = groups[shown].median().astype(float).reset_index()
        found.append((arch, mine.assign(disturbed=groups["disturbed"].any().to_numpy())))
    return found


def _name(arch: str) -> str:
    return NAMES.get(arch, arch)


def _size(size: str) -> str:
    return f"width {size[1:]}" if size.startswith("d") else f"{size} parameters"


def _length_axis(axes: Axes, lengths: list[Any], label: str) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{int(n):,}" for n in lengths], rotation=30, ha="right")
    axes.minorticks_off()
    axes.set_xlabel(label)


def _plain_numbers(axes: Axes) -> None:
    """Ticks at 1, 2 and 5 of each decade, without powers of ten."""
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())

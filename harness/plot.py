"""`seqscale plot`: figures of a run as SVG and PNG, and its summary as Markdown."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from harness import (
    curves,
    figures,
    learned,
    learned_figures,
    learned_tables,
    record,
    report,
    summary,
)
from harness.curves import Comparison
from harness.learned import Study
from harness.record import Damaged

LONGEST = 40  # characters of one thing in a file's name
FOOTER_WIDTH = 165  # characters of its small print across a figure
LEVELS = {"op": "sequence operation", "block": "one block", "model": "whole model"}
PHASES = {
    "forward": "forward",
    "train_step": "training step (forward, backward, AdamW)",
    "backward": "backward",
    "prefill": "prefill",
    "decode": "decoding one token",
}


class NothingToDrawError(Exception):
    """The run directory holds no record that can be drawn; the message says what to run."""


class Drawn(NamedTuple):
    """What was drawn of a run, and what it says."""

    paths: list[Path]  # an SVG and a PNG a figure, summary.md and learned.md
    found: list[Comparison]
    studies: list[Study]


def draw(
    source: Path,
    out: Path | None = None,
    on_damaged: Callable[[Damaged], None] = lambda damaged: None,
) -> Drawn:
    """Draw every figure that the records of a run directory or packed file allow.

    Args:
        source: run directory, or JSONL file of `seqscale export`.
        out: folder for the figures; default: figures beside the records.
        on_damaged: called for each file that is no record, and is left out.

    Raises:
        NothingToDrawError: `source` holds no record that can be drawn.
        FileNotFoundError: `source` is not there.
    """
    if source.is_file() and source.suffix != ".jsonl":
        raise NothingToDrawError(
            f"{source}: give a run directory, or a .jsonl file of seqscale export"
        )
    measurements, damaged = record.load(source)
    for file in damaged:
        on_damaged(file)
    cells = report.frame(source)
    if cells.empty:
        raise NothingToDrawError(f"{source} holds no records: run seqscale cost first")
    out = out or (source if source.is_dir() else source.parent) / "figures"
    found = curves.comparisons(cells, measurements)
    drawable = [c for c in found if any(curve.lengths for curve in c.curves)]
    studies = learned.studies(cells, measurements)
    if not drawable and not any(study.finished for study in studies):
        raise NothingToDrawError(f"{source} holds no finished cell to draw")
    paths: list[Path] = []
    with plt.rc_context(figures.SETTINGS):
        for name, comparison in zip(_file_names(drawable), drawable, strict=True):
            paths += _draw(comparison, out / name)
        for name, study in zip(_study_names(studies), studies, strict=True):
            for picture in learned_figures.drawn(study):
                path = out / f"{name}_{picture.name}"
                paths += _save(picture.figure, path, picture.title, picture.footer)
    for name, text in (
        ("summary.md", summary.markdown(found) if found else ""),
        ("learned.md", learned_tables.markdown(studies) if studies else ""),
    ):
        if text:
            record.write_atomically(out / name, text)
            paths.append(out / name)
    return Drawn(paths, found, studies)


def _draw(comparison: Comparison, path: Path) -> list[Path]:
    """The figures of one comparison; `path` is how their names begin."""
    common, decoding = comparison.common, comparison.along == "position"
    kinds: dict[str, tuple[Callable[[Comparison], Figure], str]] = {
        "time": (figures.time, _how_timed(comparison) + _marks(comparison)),
        "exponent": (figures.exponent, _how_sloped(comparison)),
        "memory": (figures.memory, _how_measured(comparison)),
    }
    if decoding:
        kinds = {"decode": (figures.decode, _how_timed(comparison) + " State: exact.")}
    title = (
        f"{LEVELS[common['level']].capitalize()}, {PHASES[common['phase']]}: "
        f"{_size(common['size'])}, {common['batch']}, {common['dtype']}, "
        f"backend {common['backend']}"
    )
    paths = []
    for kind, (figure, said) in kinds.items():
        name = path.name + ("" if decoding else f"_{kind}")
        footer = f"{said}{_steadiness(comparison)}\n{comparison.origin}"
        paths += _save(figure(comparison), path.with_name(name), title, footer)
    return paths


def _file_names(found: Sequence[Comparison]) -> list[str]:
    """What tells each comparison from the others of a run, fit for a file's name."""
    names: list[str] = []
    for comparison in found:
        common = comparison.common
        keys = ["level", "phase", "size", "dtype", "backend"]
        if common["implementation"] != "ours":
            keys.append("implementation")
        for key in ("device", "threads"):
            if len({str(other.common[key]) for other in found}) > 1:
                keys.append(key)
        said = "_".join([*(str(common[key]) for key in keys), common["batch"]])
        names.append(re.sub(r"[^\w.-]", "", said))
    return names


def _study_names(studies: Sequence[Study]) -> list[str]:
    """What tells each study from the others of a run, fit for a file's name."""
    names: list[str] = []
    for study in studies:
        alike = [other for other in studies if other.kind == study.kind]
        keys = ["size"] if study.kind == "loss" else ["task"]
        keys += [
            key
            for key in study.common
            if key not in keys and len({str(other.common[key]) for other in alike}) > 1
        ]
        said = "_".join(_word(study.common[key])[:LONGEST] for key in keys).replace(" / ", "_")
        name = re.sub(r"[^\w.-]", "", f"{study.kind}_{said}")
        again = names.count(name)
        names.append(name)
        names[-1] += f"_{again + 1}" if again else ""
    return names


def _word(value: object) -> str:
    """A value as a word: a table holds whole numbers as 800.0 where one is missing."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def _save(figure: Figure, path: Path, title: str, footer: str) -> list[Path]:
    """Both file types of a figure; the SVG is the same for the same records."""
    arrange(figure, title, footer)
    path.parent.mkdir(parents=True, exist_ok=True)
    paths = [path.with_name(f"{path.name}.{kind}") for kind in ("svg", "png")]
    figure.savefig(paths[0], metadata={"Date": None})
    figure.savefig(paths[1], dpi=200)
    plt.close(figure)
    return paths


def arrange(figure: Figure, title: str, footer: str) -> None:
    """Put the title above the legend of a figure, its panels below, and the footer under them."""
    lines = [part for line in footer.split("\n") for part in textwrap.wrap(line, FOOTER_WIDTH)]
    share = figures.HEIGHT / figure.get_figheight()
    bottom = (0.02 + 0.026 * len(lines)) * share
    figure.text(0.5, 1 - 0.025 * share, title, fontsize=8.5, ha="center", va="center")
    figure.text(0.01, 0.01 * share, "\n".join(lines), fontsize=5.5, color="0.35", va="bottom")
    (legend,) = figure.legends
    top = legend.get_window_extent().y0 / figure.bbox.height - 0.01
    figure.set_layout_engine("constrained", rect=(0, bottom, 1, top - bottom))


def _how_timed(comparison: Comparison) -> str:
    """What the points and bars of a figure of times are."""
    processes = _processes(comparison)
    said = (
        "Times: medians of one process, bars from the 20th to the 80th percentile of its samples."
    )
    if processes != "1":
        said = (
            f"Times: geometric mean of the medians of {processes} processes, bars from the fastest "
            "to the slowest."
        )
    disturbed = any(curve.cells["disturbed"].any() for curve in comparison.curves)
    return said + (" Hollow: other processes used the CPU meanwhile." if disturbed else "")


def _marks(comparison: Comparison) -> str:
    """What else a figure of times shows."""
    said = ""
    if any(curve.fits for curve in comparison.curves):
        said += " Broad: least-squares tail."
    if any(where.verdict == "in range" for _, _, where in comparison.crossovers):
        said += " Rings: crossovers with their 95 % interval."
    return said


def _how_sloped(comparison: Comparison) -> str:
    said = "Slope of log time over log length between neighbours. Broad: that of the count."
    if any(curve.judged for curve in comparison.curves):
        bars = f"Bars: 95 %, over {_processes(comparison)} processes"
    else:
        bars = f"No bars: under {curves.JUDGED} processes their noise is unknown"
    return f"{said} {bars}. Points of one pair of lengths stand side by side."


def _how_measured(comparison: Comparison) -> str:
    part = comparison.part
    sources = curves.named(part[part["peak_bytes"].notna()], "peak_source")
    said = f"Peak memory: {sources}, above inputs and weights. " if sources else ""
    return said + "State: exact."


def _steadiness(comparison: Comparison) -> str:
    unsteady = (comparison.part["stable"] == False).any()  # noqa: E712 (null is neither)
    return "\nThe device's speed changed by more than 2 % during the sweep." if unsteady else ""


def _processes(comparison: Comparison) -> str:
    counts = {len(times) for curve in comparison.curves for times in curve.ms}
    return " to ".join(str(n) for n in sorted({min(counts), max(counts)}))


def _size(size: str) -> str:
    return f"width {size[1:]}" if size.startswith("d") else f"{size} parameters"

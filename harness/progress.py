"""What long work shows while it runs: a bar on a terminal, a line a cell or part in a pipe."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

from harness.record import FAULTS, Case, Measurement, RunDirectory


class _Progress:
    """A bar, which is drawn on a terminal only, and lines above it.

    Args:
        console: where to report.
        count: what shows how much is done.
    """

    def __init__(self, console: Console, *count: ProgressColumn) -> None:
        self.console = console
        self._bar = Progress(
            BarColumn(bar_width=24),
            *count,
            TimeRemainingColumn(compact=True),
            TextColumn("{task.description}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )

    def said(self, line: str) -> None:
        """Print a line above the bar."""
        self._bar.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()


class SweepProgress(_Progress):
    """Reports on standard error; use as a context, and pass its methods to `harness.cost.run`.

    Args:
        cells: the cells of the sweep.
        console: where to report.
    """

    def __init__(self, cells: Sequence[Case], console: Console) -> None:
        super().__init__(console, TextColumn("{task.fields[done]}/{task.fields[cells]}"))
        self.total = len(cells)
        self.done = self.reused = 0
        self._current, self._before = "", 0.0  # the cell, and the estimated seconds before it
        self._seconds = _estimates(cells) if console.is_terminal else {}
        # The bar advances by estimated seconds, so that the time left means something.
        self._task = self._bar.add_task(
            "starting", total=sum(self._seconds.values()) or 1, done=0, cells=self.total
        )

    def opened(self, directory: RunDirectory) -> None:
        """Name the files that were no records."""
        for path, reason in directory.damaged:
            self.said(f"set aside, counted missing: {path} ({reason})")

    def started(self, case: Case) -> None:
        """Show which cell is being measured."""
        self._current = case.key
        self._bar.update(self._task, description=escape(case.label))

    def advanced(self, share: float) -> None:
        """Show how much of the current cell is done."""
        seconds = self._seconds.get(self._current, 0)
        self._bar.update(self._task, completed=self._before + share * seconds)

    def finished(self, measurement: Measurement, known: bool) -> None:
        """Show what came of a cell; `known` says that an earlier run measured it."""
        self.done += 1
        self.reused += known
        self._before += self._seconds.get(measurement.case.key, 0)
        self._bar.update(self._task, completed=self._before, done=self.done)
        failed = measurement.status in FAULTS
        if known or (self.console.is_terminal and not failed):
            return
        line = f"{self.done:{len(str(self.total))}d}/{self.total} {measurement.case.label}: "
        self.said(line + outcome(measurement))

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        if self.reused:
            self.said(f"{self.reused} of {self.total} cells were there already")


class StepProgress(_Progress):
    """How far a check is: a bar on a terminal, a line a part in a pipe; use as a context."""

    def __init__(self, console: Console) -> None:
        super().__init__(console, MofNCompleteColumn(), TextColumn("processes"))
        self._part = ""
        self._task = self._bar.add_task("starting", total=None)

    def advanced(self, part: str, done: int, of: int) -> None:
        """So many processes of a part are done."""
        self._bar.update(self._task, description=part, completed=done, total=of)
        if part != self._part and not self.console.is_terminal:
            self.said(f"{part}: {of} processes")
        self._part = part


def _estimates(cells: Sequence[Case]) -> dict[str, float]:
    """A rough duration of each cell in seconds, by key."""
    from harness.estimate import estimate

    return {case.key: estimate(case).seconds for case in cells}


def outcome(measurement: Measurement) -> str:
    """What came of a cell, in a few words."""
    if measurement.status != "ok":
        return f"{measurement.status}: {measurement.reason}"
    metrics = measurement.metrics
    if "time_ms_p50" in metrics:
        return f"{metrics['time_ms_p50']:.3g} ms"
    if "accuracy" in metrics:
        return f"{metrics['accuracy']:.1%} right after {metrics['steps_taken']} steps"
    return f"{metrics['val_loss_bits_per_byte']:.3f} bits a byte"

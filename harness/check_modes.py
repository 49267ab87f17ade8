"""The modes of `seqscale check`: what the command line asks for, and how it is shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from harness import (
    baseline,
    check,
    counter_check,
    judged,
    measured,
    processes,
    self_test,
    stored_check,
    trees,
    verdicts,
)
from harness.baseline import Baseline, BaselineError, RefusedError
from harness.judged import Report
from harness.processes import Asked, Listed
from harness.progress import StepProgress
from harness.run import WorkerFailedError, check_settings
from harness.self_test import Rates

COUNTS = Path("results/counters")


@dataclass(frozen=True, kw_only=True)
class Options:
    """What was asked for; the fields are those of the command line."""

    asked: Asked
    guards: Path | None
    ab: str | None
    counters: bool
    calibrate: bool
    update: bool
    self_test: bool
    files: Sequence[Path]
    reason: str | None
    accept: Sequence[str]
    cells: Sequence[str]
    baseline: Path | None
    pairs: int | None
    save: Path | None
    junit: Path | None
    markdown: Path | None

    def refuse(self) -> None:
        """ValueError for what cannot be asked, or not together."""
        modes = {
            "--ab": self.ab is not None,
            "--counters": self.counters,
            "--calibrate": self.calibrate,
            "--update": self.update,
            "--self-test": self.self_test,
            "--from": bool(self.files),
        }
        given = [name for name, is_given in modes.items() if is_given] or ["a check"]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are different checks: give one of them")
        (mode,) = given
        writes = self.calibrate or self.update
        unused = {
            "a file of guards": self.guards and self.counters,
            "--cell": self.cells and (writes or self.counters),
            "--pairs": self.pairs is not None and mode in ("--counters", "--from"),
            "--baseline": self.baseline and mode in ("--ab", "--self-test"),
            "--save": self.save and mode != "a check",
            "--accept": self.accept and not self.update,
            "--reason": self.reason is not None and not writes,
            "--junit": self.junit and (writes or self.self_test),
            "--markdown": self.markdown and (writes or self.self_test),
        }
        for name, is_given in unused.items():
            if is_given:
                raise ValueError(f"{name} means nothing to {mode}: leave it out")
        if writes and not (self.reason or "").strip():
            raise ValueError("a baseline says why it was taken: give --reason TEXT")
        if self.guards is not None and not self.guards.is_file():
            raise ValueError(f"{self.guards}: no such file of guards")
        if self.pairs is not None and self.pairs < verdicts.FEWEST:
            raise ValueError(
                f"a verdict needs {verdicts.FEWEST} pairs of processes, got {self.pairs}"
            )
        for path in (self.save, self.junit, self.markdown):
            if path is not None and not path.absolute().parent.is_dir():
                raise ValueError(f"{path}: there is no folder {path.parent} to write it into")
        check_settings(self.asked.threads, self.asked.time_limit_s)


def report(options: Options, progress: StepProgress) -> Report:
    """The verdicts: of two trees, of counts, or beside the stored baseline.

    Raises:
        BaselineError: there is nothing to compare with.
        ValueError, WorkerFailedError: as the modes.
    """
    asked = options.asked
    if options.ab is not None:
        return check.ab(
            options.ab,
            options.guards,
            asked,
            cells=options.cells,
            pairs=options.pairs,
            on_process=progress.advanced,
        )
    if options.counters:
        return counter_check.check(options.baseline or COUNTS, on_finish=progress.said)
    if options.files:
        times, names = measured.load(options.files)
        environment = times.environment
        path = options.baseline or stored_check.place(environment, options.guards)
        kept = _chosen(baseline.load(path), options, names)
        names = judged.chosen(names, options.cells)
        return stored_check.compare(kept, times, names, environment["device_type"])
    with trees.working(options.guards) as side:
        listed = processes.listed(side, asked)
        kept = _chosen(baseline.load(_place(options, listed)), options, listed.names)
        listed = listed._replace(names=judged.chosen(listed.names, options.cells))
        found, times = stored_check.check(
            kept, side, listed, asked, options.pairs, progress.advanced
        )
    if options.save is not None:
        measured.save(times, listed.names, options.save)
    return found


def written(options: Options, progress: StepProgress) -> str:
    """Write or update the baseline; what was done, in a line.

    Raises:
        BaselineError: no baseline to update, or one of another device.
        RefusedError: uncommitted changes, a red cell, or a baseline that would be lost.
        ValueError, WorkerFailedError: as the modes.
    """
    asked, reason = options.asked, options.reason or ""
    with trees.working(options.guards) as side:
        listed = processes.listed(side, asked)
        path = _place(options, listed)
        if options.calibrate:
            if path.exists():
                raise RefusedError(
                    f"{path} is there already: --update rewrites what moved; with the file gone, "
                    "--calibrate starts anew"
                )
            made = stored_check.calibrate(
                side, listed, asked, reason, options.pairs, progress.advanced
            )
            baseline.save(made, path)
            gating = baseline.gating(made, asked.device)
            return f"{path}: {len(made.cells)} cells, {len(gating)} of which gate"
        made, changed = stored_check.update(
            baseline.load(path),
            side,
            listed,
            asked,
            reason,
            options.accept,
            options.pairs,
            progress.advanced,
        )
    if not changed:
        return f"{path}: nothing that may be rewritten moved"
    baseline.save(made, path)
    return f"{path}: {len(changed)} of {len(made.cells)} cells written: {', '.join(changed)}"


def tested(options: Options, progress: StepProgress) -> Rates:
    """The rates of the check itself."""
    with trees.working(options.guards) as side:
        return self_test.run(
            side,
            options.asked,
            options.cells,
            pairs=options.pairs,
            on_process=progress.advanced,
        )


def write_failure(options: Options, why: str) -> None:
    """Say in JUnit XML, where asked for, that nothing was compared; OSError where it cannot be."""
    if options.junit is not None:
        options.junit.write_text(judged.junit_of_failure(why), encoding="utf-8")


def exit_code(error: ValueError | WorkerFailedError) -> int:
    """3: nothing to compare with; 1: no baseline may be written; 5: no process starts; else 2."""
    codes = {BaselineError: 3, RefusedError: 1, WorkerFailedError: 5}
    return next((code for kind, code in codes.items() if isinstance(error, kind)), 2)


def write_files(options: Options, report: Report) -> None:
    """JUnit XML and Markdown, where asked for; OSError where they cannot be written."""
    if options.junit is not None:
        options.junit.write_text(judged.junit(report), encoding="utf-8")
    if options.markdown is not None:
        with options.markdown.open("a", encoding="utf-8") as file:
            file.write(judged.markdown(report))


def _chosen(kept: Baseline, options: Options, names: Sequence[str]) -> Baseline:
    """The baseline of the cells that were asked for; ValueError where nothing is called so."""
    judged.refuse_unknown(options.cells, [*kept.cells, *names])
    return baseline.only(kept, options.cells)


def _place(options: Options, listed: Listed) -> Path:
    return options.baseline or stored_check.place(listed.environment, options.guards)

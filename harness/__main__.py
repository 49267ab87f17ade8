"""The command line: `seqscale VERB`; each verb is the module of that name.

Verbs import what they need when they run, so that `--help` starts without PyTorch.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, CycloptsError, Parameter

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import Console

    from harness.record import Case, Damaged
    from harness.trials import Training

app = App(
    name="seqscale",
    help="What each sequence architecture costs, and what it loses, as the sequence grows.",
    version_flags=[],
    help_format="plaintext",
    suppress_keyboard_interrupt=False,
)
Names = Annotated[list[str] | None, Parameter(negative="")]
Numbers = Annotated[list[int] | None, Parameter(negative="")]
Rates = Annotated[list[float] | None, Parameter(negative="")]
Flag = Annotated[bool, Parameter(negative="")]


class UsageError(Exception):
    """The command line asks for something that does not exist; the message names the fix."""


@app.command
def cost(
    sweep: Path | None = None,
    *,
    preset: str | None = None,
    arch: Names = None,
    level: Names = None,
    phase: Names = None,
    length: Numbers = None,
    position: Numbers = None,
    batch: int | None = None,
    tokens: int | None = None,
    size: Names = None,
    dtype: Names = None,
    backend: Names = None,
    op: Names = None,
    implementation: Names = None,
    peers: Names = None,
    replicates: int | None = None,
    device: str = "auto",
    threads: int | None = None,
    time_limit: float = 600.0,
    energy: Flag = False,
    out: Path = Path("runs/cost"),
    dry_run: Flag = False,
    json: Flag = False,
) -> int:
    """Measure time and memory of the cells of a sweep; the same command again resumes.

    Parameters
    ----------
    sweep
        TOML file with [[grid]] tables.
    preset
        A built-in sweep instead of a file; seqscale list shows them.
    arch
        These architectures instead of the sweep's (may be given several times).
    level
        Only the grids of this level: op, block, model.
    phase
        Only this phase: forward, backward, train_step, prefill, decode.
    length
        These sequence lengths instead of the sweep's.
    position
        These decode positions instead of the sweep's.
    batch
        A constant batch instead of the sweep's.
    tokens
        A constant number of tokens B * T instead of the sweep's batch.
    size
        This size instead of the sweep's: d256 for a width, d256h128 for heads of
        128 too, 5M for matched parameters.
    dtype
        This type instead of the sweep's: float32, bfloat16, float16, float64.
    backend
        This backend instead of the sweep's: reference, torch, triton.
    op
        Only the architectures with this operation: attention, ssd, wkv7, long_conv.
    implementation
        This implementation instead of ours: mamba_ssm, sdpa-flash, fla; seqscale list names all.
    peers
        Measure each operation side by side with this implementation, or with all that can be
        imported here: all.
    replicates
        Measure each cell so many times, each in its own process; from 3 on fits have intervals.
    device
        auto (an NVIDIA GPU where there is one), cpu or cuda.
    threads
        CPU threads; default: all cores.
    time_limit
        Seconds that one cell may take.
    energy
        Measure energy too: on a GPU, 2 s longer a cell.
    out
        Run directory: records, cells.csv.
    dry_run
        Only show the cells, with a rough estimate of their time and memory.
    json
        One JSON document on standard output, everything else on standard error.
    """
    from harness import cost as cost_module
    from harness import sweep as sweep_module
    from harness import versus

    _one_sweep("cost", sweep, preset)
    try:
        device = sweep_module.resolve_device(device)
        grids = sweep_module.narrowed(
            sweep_module.load(sweep) if sweep else sweep_module.preset(str(preset)),
            level=level or (),
            phase=phase or (),
            op=op or (),
            archs=arch,
            lengths=length,
            positions=position,
            batch=batch,
            tokens=tokens,
            size=size,
            dtype=dtype,
            backend=backend,
            implementation=implementation,
            replicates=replicates,
        )
        cells, left_out = versus.joined(sweep_module.cells(grids, device), peers or (), device)
    except (FileNotFoundError, IsADirectoryError, ValueError) as error:
        raise _unusable(sweep, error) from None
    for name, reason in left_out.items():
        _complain(f"left out: {name}: {reason}", 0)
    if dry_run:
        return _show_plan(cells, out, json)
    from harness.progress import SweepProgress

    with SweepProgress(cells, _console(stderr=True)) as progress:
        try:
            table = cost_module.run(
                cells,
                out,
                device=device,
                threads=threads,
                time_limit_s=time_limit,
                energy=energy,
                on_open=progress.opened,
                on_start=progress.started,
                on_finish=progress.finished,
            )
        except ValueError as error:
            raise UsageError(str(error)) from None
    return _show_results(table[table["key"].isin([case.key for case in cells])], out, json)


@app.command
def loss(
    sweep: Path | None = None,
    *,
    preset: str | None = None,
    arch: Names = None,
    length: Numbers = None,
    size: Names = None,
    learning_rate: Rates = None,
    seed: Numbers = None,
    tokens: Numbers = None,
    batch: int | None = None,
    batch_tokens: int | None = None,
    corpus: str | None = None,
    unit: str | None = None,
    evaluate_at: Numbers = None,
    dtype: str | None = None,
    backend: str | None = None,
    ranks: int | None = None,
    parallel: str | None = None,
    device: str = "auto",
    threads: int | None = None,
    time_limit: float = 3600.0,
    checkpoint_every: float = 60.0,
    out: Path = Path("runs/loss"),
    dry_run: Flag = False,
    json: Flag = False,
) -> int:
    """Train language models on real text and validate them; the same command again resumes.

    Parameters
    ----------
    sweep
        TOML file with [[grid]] tables.
    preset
        A built-in sweep instead of a file; seqscale list shows them.
    arch
        These architectures only (may be given several times); a hybrid as mamba2*3+transformer.
    length
        These training lengths instead of the sweep's.
    size
        This size instead: 1M for matched parameters, d256 for a width, d128h32l4 for heads of 32
        and four blocks.
    learning_rate
        These peak learning rates instead.
    seed
        These seeds instead; from 3 on there are intervals.
    tokens
        Train each run on so many tokens in all.
    batch
        Sequences a step.
    batch_tokens
        Tokens a step instead.
    corpus
        python-source, files:GLOB, memmap:PATH (of seqscale prepare), hf:NAME.
    unit
        What a token is: byte or character.
    evaluate_at
        Evaluate at this length too.
    dtype
        float32, or bfloat16 (autocast).
    backend
        This backend instead of the sweep's: reference, torch, triton.
    ranks
        Processes that share each run, as torchrun starts them; each takes a GPU where there are.
    parallel
        ddp or fsdp.
    device
        auto (an NVIDIA GPU where there is one), cpu or cuda.
    threads
        CPU threads; default: all cores.
    time_limit
        Seconds that one run may take.
    checkpoint_every
        Seconds between checkpoints of a run.
    out
        Run directory: records, cells.csv, checkpoints.
    dry_run
        Only show the runs, with a rough estimate of their time and memory.
    json
        One JSON document on standard output, everything else on standard error.
    """
    from harness.trials import LossGrid

    instead = {
        "archs": arch,
        "lengths": length,
        "size": size,
        "learning_rates": learning_rate,
        "seeds": seed,
        "tokens": tokens,
        "batch": batch,
        "batch_tokens": batch_tokens,
        "corpus": corpus,
        "unit": unit,
        "evaluate_at": evaluate_at,
        "dtype": dtype,
        "backend": backend,
        "ranks": ranks,
        "parallel": parallel,
    }
    running = {
        "device": device,
        "threads": threads,
        "time_limit_s": time_limit,
        "checkpoint_every_s": checkpoint_every,
    }
    return _train(LossGrid, sweep, preset, instead, running, out, dry_run, json)


@app.command
def recall(
    sweep: Path | None = None,
    *,
    preset: str | None = None,
    task: Names = None,
    arch: Names = None,
    length: Numbers = None,
    size: Names = None,
    learning_rate: Rates = None,
    seed: Numbers = None,
    steps: int | None = None,
    batch: int | None = None,
    evaluate_at: Numbers = None,
    dtype: str | None = None,
    backend: str | None = None,
    device: str = "auto",
    threads: int | None = None,
    time_limit: float = 3600.0,
    checkpoint_every: float = 60.0,
    out: Path = Path("runs/recall"),
    dry_run: Flag = False,
    json: Flag = False,
) -> int:
    """Train models on synthetic tasks of recall and test them; the same command again resumes.

    Parameters
    ----------
    sweep
        TOML file with [[grid]] tables.
    preset
        A built-in sweep instead of a file; seqscale list shows them.
    task
        These tasks only; seqscale list names all.
    arch
        These architectures only (may be given several times); a hybrid as mamba2*3+transformer.
    length
        These lengths instead of the sweep's.
    size
        This size instead: d64 for a width, d64h16 for heads of 16, d64n8 for Mamba-2's N = 8.
    learning_rate
        These peak learning rates instead.
    seed
        These seeds instead; from 3 on there are intervals.
    steps
        At most so many steps.
    batch
        Sequences a step.
    evaluate_at
        Test at this length too.
    dtype
        float32, or bfloat16 (autocast).
    backend
        This backend instead of the sweep's: reference, torch, triton.
    device
        auto (an NVIDIA GPU where there is one), cpu or cuda.
    threads
        CPU threads; default: 1, as a second one slows small models down.
    time_limit
        Seconds that one run may take.
    checkpoint_every
        Seconds between checkpoints of a run.
    out
        Run directory: records, cells.csv, checkpoints.
    dry_run
        Only show the runs, with a rough estimate of their time and memory.
    json
        One JSON document on standard output, everything else on standard error.
    """
    from harness.trials import RecallGrid

    instead = {
        "tasks": task,
        "archs": arch,
        "lengths": length,
        "size": size,
        "learning_rates": learning_rate,
        "seeds": seed,
        "steps": steps,
        "batch": batch,
        "evaluate_at": evaluate_at,
        "dtype": dtype,
        "backend": backend,
    }
    running = {
        "device": device,
        "threads": threads,
        "time_limit_s": time_limit,
        "checkpoint_every_s": checkpoint_every,
    }
    return _train(RecallGrid, sweep, preset, instead, running, out, dry_run, json)


@app.command
def prepare(corpus: str, to: Path, *, unit: str = "byte") -> int:
    """Write a corpus as a token file, which runs map into memory instead of reading it.

    Parameters
    ----------
    corpus
        python-source, files:GLOB or hf:NAME.
    to
        File to write, with TO.json beside it; then: seqscale loss --corpus memmap:TO.
    unit
        What a token is: byte or character.
    """
    from harness import data

    try:
        found = data.prepare(corpus, to, unit)
    except ValueError as error:
        raise UsageError(str(error)) from None
    print(
        f"{to}: {len(found.train):,} tokens to train on, {len(found.validation):,} to validate, "
        f"of {found.documents:,} documents: --corpus memmap:{to} --unit {unit}"
    )
    return 0


@app.command
def status(run: Path = Path("runs/cost"), *, json: Flag = False) -> int:
    """Say how far a sweep is: cells recorded, missing, broken.

    Parameters
    ----------
    run
        Run directory of seqscale cost.
    json
        One JSON document on standard output.
    """
    from harness import status as status_module

    try:
        found = status_module.status(run)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UsageError(str(error)) from None
    _say(found, status_module.lines(found), json)
    return 0


@app.command
def export(run: Path, to: Path) -> int:
    """Write a run into one file.

    Parameters
    ----------
    run
        Run directory of seqscale cost, or a JSONL file of this command.
    to
        File to write: .csv or .parquet (a row a cell), or .jsonl (everything; loads again).
    """
    from harness import export as export_module

    if not run.exists():
        raise UsageError(f"{run} is not there: run seqscale cost --out {run} first")
    try:
        count = export_module.export(run, to, _name_damaged)
    except ValueError as error:
        raise UsageError(str(error)) from None
    print(f"{to}: {count} cells")
    return 0


@app.command
def check(
    guards: Path | None = None,
    *,
    ab: str | None = None,
    counters: Flag = False,
    calibrate: Flag = False,
    update: Flag = False,
    self_test: Flag = False,
    from_: Annotated[
        list[Path] | None, Parameter(name="--from", negative="", consume_multiple=True)
    ] = None,
    reason: str | None = None,
    accept: Names = None,
    cell: Names = None,
    baseline: Path | None = None,
    pairs: int | None = None,
    device: str = "auto",
    threads: int | None = None,
    time_limit: float = 120.0,
    save: Path | None = None,
    junit: Path | None = None,
    markdown: Path | None = None,
    json: Flag = False,
) -> int:
    """Tell whether kernels have become slower: against a stored baseline, or as asked.

    Parameters
    ----------
    guards
        A Python file whose list GUARDS names callables; default: our own operations.
    ab
        Compare with this commit, branch or tag instead, in pairs of processes: the surest way.
    counters
        Compare what is counted without a GPU instead: bytes, FLOPs, registers, spills.
    calibrate
        Measure the noise of each cell and write a new baseline; needs --reason.
    update
        Write into the baseline what moved, unless the check is red; needs --reason.
    self_test
        Check the check: false alarms, and slow-downs of a known size. An hour.
    from_
        Judge these files instead of measuring: one of --save, or some of pytest-benchmark.
    reason
        Why the baseline is written; it is kept in it.
    accept
        With --update: cells of this name or pattern may be slower, or gone.
    cell
        Only the cells of this name or pattern, as "ssd*".
    baseline
        The file; default: in results/check at the top of the repository, called after the file of
        guards and the device; of --counters: in results/counters.
    pairs
        Pairs of processes; default: 12 on a CPU, 7 on a GPU.
    device
        auto (an NVIDIA GPU where there is one), cpu or cuda.
    threads
        CPU threads; default: all cores.
    time_limit
        Seconds that one cell may take in one process.
    save
        Write what was measured into this file, for --from.
    junit
        Write JUnit XML into this file.
    markdown
        Write a Markdown table into this file; in CI, $GITHUB_STEP_SUMMARY.
    json
        One JSON document on standard output, everything else on standard error.
    """
    from harness import check_modes, judged
    from harness.processes import Asked
    from harness.progress import StepProgress
    from harness.run import WorkerFailedError
    from harness.sweep import resolve_device

    try:
        options = check_modes.Options(
            asked=Asked(device=resolve_device(device), threads=threads, time_limit_s=time_limit),
            guards=guards,
            ab=ab,
            counters=counters,
            calibrate=calibrate,
            update=update,
            self_test=self_test,
            files=from_ or (),
            reason=reason,
            accept=accept or (),
            cells=cell or (),
            baseline=baseline,
            pairs=pairs,
            save=save,
            junit=junit,
            markdown=markdown,
        )
        options.refuse()
    except ValueError as error:
        raise UsageError(str(error)) from None
    check_modes.write_failure(options, "the check did not come to its end")
    try:
        with StepProgress(_console(stderr=True)) as progress:
            if calibrate or update:
                line = check_modes.written(options, progress)
                _say({"written": line}, [line], json)
                return 0
            if self_test:
                rates = check_modes.tested(options, progress)
                _say(rates.document(), rates.lines(), json)
                return 0 if rates.sound else 1
            found = check_modes.report(options, progress)
    except (ValueError, WorkerFailedError) as error:
        code = check_modes.exit_code(error)
        check_modes.write_failure(options, str(error))
        if json:
            _print_json({"schema": 1, "exit_code": code, "summary": str(error), "cells": []})
        return _complain(str(error), code)
    if json:
        _print_json(judged.as_json(found))
    else:
        _console().print(judged.table(found))
        print(found.summary)
    if "GITHUB_ACTIONS" in os.environ:
        for line in judged.workflow_commands(found):
            print(line, file=sys.stderr)
    check_modes.write_files(options, found)
    return found.exit_code


@app.command
def plot(run: Path = Path("runs/cost"), *, out: Path | None = None, json: Flag = False) -> int:
    """Say how each architecture grows and where two cross, and draw the figures as SVG and PNG.

    Parameters
    ----------
    run
        Run directory of seqscale cost, or a JSONL file of seqscale export.
    out
        Folder for the figures and summary.md; default: figures in the run directory, or beside the
        file.
    json
        One JSON document on standard output.
    """
    from harness import report, summary
    from harness.plot import NothingToDrawError, draw

    try:
        drawn = draw(run, out, _name_damaged)
    except (NothingToDrawError, FileNotFoundError) as error:
        raise UsageError(str(error)) from None
    paths = list(map(str, drawn.paths))
    if json:
        growth, crossovers = summary.growth(drawn.found), summary.crossovers(drawn.found)
        documents = {"growth": growth, "crossovers": crossovers}
        found = {name: report.documents(table) for name, table in documents.items()}
        _print_json({"figures": paths, **found})
        return 0
    console = _console()
    for table in summary.tables(drawn.found):
        console.print(table)
    if drawn.found:
        console.print(summary.LEGEND, highlight=False, markup=False)
    print("\n".join(paths))
    return 0


@app.command
def counters(
    *,
    op: Names = None,
    sm: Numbers = None,
    triton: Path | None = None,
    json: Flag = False,
) -> int:
    """Count what kernels do, without a GPU: bytes, FLOPs, registers, spills.

    Every implementation runs in Triton's interpreter beside its I/O floor, and is compiled for GPUs
    that are not here. Times are predictions.

    Parameters
    ----------
    op
        Only this operation: attention, ssd, wkv7, long_conv, short_conv.
    sm
        Compile for this GPU only: 80 (A100), 90 (H100), 100 (B200).
    triton
        Compile with the Triton in this folder: pip install --no-deps --target FOLDER triton==3.6.0.
    json
        One JSON document on standard output, the same to the byte wherever versions are the same.
    """
    from harness import counters as counters_module

    def said(done: str) -> None:
        print(f"done: {done}", file=sys.stderr, flush=True)

    try:
        found = counters_module.count(
            op or counters_module.OPS,
            archs=sm or counters_module.ARCHS,
            triton=triton,
            on_finish=said,
        )
    except ValueError as error:
        raise UsageError(str(error)) from None
    if json:
        _print_json(found)
    else:
        console = _console()
        for table in counters_module.tables(found):
            console.print(table)
        print("\n".join(counters_module.notes(found)))
    return 4 if counters_module.faults(found) else 0


@app.command(name="list")
def list_(*, json: Flag = False) -> int:
    """Show what there is to choose from: architectures, presets, levels, phases, types.

    Parameters
    ----------
    json
        One JSON document on standard output.
    """
    from harness import listing

    found = listing.everything()
    _say(found, listing.lines(found), json)
    return 0


@app.command
def doctor(*, json: Flag = False) -> int:
    """Say what works on this machine, and why the rest does not.

    Parameters
    ----------
    json
        One JSON document on standard output.
    """
    from harness import doctor as doctor_module

    checks = doctor_module.examine()
    _say(doctor_module.as_json(checks), doctor_module.lines(checks), json)
    return 0


def _one_sweep(verb: str, sweep: Path | None, preset: str | None) -> None:
    """UsageError unless there is a file or a preset."""
    if sweep is None and preset is None:
        raise UsageError(f"give a sweep file or --preset, as in: seqscale {verb} --preset quick")
    if sweep is not None and preset is not None:
        raise UsageError(
            f"give the sweep file {str(sweep)!r} or --preset, not both (options that take several "
            "values are repeated: --arch mamba2 --arch hyena)"
        )


def _unusable(sweep: Path | None, error: Exception) -> UsageError:
    """What is wrong with a sweep, in a line."""
    if isinstance(error, FileNotFoundError):
        return UsageError(f"{sweep}: no such file")
    if isinstance(error, IsADirectoryError):
        return UsageError(f"{sweep} is a directory: give a TOML file")
    return UsageError(str(error))


def _train(
    kind: type[Training],
    sweep: Path | None,
    preset: str | None,
    instead: dict[str, Any],
    running: dict[str, Any],
    out: Path,
    dry_run: bool,
    as_json: bool,
) -> int:
    """Verbs loss and recall: choose the cells, train them, show what came of them."""
    from harness import sweep as sweep_module
    from harness import trials

    _one_sweep(kind.kind, sweep, preset)
    try:
        running["device"] = sweep_module.resolve_device(running["device"])
        grids = sweep_module.load(sweep, kind) if sweep else trials.preset(kind, str(preset))
        cells = trials.trial_cells(trials.narrowed(grids, **instead), running["device"])
    except (FileNotFoundError, IsADirectoryError, ValueError) as error:
        raise _unusable(sweep, error) from None
    try:
        trials.check_corpora(cells)
        if dry_run:
            return _show_plan(cells, out, as_json)
        from harness.progress import SweepProgress

        with SweepProgress(cells, _console(stderr=True)) as progress:
            table = trials.run(
                cells,
                out,
                **running,
                on_open=progress.opened,
                on_start=progress.started,
                on_finish=progress.finished,
                on_progress=progress.advanced,
            )
    except ValueError as error:
        raise UsageError(str(error)) from None
    return _show_results(table[table["key"].isin([case.key for case in cells])], out, as_json)


def _name_damaged(damaged: Damaged) -> None:
    print(f"left out, no record: {damaged.path}: {damaged.reason}", file=sys.stderr)


def _show_plan(cells: Sequence[Case], out: Path, as_json: bool) -> int:
    """The cells of a sweep with their estimates, and which are recorded already."""
    from harness.estimate import estimate
    from harness.record import load

    if out.is_file():
        raise NotADirectoryError(errno.ENOTDIR, "not a directory", str(out))
    recorded = {m.case.key for m in load(out)[0]} if out.exists() else set()
    plan = [(case, estimate(case), case.key in recorded) for case in cells]
    document = [
        {**case.asked(), "estimated_s": e.seconds, "estimated_bytes": e.bytes, "recorded": known}
        for case, e, known in plan
    ]
    lines = [
        f"{case.label}: about {e.seconds:.2g} s, {e.bytes / 2**20:,.0f} MiB"
        + (" (recorded)" if known else "")
        for case, e, known in plan
    ]
    to_do = [e for _, e, known in plan if not known]
    lines.append(
        f"{len(to_do)} of {len(plan)} cells to measure: roughly "
        f"{sum(e.seconds for e in to_do) / 60:.1f} min on a two-core CPU and up to "
        f"{max((e.bytes for e in to_do), default=0) / 2**20:,.0f} MiB"
    )
    _say({"cells": document}, lines, as_json)
    return 0


def _show_results(table: pd.DataFrame, out: Path, as_json: bool) -> int:
    from harness import report, versus
    from harness.record import FAULTS

    broken = bool(table["status"].isin(FAULTS).any())
    if as_json:
        counts = table["status"].value_counts().to_dict()
        _print_json({"out": str(out), "statuses": counts, "cells": report.documents(table)})
    else:
        console = _console()
        for part in [*report.tables(table), *versus.tables(table)]:
            console.print(part)
        for note in report.notes(table):
            console.print(note, highlight=False, markup=False)
        print(f"records and cells.csv: {out}   fits and figures: seqscale plot {out}")
    return 4 if broken else 0


def _console(*, stderr: bool = False) -> Console:
    """A console as wide as the terminal, or 120 columns in a pipe."""
    from rich.console import Console

    class PipeConsole(Console):
        """Leaves it to `main` that the reader of a pipe left; rich ends with code 1."""

        def on_broken_pipe(self) -> None:
            raise BrokenPipeError

    stream = sys.stderr if stderr else sys.stdout
    return PipeConsole(stderr=stderr, width=None if stream.isatty() else 120)


def _say(document: Any, lines: Sequence[str], as_json: bool) -> None:
    if as_json:
        _print_json(document)
    else:
        print("\n".join(lines))


def _print_json(document: Any) -> None:
    print(json.dumps(document, indent=1, sort_keys=True, allow_nan=False))


class _TerminatedError(KeyboardInterrupt):
    """SIGTERM: not a SystemExit, which a plug-in's import may raise and is forgiven."""


def _terminated(number: int, frame: object) -> None:
    raise _TerminatedError


def main() -> None:
    """Run the command line.

    What the user can mend is one line on standard error: exit code 2 for wrong usage, 5 for the
    machine. Interrupted, it ends with 130 or 143; what was recorded stays.
    """
    _prepare_streams()
    signal.signal(signal.SIGTERM, _terminated)
    warnings.showwarning = _show_warning
    try:
        code = app(sys.argv[1:], console=_console(), exit_on_error=False, print_error=False)
        sys.stdout.flush()
    except CycloptsError as error:
        code = _complain(str(error), 2)
    except UsageError as error:
        code = _complain(str(error), 2)
    except KeyboardInterrupt as stop:
        number = signal.SIGTERM if isinstance(stop, _TerminatedError) else signal.SIGINT
        message = f"stopped by {number.name}: what is recorded stays, a run resumes when asked anew"
        code = _complain(message, 128 + number)
    except BrokenPipeError:  # the reader of a pipe left
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (sys.stdout, sys.stderr):
            os.dup2(nowhere, stream.fileno())
        code = 128 + signal.SIGPIPE
    except (ImportError, MemoryError) as error:
        code = _complain(f"{type(error).__name__}: {error}", 5)
    except OSError as error:
        what = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        code = _complain(what, 5)
    sys.exit(code)


def _prepare_streams() -> None:
    """Standard streams that are there, and that no character can break."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number: this one
    for name, number in (("stdout", 1), ("stderr", 2)):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "w", closefd=False))
        getattr(sys, name).reconfigure(errors="backslashreplace")


def _show_warning(message: Warning | str, *_: object) -> None:
    _complain(f"warning: {message}", 0)


def _complain(message: str, code: int) -> int:
    """One plain line on standard error, whatever is in the message."""
    from harness.worker import one_line

    with contextlib.suppress(OSError):
        print("seqscale:", one_line(message, limit=2000), file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    main()

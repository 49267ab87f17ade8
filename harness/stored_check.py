"""The stored baseline of a device: take it, compare with it, bring it up to date."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from harness import baseline, processes, trees
from harness.baseline import Baseline, BaselineError, RefusedError
from harness.check import CHANGED, PAIRS, OnProcess
from harness.judged import Report, chosen, refuse_unknown, worst_first
from harness.processes import Asked, Listed, Side, Times

FOLDER = Path("results/check")


def measure(
    side: Side,
    names: Sequence[str],
    asked: Asked,
    count: int,
    on_process: OnProcess = lambda what, done, of: None,
    what: str = "measuring",
) -> Times:
    """Time cells in so many processes, each beside anchors; WorkerFailedError where none starts."""
    asked = replace(asked, anchors=True)
    return processes.several(
        side, names, count, asked, on_process=lambda *at: on_process(what, *at)
    )


def check(
    kept: Baseline,
    side: Side,
    listed: Listed,
    asked: Asked,
    pairs: int | None = None,
    on_process: OnProcess = lambda what, done, of: None,
) -> tuple[Report, Times]:
    """The tree as it is beside its baseline; a change must show in fresh processes too.

    Args:
        kept: the baseline.
        side: the tree.
        listed: what is to be measured of it.
        asked: device and threads.
        pairs: processes; None: `harness.check.PAIRS`.
        on_process: called after each process.

    Returns:
        The verdicts, and what the first processes said.

    Raises:
        BaselineError: it is of another device, or of other versions.
        WorkerFailedError: no process starts.
    """
    count = PAIRS[asked.device] if pairs is None else pairs
    refuse_other_place(kept, listed.environment)
    times = measure(side, listed.names, asked, count, on_process)
    report = compare(kept, times, listed.names, asked.device)
    changed = [row.name for row in report.rows if row.verdict in CHANGED]
    if not changed:
        return report, times
    fresh = measure(side, changed, asked, count, on_process, "confirming")
    again = {
        row.name: row
        for row in baseline.judged(baseline.only(kept, changed), fresh, changed, asked.device)
    }
    rows = [again.get(row.name, row) for row in report.rows]
    return replace(report, rows=worst_first(rows)), times


def compare(kept: Baseline, times: Times, names: Sequence[str], device: str) -> Report:
    """What was measured beside a baseline.

    Raises:
        BaselineError: it is of another device, or of other versions.
    """
    if times.cells or times.faults:
        refuse_other_place(kept, times.environment)
    rows = baseline.judged(kept, times, names, device)
    return Report("now beside the stored baseline", rows, about=times.environment)


def refuse_other_place(kept: Baseline, environment: baseline.Environment) -> None:
    """BaselineError where a baseline is of another device than this, or of other versions."""
    if other := baseline.differing(kept, environment):
        raise BaselineError(
            f"the baseline is of another place: {'; '.join(other)}: seqscale check --calibrate "
            "--reason TEXT takes one here"
        )


def place(environment: baseline.Environment, path: Path | None) -> Path:
    """Where the baseline of a device and a file of guards lies where nothing else is said.

    At the top of the repository, or beside the file of guards where there is none, whatever the
    working directory is.
    """
    folder = Path.cwd() if path is None else path.resolve().parent
    try:
        root = trees.repository(folder)
    except ValueError:
        root = folder
    stem = () if path is None else path.resolve().relative_to(root).with_suffix("").parts
    found = root / FOLDER / "-".join((*stem, baseline.file_name(environment)))
    return found.relative_to(Path.cwd()) if found.is_relative_to(Path.cwd()) else found


def calibrate(
    side: Side,
    listed: Listed,
    asked: Asked,
    reason: str,
    pairs: int | None = None,
    on_process: OnProcess = lambda what, done, of: None,
) -> Baseline:
    """A new baseline, with the noise of each cell.

    Args:
        side: whose code.
        listed: what is to be measured of it.
        asked: device and threads.
        reason: why it is taken.
        pairs: half of the processes; None: `harness.check.PAIRS`.
        on_process: called after each process.

    Raises:
        RefusedError: the tree has changes that are not committed, there is no cell, or one fails.
        WorkerFailedError: no process starts.
    """
    commit = clean_commit(side)
    if not listed.names:
        raise RefusedError("there is no cell to take a baseline of")
    count = PAIRS[asked.device] if pairs is None else pairs
    times = measure(side, listed.names, asked, 2 * count, on_process)
    return _taken(times, listed.names, commit, reason)


def update(
    kept: Baseline,
    side: Side,
    listed: Listed,
    asked: Asked,
    reason: str,
    accepted: Sequence[str] = (),
    pairs: int | None = None,
    on_process: OnProcess = lambda what, done, of: None,
) -> tuple[Baseline, list[str]]:
    """The baseline with what moved as it is now, and the names of what was rewritten.

    Args:
        kept: what it was.
        side: whose code.
        listed: what is to be measured of it.
        asked: device and threads.
        reason: why it is rewritten.
        accepted: names or patterns of cells that may be slower, or gone.
        pairs: half of the processes; None: `harness.check.PAIRS`.
        on_process: called after each process.

    Raises:
        BaselineError: it is of another device.
        ValueError: nothing is called as one of `accepted`.
        RefusedError: uncommitted changes, or a red cell that is not accepted.
        WorkerFailedError: no process starts.
    """
    commit = clean_commit(side)
    refuse_other_place(kept, listed.environment)
    refuse_unknown(accepted, [*kept.cells, *listed.names])
    count = PAIRS[asked.device] if pairs is None else pairs
    times = measure(side, listed.names, asked, 2 * count, on_process)
    rows = compare(kept, times, listed.names, asked.device).rows
    spared = chosen([row.name for row in rows], accepted) if accepted else []
    baseline.refuse_red(rows, spared)
    return baseline.updated(kept, _taken(times, listed.names, commit, reason), rows, spared)


def clean_commit(side: Side) -> str:
    """The commit of the code that is guarded.

    Raises:
        RefusedError: it has changes that are not committed, or is in no repository, or git ignores
            the file of guards.
    """
    try:
        commit = trees.commit_of(trees.repository(side.folder), "HEAD")
    except ValueError:
        commit = None
    if side.tree is None or commit is None:
        raise RefusedError(f"{side.folder} has no commit: a baseline says whose code it is")
    if changed := trees.uncommitted(side.tree):
        raise RefusedError(
            f"{side.tree} has changes that are not committed ({', '.join(changed[:3])}): commit "
            "them first"
        )
    if side.path is not None and not trees.is_tracked(side.path):
        raise RefusedError(f"git ignores {side.path}: a baseline is of a commit; commit it first")
    return commit


def _taken(times: Times, names: Sequence[str], commit: str, reason: str) -> Baseline:
    utc = datetime.now(UTC).isoformat(timespec="seconds")
    return baseline.taken(times, names, commit, utc, reason)

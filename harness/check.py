"""Two trees side by side: whether one is slower. `seqscale check --ab`.

Pairs of processes, a change confirmed in fresh ones: the standard by which other modes are judged.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

from harness import processes, trees, verdicts
from harness.judged import Report, Row, chosen, refuse_unknown, worst_first
from harness.processes import Asked, Side, Times
from harness.verdicts import Verdict

PAIRS = {"cpu": 12, "cuda": 7}
CHANGED = (Verdict.REGRESSION, Verdict.IMPROVEMENT)
UNCONFIRMED = "not confirmed"
OnProcess = Callable[[str, int, int], None]  # what for, how many are done, of how many


def ab(
    reference: str,
    path: Path | None,
    asked: Asked,
    *,
    cells: Sequence[str] = (),
    pairs: int | None = None,
    on_process: OnProcess = lambda what, done, of: None,
) -> Report:
    """The working tree beside a commit.

    The cells are those of the working tree; those that only the commit has are missing.

    Args:
        reference: a commit, branch or tag of the git repository around the file of guards, or else
            around the working directory.
        path: a file of guards; None: what is guarded without one.
        asked: device and threads.
        cells: names, or patterns such as "ssd*"; none: all.
        pairs: of processes; None: `PAIRS`.
        on_process: called after each process.

    Raises:
        ValueError: no repository or commit, no cell of such a name, too few pairs, or a side runs
            code of the other.
        WorkerFailedError: no process starts.
    """
    with trees.working(path) as working, trees.beside(working, reference) as (old, new):
        known, environment = processes.listed(new, asked)
        root = trees.repository(new.folder)
        gone = [name for name in _names_of(old, asked) if name not in known]
        about = {
            **environment,
            "reference": reference,
            "reference_commit": trees.commit_of(root, reference),
            "commit": trees.commit_of(root, "HEAD"),
            "uncommitted": trees.uncommitted(root),
        }
        refuse_unknown(cells, [*known, *gone])
        rows = compare(old, new, chosen(known, cells), asked, pairs, on_process)
    missing = [
        Row(name=name, verdict=Verdict.MISSING, why=f"{reference} has it, and now it is gone")
        for name in chosen(gone, cells)
    ]
    title = f"now beside {reference}"
    if new.path is not None and old.path == new.path:
        title += f", which has no {new.path.name}: both run this one"
    return Report(title, worst_first([*rows, *missing]), about)


def compare(
    old: Side,
    new: Side,
    cells: Sequence[str],
    asked: Asked,
    pairs: int | None = None,
    on_process: OnProcess = lambda what, done, of: None,
) -> list[Row]:
    """The cells of two sides; those that seem to have changed are measured again in fresh pairs.

    Raises:
        ValueError: too few pairs.
        WorkerFailedError: no process starts.
    """
    count = PAIRS[asked.device] if pairs is None else pairs
    if count < verdicts.FEWEST:
        raise ValueError(f"a verdict needs {verdicts.FEWEST} pairs of processes, got {count}")

    def measured(what: str, names: Sequence[str]) -> tuple[Times, Times]:
        return processes.pairs(
            old, new, names, count, asked, on_process=lambda done, of: on_process(what, done, of)
        )

    if not cells:
        return []
    first = measured("comparing", cells)
    rows = {name: judged(name, *first, asked.device) for name in cells}
    doubtful = [name for name, row in rows.items() if _beyond(row)]
    if doubtful:
        second = measured("confirming", doubtful)
        for name in doubtful:
            again = judged(name, *second, asked.device)
            before, after = (a.joined(b, name) for a, b in zip(first, second, strict=True))
            rows[name] = confirmed(rows[name], again, judged(name, before, after, asked.device))
    return list(rows.values())


def judged(name: str, old: Times, new: Times, device: str) -> Row:
    """What became of a cell that processes of both sides timed."""
    before, after = old.ms(name), new.ms(name)
    if name in new.faults:
        return Row(name=name, verdict=Verdict.FAILED, why=": ".join(new.faults[name]))
    if name in old.faults:
        why = ": ".join(old.faults[name])
        if not before:
            why = f"the old code cannot run it: {why}"
            return Row(name=name, verdict=Verdict.NEW, new_ms=median(after), why=why)
        return Row(name=name, verdict=Verdict.FAILED, why=f"the old code failed once: {why}")
    for value in (*before, *after):
        if (why := verdicts.invalid(value)) is not None:
            return Row(name=name, verdict=Verdict.FAILED, why=why)
    noise = verdicts.pair_noise(before, after)
    found = verdicts.change(before, after)
    limit = verdicts.limit(median(before), noise, device)
    watched = verdicts.tracked_only(median(before), noise, device)
    return Row(
        name=name,
        verdict=verdicts.verdict(found, limit, watched=watched is not None),
        change=found,
        old_ms=median(before),
        new_ms=median(after),
        noise=noise,
        limit=limit,
        why=watched or "",
    )


def confirmed(first: Row, again: Row, both: Row) -> Row:
    """A cell that was beyond what counts, once it was measured again.

    Args:
        first: changed, inconclusive, or watched.
        again: in fresh pairs.
        both: all pairs together.

    Returns:
        Of a change what the fresh pairs say alone; of a cell that was inconclusive, or that was too
        noisy in either round, what all of them say, a change only where the fresh ones too are
        beyond what counts.
    """
    said = f"{first.verdict} {first.change.ratio:.3f}" if first.change else str(first.verdict)
    if again.verdict == Verdict.NEW:  # it ran before
        return replace(again, verdict=Verdict.FAILED, why=f"{said} before; {again.why}")
    if again.verdict == Verdict.FAILED:
        return again
    if first.verdict in CHANGED and again.verdict != Verdict.TRACK_ONLY:
        if again.verdict == first.verdict:
            return again
        return replace(again, why=f"{UNCONFIRMED}: {said} before; {again.why}".rstrip("; "))
    if both.verdict in CHANGED and not (_beyond(again) and _slower(again) == _slower(both)):
        return replace(both, verdict=Verdict.INCONCLUSIVE)
    return both


def _beyond(row: Row) -> bool:
    """Whether a cell's estimate is beyond what counts."""
    if row.change is None or row.limit is None:
        return False
    return not 1 / row.limit <= row.change.ratio <= row.limit


def _slower(row: Row) -> bool:
    return row.change is not None and row.change.ratio > 1


def _names_of(old: Side, asked: Asked) -> list[str]:
    """The cells of a commit, of which this harness need not know; none where it has no list.

    Raises:
        ValueError: it has one that cannot be read.
        WorkerFailedError: no process starts.
    """
    if old.path is None:
        if old.tree is None or not (old.tree / "harness" / "guards.py").is_file():
            return []
        return processes.listed(
            replace(old, first=old.first[1:]), asked
        ).names  # with its own harness
    if old.tree is None or not old.path.is_relative_to(old.tree):
        return []
    return processes.listed(old, asked).names

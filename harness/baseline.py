"""Stored baselines: what each cell took on one device, as a ratio to an anchor timed beside it.

A baseline is a file a device. It is compared with processes of another day, so its numbers are
ratios: of a cell's time to that of the anchor (`harness.guard_times`) that it varied least beside.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from harness import verdicts
from harness.environment import FINGERPRINT
from harness.judged import Row, chosen, worst_first
from harness.processes import Times
from harness.record import write_atomically
from harness.verdicts import Verdict

SCHEMA = 1
ANCHORS = ("matmul", "copy")
LEAST_CHANGE = 0.10  # of a ratio to an anchor: below it no change counts
MOVED = 1 / 3  # of what counts: what moved less is left as it is by an update
Environment = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Kept:
    """What a baseline holds of a cell.

    Attributes:
        anchor: of `ANCHORS`.
        ratios: of the cell's time to the anchor's, one a process.
        ms: median of the cell's times.
        floor: noise of the ratio against itself, as a share.
        commit: whose code it is.
        utc: when.
        reason: why it was taken.
        before: what stood here before: median ratio, commit, reason.
    """

    anchor: str
    ratios: tuple[float, ...]
    ms: float
    floor: float
    commit: str | None
    utc: str
    reason: str
    before: Mapping[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """The cells of one device."""

    fingerprint: Mapping[str, Any]
    cells: Mapping[str, Kept | str]  # a word where a cell's entry is none: why


class BaselineError(ValueError):
    """There is nothing to compare with; the message says why."""


class RefusedError(ValueError):
    """A baseline that must not be written; the message says why."""


def file_name(environment: Environment) -> str:
    """The file of a device's baseline: its name, threads and versions in letters and digits."""
    said = f"{environment['device']} {environment['threads']}t torch {environment['torch']}"
    return re.sub(r"[^a-z0-9.]+", "-", said.lower()).strip("-") + ".json"


def differing(baseline: Baseline, environment: Environment) -> list[str]:
    """What of the device and its software is not as it was: "torch 2.13.0, not 2.11.0"."""
    return [
        f"{key} {environment.get(key)}, not {baseline.fingerprint.get(key)}"
        for key in FINGERPRINT
        if environment.get(key) != baseline.fingerprint.get(key)
    ]


def read_document(path: Path, *, missing: str, damaged: str) -> dict[str, Any]:
    """The object that a JSON file holds.

    Args:
        path: of the file.
        missing: what to say where there is none.
        damaged: what to say of one that holds no object.

    Raises:
        BaselineError: so.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BaselineError(missing) from None
    except (OSError, ValueError, RecursionError) as error:
        raise BaselineError(f"{path} {damaged}: {error}") from None
    if not isinstance(found, dict):
        raise BaselineError(f"{path} {damaged}")
    return found


def load(path: Path) -> Baseline:
    """Read a baseline; a cell whose numbers cannot be stays, with the reason.

    Raises:
        BaselineError: no such file, or it is no baseline.
    """
    found = read_document(
        path,
        missing=f"there is no baseline {path}: --calibrate --reason TEXT with the same command "
        "takes it",
        damaged="is no baseline, or only part of one",
    )
    if found.get("schema") != SCHEMA:
        schema = found.get("schema")
        raise BaselineError(f"{path} is no baseline of schema {SCHEMA}: it says {schema!r}")
    if not isinstance(found.get("cells"), dict) or not isinstance(found.get("fingerprint"), dict):
        raise BaselineError(f"{path} is no baseline: it lacks cells or fingerprint")
    cells = {name: _kept(entry) for name, entry in found["cells"].items()}
    return Baseline(fingerprint=found["fingerprint"], cells=cells)


def only(baseline: Baseline, patterns: Sequence[str]) -> Baseline:
    """The baseline of the cells of some names or patterns; of all where there are none."""
    names = chosen(list(baseline.cells), patterns)
    return replace(baseline, cells={name: baseline.cells[name] for name in names})


def gating(baseline: Baseline, device: str) -> list[str]:
    """The cells that may stop somebody."""
    return [
        name
        for name, kept in baseline.cells.items()
        if isinstance(kept, Kept) and not verdicts.tracked_only(kept.ms, kept.floor, device)
    ]


def save(baseline: Baseline, path: Path) -> None:
    """Write a baseline, sorted, whole or not at all."""
    cells = {name: asdict(kept) for name, kept in baseline.cells.items() if isinstance(kept, Kept)}
    said = {"schema": SCHEMA, "fingerprint": dict(baseline.fingerprint), "cells": cells}
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(said, indent=1, sort_keys=True, allow_nan=False)
    write_atomically(path, text + "\n")


def _kept(entry: Any) -> Kept | str:
    """A cell's entry, or why it is none."""
    if not isinstance(entry, dict):
        return f"the baseline has {entry!r} for it"
    if lacking := [f.name for f in fields(Kept) if f.name not in entry and f.name != "before"]:
        return f"the baseline lacks its {', '.join(lacking)}"
    values = entry["ratios"]
    if entry["anchor"] not in ANCHORS:
        return f"the baseline has the anchor {entry['anchor']!r}"
    if not isinstance(values, list) or len(values) < verdicts.FEWEST:
        return f"the baseline has fewer than {verdicts.FEWEST} ratios"
    for value in (*values, entry["ms"]):
        if verdicts.invalid(value):
            return f"the baseline has {value!r} among its numbers"
    floor = entry["floor"]
    if isinstance(floor, bool) or not isinstance(floor, int | float) or not 0 <= floor < 10:
        return f"the baseline has {floor!r} for its floor"
    for name in ("commit", "utc", "reason"):
        if not isinstance(entry[name], str) and (name, entry[name]) != ("commit", None):
            return f"the baseline has {entry[name]!r} for its {name}"
    known = {f.name: entry.get(f.name) for f in fields(Kept)}
    return Kept(**{**known, "ratios": tuple(values)})


def judged(baseline: Baseline, now: Times, names: Sequence[str], device: str) -> list[Row]:
    """What became of every cell of the baseline and of those that were measured.

    Args:
        baseline: what it was.
        now: what it is.
        names: of the cells that exist.
        device: "cpu" or "cuda".
    """
    gone = [name for name in baseline.cells if name not in names]
    rows = [_row(name, baseline.cells.get(name), now, device) for name in names]
    rows += [
        Row(name=name, verdict=Verdict.MISSING, why="the baseline has it, and now it is gone")
        for name in gone
    ]
    return worst_first(rows)


def _row(name: str, kept: Kept | str | None, now: Times, device: str) -> Row:
    if name in now.faults:
        return Row(name=name, verdict=Verdict.FAILED, why=": ".join(now.faults[name]))
    if isinstance(kept, str):
        return Row(name=name, verdict=Verdict.FAILED, why=kept)
    times = now.ms(name)
    for value in times:
        if (why := verdicts.invalid(value)) is not None:
            return Row(name=name, verdict=Verdict.FAILED, why=why)
    if len(times) < verdicts.FEWEST:
        why = f"{len(times)} processes: a verdict needs {verdicts.FEWEST}"
        return Row(name=name, verdict=Verdict.FAILED, why=why)
    if kept is None:
        why = "the baseline has it not: seqscale check --update --reason TEXT adds it"
        return Row(name=name, verdict=Verdict.NEW, new_ms=median(times), why=why)
    ratios = _ratios(now, name, kept.anchor)
    for value in ratios:
        if (why := verdicts.invalid(value)) is not None:
            return Row(name=name, verdict=Verdict.FAILED, why=f"beside its anchor: {why}")
    found = verdicts.shift(kept.ratios, ratios)
    limit = max(1 + LEAST_CHANGE, verdicts.limit(kept.ms, kept.floor, device))
    watched = verdicts.tracked_only(kept.ms, kept.floor, device)
    return Row(
        name=name,
        verdict=verdicts.verdict(found, limit, watched=watched is not None),
        change=found,
        old_ms=kept.ms,
        new_ms=median(times),
        noise=kept.floor,
        limit=limit,
        why=watched or "",
    )


def taken(now: Times, names: Sequence[str], commit: str | None, utc: str, reason: str) -> Baseline:
    """A baseline of what processes of the same code said.

    Raises:
        RefusedError: a cell failed, or was timed in too few processes.
    """
    cells: dict[str, Kept | str] = {}
    for name in names:
        if name in now.faults:
            raise RefusedError(f"{name}: {': '.join(now.faults[name])}: mend it first")
        times = now.ms(name)
        if len(times) < 2 * verdicts.FEWEST:
            raise RefusedError(
                f"{name}: {len(times)} processes; its noise needs {2 * verdicts.FEWEST}"
            )
        by_anchor = {anchor: _ratios(now, name, anchor) for anchor in ANCHORS}
        anchor = min(ANCHORS, key=lambda a: float(np.std(np.log(by_anchor[a]))))
        cells[name] = Kept(
            anchor=anchor,
            ratios=tuple(by_anchor[anchor]),
            ms=median(times),
            floor=verdicts.shift_noise(by_anchor[anchor]),
            commit=commit,
            utc=utc,
            reason=reason,
        )
    return Baseline(fingerprint={key: now.environment.get(key) for key in FINGERPRINT}, cells=cells)


def refuse_red(rows: Sequence[Row], accepted: Sequence[str] = ()) -> None:
    """RefusedError for the first red cell of `judged` that is not accepted."""
    for row in rows:
        if row.verdict in verdicts.RED and row.name not in accepted:
            why = f" ({row.why})" if row.why else ""
            raise RefusedError(
                f"{row.name} is {row.verdict}{why}: a red check updates nothing; mend it, or name "
                "it after --accept"
            )


def updated(
    baseline: Baseline, fresh: Baseline, rows: Sequence[Row], accepted: Sequence[str] = ()
) -> tuple[Baseline, list[str]]:
    """The baseline with the cells that moved, are new or are gone, and their names.

    A cell that is slower, by however little, stays as it was unless it is accepted: else a baseline
    would creep.

    Args:
        baseline: what it was.
        fresh: what it is.
        rows: of `judged`.
        accepted: names of cells that may be slower.
    """
    cells, changed = dict(baseline.cells), []
    for row in rows:
        old, new = baseline.cells.get(row.name), fresh.cells.get(row.name)
        if isinstance(old, Kept) and isinstance(new, Kept):
            if not _moved(row, slower=row.name in accepted):
                continue
            before = {"ratio": median(old.ratios), "commit": old.commit, "reason": old.reason}
            cells[row.name] = replace(new, before=before)
        elif new is not None:
            cells[row.name] = new
        else:
            cells.pop(row.name)
        changed.append(row.name)
    return replace(baseline, cells=cells), changed


def _moved(row: Row, *, slower: bool) -> bool:
    """Whether a cell is surely off, and by a third of what counts or more; slower only if asked."""
    if row.change is None or row.limit is None:
        return False
    surely = row.change.high < 1 or (slower and row.change.low > 1)
    return surely and abs(math.log(row.change.ratio)) > MOVED * math.log(row.limit)


def _ratios(now: Times, name: str, anchor: str) -> list[float]:
    """Of a cell's time to an anchor's, in each process; NaN where that can be no time."""
    found = []
    for metrics in now.cells[name]:
        beside = metrics.get(f"{anchor}_ms")
        known = verdicts.invalid(beside) is None
        found.append(metrics["cell_ms"] / float(beside or 0) if known else math.nan)
    return found

"""The check checked: how often it cries wolf, and what it finds.

Code is compared with itself, many times over, and with itself made slower by a known share. The
rates are over cells that gate; how many do is reported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

from harness import check, processes, verdicts
from harness.check import OnProcess
from harness.judged import Row, chosen, refuse_unknown
from harness.processes import Asked, Side
from harness.verdicts import Verdict

CELLS = 200  # compared with themselves, at least
SHARES = (0.2, 0.1)  # by which code is made slower
CERTAIN = 0.2  # of these, what must be found in every cell
QUIET = (Verdict.SAME, Verdict.INCONCLUSIVE, Verdict.TRACK_ONLY)


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What a self-test saw.

    Attributes:
        cells: names of all cells.
        rows: how often one was compared with itself.
        gating: how often it gated then; what follows is of these.
        alarms: names of all that were anything but the same, inconclusive or watched, once
            confirmed.
        unconfirmed: how many seemed to have changed, and did not when measured again.
        inconclusive: how many were inconclusive.
        slowed: by share of slow-down, how many cells that gated were made slower.
        missed: by share, those of them that were not found slower.
        noise: of each cell against itself, medians.
    """

    cells: Sequence[str]
    rows: int
    gating: int
    alarms: Sequence[str]
    unconfirmed: int
    inconclusive: int
    slowed: Mapping[float, int]
    missed: Mapping[float, Sequence[str]]
    noise: Mapping[str, float]

    @property
    def sound(self) -> bool:
        """No false alarm, and every certain slow-down found."""
        return self.slowed[CERTAIN] > 0 and not self.alarms and not self.missed[CERTAIN]

    def document(self) -> dict[str, Any]:
        """For programs."""
        by_share = {
            name: {f"{share:g}": value for share, value in found.items()}
            for name, found in (("slowed", self.slowed), ("missed", self.missed))
        }
        return {**asdict(self), **by_share, "sound": self.sound}

    def lines(self) -> list[str]:
        """For people."""
        said = [
            f"{len(self.cells)} cells, compared {self.rows} times in all: {self.gating} gated "
            f"({self.gating / self.rows:.0%})",
            f"against itself: {len(self.alarms)} false alarms in {self.gating} "
            f"({self.unconfirmed} more were not confirmed), {self.inconclusive} inconclusive",
            *(f"false alarm: {name}" for name in self.alarms),
        ]
        for share, count in self.slowed.items():
            missed = self.missed[share]
            found = f"made {share:.0%} slower: {count - len(missed)} of {count} found"
            said.append("; not ".join([found, *missed]))
        noisy = sorted(self.noise.values())
        said.append(f"noise against itself: median {median(noisy):.1%}, largest {noisy[-1]:.1%}")
        return [*said, "sound" if self.sound else "NOT SOUND"]


def run(
    side: Side,
    asked: Asked,
    patterns: Sequence[str] = (),
    *,
    pairs: int | None = None,
    compared: int = CELLS,
    on_process: OnProcess = lambda what, done, of: None,
) -> Rates:
    """Compare code with itself until so many cells gated, then with itself made slower.

    Args:
        side: the code.
        asked: device and threads.
        patterns: names or patterns of cells; none: all.
        pairs: of processes in each comparison; None: as a check has.
        compared: gating cells to compare with themselves, at least.
        on_process: called after each process.

    Raises:
        ValueError: no cell is called so, or none gates.
        WorkerFailedError: no process starts.
    """
    known = processes.listed(side, asked).names
    if not known:
        raise ValueError("there is no cell")
    refuse_unknown(patterns, known)
    cells = chosen(known, patterns)

    def against(other: Side, what: str) -> list[Row]:
        return check.compare(
            side, other, cells, asked, pairs, lambda step, *at: on_process(f"{what}, {step}", *at)
        )

    def gating_of(rows: Sequence[Row]) -> list[Row]:
        return [row for row in rows if _gates(row, asked.device)]

    rows: list[Row] = []
    while (gating := len(gating_of(rows))) < compared:
        again = replace(side, name="now again")
        rows += against(again, f"against itself, {gating} of {compared} cells")
        if not gating_of(rows):
            raise ValueError(f"no cell gates here: {'; '.join(row.why for row in rows[:3])}")
    slowed, missed = {}, {}
    for share in SHARES:
        name = f"{share:.0%} slower"
        found = gating_of(against(replace(side, name=name, slowed=share), name))
        slowed[share] = len(found)
        missed[share] = [row.name for row in found if row.verdict != Verdict.REGRESSION]
    noise = {name: [r.noise for r in rows if r.name == name and r.noise] for name in cells}
    return Rates(
        cells=cells,
        rows=len(rows),
        gating=gating,
        alarms=[row.name for row in rows if row.verdict not in QUIET],
        unconfirmed=sum(row.why.startswith(check.UNCONFIRMED) for row in rows),
        inconclusive=sum(row.verdict == Verdict.INCONCLUSIVE for row in rows),
        slowed=slowed,
        missed=missed,
        noise={name: median(shares) for name, shares in noise.items() if shares},
    )


def _gates(row: Row, device: str) -> bool:
    """Whether a cell is one of the rates: a noisy one that its bounds give away is no find."""
    return row.old_ms is None or verdicts.tracked_only(row.old_ms, row.noise, device) is None

"""Processes that time guarded cells, one after another: each gives one number a cell.

A side is code: a tree that its processes import first. Old and new take turns, ABBA, so that drift
meets both alike. A cell that fails on a side is left out of that side's further processes; one that
kills its process costs that process alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from harness.run import Worker, WorkerFailedError

LIST_LIMIT_S = 120.0


@dataclass(frozen=True, kw_only=True)
class Side:
    """The code of one side.

    Attributes:
        name: in messages: a commit, or "now".
        path: a file of guards; None: what is guarded without one.
        first: folders that its processes import from before any other.
        folder: their working directory.
        tree: what they measure must come from it; None: from anywhere.
        other: and nothing of it from here.
        slowed: share of its time that every call takes longer, to test the check.
    """

    name: str
    path: Path | None = None
    first: tuple[Path, ...] = ()
    folder: Path = Path()
    tree: Path | None = None
    other: Path | None = None
    slowed: float = 0.0

    @property
    def code(self) -> dict[str, str | None]:
        """What its processes are told of it."""
        places = {"path": self.path, "tree": self.tree, "other": self.other}
        return {name: place and str(place) for name, place in places.items()}


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What every process does.

    Attributes:
        device: "cpu" or "cuda".
        threads: CPU threads for PyTorch; None: as it is.
        anchors: whether to time anchors in turn with each cell.
        time_limit_s: for one cell.
    """

    device: str = "cpu"
    threads: int | None = None
    anchors: bool = False
    time_limit_s: float = 120.0


@dataclass
class Times:
    """What a side's processes said.

    Attributes:
        cells: of each cell, the metrics of each process, in order.
        faults: of each cell that failed, status and reason.
        environment: of the last process.
    """

    cells: dict[str, list[Mapping[str, float]]] = field(default_factory=dict)
    faults: dict[str, tuple[str, str]] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)

    def ms(self, name: str) -> list[float]:
        """Milliseconds of a cell in each process."""
        return [metrics["cell_ms"] for metrics in self.cells.get(name, [])]

    def joined(self, more: Times, name: str) -> Times:
        """What the processes of both said of a cell."""
        cells = {name: [*self.cells.get(name, []), *more.cells.get(name, [])]}
        return Times(cells=cells, faults={**self.faults, **more.faults})


class Listed(NamedTuple):
    """What a side has, and where it runs."""

    names: list[str]
    environment: Mapping[str, Any]


def listed(side: Side, asked: Asked) -> Listed:
    """The cells of a side; device, software and threads of its processes.

    Raises:
        ValueError: they cannot be listed; the message says why.
        WorkerFailedError: no process starts.
    """
    with _worker(side, asked) as worker:
        reply = worker.ask(LIST_LIMIT_S, "guards", code=side.code)
        environment = worker.environment
    if reply["status"] != "ok":
        raise ValueError(f"{side.name}: {reply['reason']}")
    return Listed(reply["metrics"]["names"], environment)


def run(
    side: Side,
    cells: Sequence[str],
    asked: Asked,
    into: Times,
    *,
    checked: bool = False,
) -> None:
    """Time cells once, in a process of their own; what failed before is left out.

    Raises:
        ValueError: a cell ran code that is not of this side.
        WorkerFailedError: no process starts.
    """
    left = [name for name in cells if name not in into.faults]
    while left:
        with _worker(side, asked) as worker:
            into.environment = worker.environment
            while left:
                name = left.pop(0)
                try:
                    reply = worker.ask(
                        asked.time_limit_s,
                        "guard",
                        name=name,
                        code=side.code,
                        anchors=asked.anchors,
                        checked=checked,
                        slowed=side.slowed,
                    )
                except WorkerFailedError as failure:
                    into.faults[name] = (failure.status, str(failure))
                    break  # the others go on in another process
                if reply["status"] == "elsewhere":
                    raise ValueError(f"{name}, {side.name}: {reply['reason']}")
                if reply["status"] == "ok":
                    into.cells.setdefault(name, []).append(reply["metrics"])
                else:
                    into.faults[name] = (reply["status"], reply["reason"])


def several(
    side: Side,
    cells: Sequence[str],
    count: int,
    asked: Asked,
    *,
    on_process: Callable[[int, int], None] = lambda done, of: None,
) -> Times:
    """Time cells in so many processes; the first and the last compare results too."""
    found = Times()
    for process in range(count):
        run(side, cells, asked, found, checked=process in (0, count - 1))
        on_process(process + 1, count)
    return found


def pairs(
    old: Side,
    new: Side,
    cells: Sequence[str],
    count: int,
    asked: Asked,
    *,
    on_process: Callable[[int, int], None] = lambda done, of: None,
) -> tuple[Times, Times]:
    """Time cells in `count` pairs of processes, in turn: old and new, new and old.

    The first process of each side compares every result with what it should be, and so does the
    last. A cell that fails on one side is not timed on the other any longer.
    """
    found = {old: Times(), new: Times()}
    for pair in range(count):
        order = (old, new) if pair % 2 == 0 else (new, old)
        for turn, side in enumerate(order):
            failed = {name for times in found.values() for name in times.faults}
            left = [name for name in cells if name not in failed or pair == 0]
            run(side, left, asked, found[side], checked=pair in (0, count - 1))
            on_process(2 * pair + turn + 1, 2 * count)
    return found[old], found[new]


@contextmanager
def _worker(side: Side, asked: Asked) -> Iterator[Worker]:
    worker = Worker(asked.device, asked.threads, first=side.first, folder=side.folder)
    try:
        yield worker
    finally:
        worker.kill()

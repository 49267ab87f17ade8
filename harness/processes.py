"""Processes that time guarded cells, one after another: each gives one number a cell.

A side is code: a tree that its processes import first. A pair is an old and a new process that live
at the same time and time each cell one right after the other, the order turned from pair to pair: a
shared machine changes its speed within seconds, and so it meets both alike. A cell that fails on a
side is left out of that side's further processes; one that kills its process costs that process
alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
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


class _Process:
    """A process of a side; another in its place where a cell has killed it.

    Args:
        side: whose code.
        asked: what it does.
        into: where what it says goes.
    """

    def __init__(self, side: Side, asked: Asked, into: Times) -> None:
        self._side, self._asked, self._into = side, asked, into
        self._worker: Worker | None = None

    def start(self) -> Worker:
        """It, started if it is not running; WorkerFailedError if it does not start."""
        if self._worker is None:
            side, asked = self._side, self._asked
            self._worker = Worker(asked.device, asked.threads, first=side.first, folder=side.folder)
            self._into.environment = self._worker.environment
        return self._worker

    def time(self, name: str, *, checked: bool) -> None:
        """Time a cell, unless it failed before.

        Raises:
            ValueError: it ran code that is not of this side.
            WorkerFailedError: no process starts.
        """
        side, asked, into = self._side, self._asked, self._into
        if name in into.faults:
            return
        worker = self.start()
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
            self._worker = None  # the others go on in another process
            return
        if reply["status"] == "elsewhere":
            raise ValueError(f"{name}, {side.name}: {reply['reason']}")
        if reply["status"] == "ok":
            into.cells.setdefault(name, []).append(reply["metrics"])
        else:
            into.faults[name] = (reply["status"], reply["reason"])

    def end(self) -> None:
        """Kill it, if it runs."""
        if self._worker is not None:
            self._worker.kill()
            self._worker = None


def listed(side: Side, asked: Asked) -> Listed:
    """The cells of a side; device, software and threads of its processes.

    Raises:
        ValueError: they cannot be listed; the message says why.
        WorkerFailedError: no process starts.
    """
    with _process(side, asked, Times()) as process:
        worker = process.start()
        reply = worker.ask(LIST_LIMIT_S, "guards", code=side.code)
    if reply["status"] != "ok":
        raise ValueError(f"{side.name}: {reply['reason']}")
    return Listed(reply["metrics"]["names"], worker.environment)


def several(
    side: Side,
    cells: Sequence[str],
    count: int,
    asked: Asked,
    *,
    on_process: Callable[[int, int], None] = lambda done, of: None,
) -> Times:
    """Time cells in so many processes; the first and the last also check results and origin.

    Raises:
        ValueError: a cell ran code that is not of this side.
        WorkerFailedError: no process starts.
    """
    found = Times()
    for done in range(count):
        with _process(side, asked, found) as process:
            for name in cells:
                process.time(name, checked=done in (0, count - 1))
        on_process(done + 1, count)
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

    The first process of each side compares every result with what it should be, and looks where
    its code came from, and so does the last. A cell that fails on one side is not timed on the
    other any longer.

    Raises:
        ValueError: a cell ran code that is not of its side.
        WorkerFailedError: no process starts.
    """
    found = {old: Times(), new: Times()}
    # A worker dies with the thread that started it: these outlive all of them.
    with ThreadPoolExecutor(2) as starters:
        for pair in range(count):
            order = (old, new) if pair % 2 == 0 else (new, old)
            checked = pair in (0, count - 1)
            with ExitStack() as stack:
                both = [stack.enter_context(_process(s, asked, found[s])) for s in order]
                list(starters.map(_Process.start, both))
                for name in cells:
                    if any(name in times.faults for times in found.values()):
                        continue
                    for process in both:
                        process.time(name, checked=checked)
            on_process(2 * (pair + 1), 2 * count)
    return found[old], found[new]


@contextmanager
def _process(side: Side, asked: Asked, into: Times) -> Iterator[_Process]:
    process = _Process(side, asked, into)
    try:
        yield process
    finally:
        process.end()

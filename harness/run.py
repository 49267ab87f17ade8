"""Runs cells: a supervised worker process, a time limit, a record whatever happens, resume.

The worker is used again while it is healthy and replaced after the first fault, so that one cell
cannot spoil the next. The supervisor touches no tensor: it survives what a cell does.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from harness import versus
from harness.environment import code_hash, same_place
from harness.record import AGAIN, FAULTS, OURS, Case, Measurement, RunDirectory, write_atomically
from harness.worker import OUT_OF_MEMORY, one_line

if TYPE_CHECKING:
    import pandas as pd

MAX_THREADS = 4096
MAX_LIMIT_S = 30 * 24 * 3600
START_LIMIT_S = 300  # to import PyTorch from a slow disk, or to measure the ceilings
KEPT_OUTPUT_BYTES = 16_384  # of what a worker prints
HEALTHY = frozenset({"ok", "unsupported", "diverged"})


OnProgress = Callable[[float], None]  # the share of a cell that is done


class WorkerFailedError(ChildProcessError):
    """The process that measures died or hung; `status` and the message say how."""

    def __init__(self, status: str, reason: str, detail: str) -> None:
        super().__init__(reason)
        self.status, self.detail = status, detail


class Worker:
    """One process that measures, in a process group of its own.

    Args:
        device: "cpu" | "cuda".
        threads: CPU threads for PyTorch; None: as it is.
        first: folders that it imports from before any other.
        folder: its working directory.

    Raises:
        WorkerFailedError: it does not start.
    """

    def __init__(
        self,
        device: str,
        threads: int | None,
        *,
        first: Sequence[Path] = (),
        folder: Path = Path(),
    ) -> None:
        request_out, self._requests = os.pipe()
        self._replies, reply_in = os.pipe()
        self._received = bytearray()
        self._printed = bytearray()
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", "from harness.worker import main; main()"]
            + [str(number) for number in (os.getpid(), request_out, reply_in)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=(request_out, reply_in),
            start_new_session=True,
            env=child_environment(first),
            cwd=folder,
        )
        os.close(request_out)
        os.close(reply_in)
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()
        self.environment = self.ask(START_LIMIT_S, "prepare", device=device, threads=threads)

    def ask(
        self,
        limit_s: float,
        verb: str,
        on_progress: OnProgress = lambda share: None,
        **request: Any,
    ) -> dict[str, Any]:
        """The reply to a request; `on_progress` is told of the share that is done, where it says.

        Raises:
            WorkerFailedError: it died, or did not reply within `limit_s`; it is gone then.
        """
        oom_kills = _oom_kills()
        with contextlib.suppress(BrokenPipeError):  # it is dead: the missing reply will tell
            os.write(self._requests, json.dumps({"verb": verb, **request}).encode() + b"\n")
        deadline = time.monotonic() + limit_s
        try:
            while (reply := self._reply(on_progress)) is None:
                remaining = deadline - time.monotonic()
                if remaining <= 0 or not select.select([self._replies], [], [], remaining)[0]:
                    self.kill()
                    reason = f"no result within {limit_s:g} s"
                    raise WorkerFailedError("timeout", reason, self._output())
                if not (part := os.read(self._replies, 1 << 20)):
                    raise self._death(_oom_kills() > oom_kills)
                self._received += part
        except BaseException:
            self.kill()
            raise
        return reply

    def _reply(self, on_progress: OnProgress) -> dict[str, Any] | None:
        """The reply, if it has come; what came before it is passed on."""
        while b"\n" in self._received:
            line, _, rest = bytes(self._received).partition(b"\n")
            self._received = bytearray(rest)
            said = json.loads(line)
            if "progress" not in said:
                return said
            on_progress(said["progress"])
        return None

    def kill(self) -> None:
        """Kill the whole process group; it holds nothing that would be missed."""
        self._close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=30)  # one stuck in a driver stays: no more can be done
        self._listener.join(timeout=1)

    def _close(self) -> None:
        for pipe in ("_requests", "_replies"):
            if (number := getattr(self, pipe)) is not None:
                os.close(number)
                setattr(self, pipe, None)

    def _death(self, oom_killed: bool) -> WorkerFailedError:
        """What the end of the process means, from its exit status and last words."""
        self.process.wait()
        self._listener.join(timeout=1)
        code, output = self.process.returncode, self._output()
        if code == -signal.SIGKILL and oom_killed:
            return WorkerFailedError("oom", "killed by the kernel: memory exhausted", output)
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
        if any(text in output for text in OUT_OF_MEMORY):
            return WorkerFailedError("oom", one_line(f"{how}: {_last_words(output)}"), output)
        return WorkerFailedError("crashed", one_line(f"{how}: {_last_words(output)}"), output)

    def _listen(self) -> None:
        """Keep the end of what the worker prints."""
        assert self.process.stdout is not None
        with self.process.stdout as stream:
            while part := os.read(stream.fileno(), 4096):
                self._printed += part
                del self._printed[:-KEPT_OUTPUT_BYTES]

    def _output(self) -> str:
        return bytes(self._printed).decode(errors="replace")


def _last_words(output: str) -> str:
    """What a dying process said of it: its last message, and the innermost line of Python."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    trace = next((i for i, line in enumerate(lines) if "most recent call first" in line), None)
    if trace is None:
        return lines[-1] if lines else "it said nothing"
    said = [line for line in lines[:trace] if not line.startswith(("Fatal Python", "Current"))]
    return "; ".join([*said[-1:], *lines[trace + 1 : trace + 2]])


def child_environment(first: Sequence[Path] = ()) -> dict[str, str]:
    """Variables to start a process with, so that it imports what this one can import.

    Args:
        first: folders that it imports from before any other.
    """
    path = os.pathsep.join(str(Path(entry or ".").resolve()) for entry in (*first, *sys.path))
    # Spinning OpenMP threads disturb each other on a busy machine; read when PyTorch starts.
    return {"OMP_WAIT_POLICY": "passive", **os.environ, "PYTHONPATH": path}


def _oom_kills() -> int:
    """How often the kernel has killed a process for want of memory since it started."""
    counters = Path("/proc/vmstat")
    if counters.exists():
        for line in counters.read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0


class Settings(NamedTuple):
    """How a sweep is run; nothing here is part of a cell's identity."""

    device: str = "cpu"  # cpu | cuda
    threads: int | None = None  # CPU threads for PyTorch; None: as it is
    time_limit_s: float = 600.0  # for one cell, and for each cell of a comparison
    energy: bool = False  # measure energy: a GPU is kept busy 2 s longer a cell
    checkpoint_every_s: float = 60.0  # seconds between checkpoints of a training run


class Launcher:
    """Runs cells one after another in a local worker."""

    def __init__(
        self,
        settings: Settings,
        session: str,
        checkpoints: Path = Path("checkpoints"),
        on_progress: OnProgress = lambda share: None,
    ) -> None:
        self.settings = settings
        self.session = session
        self.checkpoints = checkpoints
        self.on_progress = on_progress
        self.ceilings: dict[str, float] = {}
        self._worker: Worker | None = None
        self._replicate = 0
        self._comparisons = 0

    @property
    def worker(self) -> Worker:
        """A healthy worker, started where there is none."""
        if self._worker is not None and self._worker.process.poll() is not None:
            self._worker.kill()  # it died between two cells
            self._worker = None
        if self._worker is None:
            self._worker = Worker(self.settings.device, self.settings.threads)
        return self._worker

    def measure_ceilings(self, dtypes: Sequence[str]) -> dict[str, float]:
        """The device's ceilings as they are now."""
        return self.worker.ask(START_LIMIT_S, "ceilings", dtypes=list(dtypes))

    def measure(self, case: Case) -> Measurement:
        """Measure one cell; a measurement whatever it does."""
        self._begin(case.replicate)
        worker = self.worker
        try:
            reply: dict[str, Any] = worker.ask(
                self.settings.time_limit_s,
                "measure",
                self.on_progress,
                case=case.asked(),
                ceilings=self.ceilings,
                energy=self.settings.energy,
                checkpoint=str(_checkpoint(self.checkpoints, case).resolve()),
                checkpoint_every_s=self.settings.checkpoint_every_s,
            )
        except WorkerFailedError as failure:
            self._worker = None
            reply = _fault(case, failure)
        if reply["status"] not in HEALTHY:
            self._retire()
        return self._measurement(case, worker, reply)

    def compare(self, cases: Sequence[Case]) -> list[Measurement]:
        """Measure the cells of a comparison in one process; a measurement of each.

        Where that process dies or hangs each cell is tried in a process of its own. What comes of
        those that are not well there stands, and the others are compared without them.
        """
        self._comparisons += 1
        found: dict[str, Measurement] = {}
        try:
            found = self._compare(cases)
        except WorkerFailedError as failure:
            found = {case.key: self._alone(case) for case in cases}
            rest = [case for case in cases if found[case.key].status == "ok"]
            self._retire()
            try:
                if len(rest) == len(cases):  # none fails but beside the others
                    raise failure
                found |= self._compare(rest) if rest else {}
            except WorkerFailedError as again:
                found |= {case.key: _beside(found[case.key], again) for case in rest}
        comparison = {"comparison": f"{self.session}-{self._comparisons}"}
        return [
            replace(m, environment={**m.environment, **comparison})
            for m in (found[case.key] for case in cases)
        ]

    def _compare(self, cases: Sequence[Case]) -> dict[str, Measurement]:
        """One attempt at a comparison, by the cells' keys."""
        self._begin(cases[0].replicate)
        worker = self.worker
        try:
            reply = worker.ask(
                self.settings.time_limit_s * len(cases),
                "compare",
                cases=[case.asked() for case in cases],
                ceilings=self.ceilings,
            )
        except WorkerFailedError:
            self._worker = None
            raise
        if not all(result["status"] in HEALTHY for result in reply["results"]):
            self._retire()
        return {
            case.key: self._measurement(case, worker, result)
            for case, result in zip(cases, reply["results"], strict=True)
        }

    def _alone(self, case: Case) -> Measurement:
        """One cell in a process of its own."""
        self._retire()
        return self.measure(case)

    def _begin(self, replicate: int) -> None:
        """Every replicate has a process of its own, or it replicates nothing."""
        if replicate != self._replicate:
            self._retire()
            self._replicate = replicate

    def _measurement(self, case: Case, worker: Worker, reply: dict[str, Any]) -> Measurement:
        """The record of what a worker replied, or of its end."""
        plans = reply.pop("plans", None)  # null where the worker did not survive
        place = {
            **worker.environment,
            "process": f"{self.session}-{worker.process.pid}",
            "code_hash": reply.pop("code_hash"),
            "cell_s": reply.pop("cell_s", None),  # in the worker; null where it did not survive
            "session": self.session,
            "time_limit_s": self.settings.time_limit_s,
            **({"plans": plans} if case.backend == "triton" else {}),
            **_peer(case),
        }
        return Measurement(case=case, environment=place, **reply)

    def _retire(self) -> None:
        if self._worker is not None:
            self._worker.kill()
            self._worker = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._retire()


def _fault(case: Case, failure: WorkerFailedError) -> dict[str, Any]:
    """A cell's record where its worker failed."""
    return {
        "status": failure.status,
        "reason": str(failure),
        "detail": failure.detail,
        "code_hash": code_hash(*_code(case)),
    }


def _beside(alone: Measurement, failure: WorkerFailedError) -> Measurement:
    """A cell's record where it is well alone, but no process survives the comparison."""
    return replace(
        alone,
        status=failure.status,
        reason=f"side by side, not alone: {failure}",
        detail=failure.detail,
        metrics={},
        samples={},
    )


def _peer(case: Case) -> dict[str, Any]:
    """Package, version and options of a peer; nothing of ours."""
    if case.implementation in (OURS, AGAIN):
        return {}
    from harness.peers import PEERS

    return {"peer": PEERS[case.implementation].record()}


OnStart = Callable[[Case], None]
OnFinish = Callable[[Measurement, bool], None]  # the measurement, and whether it was there already


def into(
    out: Path,
    cells: Sequence[Case],
    settings: Settings,
    on_open: Callable[[RunDirectory], None] = lambda directory: None,
    **reporting: Any,
) -> pd.DataFrame:
    """Measure the cells that a run directory does not hold; a row for every cell there.

    Args:
        out: the run directory; records go to `out`/records, the table to `out`/cells.csv.
        cells: what to measure.
        settings: how.
        on_open: called once with the opened directory.
        **reporting: as of `run_cells`.

    Raises:
        ValueError: threads or a time that cannot be.
        DirectoryInUseError, OSError, WorkerFailedError: as `RunDirectory` and `run_cells`.
    """
    from harness import report

    check_settings(settings.threads, settings.time_limit_s)
    if not settings.checkpoint_every_s >= 0:
        raise ValueError("seconds between checkpoints must be 0 or more")
    with RunDirectory(out) as directory:
        on_open(directory)
        run_cells(cells, directory, settings, **reporting)
        table = report.frame(out)
        write_atomically(out / "cells.csv", table.to_csv(index=False))
    return table


def check_settings(threads: int | None, time_limit_s: float) -> None:
    """ValueError for threads or a time limit that cannot be."""
    if threads is not None and not 1 <= threads <= MAX_THREADS:
        raise ValueError(f"threads must be 1 to {MAX_THREADS}, got {threads}")
    if not 0 < time_limit_s <= MAX_LIMIT_S:
        raise ValueError(f"the time limit must be above 0 and at most {MAX_LIMIT_S} s")


def run_cells(
    cells: Sequence[Case],
    directory: RunDirectory,
    settings: Settings,
    *,
    on_start: OnStart,
    on_finish: OnFinish,
    on_progress: OnProgress = lambda share: None,
) -> None:
    """Measure every cell of which `directory` holds no result from here.

    A result stands where device, software and code are those of now. Faults (crashed, wrong,
    error) are tried again, and so is a time-out under a shorter limit than now. The results of a
    comparison stand or are measured again together.

    Raises:
        WorkerFailedError: no worker starts, or it cannot measure the device's ceilings.
        OSError: the disk is full; earlier records are as they were.
    """
    session = f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{secrets.token_hex(3)}"
    hashes = {code: code_hash(*code) for code in set(map(_code, cells))}
    groups = versus.groups(cells)
    write_atomically(directory.path / "plan.json", _plan(cells))
    checkpoints = directory.path / "checkpoints"
    with Launcher(settings, session, checkpoints, on_progress) as launcher:
        here = launcher.worker.environment
        standing = {
            key
            for key, m in directory.latest.items()
            if stands(m, {**here, "code_hash": hashes.get(_code(m.case))}, settings)
        }
        known = [_stand(group, standing, directory.latest) for group in groups]
        dtypes = sorted(
            {
                c.dtype
                for group, stand in zip(groups, known, strict=True)
                if not stand
                for c in group
            }
        )
        if dtypes:
            launcher.ceilings = launcher.measure_ceilings(dtypes)
            report: dict[str, Any] = {
                "session": session,
                "environment": here,
                "ceilings_start": launcher.ceilings,
            }
            _write_session(directory, session, report)
        for group, stand in zip(groups, known, strict=True):
            if stand:
                for case in group:
                    on_finish(directory.latest[case.key], True)
                continue
            on_start(group[0])
            compared = len(group) > 1
            for found in launcher.compare(group) if compared else [launcher.measure(group[0])]:
                directory.write(found)
                if found.status in HEALTHY:  # a fault's is kept, to go on from
                    _checkpoint(checkpoints, found.case).unlink(missing_ok=True)
                on_finish(found, False)
        if dtypes:
            report |= _end_of_session(launcher, dtypes)
            _write_session(directory, session, report)


def _end_of_session(launcher: Launcher, dtypes: Sequence[str]) -> dict[str, Any]:
    """The ceilings once more, and whether the device kept its speed; why not, if they fail."""
    from harness.ceilings import UNSTABLE_DRIFT, drift

    try:
        ceilings = launcher.measure_ceilings(dtypes)
    except WorkerFailedError as failure:  # the cells are recorded: nothing is lost
        return {"ceilings_end": None, "reason": str(failure)}
    change = drift(launcher.ceilings, ceilings)
    return {"ceilings_end": ceilings, "drift": change, "stable": change <= UNSTABLE_DRIFT}


def stands(measurement: Measurement, here: Mapping[str, Any], settings: Settings) -> bool:
    """Whether a record answers its case in environment `here`, so that it is not tried again."""
    before = measurement.environment
    if measurement.status in FAULTS or not same_place(before, here):
        return False
    if measurement.status == "timeout" and before.get("time_limit_s", 0) < settings.time_limit_s:
        return False
    return before.get("code_hash") == here["code_hash"]


def _checkpoint(folder: Path, case: Case) -> Path:
    """Where the checkpoint of a training run lies."""
    return folder / f"{case.key}.safetensors"


def _code(case: Case) -> tuple[str, str, str, str]:
    """What `code_hash` is formed of."""
    return case.arch, case.implementation, case.backend, case.kind


def _stand(
    group: Sequence[Case], standing: Collection[str], latest: Mapping[str, Measurement]
) -> bool:
    """Whether all results of a group stand, those of a comparison as results of the same one."""
    if not all(case.key in standing for case in group):
        return False
    comparisons = {latest[case.key].environment.get("comparison") for case in group}
    return len(group) == 1 or (len(comparisons) == 1 and None not in comparisons)


def _plan(cells: Sequence[Case]) -> str:
    """What the last sweep asked for, so that `seqscale status` can name what is missing."""
    return json.dumps([case.asked() for case in cells], sort_keys=True) + "\n"


def _write_session(directory: RunDirectory, session: str, report: Mapping[str, Any]) -> None:
    folder = directory.path / "sessions"
    folder.mkdir(exist_ok=True)
    text = json.dumps(report, indent=1, sort_keys=True, allow_nan=False) + "\n"
    write_atomically(folder / f"{session}.json", text)

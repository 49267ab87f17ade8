"""Cases and measurements: the one identity, the one file format.

One JSON file a cell attempt, written to a temporary name, fsynced and renamed, so that a reader
never sees half a record, whatever is killed when. NaN is never written. A file that is no record
is named and set aside, never trusted and never deleted.
"""

from __future__ import annotations

import fcntl
import functools
import gc
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, Self

import orjson

from harness.environment import FINGERPRINT

if TYPE_CHECKING:
    from archs.ops import Backend

SCHEMA = 1
STATUSES = (
    "ok",
    "oom",
    "timeout",
    "crashed",
    "unsupported",
    "wrong",
    "diverged",
    "error",
)
FAULTS = frozenset({"crashed", "wrong", "error"})  # something is broken; the rest are results
# Implementations that are no library's; the second is ours once more beside ours: its ratio to
# ours is the noise of a comparison.
OURS, AGAIN = "ours", "ours again"


@dataclass(frozen=True, kw_only=True)
class Case:
    """What was asked of one cell; `key` is its only identity."""

    kind: str  # cost | loss | recall
    arch: str  # an architecture or a hybrid pattern
    level: str  # op | block | model
    phase: str  # forward | backward | train_step | prefill | decode
    batch: int
    seq_len: int | None  # tokens a sequence; None for decode
    position: int | None = None  # tokens already read; decode only
    size: str  # "d256": width 256; "d256h128": heads of 128; "1M": matched to that many parameters
    dtype: str = "float32"
    backend: Backend = "torch"
    implementation: str = OURS  # or AGAIN, or a name in `harness.peers`
    seed: int = 0
    replicate: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)

    @functools.cached_property
    def key(self) -> str:
        """16 hexadecimal digits of the SHA-256 of the canonical JSON."""
        return _key(self.asked())

    def asked(self) -> dict[str, Any]:
        """The fields by name."""
        return {name: self.__dict__[name] for name in CASE_FIELDS}

    @property
    def label(self) -> str:
        """One line for people."""
        if self.kind != "cost":
            return self._trial_label
        where = f"T={self.seq_len}" if self.position is None else f"position {self.position}"
        whose = "" if self.implementation == OURS else f" {self.implementation}"
        again = f" replicate {self.replicate}" if self.replicate else ""
        return (
            f"{self.arch} {self.level} {self.phase} {where} B={self.batch} {self.size} "
            f"{self.dtype} {self.backend}{whose}{again}"
        )

    @property
    def _trial_label(self) -> str:
        """One line for people of a training run."""
        task = " ".join([self.options.get("task", self.kind), *self._given("settings")])
        arch = " ".join([self.arch, *self._given("block")])
        return (
            f"{arch} {task} T={self.seq_len} B={self.batch} {self.size} {self.dtype} "
            f"{self.backend}, {self.options.get('steps')} steps at "
            f"{self.options.get('learning_rate')}, seed {self.seed}"
        )

    def _given(self, option: str) -> list[str]:
        return [f"{name}={value}" for name, value in self.options.get(option, {}).items()]


# Made once: 100,000 records are read in seconds.
CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"))
CASE_FIELDS = tuple(f.name for f in fields(Case))


def _key(asked: Mapping[str, Any]) -> str:
    return hashlib.sha256(CANONICAL.encode(asked).encode()).hexdigest()[:16]


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What came of one attempt at a case."""

    case: Case
    status: str
    environment: Mapping[str, Any]
    reason: str | None = None  # one line, for every status but "ok"
    detail: str | None = None  # traceback or last output, where there is one
    metrics: Mapping[str, float | int | str | None] = field(default_factory=dict)
    samples: Mapping[str, list[float]] = field(default_factory=dict)
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        if self.status not in STATUSES:
            raise ValueError(f"status {self.status!r} is none of {', '.join(STATUSES)}")


# Of the environment, what stands in a row.
PLACES = (
    *FINGERPRINT, "commit", "dirty", "code_hash", "session", "process", "utc", "stable",
    "comparison",
)  # fmt: skip


class Damaged(NamedTuple):
    """A file among the records that is not one this version can read."""

    path: Path
    reason: str


class DirectoryInUseError(OSError):
    """Another sweep writes into the directory; the message names its process."""


def to_json(measurement: Measurement, indent: int | None = None) -> str:
    """Canonical JSON of a measurement; ValueError if a number in it is NaN or infinite."""
    document = {**vars(measurement), "case": measurement.case.asked()}
    return json.dumps(document, indent=indent, sort_keys=True, allow_nan=False)


def from_json(text: bytes) -> Measurement:
    """The measurement in a JSON document.

    Raises:
        ValueError: not JSON, not a record, or of another schema; the message says which.
    """
    try:
        document = orjson.loads(text)  # three times as fast as json, and it refuses NaN
    except orjson.JSONDecodeError as error:
        raise ValueError(_why_not_json(text, error)) from None
    if not isinstance(document, dict) or "schema" not in document:
        raise ValueError("not a record")
    if document["schema"] != SCHEMA:
        raise ValueError(f"schema {document['schema']}, this version reads {SCHEMA}")
    try:
        measurement = Measurement(**{**document, "case": Case(**document["case"])})
    except (TypeError, KeyError) as error:
        raise ValueError(f"not a record: {error}") from None
    _check(measurement)
    return measurement


def _why_not_json(text: bytes, error: ValueError) -> str:
    try:
        return f"not JSON: {error}" if text.decode().strip() else "empty"
    except UnicodeDecodeError:
        return "not text"


def _check(m: Measurement) -> None:
    """ValueError where a table could not be made of a record."""
    for name in ("environment", "metrics", "samples"):
        if not isinstance(getattr(m, name), dict):
            raise ValueError(f"not a record: {name} is no table")
    if {dict, list} & set(map(type, m.metrics.values())):
        raise ValueError("not a record: a metric is no number")
    if m.status == "ok" and m.case.kind == "cost":
        for name in ("time_ms_p20", "time_ms_p50", "time_ms_p80"):
            value = m.metrics.get(name)
            if not isinstance(value, float | int) or value <= 0:
                raise ValueError(f"not a record: measured, but {name} is {value!r}")


def load(source: Path) -> tuple[list[Measurement], list[Damaged]]:
    """The latest attempt at every case, and the files that are no records.

    Args:
        source: a run directory, or a packed JSONL file of `seqscale export`.

    Raises:
        FileNotFoundError: there is neither.
    """
    latest: dict[str, Measurement] = {}
    damaged: list[Damaged] = []
    with collector_paused():
        for found in each(source):
            if isinstance(found, Damaged):
                damaged.append(found)
            else:
                latest[found.case.key] = found
    return list(latest.values()), damaged


def each(source: Path) -> Iterator[Measurement | Damaged]:
    """Every attempt at every case, later ones later, and the files that are no records.

    Args:
        source: as for `load`.

    Raises:
        FileNotFoundError: there is neither.
    """
    packed = source.is_file()
    for name, text in _lines(source) if packed else _files(source):
        try:
            measurement = from_json(text)
            if not (packed or name.startswith(f"{measurement.case.key}-")):
                raise ValueError("its name is not that of its case")
        except ValueError as error:
            path = source if packed else source / "records" / name
            yield Damaged(path, f"line {name}: {error}" if packed else str(error))
        else:
            yield measurement


@contextmanager
def collector_paused() -> Iterator[None]:
    """No garbage collection: walking 100,000 records again and again takes a third of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _files(directory: Path) -> Iterator[tuple[str, bytes]]:
    """Names and contents of the records, in order of name, so that later attempts come later."""
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory} is not there: run seqscale cost --out {directory}")
    records = str(directory / "records")
    if not os.path.isdir(records):  # noqa: PTH112 (pathlib takes twice the time over many files)
        return
    with os.scandir(records) as entries:
        names = sorted(e.name for e in entries if e.name.endswith(".json") and e.is_file())
    for name in names:
        with open(f"{records}/{name}", "rb") as file:  # noqa: PTH123 (likewise)
            yield name, file.read()


def _lines(packed: Path) -> Iterator[tuple[str, bytes]]:
    for number, line in enumerate(packed.read_bytes().splitlines(), start=1):
        yield str(number), line


def rows(source: Path) -> list[dict[str, Any]]:
    """One flat row a case, of its latest attempt: what was asked, metrics, where it was taken."""
    found = {}
    with collector_paused():
        for m in each(source):  # samples are dropped as soon as they are read: they are most of it
            if isinstance(m, Measurement):
                found[m.case.key] = {
                    "key": m.case.key,
                    **vars(m.case),
                    "options": CANONICAL.encode(m.case.options) if m.case.options else "{}",
                    "status": m.status,
                    "reason": m.reason,
                    **m.metrics,
                    **{name: m.environment.get(name) for name in PLACES},
                }
    return list(found.values())


def write_atomically(path: Path, text: str) -> None:
    """Replace `path` by `text`; errors as `replacing`."""
    with replacing(path) as file:
        file.write(text.encode())


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write that becomes `path` at the end.

    After a crash at any moment `path` holds all of the old or the new.

    Raises:
        OSError: disk full or no permission; no temporary file is left.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):  # a full disk names none, the others the temporary file
            error.filename, error.filename2 = str(path), None
        raise


class RunDirectory:
    """A run directory held by its only writer, this process, until it is closed.

    Opening it clears what a killed writer left half-written, reads the records, and moves what is
    no record into the folder set-aside.

    Attributes:
        path: the directory.
        latest: the latest attempt at every case, by key.
        damaged: the files that were set aside, at their old paths.

    Raises:
        DirectoryInUseError: another sweep holds it.
        OSError: it cannot be created, read or written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records = path / "records"
        self.records.mkdir(parents=True, exist_ok=True)
        self._lock = _lock(path / ".lock")
        try:
            for litter in (*path.glob("*.tmp"), *path.glob("*/*.tmp")):
                if litter.is_file():
                    litter.unlink()
            write_atomically(self.records / "probe", "")
            (self.records / "probe").unlink()
            measurements, self.damaged = load(path)
            if self.damaged:
                (path / "set-aside").mkdir(exist_ok=True)
            for file, _ in self.damaged:
                file.replace(_free_name(path / "set-aside" / file.name))
        except BaseException:
            self.close()
            raise
        self.latest = {m.case.key: m for m in measurements}

    def write(self, measurement: Measurement) -> Path:
        """Add a record as a new file beside those of earlier attempts, and return its path.

        Raises:
            ValueError: a metric or sample is NaN or infinite.
            OSError: disk full or no permission; nothing is left of the record.
        """
        key = measurement.case.key
        text = to_json(measurement, indent=1) + "\n"
        attempt = 1
        while (path := self.records / f"{key}-{attempt:03d}.json").exists():
            attempt += 1
        write_atomically(path, text)
        self.latest[key] = measurement
        return path

    def close(self) -> None:
        """Let another sweep have the directory."""
        os.ftruncate(self._lock, 0)
        os.close(self._lock)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def holder(directory: Path) -> int | None:
    """The process that is sweeping into a run directory (0: unknown which), or None."""
    try:
        lock = os.open(directory / ".lock", os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        said = os.pread(lock, 32, 0).strip()
        return int(said) if said.isdigit() else 0
    else:
        return None
    finally:
        os.close(lock)


def _lock(path: Path) -> int:
    """Hold `path` for this process; the kernel lets go of it when the process dies."""
    lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        pid = os.pread(lock, 32, 0).decode().strip()
        os.close(lock)
        raise DirectoryInUseError(
            f"{path.parent} is in use by the sweep of process {pid}: wait for it, stop it, "
            "or give another --out"
        ) from None
    except OSError:
        os.close(lock)
        raise
    os.ftruncate(lock, 0)
    os.write(lock, f"{os.getpid()}\n".encode())
    return lock


def _free_name(path: Path) -> Path:
    """`path`, or the first of path.2, path.3 … that does not exist."""
    number, free = 1, path
    while free.exists():
        number += 1
        free = path.with_name(f"{path.name}.{number}")
    return free

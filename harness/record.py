"""Cases, measurements and the environment: the one identity, the one file format.

One JSON file a cell attempt, written to a temporary name, fsynced and renamed, so that a reader
never sees half a record. NaN is never written.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
# Where two measurements may be compared as one: same device, same software under the numbers.
FINGERPRINT = ("device", "cores", "threads", "memory_gib", "torch", "triton", "python")


@dataclass(frozen=True, kw_only=True)
class Case:
    """What was asked of one cell; `key` is its only identity."""

    kind: str  # cost | loss
    arch: str  # an architecture or a hybrid pattern
    level: str  # op | block | model
    phase: str  # forward | backward | train_step | prefill | decode
    batch: int
    seq_len: int | None  # tokens a sequence; None for decode
    position: int | None = None  # tokens already read; decode only
    size: str  # "d256": width 256; "1M": matched to that many parameters
    dtype: str = "float32"
    backend: Backend = "torch"
    implementation: str = "ours"
    seed: int = 0
    replicate: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """16 hexadecimal digits of the SHA-256 of the canonical JSON."""
        text = json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def label(self) -> str:
        """One line for people."""
        where = f"T={self.seq_len}" if self.position is None else f"position {self.position}"
        return f"{self.arch} {self.level} {self.phase} {where} {self.size} {self.backend}"


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What came of one attempt at a case."""

    case: Case
    status: str
    environment: Mapping[str, Any]
    reason: str | None = None
    metrics: Mapping[str, float | int | str | None] = field(default_factory=dict)
    samples: Mapping[str, list[float]] = field(default_factory=dict)
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        if self.status not in STATUSES:
            raise ValueError(f"status {self.status!r} is none of {', '.join(STATUSES)}")


def write(directory: Path, measurement: Measurement) -> Path:
    """Write one record atomically into `directory`/records and return its path.

    Raises:
        ValueError: a metric or sample is NaN or infinite.
    """
    records = directory / "records"
    records.mkdir(parents=True, exist_ok=True)
    text = json.dumps(asdict(measurement), indent=1, sort_keys=True, allow_nan=False)
    key = measurement.case.key
    attempt = 1 + len(list(records.glob(f"{key}-*.json")))
    path = records / f"{key}-{attempt:03d}.json"
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    return path


def read(directory: Path) -> list[Measurement]:
    """The latest attempt at every case under `directory`/records, in order of file name."""
    latest: dict[str, Measurement] = {}
    for path in sorted((directory / "records").glob("*.json")):
        fields = json.loads(path.read_text(encoding="utf-8"))
        if fields["schema"] != SCHEMA:
            raise ValueError(f"{path}: schema {fields['schema']}, this version reads {SCHEMA}")
        fields["case"] = Case(**fields["case"])
        latest[fields["case"].key] = Measurement(**fields)
    return list(latest.values())


def rows(measurements: list[Measurement]) -> list[dict[str, Any]]:
    """One flat row a measurement: case, status, metrics, and where it was taken."""
    return [
        {
            "key": m.case.key,
            **{k: v for k, v in asdict(m.case).items() if k != "options"},
            "options": json.dumps(dict(m.case.options), sort_keys=True),
            "status": m.status,
            "reason": m.reason,
            **m.metrics,
            **{k: m.environment.get(k) for k in (*FINGERPRINT, "commit", "dirty", "kernel_hash")},
        }
        for m in measurements
    ]


def same_place(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Whether a record taken in environment `a` still stands in `b`: same device, same code."""
    return all(a.get(key) == b.get(key) for key in (*FINGERPRINT, "kernel_hash"))


def environment() -> dict[str, Any]:
    """Device, software, code and time, as stored with every measurement."""
    import torch

    return {
        **_host(),
        "threads": torch.get_num_threads(),
        "utc": datetime.now(UTC).isoformat(timespec="seconds"),
        **{
            name: os.environ.get(name)
            for name in ("OMP_WAIT_POLICY", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
        },
    }


@functools.cache
def _host() -> dict[str, Any]:
    """The part of the environment that cannot change while the process lives."""
    root = Path(__file__).parent.parent
    return {
        "device": _cpu_name(),
        "device_type": "cpu",
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "os": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        **{name: _version(name) for name in ("torch", "triton", "numpy")},
        "commit": _git(root, "rev-parse", "HEAD"),
        "dirty": bool(_git(root, "status", "--porcelain", "--untracked-files=no")),
        "kernel_hash": kernel_hash(),
    }


def kernel_hash() -> str:
    """16 hexadecimal digits over every source file of `archs`: the code that is timed."""
    import archs

    digest = hashlib.sha256()
    root = Path(archs.__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git(root: Path, *arguments: str) -> str | None:
    """Standard output of git in `root`, or None outside a checkout."""
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()

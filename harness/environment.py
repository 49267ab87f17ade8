"""Where a number was taken: device, software, code and time, as stored with every measurement."""

from __future__ import annotations

import ast
import functools
import hashlib
import os
import platform
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec, resolve_name
from pathlib import Path
from typing import Any

# Where two measurements may be compared as one: same device, same software under the numbers.
FINGERPRINT = (
    "device", "driver", "cores", "threads", "memory_gib", "torch", "triton", "python",
)  # fmt: skip

# What git tells its hooks: in another repository, or of another tree, it would be wrong.
OF_HOOKS = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_COMMON_DIR", "GIT_PREFIX")
FOREIGN_LOAD = 0.5  # of our cores that others may use before a time counts as disturbed
# The modules of the harness that decide what is measured, and how, by kind of cell.
TRAINING = (
    "harness.checkpoint", "harness.ranks", "harness.sizes", "harness.timing", "harness.training",
    "harness.trial",
)  # fmt: skip
TEXT = ("harness.corpus", "harness.data", "harness.documents", "harness.token_file")
MEASURING = {
    "cost": ("harness.op_inputs", "harness.subjects", "harness.timing", "harness.workload"),
    "loss": (*TRAINING, *TEXT, "harness.loss"),
    "recall": (*TRAINING, "harness.recall", "harness.recall_tasks", "harness.tasks"),
}
CALLING = ("harness.peers", "harness.peer_calls")  # likewise of a peer


def same_place(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Whether environments `a` and `b` are one device with the same software."""
    return all(a.get(key) == b.get(key) for key in FINGERPRINT)


def environment(device: str) -> dict[str, Any]:
    """Device ("cpu" | "cuda"), software, code and time of this process."""
    import torch

    return {
        **_host(),
        **(_gpu() if device == "cuda" else {}),
        "device_type": device,
        "threads": torch.get_num_threads(),
        "utc": datetime.now(UTC).isoformat(timespec="seconds"),
        **{
            name: os.environ.get(name)
            for name in ("OMP_WAIT_POLICY", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
        },
    }


@functools.cache
def _host() -> dict[str, Any]:
    """The part that cannot change while the process lives."""
    affinity = getattr(os, "sched_getaffinity", None)
    return {
        "device": _cpu_name(),
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "os": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        **{name: installed_version(name) for name in ("torch", "triton", "numpy")},
        **_commit(Path(__file__).parent.parent),
    }


@functools.cache
def _gpu() -> dict[str, Any]:
    import torch

    from harness import nvml

    properties = torch.cuda.get_device_properties(0)
    return {
        "device": properties.name,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
        "driver": nvml.driver_version(),
    }


def code_hash(
    arch: str, implementation: str = "ours", backend: str = "torch", kind: str = "cost"
) -> str:
    """16 hexadecimal digits over the sources behind a number of an architecture or hybrid pattern.

    These are the modules of its blocks, the model around them, and all that they import of the
    same packages; a plug-in's own sources likewise; and those of a kind of cell's measuring. On
    backend "triton" also the kernels of the operations among them, which are imported by name. Of
    a peer also the modules that call it, and its library's version.

    Raises:
        ValueError: unknown architecture.
    """
    from archs import block_class
    from archs.model import expand_pattern
    from harness.peers import PEERS

    modules = {block_class(name).__module__ for name in expand_pattern(arch)}
    modules.add("archs.model")
    packages = {module.partition(".")[0] for module in modules} | {"archs"}
    sources: dict[str, bytes] = {}
    while modules:
        module = modules.pop()
        if module not in sources and (path := _source(module)):
            sources[module] = path.read_bytes()
            modules |= {m for m in _imports(module, path) if m.partition(".")[0] in packages}
            if backend == "triton" and module.startswith("archs.ops."):
                modules.add(f"{module}_kernel")
    peer = PEERS.get(implementation)
    # These import every architecture: they are not followed.
    for module in (*MEASURING[kind], *(CALLING if peer else ())):
        if path := _source(module):
            sources[module] = path.read_bytes()
    digest = hashlib.sha256(str(peer.version).encode() if peer else b"")
    for module in sorted(sources):
        digest.update(module.encode() + b"\0" + sources[module])
    return digest.hexdigest()[:16]


def _source(module: str) -> Path | None:
    """The file of a module, but of `archs` itself, the menu, which imports everything."""
    if module == "archs":
        return None
    try:
        spec = find_spec(module)
    except ModuleNotFoundError:  # a name imported from a module, not a module
        return None
    return Path(spec.origin) if spec and spec.has_location and spec.origin else None


def _imports(module: str, path: Path) -> set[str]:
    """What a module imports, also inside functions; names that are no modules among it."""
    if path.suffix != ".py":
        return set()
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = resolve_name("." * node.level + (node.module or ""), package)
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return found


def installed_version(package: str) -> str | None:
    """The version of an installed package, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def git(place: Path, *arguments: str, index: Path | None = None) -> str:
    """What git says in a folder, which alone decides on the repository.

    Args:
        place: the folder.
        arguments: the command.
        index: a file to use as its index; None: the repository's.

    Raises:
        ValueError: git refuses, or there is none; the message says why.
    """
    known = {name: text for name, text in os.environ.items() if name not in OF_HOOKS}
    if index is not None:
        known["GIT_INDEX_FILE"] = str(index)
    command = ["git", "-C", str(place), *arguments]
    try:
        done = subprocess.run(  # a path need not be text
            command, capture_output=True, text=True, errors="surrogateescape", env=known
        )
    except OSError as error:
        raise ValueError(f"git cannot be run: {error.strerror}") from None
    if done.returncode:
        raise ValueError(f"git {arguments[0]}: {' '.join(done.stderr.split())}")
    return done.stdout.strip()


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _commit(root: Path) -> dict[str, Any]:
    """The commit of a checkout at `root` and whether tracked files differ from it, else nulls."""
    if not (root / ".git").exists():  # an installed copy may lie inside someone else's checkout
        return {"commit": None, "dirty": None}
    try:
        commit = git(root, "rev-parse", "HEAD")
        changes = git(root, "status", "--porcelain", "--untracked-files=no")
    except ValueError:
        return {"commit": None, "dirty": None}
    return {"commit": commit, "dirty": bool(changes)}

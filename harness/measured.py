"""Files of what cells took, to be judged later: ours, and those of pytest-benchmark.

A file of pytest-benchmark is of one process. Its benchmarks must have been timed by `benchmarked`,
which times a cell as a check does, beside anchors, and says so in the file.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness import verdicts
from harness.baseline import ANCHORS, BaselineError, read_document
from harness.environment import FINGERPRINT
from harness.processes import Times
from harness.record import write_atomically

SCHEMA = 1
PLACE = "seqscale"  # in extra_info of a benchmark
PLACES = (*FINGERPRINT, "device_type")
METRICS = ("cell_ms", *(f"{anchor}_ms" for anchor in ANCHORS))
HINT = "let harness.measured.benchmarked time it"


def save(times: Times, names: Sequence[str], path: Path) -> None:
    """Write what processes said, for `load`."""
    said = {
        "schema": SCHEMA,
        "environment": {key: times.environment.get(key) for key in PLACES},
        "names": list(names),
        "cells": times.cells,
        "faults": times.faults,
    }
    write_atomically(path, json.dumps(said, indent=1, sort_keys=True, allow_nan=False) + "\n")


def load(paths: Sequence[Path]) -> tuple[Times, list[str]]:
    """What processes said, and the names of the cells.

    Args:
        paths: one file of `save`, or files of pytest-benchmark, one a process.

    Raises:
        BaselineError: a file is neither, has no benchmark, or is there twice, or they are of
            different devices.
    """
    documents = [(path, _read(path)) for path in paths]
    for i, (path, document) in enumerate(documents):
        for other, before in documents[:i]:
            if document == before:
                raise BaselineError(f"{path} holds what {other} does: a file is a process")
    if len(documents) == 1 and "cells" in documents[0][1]:
        return _ours(*documents[0])
    times, seen = Times(), Counter[str]()
    for path, document in documents:
        for name, said in _of_pytest(path, document).items():
            seen[name] += 1
            here = said["environment"]
            if times.environment and times.environment != here:
                raise BaselineError(f"{path} is of another device or versions than {paths[0]}")
            times.environment = here
            if said["status"] == "ok":
                times.cells.setdefault(name, []).append({key: said[key] for key in METRICS})
            else:
                times.faults[name] = (said["status"], f"in {path}")
    for name, count in seen.items():
        if count < len(paths):
            times.faults[name] = ("error", f"in {count} of {len(paths)} files")
    return times, list(seen)


def benchmarked(
    benchmark: Any, name: str, device: str, path: Path | None = None, tree: Path | None = None
) -> None:
    """Time a guarded cell as a benchmark, so that `load` can read it from pytest-benchmark's file.

    pytest-benchmark's own numbers, in its table, are of the same call. What is judged is timed as a
    check does it, in turn with anchors. Where benchmarks are disabled, results are compared alone.

    Args:
        benchmark: the fixture.
        name: of a cell of `harness.guards.names`.
        device: "cpu" or "cuda".
        path: a file of guards; None: what is guarded without one.
        tree: as of `harness.guards.names`.

    Raises:
        WrongResultError: the cell does not return what it should.
    """
    import torch

    from harness import guard_times, guards
    from harness.environment import environment
    from harness.worker import WrongResultError

    cell = guards.prepare(name, device, path, tree)
    if fault := cell.fault():
        raise WrongResultError(fault)

    def finished() -> None:
        cell.function()
        if device == "cuda":
            torch.cuda.synchronize()

    benchmark(finished)
    if not benchmark.enabled:
        return
    here = environment(device)
    said = {"cell": name, "environment": {key: here.get(key) for key in PLACES}}
    benchmark.extra_info[PLACE] = {**said, "status": "wrong", **dict.fromkeys(METRICS, 0.0)}
    metrics, _ = guard_times.measure(name, device, path, tree, anchors=True, checked=True)
    benchmark.extra_info[PLACE] = {**said, "status": "ok", **metrics}


def _read(path: Path) -> dict[str, Any]:
    unread = "cannot be read"
    return read_document(path, missing=f"{path} {unread}: there is no such file", damaged=unread)


def _ours(path: Path, document: Mapping[str, Any]) -> tuple[Times, list[str]]:
    names, cells, faults = (document.get(key) for key in ("names", "cells", "faults"))
    if not (
        document.get("schema") == SCHEMA
        and isinstance(names, list)
        and all(isinstance(name, str) for name in names)
        and len(set(names)) == len(names)
        and isinstance(cells, dict)
        and all(_are_processes(said) for said in cells.values())
        and isinstance(faults, dict)
        and all(_is_fault(fault) for fault in faults.values())
        and all(name in cells or name in faults for name in names)
    ):
        raise BaselineError(f"{path} is no file of seqscale check --save, or only part of one")
    environment = _environment(path, document.get("environment"))
    kept = {name: (fault[0], fault[1]) for name, fault in faults.items()}
    return Times(cells=cells, faults=kept, environment=environment), names


def _are_processes(said: Any) -> bool:
    return isinstance(said, list) and all(_has_metrics(metrics) for metrics in said)


def _has_metrics(metrics: Any) -> bool:
    return isinstance(metrics, dict) and all(name in metrics for name in METRICS)


def _is_fault(fault: Any) -> bool:
    return isinstance(fault, list) and len(fault) == 2 and all(isinstance(x, str) for x in fault)


def _environment(path: Path, found: Any) -> dict[str, Any]:
    """Device and versions; BaselineError where they are not there, or not what they should be."""
    if not isinstance(found, dict) or any(
        not isinstance(found.get(key), str | int | float | None) for key in PLACES
    ):
        raise BaselineError(f"{path} does not say on which device and versions it ran: {HINT}")
    if found.get("device_type") not in verdicts.LEAST_MS:
        raise BaselineError(f"{path} is of device type {found.get('device_type')!r}")
    return {key: found.get(key) for key in PLACES}


def _of_pytest(path: Path, document: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What `benchmarked` wrote of each cell."""
    benchmarks = document.get("benchmarks")
    if not isinstance(benchmarks, list):
        raise BaselineError(f"{path} is neither of seqscale check --save nor pytest-benchmark")
    if not benchmarks:
        raise BaselineError(f"{path} has no benchmark")
    found = {}
    for benchmark in benchmarks:
        extra = benchmark.get("extra_info") if isinstance(benchmark, dict) else None
        said = extra.get(PLACE) if isinstance(extra, dict) else None
        if (
            not isinstance(said, dict)
            or not all(isinstance(said.get(key), str) for key in ("cell", "status"))
            or not _has_metrics(said)
        ):
            raise BaselineError(f"{path} has a benchmark beside no anchors: {HINT}")
        if said["cell"] in found:
            raise BaselineError(f"{path} has two benchmarks of {said['cell']!r}")
        found[said["cell"]] = {**said, "environment": _environment(path, said.get("environment"))}
    return found

"""`seqscale counters`: what kernels do, counted without a GPU.

Every implementation of an operation is called forward and backward at a fixed shape: in Triton's
interpreter, which shows what it moves and computes (`harness.traffic`), and under Triton's compiler
for GPUs that are not here (`harness.compiled`). The same code gives the same figures anywhere.

The floor of a forward pass is every input read once and every output written once; that of a
backward pass is inputs and the gradient of y read once, and every gradient written once.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.run import child_environment
from harness.sweep import unknown
from harness.worker import one_line

if TYPE_CHECKING:
    from rich.table import Table

OPS = ("attention", "ssd", "wkv7", "long_conv", "short_conv")
ARCHS = (80, 90, 100)
# Rates a second that a prediction assumes: bytes copied, FLOPs by operands (dense), exponentials.
# Copy and 16-bit rates are cautious; the rest is NVIDIA's H100 data sheet and 16 exponentials a
# clock and multiprocessor. `seqscale cost` measures a device's own.
DEVICES: dict[str, dict[str, float]] = {
    "H100 SXM": {
        "bytes": 3.0e12,
        "fp16": 8.0e14,
        "fp32 tf32": 4.0e14,
        "fp32 tf32x3": 4.0e14 / 3,
        "fp32 ieee": 6.7e13,
        "exponentials": 16 * 132 * 1.755e9,
    }
}
ALLOWED_ERROR = 4e-3  # relative RMS in float16: `harness.correctness`
LEGEND = (
    "launches: of Triton kernels. torch ops: PyTorch operations that move data; what happens "
    "inside one is not seen. MB: each byte once a launch or operation. floor: inputs and outputs "
    "once; backward: inputs, dy, gradients. sectors / asked: bytes of the 32-byte sectors that "
    "accesses touch over bytes asked for. predicted: the slower of bytes, dots and exponentials "
    "at assumed rates, launches not counted; never a measurement. error: relative, against ours "
    "in float64."
)
DONE, RESULT = "#done", "#result"  # begin the lines of a job's output that are meant for us
Document = dict[str, Any]


class CountingFailedError(ChildProcessError):
    """A process that counts or compiles failed; the message holds its last words."""


def count(
    ops: Sequence[str] = OPS,
    *,
    archs: Sequence[int] = ARCHS,
    implementations: Sequence[str] | None = None,
    triton: Path | None = None,
    on_finish: Callable[[str], None] = lambda job: None,
) -> Document:
    """Count and compile every implementation of some operations.

    Args:
        ops: names in `OPS`.
        archs: compute capabilities times ten to compile for, of `ARCHS`; 90 is sm_90.
        implementations: only these, as "triton" and "torch"; None: all.
        triton: folder with another Triton to compile with, as `pip install --no-deps --target
            FOLDER triton==3.6.0` makes it; the traffic is then not counted again.
        on_finish: called with what was just counted.

    Returns:
        What `--json` prints: versions, then lists `traffic`, `compiled` and `left_out`.

    Raises:
        ValueError: an operation or a GPU that does not exist, or a folder without Triton.
        CountingFailedError: a process failed.
    """
    for name in ops:
        if name not in OPS:
            raise ValueError(unknown("operation", name, OPS))
    for arch in archs:
        if arch not in ARCHS:
            raise ValueError(f"no GPU sm_{arch} here: {', '.join(map(str, ARCHS))}")
    if triton is not None and not (triton / "triton" / "__init__.py").is_file():
        raise ValueError(
            f"{triton} holds no Triton; run: pip install --no-deps --target {triton} triton==3.6.0"
        )
    ops = list(dict.fromkeys(ops))
    kinds = ("compiled",) if triton else ("traffic", "compiled")
    # A process a core: each spends seconds on its imports.
    groups = max(1, min(len(ops), (os.cpu_count() or 1) // len(kinds)))
    jobs = [
        {
            "kind": kind,
            "ops": ops[start::groups],
            "archs": list(archs),
            "implementations": implementations and list(implementations),
        }
        for kind in kinds
        for start in range(groups)
    ]
    processes = [_start(job, triton) for job in jobs]
    with ThreadPoolExecutor(len(jobs)) as pool:
        try:
            parts = list(pool.map(lambda process: _result(process, on_finish), processes))
        finally:
            for process in processes:
                process.kill()
    rows = {
        kind: [row for op in ops for part in parts for row in part[kind] if row["op"] == op]
        for kind in ("traffic", "compiled")
    }
    for row in rows["traffic"]:
        row["predicted_ms"] = {name: predicted_ms(row, rates) for name, rates in DEVICES.items()}
    left_out = {tuple(o.values()): o for part in parts for o in part["left_out"]}
    return {
        "schema": 1,
        "versions": parts[0]["versions"],
        **rows,
        "left_out": [left_out[key] for key in sorted(left_out)],
    }


def _start(job: Document, triton: Path | None) -> subprocess.Popen[str]:
    """A process for a job: kernels are interpreted or compiled from their import on."""
    environment = {**child_environment(), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    environment.pop("TRITON_INTERPRET", None)
    if job["kind"] == "traffic":
        environment["TRITON_INTERPRET"] = "1"
    if triton is not None:
        environment["PYTHONPATH"] = os.pathsep.join((str(triton), environment["PYTHONPATH"]))
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", "from harness.tally import main; main()", str(os.getpid())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )
    assert process.stdin is not None
    with process.stdin as request:
        request.write(json.dumps(job))
    return process


def _result(process: subprocess.Popen[str], on_finish: Callable[[str], None]) -> Document:
    """What a job replies last; before that it says what it has done."""
    assert process.stdout is not None
    said = "it said nothing"
    with process:
        for line in process.stdout:
            kind, _, text = line.rstrip().partition(" ")
            if kind == DONE:
                on_finish(text)
            elif kind == RESULT:
                return json.loads(text)
            else:
                said = line
    raise CountingFailedError(
        f"counting ended with code {process.returncode}: {one_line(said)}; seqscale doctor says "
        "what works here"
    )


def predicted_ms(row: Mapping[str, Any], rates: Mapping[str, float]) -> float:
    """Least milliseconds on a device of these rates: a prediction, launches not included.

    Kernels and operations run one after another, each as long as the slowest of its bytes, its
    dots and its exponentials.
    """
    seconds = 0.0
    for kernel in row["kernels"]:
        dots = sum(flops / rates[name] for name, flops in kernel["dot_flops"].items())
        exponentials = kernel["exponentials"] / rates["exponentials"]
        seconds += max(kernel["unique_bytes"] / rates["bytes"], dots, exponentials)
    for operation in row["operations"]:
        flops = operation["flops"] / rates["fp16"]
        seconds += max(operation["unique_bytes"] / rates["bytes"], flops)
    return float(f"{1e3 * seconds:.4g}")


def is_wrong(row: Mapping[str, Any]) -> bool:
    """Whether a counted call computed something else than it should."""
    return row["relative_error"] is None or row["relative_error"] > ALLOWED_ERROR


def faults(document: Document) -> list[str]:
    """What went wrong: calls that failed, or computed something else."""
    failed = [
        f"{o['op']} {o['implementation']} ({o['shape']}): {o['reason']}"
        for o in document["left_out"]
        if o["failed"]
    ]
    return failed + [
        f"{row['op']} {row['implementation']} {row['phase']} ({row['shape']}): the result is wrong"
        for row in document["traffic"]
        if is_wrong(row)
    ]


def notes(document: Document) -> list[str]:
    """What a reader of the tables must know."""
    reasons = {
        f"left out, {o['op']} {o['implementation']}: {o['reason']}": None
        for o in document["left_out"]
        if not o["failed"]
    }
    return [LEGEND, *reasons, *(f"FAULT: {fault}" for fault in faults(document))]


def tables(document: Document) -> Iterator[Table]:
    """The document for a terminal: counted by operation and shape, compiled by operation."""
    from rich.table import Table

    for op, shape in dict.fromkeys((row["op"], row["shape"]) for row in document["traffic"]):
        table = Table(title=f"{op}: {shape}; counted, no GPU")
        table.add_column("implementation", no_wrap=True)
        table.add_column("phase", no_wrap=True)
        for name in (
            "launches",
            "torch\nops",
            "MB",
            "MB /\nfloor",
            "kernels\n/ floor",
            "sectors\n/ asked",
            "GFLOP",
            *(f"{device}:\npredicted\nms" for device in DEVICES),
            "error",
        ):
            table.add_column(name, justify="right", no_wrap=True)
        for row in document["traffic"]:
            if (row["op"], row["shape"]) == (op, shape):
                table.add_row(*_traffic_cells(row))
        yield table
    for op in dict.fromkeys(row["op"] for row in document["compiled"]):
        yield _compiled_table(document, op)


def _traffic_cells(row: Document) -> list[str]:
    flops = sum(sum(kernel["dot_flops"].values()) for kernel in row["kernels"])
    flops += sum(operation["flops"] for operation in row["operations"])
    has_kernels, floor = row["launches"] > 0, row["floor_bytes"]
    error = "not finite" if row["relative_error"] is None else f"{row['relative_error']:.0e}"
    return [
        row["implementation"],
        row["phase"],
        str(row["launches"]),
        str(row["operation_calls"]),
        f"{row['unique_bytes'] / 1e6:.2f}",
        f"{row['unique_bytes'] / floor:.2f}",
        f"{row['kernel_bytes'] / floor:.2f}" if has_kernels else "-",
        f"{row['sector_bytes'] / row['requested_bytes']:.2f}" if has_kernels else "-",
        f"{flops / 1e9:.2f}",
        *(f"{row['predicted_ms'][device]:.3g}" for device in DEVICES),
        f"WRONG: {error}" if is_wrong(row) else error,
    ]


def _compiled_table(document: Document, op: str) -> Table:
    """One operation's kernels by row, GPUs by column."""
    from rich.table import Table

    triton = document["versions"]["triton"]
    table = Table(title=f"{op}: compiled by Triton {triton}, no GPU", show_lines=True)
    table.add_column("kernel", overflow="fold")
    rows = [row for row in document["compiled"] if row["op"] == op]
    archs = sorted({row["arch"] for row in rows})
    # A kernel that is compiled several ways is told apart by order: its tiles may differ by GPU.
    kernels: dict[tuple[str, ...], dict[int, list[Document]]] = {}
    for row in rows:
        key = (row["implementation"], row["kernel"], row["shape"])
        kernels.setdefault(key, {arch: [] for arch in archs})[row["arch"]].append(row)
    for arch in archs:
        table.add_column(f"sm_{arch}")
    for (implementation, kernel, _), by_arch in kernels.items():
        for ways in zip_longest(*by_arch.values()):
            cells = [_compiled_cell(row) if row else "" for row in ways]
            table.add_row(f"{implementation}\n{kernel}", *cells)
    return table


def _compiled_cell(row: Document) -> str:
    cores = [f"{n} {name}" for name, n in row["opcodes"].items() if n and name.endswith("MMA")]
    said = [
        f"{row['registers']} registers, {row['warps']} warps",
        f"{row['shared_bytes'] / 1024:.0f} KB shared, {row['programs_per_sm']} an SM",
        *([", ".join(cores)] if cores else []),
        *row["remarks"],
    ]
    return "\n".join(said)

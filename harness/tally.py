"""One job of `seqscale counters`, in a process of its own: an operation interpreted, or compiled.

The process reads a job as JSON from standard input; its argument is the process that waits for it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
import triton
from torch import Tensor

from archs.block import tensor_bytes
from archs.ops import BackendUnavailableError
from harness import compiled, counted, pretend, traffic
from harness.correctness import relative_error, worst
from harness.counted import Counted
from harness.counters import DONE, RESULT
from harness.worker import die_with, one_line

INTERPRETED_AS = 90  # the GPU that code which asks is told of
Document = dict[str, Any]


def main() -> None:
    """Do one job: its result is the last line of the output."""
    die_with(int(sys.argv[1]))
    job = json.load(sys.stdin)
    rows, left_out = [], []
    for op in job["ops"]:
        for call in counted.calls(op, DTYPES[job["kind"]]):
            if job["implementations"] and call.implementation not in job["implementations"]:
                continue
            found, reason, failed = _attempt(call, job)
            rows += found
            if reason is not None:
                names = {"op": op, "shape": call.shape, "implementation": call.implementation}
                left_out.append({**names, "reason": reason, "failed": failed})
        print(DONE, op, job["kind"], flush=True)
    result = {
        **{kind: rows if kind == job["kind"] else [] for kind in KINDS},
        "left_out": left_out,
        "versions": {"torch": torch.__version__.partition("+")[0], "triton": triton.__version__},
    }
    print(RESULT, json.dumps(result, allow_nan=False))


def _attempt(call: Counted, job: Document) -> tuple[list[Document], str | None, bool]:
    """The rows of a call; or why there are none, and whether that is a fault."""
    with pretend.gpu(INTERPRETED_AS):  # a library may ask about the GPU when it is imported
        reason = call.unavailable
    if reason is not None:
        return [], reason, False
    try:
        return KINDS[job["kind"]](call, job), None, False
    except BackendUnavailableError as error:
        return [], str(error), False
    except Exception as error:
        return [], one_line(f"{type(error).__name__}: {error}"), True


# The interpreter computes bfloat16 wrongly; float16 has its size.
DTYPES = {"traffic": torch.float16, "compiled": torch.bfloat16}


def _traffic(call: Counted, job: Document) -> list[Document]:
    """The forward and the backward pass of a call, each with its floor and its error."""
    if call.only is not None:
        return []  # Gluon, which no interpreter runs
    leaves = list(call.leaves.values())
    with pretend.gpu(INTERPRETED_AS):
        call.prepare()
        outputs, forward = traffic.count(lambda: call.call(call.leaves))
        y = outputs[0]
        seed = _seed(y)
        passes = {"forward": forward}
        gradients: tuple[Tensor, ...] = ()
        if call.backward:
            gradients, passes["backward"] = traffic.count(
                lambda: torch.autograd.grad(y, leaves, seed)
            )
    wide = {name: x.detach().double().requires_grad_() for name, x in call.leaves.items()}
    wanted = call.reference(wide)
    errors = {"forward": _error(outputs, wanted)}
    if call.backward:
        expected = torch.autograd.grad(wanted[0], list(wide.values()), seed.double())
        errors["backward"] = _error(gradients, expected)
    read = tensor_bytes(leaves)
    floors = {
        "forward": read + tensor_bytes(list(outputs)),
        "backward": 2 * read + tensor_bytes(seed),
    }
    return [
        {
            "op": call.op,
            "shape": call.shape,
            "implementation": call.implementation,
            "phase": phase,
            "floor_bytes": floors[phase],
            "relative_error": errors[phase],
            **document(counts),
        }
        for phase, counts in passes.items()
    ]


def document(counts: traffic.Traffic) -> Document:
    """What was counted, kernel by kernel and operation by operation, with the sums."""
    kernels = list(counts.kernels.values())
    return {
        "launches": counts.launches,
        "operation_calls": counts.operation_calls,
        "unique_bytes": counts.unique_bytes,
        "kernel_bytes": sum(k.unique_bytes for k in kernels),
        "requested_bytes": sum(k.requested_bytes for k in kernels),
        "sector_bytes": sum(k.sector_bytes for k in kernels),
        "kernels": [
            {
                **asdict(k),
                "unique_bytes": k.unique_bytes,
                "requested_bytes": k.requested_bytes,
                "sector_bytes": k.sector_bytes,
            }
            for k in kernels
        ],
        "operations": [asdict(o) for o in counts.operations.values()],
    }


def _compiled(call: Counted, job: Document) -> list[Document]:
    """What the compiler makes of the kernels of both passes, for every architecture asked for."""
    if not call.kernels:
        return []

    def both_passes() -> None:
        y = call.call(call.leaves)[0]
        torch.autograd.grad(y, list(call.leaves.values()), _seed(y))

    names = {"op": call.op, "shape": call.shape, "implementation": call.implementation}
    rows = []
    for arch in job["archs"]:
        if call.only not in (None, arch):
            continue
        with pretend.gpu(arch):
            for row in compiled.compile_launches(both_passes, arch):
                remarks = [
                    remark
                    for remark in row.remarks
                    if call.op not in counted.WITHOUT_PRODUCTS or "tensor cores" not in remark
                ]
                rows.append({**names, **asdict(row), "remarks": remarks})
    return rows


def _seed(y: Tensor) -> Tensor:
    """A random gradient of y."""
    return torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)


def _error(got: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> float | None:
    """The largest relative RMS error, to two digits; None where something is not finite."""
    error = worst(relative_error(a, b) for a, b in zip(got, wanted, strict=True))
    return float(f"{error:.1e}") if error == error else None


KINDS: dict[str, Callable[[Counted, Document], list[Document]]] = {
    "traffic": _traffic,
    "compiled": _compiled,
}

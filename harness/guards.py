"""What `seqscale check` guards: operations of ours, and callables of anyone's.

A file of guards names them, in a list GUARDS:

    from harness.guards import Guard
    from mine import scan, slow_scan

    GUARDS = [Guard("scan, 512 x 4,096", scan, lambda: (torch.randn(512, 4096),), slow_scan)]

So does an entry point of the group `seqscale.guards`: an object that is such a list.
"""

from __future__ import annotations

import runpy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from harness.record import Case

GROUP = "seqscale.guards"
ALLOWED_ERROR = 1e-3  # relative RMS of a guard's result, where it does not say another


@dataclass(frozen=True)
class Guard:
    """A callable whose speed is guarded.

    Attributes:
        name: of the cell; it stays the same as long as what is measured does.
        call: does the whole work and leaves its arguments as they are. The tensors, arrays and
            numbers in what it returns are compared: also in lists, mappings and dataclasses.
        inputs: makes the arguments of `call`, a tuple.
        reference: returns what `call` should, of the same arguments; None: the result is only
            checked for being the same after as before it was timed, and finite.
        allowed_error: relative RMS difference of each from the reference's.

    Raises:
        ValueError: no name, or nothing that can be called.
    """

    name: str
    call: Callable[..., Any]
    inputs: Callable[[], tuple[Any, ...]] = tuple
    reference: Callable[..., Any] | None = None
    allowed_error: float = ALLOWED_ERROR

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.strip():
            raise ValueError(f"a guard is called by a text, not {self.name!r}")
        for what in ("call", "inputs"):
            if not callable(getattr(self, what)):
                raise ValueError(f"guard {self.name!r}: {what} is not callable")


class Prepared(NamedTuple):
    """A cell that is ready to be timed."""

    function: Callable[[], Any]
    fault: Callable[[], str | None]  # why its result is wrong; None where it is right


def names(device: str, path: Path | None = None, tree: Path | None = None) -> list[str]:
    """The names of all cells, in order.

    Args:
        device: "cpu" or "cuda".
        path: a file of guards, whose cells alone they are then; None: ours and those of packages.
        tree: without a file, only what is imported from this folder; None: from anywhere.

    Raises:
        ValueError: the file is no file of guards, or a name is there twice.
    """
    return list(_cells(device, path, tree))


def prepare(name: str, device: str, path: Path | None = None, tree: Path | None = None) -> Prepared:
    """Build a cell and its inputs; errors are those of the code that is guarded."""
    found = _cells(device, path, tree)[name]
    return _guarded(found) if isinstance(found, Guard) else _ours(found, device)


@cache
def _cells(device: str, path: Path | None, tree: Path | None) -> Mapping[str, Guard | Case]:
    found: list[tuple[str, Guard | Case]] = []
    if path is not None:
        found += [(guard.name, guard) for guard in _of_file(path)]
    else:
        if _lies_in("archs", tree):
            found += _own(device).items()
            found += [(guard.name, guard) for guard in _short_convs(device)]
        for entry in entry_points(group=GROUP):
            if _lies_in(entry.module.partition(".")[0], tree):
                found += [(guard.name, guard) for guard in _listed(entry.load(), entry.value)]
    cells: dict[str, Guard | Case] = {}
    for name, cell in found:
        if name in cells:
            raise ValueError(f"two cells are called {name!r}: give each guard a name of its own")
        cells[name] = cell
    return cells


def _lies_in(package: str, tree: Path | None) -> bool:
    """Whether a package is imported from a folder, of which None is any."""
    found = find_spec(package)
    if tree is None or found is None or found.origin is None:
        return tree is None
    return Path(found.origin).resolve().is_relative_to(tree)


def _of_file(path: Path) -> list[Guard]:
    found = runpy.run_path(str(path))
    if "GUARDS" not in found:
        raise ValueError(f"{path} has no list GUARDS of harness.guards.Guard")
    return _listed(found["GUARDS"], str(path))


def _listed(guards: Any, where: str) -> list[Guard]:
    if not isinstance(guards, Iterable):
        raise ValueError(f"{where}: {guards!r} is no list of harness.guards.Guard")
    found = list(guards)
    for guard in found:
        if not isinstance(guard, Guard):
            raise ValueError(f"{where}: {guard!r} is no harness.guards.Guard")
    return found


def _own(device: str) -> Mapping[str, Case]:
    """The cells of our operations by name."""
    from harness.sweep import ARCHS, OPERATIONS, Grid, cells

    grid = Grid(
        level="op",
        phase=("forward", "backward"),
        archs=ARCHS,
        lengths=(1024, 16384) if device == "cuda" else (256, 2048),
        tokens=16384 if device == "cuda" else 2048,
        size="d1024" if device == "cuda" else "d256",
    )
    return {
        f"{OPERATIONS[case.arch]} {case.phase} T={case.seq_len} B={case.batch} {case.size} "
        f"{case.dtype} {case.backend}": case
        for case in cells([grid], device)
    }


def _short_convs(device: str) -> list[Guard]:
    """The short convolution, which is no architecture's mixer and so no cell of a sweep."""
    import torch

    from archs.ops.short_conv import short_conv

    cuda = device == "cuda"
    shape, dtype = ((8, 8192, 2048), torch.bfloat16) if cuda else ((4, 2048, 512), torch.float32)
    backend = "triton" if cuda else "torch"

    def inputs() -> tuple[Any, ...]:
        x, dy = (torch.randn(shape, device=device, dtype=dtype) for _ in range(2))
        weight, bias = (torch.randn(shape[2], *w, device=device, dtype=dtype) for w in ((4,), ()))
        return x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), dy

    def forward(x: Any, weight: Any, bias: Any, dy: Any) -> Any:
        with torch.no_grad():
            return short_conv(x, weight, bias, activation="silu", backend=backend)[0]

    def both(x: Any, weight: Any, bias: Any, dy: Any, backend: Any = backend) -> Any:
        y, _ = short_conv(x, weight, bias, activation="silu", backend=backend)
        return torch.autograd.grad(y, (x, weight, bias), dy)

    def wide(tensors: Iterable[Any]) -> list[Any]:
        return [t.detach().double().requires_grad_() for t in tensors]

    def right(*tensors: Any) -> Any:
        x, weight, bias, _ = wide(tensors)
        return short_conv(x, weight, bias, activation="silu", backend="reference")[0]

    def right_gradients(*tensors: Any) -> Any:
        return both(*wide(tensors), backend="reference")

    name = f"T={shape[1]} B={shape[0]} d{shape[2]} {str(dtype).removeprefix('torch.')} {backend}"
    allowed = 2e-2 if cuda else ALLOWED_ERROR
    return [
        Guard(f"short_conv forward {name}", forward, inputs, right, allowed),
        Guard(f"short_conv forward and backward {name}", both, inputs, right_gradients, allowed),
    ]


def _ours(case: Case, device: str) -> Prepared:
    from harness.workload import ALLOWED_ERROR, build

    workload = build(case, device)
    allowed = ALLOWED_ERROR[case.dtype]

    def fault() -> str | None:
        error = workload.check()
        return None if error <= allowed else f"relative error {error:.1e}, allowed {allowed:.0e}"

    return Prepared(workload.function, fault)


def _guarded(guard: Guard) -> Prepared:
    import torch

    torch.manual_seed(0)
    inputs = guard.inputs()
    wanted: list[Any] | None = None  # once asked for: most processes compare nothing

    def fault() -> str | None:
        nonlocal wanted
        if wanted is None:
            right = guard.call if guard.reference is None else guard.reference
            wanted = _tensors(right(*inputs))
        if not wanted:
            what = "call" if guard.reference is None else "reference"
            return f"the {what} returns no tensor, array or number to compare"
        found = _tensors(guard.call(*inputs))
        if len(found) != len(wanted):
            return f"{len(found)} tensors, not {len(wanted)}"
        for tensor, right in zip(found, wanted, strict=True):
            if tensor.shape != right.shape:
                return f"shape {tuple(tensor.shape)}, not {tuple(right.shape)}"
            error = _error(tensor, right)
            if not error <= guard.allowed_error:  # NaN is wrong too
                return f"relative error {error:.1e}, allowed {guard.allowed_error:.0e}"
        return None

    return Prepared(lambda: guard.call(*inputs), fault)


def _tensors(result: Any) -> list[Any]:
    """The tensors, arrays and numbers in a result as tensors, detached copies, in order."""
    import numpy as np
    import torch

    if isinstance(result, torch.Tensor):
        return [result.detach().clone()]
    if isinstance(result, np.ndarray | np.generic | bool | int | float | complex):
        return [torch.from_numpy(np.array(result))]
    if is_dataclass(result) and not isinstance(result, type):
        result = [getattr(result, part.name) for part in fields(result)]
    if isinstance(result, Mapping):
        result = result.values()
    if isinstance(result, Iterable) and not isinstance(result, str | bytes):
        return [tensor for part in result for tensor in _tensors(part)]
    return []


def _error(tensor: Any, right: Any) -> float:
    """Relative RMS difference, in double precision; of an exact zero the RMS itself."""
    import torch

    if tensor.numel() == 0:
        return 0.0
    tensor, right = (t.to("cpu", torch.complex128) for t in (tensor, right))
    difference, size = (t.abs().square().mean().sqrt().item() for t in (tensor - right, right))
    return difference / size if size > 0 else difference

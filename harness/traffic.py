"""What a call moves through memory and computes, counted exactly on a machine without a GPU.

Triton kernels run in Triton's interpreter with every access to memory and every dot hooked; PyTorch
operations around them are counted as they are dispatched, so that nothing hides between kernels.
What is counted of a kernel:

    requested bytes  elements accessed times their size, every lane that is not masked
    unique bytes     bytes of global memory touched, each once a launch: the least that can move
    sector bytes     32-byte sectors touched by each load or store, summed: what a GPU must move
                     through L1 where lanes do not lie side by side

Time, caches, layouts and races do not exist here. An operation of PyTorch reads each of its inputs
and writes each of its results once; what a library does inside one operation is not seen.

TRITON_INTERPRET=1 must be set before any kernel is imported: use a process of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from harness.interpreter import convertible_loop_variables, prepared_once

SECTOR_BYTES = 32  # NVIDIA, CUDA C++ Best Practices Guide, "Coalesced access to global memory"
EXPONENTIALS = (np.exp, np.exp2)
# Types whose arithmetic the interpreter gets wrong: it multiplies their bit patterns.
UNSUPPORTED = (torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
aten = torch.ops.aten


def _real_fft_flops(x: Any, dim: list[int], *_: Any, out_val: Tensor, **__: Any) -> int:
    """2.5 n log2 n a transform (van Loan, Computational Frameworks for the FFT, 1992)."""
    points = math.prod(out_val.shape[d] if not out_val.is_complex() else x.shape[d] for d in dim)
    transforms = (x.numel() if out_val.is_complex() else out_val.numel()) // points
    return round(2.5 * points * math.log2(points)) * transforms


# FLOPs of operations that `torch.utils.flop_counter` does not know.
MORE_FLOPS = {
    aten._fft_r2c: _real_fft_flops,
    aten._fft_c2r: _real_fft_flops,
    **{
        getattr(aten, f"_scaled_dot_product_flash_attention_for_cpu{suffix}"): flop_registry[
            getattr(aten, f"_scaled_dot_product_flash_attention{suffix}")
        ]
        for suffix in ("", "_backward")
    },
}
FACTORIES = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
OVERWRITES = ("copy_", "fill_", "zero_", "normal_", "uniform_")  # do not read what they replace

Result = TypeVar("Result")


class UncountableError(RuntimeError):
    """The call cannot be counted here; the message says why and what to do."""


@dataclass
class Argument:
    """The traffic of one tensor, or of several that share memory, over all launches of a kernel."""

    requested_bytes: int = 0
    unique_bytes: int = 0
    read_bytes: int = 0  # unique, likewise the next: their sum is more where both happen
    written_bytes: int = 0
    sector_bytes: int = 0


@dataclass
class Kernel:
    """A Triton kernel over all its launches in one call."""

    name: str
    launches: int = 0
    programs: int = 0
    loads: int = 0  # instructions of a program, likewise the next three
    stores: int = 0
    atomics: int = 0
    descriptor_accesses: int = 0  # among the loads and stores
    dot_flops: dict[str, int] = field(default_factory=dict)  # by type and precision of the operands
    exponentials: int = 0
    arguments: dict[str, Argument] = field(default_factory=dict)

    @property
    def unique_bytes(self) -> int:
        """Over all arguments."""
        return sum(a.unique_bytes for a in self.arguments.values())

    @property
    def requested_bytes(self) -> int:
        """Over all arguments."""
        return sum(a.requested_bytes for a in self.arguments.values())

    @property
    def sector_bytes(self) -> int:
        """Over all arguments."""
        return sum(a.sector_bytes for a in self.arguments.values())


@dataclass
class Operation:
    """An operation of PyTorch over all its calls."""

    name: str
    calls: int = 0
    unique_bytes: int = 0
    flops: int = 0


@dataclass
class Traffic:
    """All that was counted during one call, in the order of first use."""

    kernels: dict[str, Kernel] = field(default_factory=dict)
    operations: dict[str, Operation] = field(default_factory=dict)

    @property
    def launches(self) -> int:
        """Of Triton kernels."""
        return sum(k.launches for k in self.kernels.values())

    @property
    def operation_calls(self) -> int:
        """Of PyTorch operations that move anything: on a GPU at least a launch each."""
        return sum(o.calls for o in self.operations.values())

    @property
    def unique_bytes(self) -> int:
        """Of kernels and operations."""
        counted = [*self.kernels.values(), *self.operations.values()]
        return sum(one.unique_bytes for one in counted)


def count(function: Callable[[], Result]) -> tuple[Result, Traffic]:
    """The result of a call on CPU tensors, and what it moved and computed.

    Raises:
        UncountableError: the interpreter is off, or computes a type in use wrongly.
        IndexError: a kernel accesses memory outside its arguments.
    """
    traffic = Traffic()
    with _hooked(traffic), _TensorOperations(traffic):
        result = function()
    return result, traffic


class _Region:
    """The memory of one tensor during a launch, with a mark for every byte touched."""

    def __init__(self, name: str, storage: torch.UntypedStorage) -> None:
        self.names = [name]
        self.start, self.size = storage.data_ptr(), storage.nbytes()
        self.read = np.zeros(self.size, bool)
        self.written = np.zeros(self.size, bool)
        self.requested_bytes = 0
        self.sectors = 0

    def mark(self, offsets: np.ndarray, size: int, *, read: bool, written: bool) -> None:
        """Note an access to elements of `size` bytes at byte `offsets`."""
        self.requested_bytes += size * offsets.size
        self.sectors += _distinct(offsets // SECTOR_BYTES, (offsets + size - 1) // SECTOR_BYTES)
        whole = self.size % size == 0 and not (offsets % size).any()
        for marks in [self.read] * read + [self.written] * written:
            if whole:
                marks.reshape(-1, size)[offsets // size] = True
            else:
                marks[offsets[:, None] + np.arange(size)] = True

    def add_to(self, kernel: Kernel) -> None:
        """Add what was touched to the kernel's account."""
        argument = kernel.arguments.setdefault("+".join(self.names), Argument())
        argument.requested_bytes += self.requested_bytes
        argument.unique_bytes += int(np.count_nonzero(self.read | self.written))
        argument.read_bytes += int(np.count_nonzero(self.read))
        argument.written_bytes += int(np.count_nonzero(self.written))
        argument.sector_bytes += SECTOR_BYTES * self.sectors


def _distinct(first: np.ndarray, last: np.ndarray) -> int:
    """How many different sectors lie in the spans from `first` to `last`."""
    numbers = first if (first == last).all() else np.concatenate((first, last))
    low = numbers.min()
    span = int(numbers.max() - low) + 1
    if span > 16 * numbers.size:
        return np.unique(numbers).size
    touched = np.zeros(span, bool)
    touched[numbers - low] = True
    return int(np.count_nonzero(touched))


class _Launch:
    """One launch of a kernel: the regions of its arguments."""

    def __init__(self, kernel: Kernel, tensors: Iterable[tuple[str, Tensor]]) -> None:
        self.kernel = kernel
        regions: dict[int, _Region] = {}
        for name, tensor in tensors:
            storage = tensor.untyped_storage()
            if not storage.nbytes():
                continue
            if (known := regions.get(storage.data_ptr())) is not None:
                known.names.append(name)
            else:
                regions[storage.data_ptr()] = _Region(name, storage)
        self.arguments = list(regions.values())
        self.regions = sorted(self.arguments, key=lambda region: region.start)
        self.starts = np.array([region.start for region in self.regions], np.int64)

    def access(
        self, pointers: np.ndarray, mask: np.ndarray, size: int, *, read: bool, written: bool
    ) -> None:
        """Note the lanes of one load or store that are not masked."""
        # Python's True and a mask make the interpreter's integers.
        lanes = np.broadcast_to(np.asarray(mask, bool), pointers.shape)
        addresses = pointers[lanes].astype(np.int64).ravel()
        if not addresses.size:
            return
        owners = np.searchsorted(self.starts, [addresses.min(), addresses.max()], "right") - 1
        for i in range(owners[0], owners[1] + 1):
            inside = addresses
            if owners[0] != owners[1]:
                owner = np.searchsorted(self.starts, addresses, "right") - 1
                inside = addresses[owner == i]
            if not inside.size:
                continue
            region = self.regions[i] if i >= 0 else None
            if region is None or inside.max() + size > region.start + region.size:
                raise IndexError(
                    f"{self.kernel.name} accesses memory outside its arguments"
                    + (f", beyond {'+'.join(region.names)}" if region else "")
                )
            region.mark(inside - region.start, size, read=read, written=written)

    def end(self) -> None:
        """Add everything to the kernel's account."""
        for region in self.arguments:
            region.add_to(self.kernel)


class _Hooks:
    """The interpreter's own functions, each noting what it does in the launch that runs."""

    def __init__(self, traffic: Traffic) -> None:
        from triton.runtime import interpreter

        self.traffic = traffic
        self.builder: Any = interpreter.interpreter_builder
        self.launch: _Launch | None = None

    @property
    def kernel(self) -> Kernel:
        assert self.launch is not None, "an access outside a launch"
        return self.launch.kernel

    @contextmanager
    def installed(self) -> Iterator[None]:
        from triton.runtime import interpreter

        hooks, builder = self, interpreter.InterpreterBuilder

        class Memory:
            """The compiled part of the interpreter, through which all its accesses go."""

            def __getattr__(self, name: str) -> Any:
                return getattr(memory, name)

            def load(self, pointers: Any, mask: Any, other: Any, dtype: Any) -> Any:
                hooks.kernel.loads += 1
                hooks.note(pointers, mask, np.dtype(dtype).itemsize, read=True, written=False)
                return memory.load(pointers, mask, other, dtype)

            def store(self, pointers: Any, value: Any, mask: Any) -> Any:
                hooks.kernel.stores += 1
                hooks.note(pointers, mask, value.dtype.itemsize, read=False, written=True)
                return memory.store(pointers, value, mask)

            def atomic_rmw(self, kind: Any, pointers: Any, value: Any, mask: Any, sem: Any) -> Any:
                hooks.kernel.atomics += 1
                hooks.note(pointers, mask, value.dtype.itemsize, read=True, written=True)
                return memory.atomic_rmw(kind, pointers, value, mask, sem)

            def atomic_cas(self, pointers: Any, expected: Any, value: Any, sem: Any) -> Any:
                hooks.kernel.atomics += 1
                everywhere = np.ones(pointers.shape, bool)
                hooks.note(pointers, everywhere, value.dtype.itemsize, read=True, written=True)
                return memory.atomic_cas(pointers, expected, value, sem)

        def counting_descriptors(function: Callable[..., Any]) -> Callable[..., Any]:
            def access(self: Any, *args: Any, **kwargs: Any) -> Any:
                hooks.kernel.descriptor_accesses += 1
                return function(self, *args, **kwargs)

            return access

        def create_dot(self: Any, a: Any, b: Any, d: Any, precision: Any, *rest: Any) -> Any:
            hooks.note_dot(a, b, precision)
            return dot(self, a, b, d, precision, *rest)

        def unary_op(self: Any, x: Any, operation: Any) -> Any:
            if operation in EXPONENTIALS:
                hooks.kernel.exponentials += x.data.size
            return unary(self, x, operation)

        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            with (
                hooks.launched(self, args, kwargs),
                convertible_loop_variables(self.fn),
                _disable_current_modes(),
            ):
                return run(self, *args, **kwargs)

        memory, dot, unary = interpreter._interpreter, builder.create_dot, builder.unary_op
        run = interpreter.GridExecutor.__call__
        with ExitStack() as stack:
            stack.enter_context(patch.object(interpreter, "_interpreter", Memory()))
            stack.enter_context(patch.object(builder, "create_dot", create_dot))
            stack.enter_context(patch.object(builder, "unary_op", unary_op))
            stack.enter_context(patch.object(interpreter.GridExecutor, "__call__", call))
            for name in ("create_descriptor_load", "create_descriptor_store"):
                hooked = counting_descriptors(getattr(builder, name))
                stack.enter_context(patch.object(builder, name, hooked))
            yield

    @contextmanager
    def launched(self, executor: Any, args: Any, kwargs: Any) -> Iterator[None]:
        name = executor.fn.__name__
        named = dict(zip(executor.arg_names, args, strict=False)) | kwargs
        tensors = [(key, t) for key, value in named.items() for t in _tensors(value)]
        for key, tensor in tensors:
            if tensor.dtype in UNSUPPORTED:
                raise UncountableError(
                    f"{name}: Triton's interpreter computes {tensor.dtype} wrongly ({key}): use "
                    "float16, which has the size of bfloat16, or float32"
                )
        kernel = self.traffic.kernels.setdefault(name, Kernel(name))
        kernel.launches += 1
        self.launch = _Launch(kernel, tensors)
        try:
            yield
            self.launch.end()
            kernel.programs += math.prod(self.builder.grid_dim)
        finally:
            self.launch = None

    def note(self, pointers: Any, mask: Any, size: int, *, read: bool, written: bool) -> None:
        assert self.launch is not None, "an access outside a launch"
        self.launch.access(pointers, mask, size, read=read, written=written)

    def note_dot(self, a: Any, b: Any, precision: Any) -> None:
        name = str(a.dtype.scalar)
        if name == "bf16":
            raise UncountableError(
                f"{self.kernel.name}: Triton's interpreter computes bfloat16 dots wrongly: cast "
                "to the type of the inputs, and use float16 or float32 for them"
            )
        if name == "fp32":
            name += f" {precision.name.lower()}"
        *outer, inner = a.data.shape
        flops = 2 * math.prod(outer) * inner * b.data.shape[-1]
        self.kernel.dot_flops[name] = self.kernel.dot_flops.get(name, 0) + flops


@contextmanager
def _hooked(traffic: Traffic) -> Iterator[None]:
    """Count the kernels that are launched meanwhile."""
    import triton

    if not triton.knobs.runtime.interpret:  # type: ignore[attr-defined]
        raise UncountableError(
            "kernels are counted in Triton's interpreter: set TRITON_INTERPRET=1 before they are "
            "imported"
        )
    with prepared_once(), _Hooks(traffic).installed():
        yield


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in an argument of a kernel: itself, in a tuple, or behind a descriptor."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for part in value:
            yield from _tensors(part)
    elif isinstance(base := getattr(value, "base", None), Tensor):  # TensorDescriptor and -Wrapper
        yield base


class _TensorOperations(TorchDispatchMode):
    """Counts the operations of PyTorch that move data; views and uninitialised memory are free."""

    def __init__(self, traffic: Traffic) -> None:
        super().__init__()
        self.traffic = traffic

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if (custom := OPDEFS.get(func._schema.name)) is not None:
            with self:  # what it is made of counts: kernels, and operations around them
                return custom._init_fn(*args, **kwargs)
        result = func(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        if name not in FACTORIES and (moved := self._moved(func, name, args, kwargs, result)):
            operation = self.traffic.operations.setdefault(name, Operation(name))
            operation.calls += 1
            operation.unique_bytes += moved
            packet = func._overloadpacket
            if formula := flop_registry.get(packet) or MORE_FLOPS.get(packet):
                operation.flops += formula(*args, **kwargs, out_val=result)
        return result

    def _moved(self, func: Any, name: str, args: tuple, kwargs: dict, result: Any) -> int:
        """Bytes read and written: each distinct input once, each new or changed result once."""
        written, read = [], []
        for place, argument in enumerate(func._schema.arguments):
            given = args[place] if place < len(args) else kwargs.get(argument.name)
            tensors = [t for t in tree_leaves(given) if isinstance(t, Tensor)]
            changed = argument.alias_info is not None and argument.alias_info.is_write
            written += tensors if changed else []
            if not changed or not (name in OVERWRITES or argument.is_out):
                read += tensors
        known = {t.untyped_storage().data_ptr() for t in read + written}
        new = [
            t
            for t in tree_leaves(result)
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in known
        ]
        views = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        if views and not new and not written:
            return 0
        # The same memory read twice, say a matrix and its transpose, counts once.
        inputs = {(t.data_ptr(), _distinct_bytes(t)) for t in read}
        return sum(map(_distinct_bytes, new + written)) + sum(size for _, size in inputs)


def _distinct_bytes(tensor: Tensor) -> int:
    """Bytes of memory under a tensor, without those that an expanded axis repeats."""
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return tensor.element_size() * math.prod(n for n, stride in sizes if stride or not n)

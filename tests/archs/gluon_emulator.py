"""Gluon on a CPU, as far as `attention_hopper_forward_kernel` goes, to find races and deadlocks.

The kernel's own Python functions are run, with numbers and tensors of PyTorch. Every partition is a
thread; one runs at a time, and hands over wherever it does something that another could notice.
Copies and matrix products are asynchronous: each takes effect at some moment between its start and
what waits for it. Who goes on, and what takes effect when, is drawn from a seed.

Memory starts as NaN. What the hardware leaves undefined is an error here: `RaceError` where memory
is written while it is read or written, or read before its writes were fenced, and where a result is
used that was not waited for; `DeadlockError` where nobody can go on.

Not modelled: layouts, and the threads of a warpgroup, which the compiler keeps in step.
"""

from __future__ import annotations

import operator
import random
import threading
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

RELUCTANCE = (0.0, 0.7, 0.97)  # how often what is asynchronous has to wait while somebody can go on


class RaceError(RuntimeError):
    """Something whose result the hardware leaves open."""


class DeadlockError(RuntimeError):
    """Everybody waits, and nothing is on its way."""


class EmulatedKernel:
    """Stands in for the Gluon kernel `name` of a module: launches run here, one program at a time.

    Args:
        module: whose functions are run.
        name: the kernel.
        seed: what every draw follows from.
        edits: pairs of a part of the module's source, which must occur once, and its replacement.
    """

    def __init__(
        self, module: ModuleType, name: str, seed: int, edits: tuple[tuple[str, str], ...] = ()
    ) -> None:
        path = Path(module.__file__)
        source = path.read_text()
        for old, new in edits:
            if source.count(old) != 1:
                raise ValueError(f"{source.count(old)} times in {path.name}: {old}")
            source = source.replace(old, new)
        self.functions: dict[str, Any] = {"__name__": module.__name__}
        exec(compile(source, str(path), "exec"), self.functions)
        self.name, self.draw = name, random.Random(seed)

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        """What launches so many programs."""

        def launch(*args: Any, num_warps: int, **constants: Any) -> None:
            assert num_warps == 4, "a partition is a warpgroup"
            for pid in self.draw.sample(range(grid[0]), grid[0]):
                program = Program(pid, self.draw)
                kernel = program.bound(self.functions)[self.name]
                kernel(*map(_as_argument, args), **constants)
                assert program.specialised, "there were no partitions"

        return launch


class Number(int):
    """An integer of the device, where division rounds towards zero: none of negative numbers."""

    def to(self, dtype: torch.dtype) -> Number:
        """The same in another type: here they all have one."""
        return self


def _arithmetic(
    operation: Callable[[int, int], int], swapped: bool
) -> Callable[[Number, Any], Any]:
    def apply(self: Number, other: Any) -> Any:
        if not isinstance(other, int):
            return NotImplemented
        left, right = (int(other), int(self)) if swapped else (int(self), int(other))
        if operation in (operator.floordiv, operator.mod):
            assert left >= 0 < right, f"{operation.__name__} of {left} and {right}"
        return Number(operation(left, right))

    return apply


for _operation in (operator.add, operator.sub, operator.mul, operator.floordiv, operator.mod):
    setattr(Number, f"__{_operation.__name__}__", _arithmetic(_operation, swapped=False))
    setattr(Number, f"__r{_operation.__name__}__", _arithmetic(_operation, swapped=True))


@dataclass
class Pointer:
    """Addresses of elements of a tensor: one, or a tensor of them."""

    memory: Tensor  # (N,)
    offset: Any = 0

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.memory, self.offset + offset)


class Descriptor:
    """A tensor as TMA sees it, in blocks."""

    def __init__(self, described: Any) -> None:
        base = described.base
        self.memory = base.as_strided(described.shape, described.strides, base.storage_offset())
        shape = list(described.block_shape)
        size = torch.Size(shape).numel() * base.element_size()
        self.block_type = SimpleNamespace(shape=shape, nbytes=size)
        self.dtype, self.layout = base.dtype, described.layout

    def inside(self, start: list[int]) -> tuple[Tensor, tuple[slice, ...]]:
        """The part of the block at `start` that is in the tensor, and where it is in the block."""
        block = self.block_type.shape
        assert min(start) >= 0
        part = self.memory[tuple(slice(a, a + n) for a, n in zip(start, block, strict=True))]
        return part, tuple(slice(0, n) for n in part.shape)


def _as_argument(x: Any) -> Any:
    if isinstance(x, Tensor):
        return Pointer(x.as_strided((x.numel(),), (1,)))
    if isinstance(x, int):
        return Number(x)
    return x if isinstance(x, float) else Descriptor(x)


class Shared:
    """A part of shared memory, and maybe a view of it in another shape."""

    def __init__(self, program: Program, memory: Tensor) -> None:
        self.program, self.memory = program, memory
        self.place = memory.data_ptr()
        self.shape, self.dtype = list(memory.shape), memory.dtype

    def index(self, i: int) -> Shared:
        assert 0 <= i < self.shape[0]
        return Shared(self.program, self.memory[i])

    def reshape(self, shape: list[int]) -> Shared:
        return Shared(self.program, self.memory.view(shape))

    def permute(self, order: tuple[int, ...]) -> Shared:
        return Shared(self.program, self.memory.permute(order))

    def store(self, value: Tensor) -> None:
        """By the threads of a partition, so that copies have to be fenced from it."""
        self.program.hand_over()
        assert value.shape == self.memory.shape
        assert value.dtype == self.dtype
        self.program.check_unused(self)
        self.memory.copy_(value)
        self.program.unfenced[self.place] = self.program.running


@dataclass
class Barrier:
    """An mbarrier: a phase completes after `count` arrivals, once all bytes are there (PTX ISA)."""

    count: int
    left: int
    bytes_left: int = 0
    phases: int = 0  # completed

    def advance(self, arrivals: int = 0, expected: int = 0) -> None:
        self.left -= arrivals
        self.bytes_left += expected
        if self.left < 0 or (self.bytes_left < 0 and not self.left):
            raise RaceError("more arrived at a barrier than it waits for")
        if self.left == self.bytes_left == 0:
            self.phases += 1
            self.left = self.count


@dataclass(eq=False)
class Task:
    """Something asynchronous: what happens when it takes effect, and what it reads till then."""

    effect: Callable[[], Any]
    reads: tuple[int, ...] = ()
    done: bool = False
    result: Any = None


@dataclass(eq=False)
class Partition:
    """A thread of the program, and what it has started that completes in order."""

    name: str
    can_go_on: Callable[[], bool] = lambda: True
    waits_for: object = None
    turn: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    products: deque[Task] = field(default_factory=deque)
    stores: deque[Task] = field(default_factory=deque)
    finished: bool = False


class _Stopped(BaseException):
    """Raised in the partitions that are left when one has failed."""


class Program:
    """One program: its shared memory, what is under way in it, and who goes on next."""

    def __init__(self, pid: int, draw: random.Random) -> None:
        self.pid, self.draw = pid, draw
        self.reluctance = draw.choice(RELUCTANCE)
        self.barriers: dict[int, Barrier] = {}
        self.reading: Counter[int] = Counter()
        self.writing: dict[int, Task] = {}
        self.unfenced: dict[int, Partition | None] = {}  # by whom it was written
        self.kept: list[Tensor] = []  # so that no address is used twice
        self.partitions: list[Partition] = []
        self.running: Partition | None = None
        self.back = threading.Semaphore(0)
        self.failure: BaseException | None = None
        self.specialised = False

    def bound(self, functions: dict[str, Any]) -> dict[str, Any]:
        """The functions of a kernel's module, which find this program where they look for Gluon."""
        found = dict(functions)
        for name, value in functions.items():
            if isinstance(function := getattr(value, "fn", None), FunctionType):
                found[name] = FunctionType(function.__code__, found, name)
        found |= {
            "gl": self.language(),
            "mbarrier": SimpleNamespace(
                MBarrierLayout=_no_layout,
                init=self.init,
                expect=self.expect,
                arrive=self.arrive,
                wait=self.wait,
            ),
            "tma": SimpleNamespace(
                async_copy_global_to_shared=self.load,
                async_copy_shared_to_global=self.store,
                store_wait=self.store_wait,
            ),
            "fence_async_shared": self.fence,
            "warpgroup_mma": self.multiply,
            "warpgroup_mma_wait": self.multiply_wait,
            "range": lambda *limits: map(Number, range(*limits)),
        }
        return found

    def language(self) -> SimpleNamespace:
        """What stands for `triton.experimental.gluon.language`."""
        return SimpleNamespace(
            float32=torch.float32,
            int64=torch.int64,
            NVMMADistributedLayout=_no_layout,
            DotOperandLayout=_no_layout,
            SliceLayout=_no_layout,
            allocate_shared_memory=self.allocate,
            warp_specialize=self.warp_specialize,
            program_id=lambda axis: Number((self.pid, 0, 0)[axis]),
            static_range=range,
            cdiv=lambda a, b: (a + b - 1) // b,
            arange=lambda start, stop, layout: torch.arange(start, stop, dtype=torch.int32),
            zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype),
            full=lambda shape, value, dtype, layout: torch.full(shape, value, dtype=dtype),
            convert_layout=lambda x, layout: x,
            where=torch.where,
            maximum=_of_numbers_too(max, torch.maximum),
            minimum=_of_numbers_too(min, torch.minimum),
            max=lambda x, axis: x.amax(axis),
            sum=lambda x, axis: x.sum(axis),
            exp2=torch.exp2,
            log2=torch.log2,
            store=self.store_by_threads,
        )

    def allocate(self, dtype: torch.dtype, shape: list[int], layout: Any) -> Shared:
        nothing = float("nan") if dtype.is_floating_point else 0
        self.kept.append(torch.full(shape, nothing, dtype=dtype))
        return Shared(self, self.kept[-1])

    def check_unused(self, part: Shared) -> None:
        """Before it is written."""
        if self.reading[part.place]:
            raise RaceError(f"{self.name()} writes what is being read")
        self.check_written(part)

    def check_written(self, part: Shared) -> None:
        """Before it is read."""
        if part.place in self.writing:
            raise RaceError(f"{self.name()} uses what a copy is writing")

    def check_fenced(self, part: Shared) -> None:
        """Before something asynchronous uses it."""
        if part.place in self.unfenced:
            raise RaceError(f"{self.name()} hands on what it wrote without a fence")

    def fence(self) -> None:
        self.hand_over()
        own = [place for place, writer in self.unfenced.items() if writer is self.running]
        for place in own:
            del self.unfenced[place]

    def store_by_threads(self, pointer: Pointer, value: Tensor, mask: Tensor) -> None:
        self.hand_over()
        offset = pointer.offset[mask].long()
        assert ((offset >= 0) & (offset < pointer.memory.numel())).all()
        pointer.memory[offset] = value[mask]

    def init(self, barrier: Shared, count: int) -> None:
        self.barriers[barrier.place] = Barrier(count, count)
        self.unfenced[barrier.place] = self.running

    def expect(self, barrier: Shared, size_bytes: int) -> None:
        self.hand_over()
        self.barriers[barrier.place].advance(1, size_bytes)

    def arrive(self, barrier: Shared) -> None:
        self.hand_over()
        self.barriers[barrier.place].advance(1)

    def wait(self, barrier: Shared, parity: int) -> None:
        """Until the phase of this parity has completed: the last one that did, or the one before.

        A barrier that has not completed a phase counts as having completed one of parity 1.
        """
        known = self.barriers[barrier.place]
        self.hand_over(lambda: known.phases & 1 != parity, ("parity", parity, known))

    def load(self, source: Descriptor, start: list[int], barrier: Shared, target: Shared) -> None:
        self.hand_over()
        assert target.shape == source.block_type.shape
        assert target.dtype == source.dtype
        self.check_fenced(barrier)
        self.check_unused(target)

        def land() -> None:
            part, where = source.inside(start)
            target.memory.zero_()
            target.memory[where] = part
            del self.writing[target.place]
            self.barriers[barrier.place].advance(expected=-source.block_type.nbytes)

        self.writing[target.place] = Task(land)

    def store(self, target: Descriptor, start: list[int], source: Shared) -> None:
        self.hand_over()
        assert source.shape == target.block_type.shape
        self.check_fenced(source)
        self.check_written(source)

        def take_effect() -> None:
            part, where = target.inside(start)
            part.copy_(source.memory[where])

        self.start(self.running.stores, Task(take_effect, (source.place,)))

    def store_wait(self, pending: int) -> None:
        stores = self.running.stores
        self.hand_over(lambda: len(stores) <= pending, "its copies to be read")

    def multiply(
        self,
        a: Shared | Tensor,
        b: Shared,
        total: Task | Tensor,
        use_acc: bool = True,
        is_async: bool = False,
    ) -> Task:
        self.hand_over()
        assert is_async
        parts = [x for x in (a, b) if isinstance(x, Shared)]
        for part in parts:
            self.check_fenced(part)
            self.check_written(part)

        def take_effect() -> Tensor:
            left = a.memory if isinstance(a, Shared) else a
            assert left.dtype == b.dtype
            product = left.float() @ b.memory.float()
            if not use_acc:
                return product
            return product + (total.result if isinstance(total, Task) else total)

        task = Task(take_effect, tuple(part.place for part in parts))
        self.start(self.running.products, task)
        return task

    def multiply_wait(self, pending: int, deps: tuple[Task, ...]) -> Any:
        products = self.running.products
        self.hand_over(lambda: len(products) <= pending, "its products")
        if not all(task.done for task in deps):
            raise RaceError(f"{self.name()} uses a product that it has not waited for")
        return deps[0].result if len(deps) == 1 else tuple(task.result for task in deps)

    def start(self, queue: deque[Task], task: Task) -> None:
        self.reading.update(task.reads)
        queue.append(task)

    def name(self) -> str:
        return self.running.name if self.running else "the program"

    def warp_specialize(
        self, parts: list[tuple[Callable, tuple]], warps: list[int], registers: list[int]
    ) -> None:
        """Run every partition to its end."""
        assert len(parts) == 1 + len(warps) == 1 + len(registers)
        self.specialised = True
        threads = []
        for i, (function, args) in enumerate(parts):
            partition = Partition(f"{function.__name__} {i}")
            self.partitions.append(partition)
            target = (partition, function, args)
            threads.append(threading.Thread(target=self.run_partition, args=target, daemon=True))
            threads[-1].start()
        try:
            while not all(partition.finished for partition in self.partitions):
                self.go_on()
            if self.writing or any(p.products or p.stores for p in self.partitions):
                raise RaceError("the program ends while something uses its memory")
        except BaseException as error:
            self.failure = error
            for partition in self.partitions:
                partition.turn.release()
            raise
        finally:
            for thread in threads:
                thread.join()

    def run_partition(self, partition: Partition, function: Callable, args: tuple) -> None:
        try:
            partition.turn.acquire()
            if not self.failure:
                function(*args)
        except _Stopped:
            pass
        except BaseException as error:
            self.failure = error
        partition.finished = True
        self.back.release()

    def hand_over(
        self, can_go_on: Callable[[], bool] = lambda: True, waits_for: object = None
    ) -> None:
        """Let others go first; the caller goes on at some later moment when `can_go_on`."""
        partition = self.running
        if partition is None:  # before there are partitions
            assert can_go_on(), f"nobody is there who could do what is waited for: {waits_for}"
            return
        partition.can_go_on, partition.waits_for = can_go_on, waits_for
        self.back.release()
        partition.turn.acquire()
        if self.failure:
            raise _Stopped

    def go_on(self) -> None:
        """One step: a partition up to where it hands over, or something asynchronous."""
        able = [p for p in self.partitions if not p.finished and p.can_go_on()]
        queues = [queue for p in self.partitions for queue in (p.products, p.stores) if queue]
        under_way = [*self.writing.values(), *queues]
        if able and (not under_way or self.draw.random() < self.reluctance):
            under_way = []
        if not able and not under_way:
            blocked = [p for p in self.partitions if not p.finished]
            raise DeadlockError("; ".join(f"{p.name} waits for {p.waits_for}" for p in blocked))
        chosen = self.draw.choice(able + under_way)
        if isinstance(chosen, Partition):
            self.running = chosen
            chosen.turn.release()
            self.back.acquire()
            if self.failure:
                raise self.failure
        elif isinstance(chosen, Task):
            chosen.effect()
        else:
            task = chosen.popleft()
            task.result, task.done = task.effect(), True
            self.reading.subtract(task.reads)


def _no_layout(*args: Any) -> None:
    return None


def _of_numbers_too(of_numbers: Callable, of_tensors: Callable) -> Callable:
    def apply(a: Any, b: Any) -> Any:
        if isinstance(a, Tensor):
            return of_tensors(a, b)
        return Number(of_numbers(a, b))

    return apply

"""What Triton's compiler makes of the kernels that a call launches, for GPUs that are not here.

The call runs on CPU tensors, on the host only: every launch is compiled, with the types, alignments
and constants it would have, and skipped. Registers, stack and shared memory are read from the
binary, instructions from its disassembly, with the programs that Triton's wheel brings.
"""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

TENSOR_CORE = re.compile(r"[HIQ]MMA|[HIQ]GMMA|UTC\w*MMA")
ASYNCHRONOUS = {90: re.compile(r"[HIQ]GMMA"), 100: re.compile(r"UTC\w*MMA")}
OPCODES = ("HGMMA", "HMMA", "UTCHMMA", "FFMA", "MUFU", "LDL", "STL", "UTMALDG", "USETMAXREG")


RESERVED_SHARED_BYTES = 1 << 10  # of each program, by the system


class Multiprocessor(NamedTuple):
    """What programs share (CUDA C++ Programming Guide, "Technical specifications")."""

    shared_bytes: int
    registers: int = 65_536
    warps: int = 64
    programs: int = 32

    @property
    def shared_of_a_program(self) -> int:
        """The most that one program may have."""
        return self.shared_bytes - RESERVED_SHARED_BYTES


MULTIPROCESSORS = {
    80: Multiprocessor(164 << 10),
    90: Multiprocessor(228 << 10),
    100: Multiprocessor(228 << 10),
}
REGISTERS_ALLOCATED = 256  # a warp's come in multiples of this
INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)(\S*)\s*(.*)")
MANY_FFMA = 32  # in loops: a matrix product by hand, or one that lost its tensor cores
DEFAULT_WARPS = 4  # Triton's: a warp group, which the H100's own matrix instructions need
LABEL = re.compile(r"^\s*(\.L\w+):")
DOT = re.compile(r"tt\.dot\b.*")


@dataclass(frozen=True)
class Compiled:
    """One kernel configuration compiled for one architecture."""

    kernel: str
    arch: int  # 90 is sm_90
    launches: int
    constants: dict[str, Any]  # compile-time arguments: tile sizes and switches
    warps: int
    stages: int
    registers: int  # a thread
    stack_bytes: int  # a thread
    shared_bytes: int  # a program
    instructions: int
    opcodes: dict[str, int]  # those of OPCODES
    spills: int  # loads and stores of local memory
    spills_in_loops: int
    programs_per_sm: int
    remarks: tuple[str, ...]


class ToolFailedError(RuntimeError):
    """A program of Triton's wheel failed; the message holds what it said."""


def compile_launches(function: Callable[[], object], arch: int) -> list[Compiled]:
    """Every different kernel configuration that a call on CPU tensors launches, in order.

    The results of the call are not computed. Of an autotuned kernel it is the configuration with
    the largest tiles that fits, among equals with four warps or near. Code that asks about the GPU
    needs `harness.pretend.gpu` around it.

    Args:
        function: launches the kernels.
        arch: compute capability times ten: 80, 90, 100.
    """
    kernels: list[Any] = []
    with _launches_compiled(arch, kernels):
        function()
    launches = Counter(kernel.hash for kernel in kernels)
    return [
        _examine(kernel, arch, launches[kernel.hash])
        for kernel in {kernel.hash: kernel for kernel in kernels}.values()
    ]


class Target:
    """Stands in for the driver of a GPU: enough to specialise and compile, not to launch."""

    def __init__(self, arch: int) -> None:
        self.arch = arch
        answers = {"max_shared_mem": MULTIPROCESSORS[arch].shared_of_a_program}
        self.utils = SimpleNamespace(get_device_properties=lambda device: answers)

    def get_current_target(self) -> Any:
        """What is compiled for."""
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        """The architecture: Triton keeps what it compiled by device."""
        return self.arch

    def get_current_stream(self, device: int) -> int:
        """The default one."""
        return 0


def tile_size(config: Any) -> int:
    """The product of a configuration's tile sizes."""
    product = 1
    for value in config.kwargs.values():
        product *= value if isinstance(value, int) else 1
    return product


def _preference(config: Any) -> tuple[int, int]:
    return tile_size(config), -abs(config.num_warps - DEFAULT_WARPS)


@contextmanager
def _launches_compiled(arch: int, kernels: list[Any]) -> Iterator[None]:
    """Meanwhile every launch appends the kernel it would run, and runs nothing."""
    from triton.runtime import driver
    from triton.runtime.autotuner import Autotuner
    from triton.runtime.jit import JITFunction

    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel: Any = run(self, *args, grid=grid, warmup=True, **kwargs)
        kernels.append(kernel)

    def largest_that_fits(self: Any, *args: Any, **kwargs: Any) -> None:
        before = len(kernels)
        for config in sorted(self.configs, key=_preference, reverse=True):
            del kernels[before:]
            self.best_config = config  # the host may read it
            self.fn.run(*args, **kwargs, **config.all_kwargs())
            if kernels[-1].metadata.shared <= MULTIPROCESSORS[arch].shared_of_a_program:
                break

    with (
        patch.object(driver, "_active", Target(arch)),
        patch.object(JITFunction, "run", compile_only),
        patch.object(Autotuner, "run", largest_that_fits),
    ):
        yield


def _examine(kernel: Any, arch: int, launches: int) -> Compiled:
    with TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(kernel.asm["cubin"])
        usage = _tool("cuobjdump", "--dump-resource-usage", str(path))
        listing = _tool("nvdisasm", "-c", str(path))
    used = dict(re.findall(r"(REG|STACK):(\d+)", usage))
    registers, stack = int(used["REG"]), int(used["STACK"])
    opcodes, in_loops = _instructions(listing)
    warps, shared = kernel.metadata.num_warps, kernel.metadata.shared
    programs = programs_per_sm(arch, registers, shared, warps)
    names = kernel.src.fn.arg_names
    constants = {
        names[path[0]]: value for path, value in kernel.src.constants.items() if len(path) == 1
    }
    return Compiled(
        kernel=kernel.metadata.name,
        arch=arch,
        launches=launches,
        constants={
            k: v for k, v in constants.items() if isinstance(v, bool | int | float | str | None)
        },
        warps=warps,
        stages=kernel.metadata.num_stages,
        registers=registers,
        stack_bytes=stack,
        shared_bytes=shared,
        instructions=opcodes.total(),
        opcodes={name: opcodes[name] for name in OPCODES},
        spills=opcodes["LDL"] + opcodes["STL"],
        spills_in_loops=in_loops["LDL"] + in_loops["STL"],
        programs_per_sm=programs,
        remarks=tuple(remarks(arch, opcodes, in_loops, kernel.asm.get("ttir", ""), programs)),
    )


def _tool(name: str, *arguments: str) -> str:
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    done = subprocess.run([path, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ToolFailedError(f"{name} {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


def _instructions(listing: str) -> tuple[Counter[str], Counter[str]]:
    """How often each opcode stands in a disassembly, and how often inside loops.

    A loop is what lies between a label and a later branch to it.
    """
    opcodes: list[str] = []
    labels: dict[str, int] = {}
    loops: list[tuple[int, int]] = []
    for line in listing.splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(opcodes)
        elif instruction := INSTRUCTION.search(line):
            place, opcode, operands = len(opcodes), instruction[1], instruction[3]
            opcodes.append(opcode)
            target = re.search(r"\.L\w+", operands)
            # The last instruction branches to itself: padding, not a loop.
            if opcode == "BRA" and target and labels.get(target[0], place) < place:
                loops.append((labels[target[0]], place))
    inside = (op for at, op in enumerate(opcodes) if any(a <= at <= b for a, b in loops))
    return Counter(opcodes), Counter(inside)


def programs_per_sm(arch: int, registers: int, shared_bytes: int, warps: int) -> int:
    """How many programs fit on a multiprocessor at once."""
    has = MULTIPROCESSORS[arch]
    of_a_warp = -(-32 * registers // REGISTERS_ALLOCATED) * REGISTERS_ALLOCATED
    return min(
        has.programs,
        has.warps // warps,
        has.registers // (of_a_warp * warps),
        has.shared_bytes // (shared_bytes + RESERVED_SHARED_BYTES),
    )


def remarks(
    arch: int, opcodes: Counter[str], in_loops: Counter[str], ttir: str, programs: int
) -> Iterator[str]:
    """What a reader should look at.

    Args:
        arch: compute capability times ten.
        opcodes: how often each stands in the binary.
        in_loops: how often inside its loops.
        ttir: Triton's intermediate code, which says how exact each dot is.
        programs: how many fit on a multiprocessor.
    """
    if not programs:
        yield "does not fit: too much shared memory"
    if spills := opcodes["LDL"] + opcodes["STL"]:
        yield f"{spills} spills, {in_loops['LDL'] + in_loops['STL']} in loops"
    dots = DOT.findall(ttir)
    exact = [dot for dot in dots if "xf32> *" in dot and "inputPrecision" not in dot]
    if exact:
        yield f"{len(exact)} of {len(dots)} dots ieee"
    cores = {name for name in opcodes if TENSOR_CORE.fullmatch(name)}
    if not cores and (len(dots) > len(exact) or in_loops["FFMA"] >= MANY_FFMA):
        yield f"no tensor cores, {in_loops['FFMA']} FFMA in loops"
    wanted = ASYNCHRONOUS.get(arch)
    if wanted and cores and (old := sorted(c for c in cores if not wanted.fullmatch(c))):
        yield f"{' '.join(old)} instead of sm_{arch}'s own"

"""Sweeps: grids of cells, from presets or TOML files."""

from __future__ import annotations

import itertools
import json
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from harness.record import AGAIN, OURS, Case
from harness.sizes import SCALING, parse_size, shape_of, width_fields

ARCHS = ("transformer", "mamba2", "rwkv7", "hyena")
# The sequence operation that each architecture calls; those of plug-ins have none here.
OPERATIONS = {
    "transformer": "attention",
    "mamba2": "ssd",
    "rwkv7": "wkv7",
    "hyena": "long_conv",
}
LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16384)
MAX_LENGTH = 1 << 30
# Least and most of a grid's whole numbers.
LIMITS = {
    "batch": (1, 1 << 40),
    "tokens": (1, 1 << 50),
    "replicates": (1, 10_000),
    "seed": (0, (1 << 63) - 1),
}
MAX_WIDTH = 1 << 20
SMALLEST_PARAMS = 200_000  # of a matched size: below, no shape of some architectures is near

CHOICES = {
    "level": ("op", "block", "model"),
    "phase": ("forward", "backward", "train_step", "prefill", "decode"),
    "dtype": ("float32", "float64", "bfloat16", "float16"),
    "backend": ("reference", "torch", "triton"),
    "device": ("cpu", "cuda"),
}
PHASES = {
    "op": ("forward", "backward", "decode"),
    "block": ("forward", "backward", "train_step", "prefill", "decode"),
    "model": ("forward", "backward", "train_step", "prefill", "decode"),
}
DEFAULT_DTYPE = {"cpu": "float32", "cuda": "bfloat16"}


def in_order(archs: Iterable[str]) -> list[str]:
    """Architectures each once: those of the menu in its order, then others by name."""
    found = set(archs)
    return [a for a in ARCHS if a in found] + sorted(found - set(ARCHS))


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Every combination of what is given as a list is one cell.

    A word or number may stand for a list of one. Lengths go with every phase but decode, which
    takes positions.
    """

    level: str | Sequence[str]
    phase: str | Sequence[str]
    archs: str | Sequence[str] = ARCHS
    lengths: int | Sequence[int] = ()
    positions: int | Sequence[int] = ()  # decode only
    tokens: int | None = None  # constant token budget: the batch is tokens / length
    batch: int | None = None  # constant batch, unless there are tokens; default 1
    size: str | Sequence[str] = "d256"
    # auto: float32 on a CPU, bfloat16 on a GPU
    dtype: str | Sequence[str] = "auto"
    # auto: our Triton kernels on a GPU where an architecture has them, else torch
    backend: str | Sequence[str] = "auto"
    # ours, or the name of a library's, of whose operation every architecture of the grid is
    # measured that calls it, and no other
    implementation: str | Sequence[str] = OURS
    replicates: int = 1  # each cell so many times
    seed: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)

    def cells(self, device: str = "cpu") -> list[Case]:
        """The cells, shortest first, architectures side by side.

        Raises:
            ValueError: a field of the wrong type, or a name, number or combination that cannot be;
                the message says what to write.
        """
        from archs import resolve_backend
        from archs.model import canonical_pattern

        self._check_numbers()
        levels, phases, archs, sizes, dtypes = (
            self._names(name) for name in ("level", "phase", "archs", "size", "dtype")
        )
        archs = [canonical_pattern(arch) for arch in archs]
        backends = self._names("backend")
        pairs = self._implemented(archs)
        return [
            Case(
                kind="cost",
                arch=arch,
                level=level,
                phase=phase,
                batch=self._batch(number),
                seq_len=None if phase == "decode" else number,
                position=number if phase == "decode" else None,
                size=size,
                dtype=DEFAULT_DTYPE[device] if dtype == "auto" else dtype,
                backend=resolve_backend(backend, arch, device),
                implementation=implementation,
                seed=self.seed,
                replicate=replicate,
                options=self.options,
            )
            for backend in backends
            for level, phase, size, dtype in itertools.product(levels, phases, sizes, dtypes)
            for number in listed(self.positions if phase == "decode" else self.lengths)
            for arch, implementation in pairs
            for replicate in range(self.replicates)
        ]

    def _implemented(self, archs: Sequence[str]) -> list[tuple[str, str]]:
        """Architectures with each implementation that has an operation of theirs."""
        names = self._names("implementation")
        known = implementations()
        for name in names:
            if name not in known:
                raise ValueError(unknown("implementation", name, known))
        return [
            (arch, name)
            for arch in archs
            for name in names
            if name == OURS or known[name] in operations(arch)
        ]

    def _names(self, name: str) -> list[str]:
        values = listed(getattr(self, name))
        if not values or not all(isinstance(v, str) for v in values):
            raise ValueError(f"{name} must be a name or a list of names, got {values!r}")
        return values

    def _check_numbers(self) -> None:
        for name, (low, high) in LIMITS.items():
            value = getattr(self, name)
            if value is not None and not (is_whole(value) and low <= value <= high):
                raise ValueError(f"{name} must be a whole number >= {low}, got {value!r}")
        for name in ("lengths", "positions"):
            for value in listed(getattr(self, name)):
                if not (is_whole(value) and 1 <= value <= MAX_LENGTH):
                    raise ValueError(f"{name} must be whole numbers >= 1, got {value!r}")
        if self.tokens is not None and self.batch is not None:
            raise ValueError("give tokens (a constant B * T) or batch (a constant B), not both")
        if not isinstance(self.options, Mapping):
            raise ValueError(f"options must be a table, got {self.options!r}")
        try:
            json.dumps(dict(self.options), allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"options must be words and finite numbers: {error}") from None

    def _batch(self, length: int) -> int:
        if self.tokens is None:
            return self.batch or 1
        if self.tokens % length:
            raise ValueError(
                f"tokens = {self.tokens} is not a multiple of length {length}: with a constant "
                "token budget every length must divide it"
            )
        return self.tokens // length


PRESETS: dict[str, tuple[Grid, ...]] = {
    # About three minutes on two cores: the shape of every curve, intervals for the operations.
    "quick": (
        Grid(level="op", phase="forward", lengths=LENGTHS, replicates=3),
        Grid(level="block", phase="train_step", lengths=LENGTHS[:4]),
        Grid(level="model", phase="decode", positions=(256, 1024, 4096, 16384)),
    ),
    # About an hour on a CPU: every point in five processes, so that fits have intervals.
    "cpu": (
        Grid(
            level="op",
            phase="forward",
            lengths=(*LENGTHS, 32768),
            tokens=32768,
            replicates=5,
        ),
        Grid(level="op", phase="backward", lengths=LENGTHS, tokens=16384, replicates=5),
        Grid(
            level="block",
            phase="train_step",
            lengths=LENGTHS[:-1],
            tokens=8192,
            replicates=5,
        ),
        Grid(level="model", phase="prefill", lengths=LENGTHS[:-1], replicates=5),
        Grid(
            level="model",
            phase="decode",
            positions=(256, 1024, 4096, 16384, 65536),
            replicates=5,
        ),
    ),
    # Some minutes on one data-centre GPU, every architecture at a size that fills it.
    "h100": (
        Grid(
            level="op",
            phase=("forward", "backward"),
            lengths=[1 << n for n in range(9, 18)],
            tokens=131072,
            size="d2048",
            replicates=3,
        ),
        Grid(
            level="block",
            phase=("train_step", "prefill"),
            lengths=[1 << n for n in range(9, 17)],
            tokens=65536,
            size="d2048",
            replicates=3,
        ),
        Grid(
            level="model",
            phase="decode",
            positions=[1 << n for n in range(8, 18)],
            size="d2048",
            replicates=3,
        ),
    ),
    # Our kernels at one shape a length, to be measured beside libraries' (--peers all); attention
    # with heads of 64 and of 128.
    "h100-ops": (
        *(
            Grid(
                level="op",
                phase=("forward", "backward"),
                archs=archs,
                lengths=(2048, 4096, 8192, 32768),
                tokens=32768,
                size=size,
                backend="triton",
            )
            for archs, size in ((ARCHS, "d2048"), (("transformer",), "d2048h128"))
        ),
        # 2.1 GB of keys and values, 1.1 GB of Hyena's past; states of at most 134 MB.
        *(
            Grid(
                level="op",
                phase="decode",
                archs=archs,
                positions=position,
                batch=(1 << 18) // position,
                size=size,
                backend="triton",
            )
            for archs, size in ((ARCHS, "d2048"), (("transformer",), "d2048h128"))
            for position in (4096, 32768)
        ),
    ),
}


def implementations() -> dict[str, str | None]:
    """What a grid's implementation may be, with the operation that it implements; ours: None."""
    from harness.peers import PEERS

    return {OURS: None, **{name: peer.op for name, peer in PEERS.items()}}


def operations(arch: str) -> set[str]:
    """The sequence operations of an architecture or hybrid pattern."""
    from archs.model import expand_pattern

    return {OPERATIONS[name] for name in expand_pattern(arch) if name in OPERATIONS}


def preset(name: str) -> tuple[Grid, ...]:
    """The grids of a preset; ValueError with the nearest name if there is none."""
    if name not in PRESETS:
        raise ValueError(unknown("preset", name, PRESETS))
    return PRESETS[name]


def load(path: Path, kind: type[Any] = Grid) -> tuple[Any, ...]:
    """The grids of a TOML file: tables [[grid]] with the fields of `Grid`, or of another kind.

    Raises:
        ValueError: not TOML, no grid, a key that is not a field, or a wrong value;
        OSError: no such file, or not a file.
    """
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not a TOML file: not UTF-8 text") from None
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: not a TOML file: {error}") from None
    known = [f.name for f in fields(kind)]
    needed = [f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING]
    if extra := sorted(set(document) - {"grid"}):
        raise ValueError(f"{path}: {unknown('table', extra[0], ['grid'])}")
    tables = document.get("grid", [])
    if not tables or not isinstance(tables, list) or not all(isinstance(t, dict) for t in tables):
        raise ValueError(f"{path}: no [[grid]] table")
    grids = []
    for number, table in enumerate(tables, start=1):
        for key in table:
            if key not in known:
                raise ValueError(f"{path}: grid {number}: {unknown('key', key, known)}")
        for key in needed:
            if key not in table:
                hint = f": one of {', '.join(CHOICES[key])}" if key in CHOICES else ""
                raise ValueError(f"{path}: grid {number}: no {key}{hint}")
        grids.append(kind(**table))
    return tuple(grids)


def narrowed(
    grids: Iterable[Grid],
    *,
    level: Sequence[str] = (),
    phase: Sequence[str] = (),
    op: Sequence[str] = (),
    **instead: Any,
) -> list[Grid]:
    """The grids cut down to some levels, phases and operations, with other fields for theirs.

    Args:
        grids: of a preset or a file.
        level: only these; all where there is none.
        phase: only these; all where there is none.
        op: only the architectures with one of these operations; all where there is none.
        **instead: fields of `Grid` to replace where they are not None.

    Raises:
        ValueError: a level, phase or operation that does not exist, or one that no grid has.
    """
    grids = list(grids)
    changes = {name: value for name, value in instead.items() if value is not None}
    for name, wanted in (("level", level), ("phase", phase)):
        for value in wanted:
            if value not in CHOICES[name]:
                raise ValueError(unknown(name, value, CHOICES[name]))
        if wanted:
            grids = [
                replace(grid, **{name: kept})
                for grid in grids
                if (kept := [v for v in listed(getattr(grid, name)) if v in wanted])
            ]
        if not grids:
            raise ValueError(f"the sweep has no {name} {' or '.join(wanted)}")
    phases = {name for grid in grids for name in listed(grid.phase)}
    if "positions" in changes and "decode" not in phases:
        raise ValueError("positions are for phase decode, which the sweep does not have")
    if "lengths" in changes and phases == {"decode"}:
        raise ValueError("the sweep only decodes: give positions instead of lengths")
    if "lengths" in changes or "positions" in changes:
        changes.setdefault("tokens", None)
    if "batch" in changes:
        changes["tokens"] = None
    if changes.get("tokens") is not None:
        changes["batch"] = None
    if "archs" in changes and "size" not in changes:
        wanted = listed(changes.pop("archs"))
        found = [(grid, _archs_at_its_size(grid, wanted)) for grid in grids]
        grids = [replace(grid, archs=archs) for grid, archs in found if archs]
        if not grids:
            raise ValueError("the sweep has no such architecture at its sizes: give a size too")
    grids = [replace(grid, **changes) for grid in grids]
    return _with_operations(grids, op) if op else grids


def _archs_at_its_size(grid: Grid, archs: Sequence[str]) -> list[str]:
    """Those of other architectures that a grid may have: sizes with heads are of its own alone."""
    with_fields = any(isinstance(size, str) and width_fields(size) for size in listed(grid.size))
    return [a for a in archs if a in listed(grid.archs)] if with_fields else list(archs)


def _with_operations(grids: Iterable[Grid], wanted: Sequence[str]) -> list[Grid]:
    """The grids with those of their architectures that have one of the operations."""
    known = list(OPERATIONS.values())
    for name in wanted:
        if name not in known:
            raise ValueError(unknown("op", name, known))
    kept = [
        replace(grid, archs=archs)
        for grid in grids
        if (archs := [a for a in listed(grid.archs) if operations(a) & set(wanted)])
    ]
    if not kept:
        raise ValueError(f"no architecture of the sweep has op {' or '.join(wanted)}")
    return kept


def cells(grids: Iterable[Grid], device: str = "cpu") -> list[Case]:
    """All cells of the grids, each once; all of replicate 0 first, then of 1, and so on.

    Raises:
        ValueError: an architecture, level, phase, length or size that does not exist, or a
            configuration that cannot be built.
    """
    found: dict[str, Case] = {}
    wanted: set[str] = set()
    for grid in grids:
        wanted |= set(listed(grid.implementation))
        for case in grid.cells(device):
            _validate(case)
            found[case.key] = case
    for name in sorted(wanted - {case.implementation for case in found.values()} - {OURS}):
        op = implementations()[name]
        raise ValueError(f"implementation {name!r} is of {op}: no architecture of the sweep has it")
    if not found:
        raise ValueError("the sweep has no cells: give each grid lengths, or positions for decode")
    return sorted(found.values(), key=lambda case: case.replicate)


def as_cells(sweep: str | Path | Sequence[Grid] | Sequence[Case], device: str) -> list[Case]:
    """The cells of a preset's name, a TOML file, grids, or cells; errors as in `cells`."""
    if isinstance(sweep, Path) or (isinstance(sweep, str) and sweep.endswith(".toml")):
        return cells(load(Path(sweep)), device)
    if isinstance(sweep, str):
        return cells(preset(sweep), device)
    found: list[Case] = []
    for part in sweep:
        found += [part] if isinstance(part, Case) else cells([part], device)
    if not found:
        raise ValueError("the sweep has no cells")
    for case in found:
        _validate(case)
    return list({case.key: case for case in found}.values())


def resolve_device(device: str) -> str:
    """The device that "auto" stands for here: "cuda" where there is an NVIDIA GPU, else "cpu".

    Raises:
        ValueError: unknown device, or a GPU asked for where PyTorch sees none.
    """
    import torch

    if device not in ("auto", *CHOICES["device"]):
        raise ValueError(unknown("device", device, ("auto", *CHOICES["device"])))
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("PyTorch sees no NVIDIA GPU here: seqscale doctor says why")
    return device


def _validate(case: Case) -> None:
    from archs.model import expand_pattern

    for name in ("level", "phase", "dtype", "backend"):
        if getattr(case, name) not in CHOICES[name]:
            raise ValueError(unknown(name, getattr(case, name), CHOICES[name]))
    if case.phase not in PHASES[case.level]:
        raise ValueError(
            f"level {case.level!r} has no phase {case.phase!r}: {', '.join(PHASES[case.level])}"
        )
    known = [AGAIN, *implementations()]
    if case.implementation not in known:
        raise ValueError(unknown("implementation", case.implementation, known))
    if len(expand_pattern(case.arch)) > 1 and case.level != "model":
        raise ValueError(f"the hybrid {case.arch!r} is measured at level model, not {case.level}")
    check_buildable(case)


def check_buildable(case: Case) -> None:
    """ValueError where there is no model of a case's architecture and size."""
    from archs import block_class
    from archs.model import expand_pattern

    names = expand_pattern(case.arch)
    blocks = [block_class(name) for name in names]
    what, number = parse_size(case.size)
    if what == "params":
        if case.arch not in SCALING:
            raise ValueError(f"no matched sizes for {case.arch!r}: give a width, as d256")
        if number < SMALLEST_PARAMS:
            raise ValueError(f"size {case.size}: matched sizes begin at {SMALLEST_PARAMS:,}")
    elif number > MAX_WIDTH:
        raise ValueError(f"size {case.size[:20]}: no width above {MAX_WIDTH}")
    else:
        fields = width_fields(case.size)
        if fields and len(names) > 1:
            raise ValueError("a hybrid has heads of several kinds: give a width alone, as d256")
        shape_of(case.arch, case.size)
        for name, block in zip(names, blocks, strict=True):
            try:
                block.Config(width=number, **fields)
            except ValueError as error:
                raise ValueError(f"{name} at size {case.size}: {error}") from None
            except TypeError:
                lacks = "state size" if "d_state" in fields else "heads"
                raise ValueError(f"{name} has no {lacks}: give a width alone, as d256") from None


def listed(value: Any) -> list[Any]:
    """A list, whether one thing was given or several."""
    return list(value) if isinstance(value, list | tuple | range) else [value]


def is_whole(value: Any) -> bool:
    """Whether it is an integer, which True and False are not here."""
    return isinstance(value, int) and not isinstance(value, bool)


def unknown(what: str, name: str, known: Iterable[str]) -> str:
    """The message for a name that does not exist, with the nearest that does."""
    close = get_close_matches(str(name), list(known), n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"unknown {what} {name!r}, expected one of {', '.join(known)}{hint}"

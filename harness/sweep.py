"""Sweeps: grids of cells, from presets or TOML files."""

import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from harness.record import Case
from harness.sizes import parse_size

ARCHS = ("transformer", "mamba2", "rwkv7", "hyena")
LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16384)


def in_order(archs: Iterable[str]) -> list[str]:
    """Architectures each once: those of the menu in its order, then others by name."""
    found = set(archs)
    return [a for a in ARCHS if a in found] + sorted(found - set(ARCHS))


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Every combination of its architectures and lengths (or positions) is one cell."""

    kind: str = "cost"
    level: str
    phase: str
    archs: Sequence[str] = ARCHS
    lengths: Sequence[int] = ()
    positions: Sequence[int] = ()  # decode only
    batch: int = 1
    size: str = "d256"
    dtype: str = "float32"
    backend: str = "torch"
    seed: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)

    def cells(self) -> list[Case]:
        """The cells, shortest first, architectures side by side."""
        shared = {
            name: getattr(self, name)
            for name in (
                "kind", "level", "phase", "batch", "size", "dtype", "backend", "seed", "options",
            )
        }  # fmt: skip
        if self.phase == "decode":
            places = [{"seq_len": None, "position": p} for p in self.positions]
        else:
            places = [{"seq_len": n, "position": None} for n in self.lengths]
        return [Case(arch=a, **shared, **p) for p in places for a in self.archs]


PRESETS: dict[str, tuple[Grid, ...]] = {
    # A few minutes on two cores: the shape of every curve.
    "quick": (
        Grid(level="op", phase="forward", lengths=LENGTHS),
        Grid(level="block", phase="train_step", lengths=(256, 512, 1024, 2048, 4096)),
        Grid(level="model", phase="decode", positions=(256, 1024, 4096, 16384)),
        Grid(
            kind="loss",
            level="model",
            phase="train_step",
            lengths=(256,),
            batch=8,
            size="1M",
            options={"steps": 50, "learning_rate": 2e-3, "corpus": "python-source"},
        ),
    ),
}


def preset(name: str) -> tuple[Grid, ...]:
    """The grids of a preset; ValueError with the nearest name if there is none."""
    if name not in PRESETS:
        raise ValueError(_unknown("preset", name, PRESETS))
    return PRESETS[name]


def load(path: Path) -> tuple[Grid, ...]:
    """The grids of a TOML file: tables [[grid]] with the fields of `Grid`.

    Raises:
        ValueError: not TOML, no grid, or a key that is not a field; OSError: no such file.
    """
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a TOML file: {error}") from None
    known = [f.name for f in fields(Grid)]
    if extra := sorted(set(document) - {"grid"}):
        raise ValueError(f"{path}: {_unknown('table', extra[0], ['grid'])}")
    grids = []
    for table in document.get("grid", []):
        for key in table:
            if key not in known:
                raise ValueError(f"{path}: {_unknown('key', key, known)}")
        try:
            grids.append(Grid(**table))
        except TypeError as error:
            raise ValueError(f"{path}: {error}") from None
    if not grids:
        raise ValueError(f"{path}: no [[grid]] table")
    return tuple(grids)


def cells(grids: Iterable[Grid], archs: Sequence[str] = ()) -> list[Case]:
    """All cells of the grids, each once; `archs` replaces the grids' architectures.

    Raises:
        ValueError: an architecture, level, phase, length or size that does not exist.
    """
    found: dict[str, Case] = {}
    for grid in grids:
        for case in grid.cells():
            for arch in archs or (case.arch,):
                cell = Case(**{**_shallow(case), "arch": arch})
                _validate(cell)
                found[cell.key] = cell
    if not found:
        raise ValueError("the sweep has no cells: give each grid lengths, or positions for decode")
    return list(found.values())


def _shallow(case: Case) -> dict[str, Any]:
    return {f.name: getattr(case, f.name) for f in fields(case)}


CHOICES = {
    "kind": ("cost", "loss"),
    "level": ("op", "block", "model"),
    "phase": ("forward", "train_step", "prefill", "decode"),
    "dtype": ("float32", "float64", "bfloat16", "float16"),
    "backend": ("reference", "torch", "triton"),
}
PHASES = {
    "op": ("forward",),
    "block": ("forward", "train_step"),
    "model": ("forward", "train_step", "prefill", "decode"),
}


def _validate(case: Case) -> None:
    from archs import block_class
    from archs.model import expand_pattern

    for name, allowed in CHOICES.items():
        if getattr(case, name) not in allowed:
            raise ValueError(_unknown(name, getattr(case, name), allowed))
    if case.phase not in PHASES[case.level]:
        raise ValueError(
            f"level {case.level!r} has no phase {case.phase!r}: {', '.join(PHASES[case.level])}"
        )
    length = case.seq_len if case.position is None else case.position
    if not isinstance(length, int) or length < 1 or case.batch < 1:
        raise ValueError(f"lengths, positions and batch must be whole and >= 1: {case.label}")
    for name in expand_pattern(case.arch):
        block_class(name)
    parse_size(case.size)


def _unknown(what: str, name: str, known: Iterable[str]) -> str:
    close = get_close_matches(str(name), list(known), n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"unknown {what} {name!r}, expected one of {', '.join(known)}{hint}"

"""`seqscale list`: what there is to choose from."""

from __future__ import annotations

from typing import Any

from harness import sweep, trials


def everything() -> dict[str, Any]:
    """Architectures (with plug-ins), backends, peers, levels with their phases, presets, types."""
    from archs import architectures
    from harness.peers import PEERS
    from harness.tasks import TASKS

    return {
        "architectures": {
            name: (block.__doc__ or "").strip().partition("\n")[0]
            for name, block in architectures().items()
        },
        "backends": list(sweep.CHOICES["backend"]),
        "peers": {
            op: [peer.name for peer in PEERS.values() if peer.op == op]
            for op in sweep.OPERATIONS.values()
        },
        "phases": {level: list(phases) for level, phases in sweep.PHASES.items()},
        "dtypes": list(sweep.CHOICES["dtype"]),
        "presets": {
            name: {
                "cells": len(sweep.cells(grids)),
                "grids": [_summary(grid) for grid in grids],
            }
            for name, grids in sweep.PRESETS.items()
        },
        **{
            f"{kind} presets": {
                name: {"cells": len(trials.trial_cells(grids))} for name, grids in presets.items()
            }
            for kind, presets in trials.PRESETS.items()
        },
        "tasks": {name: (task.__doc__ or "").partition("\n")[0] for name, task in TASKS.items()},
    }


def _summary(grid: sweep.Grid) -> str:
    """One grid in a line."""

    def words(value: Any) -> str:
        return value if isinstance(value, str) else " ".join(map(str, value))

    places = grid.lengths or grid.positions
    numbers = [places] if isinstance(places, int) else list(places)
    span = f"{numbers[0]:,}" if len(numbers) == 1 else f"{numbers[0]:,} … {numbers[-1]:,}"
    along = "T" if grid.lengths else "position"
    batch = f"B·T = {grid.tokens:,}" if grid.tokens else f"B = {grid.batch or 1}"
    return f"{words(grid.level)} {words(grid.phase)}, {along} {span}, {batch}, {grid.size}"


def lines(found: dict[str, Any]) -> list[str]:
    """The same for people."""
    said = ["architectures"]
    width = max(map(len, found["architectures"]))
    said += [f"  {name:{width}}  {about}" for name, about in found["architectures"].items()]
    said.append("  or a hybrid, as mamba2*3+transformer")
    said.append("presets of seqscale cost")
    for name, preset in found["presets"].items():
        said.append(f"  {name}: {preset['cells']} cells")
        said += [f"    {grid}" for grid in preset["grids"]]
    for kind in trials.PRESETS:
        counts = [f"{name} ({p['cells']} runs)" for name, p in found[f"{kind} presets"].items()]
        said.append(f"presets of seqscale {kind}: {', '.join(counts)}")
    said.append("recall tasks")
    width = max(map(len, found["tasks"]))
    said += [f"  {name:{width}}  {about}" for name, about in found["tasks"].items()]
    said.append("levels and their phases")
    said += [f"  {level}: {', '.join(phases)}" for level, phases in found["phases"].items()]
    said.append("backends: " + ", ".join(found["backends"]))
    said.append("peers, by operation (seqscale doctor says which run here)")
    said += [f"  {op}: {', '.join(names)}" for op, names in found["peers"].items()]
    said.append("types: " + ", ".join(found["dtypes"]))
    said.append(
        "sizes: d256 (a width), d256h128 (and heads of 128), 5M (parameters, matched across "
        "architectures within 1 %)"
    )
    return said

"""`seqscale status`: how far a sweep is, and what is wrong in its directory."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from harness import record
from harness.record import Case, Damaged


def status(out: Path) -> dict[str, Any]:
    """What a run directory holds of the sweep that was last started in it.

    Returns:
        planned, and of these recorded, missing (labels), statuses (counts), faults (label, status,
        reason); damaged (path, reason); running: the process that sweeps into it, or None.

    Raises:
        FileNotFoundError: there is no such directory.
        NotADirectoryError: it is a file.
    """
    if out.is_file():
        raise NotADirectoryError(f"{out} is a file: status takes a run directory")
    measurements, damaged = record.load(out)
    latest = {m.case.key: m for m in measurements}
    cells = [m.case for m in measurements]
    plan = out / "plan.json"
    try:
        cells = [Case(**asked) for asked in json.loads(plan.read_text(encoding="utf-8"))]
    except FileNotFoundError:
        pass
    except (ValueError, TypeError):
        damaged.append(Damaged(plan, "not a plan of cells: what is planned is not known"))
    found = [latest[case.key] for case in cells if case.key in latest]
    return {
        "out": str(out),
        "planned": len(cells),
        "recorded": len(found),
        "statuses": dict(sorted(Counter(m.status for m in found).items())),
        "missing": [case.label for case in cells if case.key not in latest],
        "faults": [
            {"cell": m.case.label, "status": m.status, "reason": m.reason}
            for m in found
            if m.status in record.FAULTS
        ],
        "damaged": [{"path": str(path), "reason": reason} for path, reason in damaged],
        "running": record.holder(out),
    }


def lines(found: dict[str, Any], shown: int = 10) -> list[str]:
    """The same for people: at most `shown` of each list."""
    counts = ", ".join(f"{n} {name}" for name, n in found["statuses"].items()) or "nothing yet"
    running = "no sweep runs"
    if found["running"] is not None:
        running = f"process {found['running'] or 'unknown'} is sweeping"
    said = [
        f"{found['out']}: {found['recorded']} of {found['planned']} cells ({counts}); {running}"
    ]
    for name, items in (
        ("missing", found["missing"]),
        ("broken", [f"{f['cell']}: {f['status']}: {f['reason']}" for f in found["faults"]]),
        ("no record", [f"{d['path']}: {d['reason']}" for d in found["damaged"]]),
    ):
        said += [f"  {name}: {item}" for item in items[:shown]]
        if len(items) > shown:
            said.append(f"  {name}: {len(items) - shown} more")
    return said

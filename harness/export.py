"""`seqscale export`: a run as one file: CSV, Parquet, or packed JSONL that loads again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from harness import record, report
from harness.record import Damaged, Measurement

FORMATS = (".csv", ".parquet", ".jsonl")


def export(
    source: Path, to: Path, on_damaged: Callable[[Damaged], None] = lambda damaged: None
) -> int:
    """Write the latest attempt at every case of `source` into one file; the number of cases.

    The suffix of `to` chooses the format. CSV and Parquet hold one flat row a cell. JSONL holds
    everything, one record a line, sorted, so that the same records give the same bytes; every verb
    that reads a run directory reads it too.

    `on_damaged` is called for each file that is no record, and is left out.

    Raises:
        ValueError: another suffix, or nothing to export.
        OSError: `source` is not there, or `to` cannot be written.
    """
    if to.suffix not in FORMATS:
        raise ValueError(f"{to}: write a file that ends in {', '.join(FORMATS)}")
    measurements, damaged = record.load(source)
    for file in damaged:
        on_damaged(file)
    if not measurements:
        raise ValueError(f"{source} holds no records: run seqscale cost --out {source} first")
    to.parent.mkdir(parents=True, exist_ok=True)
    if to.suffix == ".jsonl":
        lines = sorted(record.to_json(m) for m in _with_stability(source, measurements))
        record.write_atomically(to, "\n".join(lines) + "\n")
    elif to.suffix == ".csv":
        record.write_atomically(to, report.frame(source).to_csv(index=False))
    else:
        temporary = to.with_name(to.name + ".tmp")
        try:
            report.frame(source).to_parquet(temporary, index=False)
            temporary.replace(to)
        except OSError as error:
            error.filename = str(to)
            raise
        finally:
            temporary.unlink(missing_ok=True)
    return len(measurements)


def _with_stability(source: Path, measurements: list[Measurement]) -> list[Measurement]:
    """The records with what is known only from their session's end, which is not packed."""
    if not source.is_dir():
        return measurements
    stable = report.stability(source)
    return [
        replace(
            m, environment={**m.environment, "stable": stable.get(m.environment.get("session", ""))}
        )
        for m in measurements
    ]

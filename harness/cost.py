"""`seqscale cost`: run a sweep's cells one after another, each an atomic record."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from archs.ops import BackendUnavailableError
from harness import record, report, timing
from harness.record import Case, Measurement

if TYPE_CHECKING:
    import pandas as pd

Report = Callable[[int, int, Measurement], None]  # cells done, cells in all, the newest


def run(
    cells: Sequence[Case],
    out: Path,
    *,
    threads: int | None = None,
    on_start: Callable[[Case], None] = lambda case: None,
    on_finish: Report = lambda done, total, measurement: None,
) -> pd.DataFrame:
    """Measure every cell that `out` does not hold yet; one row a cell.

    A finished cell is skipped where its device, software and code are those of now.

    Args:
        cells: what to measure, from `harness.sweep.cells`.
        out: run directory; records go to `out`/records, the table to `out`/cells.csv.
        threads: CPU threads for PyTorch; default: as it is.
        on_start: called before each cell that is not skipped.
        on_finish: called after each cell.
    """
    settings = timing.prepare_process(threads)
    environment = {**record.environment(), **settings}
    finished = {
        m.case.key: m
        for m in record.read(out)
        if m.status == "ok" and record.same_place(m.environment, environment)
    }
    for done, case in enumerate(cells, start=1):
        if case.key in finished:
            on_finish(done, len(cells), finished[case.key])
            continue
        on_start(case)
        measurement = _attempt(case, {**record.environment(), **settings})
        record.write(out, measurement)
        on_finish(done, len(cells), measurement)
    table = report.frame(out)
    table.to_csv(out / "cells.csv", index=False)
    return table


def _attempt(case: Case, environment: dict) -> Measurement:
    """Measure one cell; whatever goes wrong becomes its status."""
    try:
        measure = {"cost": _cost, "loss": _loss}[case.kind]
        return measure(case, environment)
    except (NotImplementedError, BackendUnavailableError) as error:
        return _failed(case, environment, "unsupported", error)
    except FloatingPointError as error:
        return _failed(case, environment, "diverged", error)
    except MemoryError as error:
        return _failed(case, environment, "oom", error)
    except Exception as error:
        # PyTorch reports exhausted CPU memory as a plain RuntimeError.
        status = "oom" if "can't allocate memory" in str(error) else "error"
        return _failed(case, environment, status, error)


def _failed(case: Case, environment: dict, status: str, error: BaseException) -> Measurement:
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    return Measurement(case=case, status=status, reason=reason, environment=environment)


def _cost(case: Case, environment: dict) -> Measurement:
    from harness.workload import ALLOWED_ERROR, build

    workload = build(case)
    errors = [workload.error()] if workload.error else []
    peak = timing.peak_bytes(workload.function)
    samples = timing.measure(workload.function)
    if workload.error:
        errors.append(workload.error())
    if wrong := [e for e in errors if not e <= ALLOWED_ERROR[case.dtype]]:
        reason = f"relative error {wrong[0]:.1e} against the reference"
        return Measurement(case=case, status="wrong", reason=reason, environment=environment)
    metrics = {**timing.quantiles(samples), "peak_bytes": peak, **workload.counted}
    if errors:
        metrics["relative_error"] = max(errors)
    return Measurement(
        case=case,
        status="ok",
        environment=environment,
        metrics=metrics,
        samples={"time_ms": samples},
    )


def _loss(case: Case, environment: dict) -> Measurement:
    from harness import data, loss
    from harness.workload import build_model

    assert case.seq_len is not None
    if case.options["corpus"] != "python-source":
        raise NotImplementedError(f"no corpus {case.options['corpus']!r}: python-source is there")
    corpus = data.python_source()
    model = build_model(case, max_len=case.seq_len)
    run = loss.train(
        model,
        corpus,
        steps=case.options["steps"],
        batch=case.batch,
        seq_len=case.seq_len,
        learning_rate=case.options["learning_rate"],
        seed=case.seed,
    )
    steps = len(run.train_bits_per_byte)
    metrics = {
        "train_loss_bits_per_byte_first": run.train_bits_per_byte[0],
        "train_loss_bits_per_byte_last": run.train_bits_per_byte[-1],
        "val_loss_bits_per_byte": run.validation_bits_per_byte,
        "train_s": run.seconds,
        "tokens": steps * case.batch * case.seq_len,
        "params": model.parameter_count(),
        "corpus_sha256": corpus.sha256,
        "corpus_bytes": len(corpus.train) + len(corpus.validation),
    }
    return Measurement(
        case=case,
        status="ok",
        environment=environment,
        metrics=metrics,
        samples={"train_loss_bits_per_byte": run.train_bits_per_byte},
    )

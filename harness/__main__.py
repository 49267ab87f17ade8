"""The command line: `seqscale VERB`; each verb is the module of that name.

Verbs import what they need when they run, so that `--help` starts without PyTorch.
"""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import App, Parameter
from rich.console import Console

if TYPE_CHECKING:
    from harness.record import Measurement

app = App(
    name="seqscale",
    help="What each sequence architecture costs, and what it loses, as the sequence grows.",
    version_flags=[],
)
ArchNames = Annotated[list[str] | None, Parameter(name="--arch", negative="")]


class UsageError(Exception):
    """The command line asks for something that does not exist; the message names the fix."""


@app.command
def cost(
    sweep: Path | None = None,
    *,
    preset: str | None = None,
    arch: ArchNames = None,
    out: Path = Path("runs/cost"),
    threads: int | None = None,
) -> int:
    """Measure time and memory of the cells of a sweep; the same command again resumes.

    Parameters
    ----------
    sweep
        TOML file with [[grid]] tables.
    preset
        A built-in sweep instead of a file: quick.
    arch
        Only these architectures (may be given several times).
    out
        Run directory: records, cells.csv.
    threads
        CPU threads; default: all cores.
    """
    # Spinning OpenMP threads disturb each other on a busy machine; read when PyTorch starts.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from harness import cost as cost_module
    from harness import report
    from harness import sweep as sweep_module

    if (sweep is None) == (preset is None):
        raise UsageError("give a sweep file or --preset, as in: seqscale cost --preset quick")
    try:
        grids = sweep_module.load(sweep) if sweep else sweep_module.preset(str(preset))
        cells = sweep_module.cells(grids, archs=arch or ())
    except (ValueError, FileNotFoundError, IsADirectoryError) as error:
        raise UsageError(str(error)) from None
    progress = Console(stderr=True)
    results = cost_module.run(
        cells,
        out,
        threads=threads,
        on_finish=lambda done, total, m: progress.print(
            f"{done:3d}/{total} {m.case.label}: {_outcome(m)}", highlight=False, markup=False
        ),
    )
    console = Console(width=None if sys.stdout.isatty() else 120)
    for table in report.tables(results):
        console.print(table)
    print(f"records and cells.csv: {out}")
    return 0 if results["status"].isin(["ok", "oom", "timeout", "unsupported"]).all() else 4


@app.command
def plot(run: Path = Path("runs/cost")) -> int:
    """Draw the figures of a run directory as SVG and PNG into its folder figures.

    Parameters
    ----------
    run
        Run directory of `seqscale cost`.
    """
    from harness.plot import NothingToDrawError, draw

    try:
        paths = draw(run)
    except NothingToDrawError as error:
        raise UsageError(str(error)) from None
    print("\n".join(map(str, paths)))
    return 0


def _outcome(measurement: "Measurement") -> str:
    if measurement.status != "ok":
        return f"{measurement.status}: {measurement.reason}"
    metrics = measurement.metrics
    if "time_ms_p50" in metrics:
        return f"{metrics['time_ms_p50']:.3g} ms"
    return f"{metrics['val_loss_bits_per_byte']:.3f} bits a byte"


def main() -> None:
    """Run the command line; wrong usage is one line on standard error and exit code 2."""
    try:
        sys.exit(app())
    except UsageError as error:
        print(f"seqscale: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        print(f"seqscale: {error}", file=sys.stderr)
        sys.exit(5)


if __name__ == "__main__":
    main()

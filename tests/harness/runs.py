"""Run directories made up for the tests of what reads them."""

import numpy as np

from harness.record import Case, Measurement, RunDirectory

ENVIRONMENT = {
    "device": "a CPU",
    "threads": 2,
    "torch": "2",
    "python": "3",
    "commit": "abcdef0123456",
}


def write_curve(
    out,
    arch,
    law,
    *,
    lengths=tuple(1 << k for k in range(8, 15)),
    flops=None,
    processes=3,
    phase="forward",
    level="op",
    batch=1,
    tokens=None,
    failed=None,
    noise=0.01,
):
    """Add one architecture's cells: `law` gives milliseconds a sequence, `failed` statuses."""
    generator = np.random.default_rng(sum(map(ord, arch)))
    with RunDirectory(out) as directory:
        for n in lengths:
            for replicate in range(processes):
                size = tokens // n if tokens else batch
                case = Case(
                    kind="cost",
                    arch=arch,
                    level=level,
                    phase=phase,
                    batch=size,
                    seq_len=None if phase == "decode" else n,
                    position=n if phase == "decode" else None,
                    size="d256",
                    replicate=replicate,
                )
                if failed and n in failed:
                    directory.write(
                        Measurement(
                            case=case, status=failed[n], reason="why", environment=ENVIRONMENT
                        )
                    )
                    continue
                times = size * law(n) * np.exp(noise * generator.standard_normal(7))
                p20, p50, p80 = np.quantile(times, [0.2, 0.5, 0.8])
                metrics = {
                    "time_ms_p20": p20,
                    "time_ms_p50": p50,
                    "time_ms_p80": p80,
                    "peak_bytes": 1024 * size * n,
                    "state_bytes": 2048 * size,
                    "work_flops": round(size * (flops or law)(n) * 1e6),
                    "floor_bytes": round(size * (flops or law)(n) * 1e3),
                    "foreign_load": 0.0,
                }
                directory.write(
                    Measurement(
                        case=case,
                        status="ok",
                        environment=ENVIRONMENT,
                        metrics=metrics,
                        samples={"time_ms": times.tolist()},
                    )
                )

import itertools
import json
import os
import resource
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

from harness import cost, record, run, sweep
from harness.record import RunDirectory
from harness.run import Settings, Worker, WorkerFailedError
from harness.sweep import Grid

CEILINGS = {"copy_bytes_per_s": 1e15, "matmul_flops_per_s_float32": 1e15, "exp2_per_s": 1e15}
GRID = Grid(level="block", phase="forward", lengths=32, size="d64", archs="mamba2")


@pytest.fixture(autouse=True)
def known_ceilings(request, monkeypatch):
    """Measuring what the device can do takes seconds: only the test about it does."""
    if "measured_ceilings" not in request.fixturenames:
        monkeypatch.setattr(run.Launcher, "measure_ceilings", lambda self, dtypes: CEILINGS)


@pytest.fixture
def measured_ceilings():
    """Asks for the real ones."""


def swept(out, archs, **options):
    """The records of one small cell of each architecture, by architecture."""
    cost.run(
        [Grid(level="block", phase="forward", lengths=32, size="d64", archs=archs)], out, **options
    )
    return {m.case.arch: m for m in record.load(out)[0]}


FAULTS = {
    "segfault": ("crashed", "killed by SIGSEGV", "string_at"),
    "abort": ("crashed", "killed by SIGABRT", "want of sense"),
    "killed": ("crashed", "killed by SIGKILL", "said nothing"),
    "exit": ("crashed", "exited with code 1", "should not do this"),
    "hungry-cpp": ("oom", "killed by SIGABRT", "bad_alloc"),
    "wrong": ("wrong", "WrongResultError", "relative error"),
    "raises": ("error", "ZeroDivisionError: a bug", "faulty_blocks.py"),
    "too-large": ("unsupported", "OutOfResources", "shared memory"),
}


def test_every_fault_is_a_record_and_the_sweep_goes_on(tmp_path, faulty):
    found = swept(tmp_path, [*FAULTS, "mamba2"])
    for arch, (status, *said) in FAULTS.items():
        assert found[arch].status == status, found[arch]
        for words in said:
            assert words in found[arch].reason
        assert found[arch].reason.isprintable()
        assert "time_ms_p50" not in found[arch].metrics
    assert found["mamba2"].status == "ok"
    assert "Traceback" in found["raises"].detail


def test_a_hang_is_killed_at_its_time_limit_with_its_group(tmp_path, faulty, monkeypatch):
    monkeypatch.setenv("SEQSCALE_TEST_SLEEP", "62.75")
    start = time.monotonic()
    found = swept(tmp_path, ["hang", "mamba2"], time_limit_s=3)
    assert time.monotonic() - start < 60
    assert found["hang"].status == "timeout"
    assert "within 3 s" in found["hang"].reason
    assert sleepers("62.75") == []
    assert found["mamba2"].status == "ok"


def test_memory_that_runs_out_is_oom(tmp_path, faulty):
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (6 << 30, limits[1]))
    try:
        found = swept(tmp_path, ["hungry", "hungry-python", "mamba2"])
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert found["hungry"].status == "oom"
    assert found["hungry-python"].status == "oom"
    assert found["mamba2"].status == "ok"


def test_what_a_cell_prints_disturbs_nothing(tmp_path, faulty):
    assert swept(tmp_path, ["chatty"])["chatty"].status == "ok"


def test_a_healthy_worker_is_used_again_and_retired_at_a_fault(tmp_path, faulty):
    cost.run([Grid(level="block", phase="forward", lengths=[16, 32], size="d64",
                   archs=["mamba2", "raises"])], tmp_path)  # fmt: skip
    process = {(m.case.arch, m.case.seq_len): m.environment["process"]
               for m in record.load(tmp_path)[0]}  # fmt: skip
    assert process["mamba2", 16] == process["raises", 16]
    assert process["mamba2", 32] == process["raises", 32]
    assert len(set(process.values())) == 2


def test_replicates_run_in_processes_of_their_own(tmp_path):
    cost.run([Grid(level="op", phase="forward", lengths=[16, 32], size="d64", archs="mamba2",
                   replicates=2)], tmp_path)  # fmt: skip
    found = record.load(tmp_path)[0]
    processes = [
        {m.environment["process"] for m in found if m.case.replicate == r} for r in range(2)
    ]
    assert [len(p) for p in processes] == [1, 1]
    assert len(set.union(*processes)) == 2


def test_a_worker_that_died_between_cells_is_replaced():
    launcher = run.Launcher(Settings(), "session")
    with launcher:
        first = launcher.worker
        os.killpg(first.process.pid, signal.SIGKILL)
        first.process.wait()
        assert launcher.worker is not first
        assert launcher.worker.environment["torch"]


def sleepers(seconds):
    """The processes `sleep seconds`, which only the test has started."""
    found = subprocess.run(["pgrep", "-fx", f"sleep {seconds}"], capture_output=True, text=True)
    return [int(pid) for pid in found.stdout.split()]


def test_a_busy_worker_dies_with_its_sweep(tmp_path, faulty_environment):
    code = (
        "from harness import cost; from harness.sweep import Grid;"
        "cost.run([Grid(level='block', phase='forward', lengths=16, size='d64', archs='hang')])"
    )
    variables = {**faulty_environment, "SEQSCALE_TEST_SLEEP": "61.25"}
    sweeping = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=variables)
    deadline = time.monotonic() + 60
    while not (found := sleepers("61.25")) and time.monotonic() < deadline:
        time.sleep(0.1)
    (sleeper,) = found
    worker = int(Path(f"/proc/{sleeper}/stat").read_text().split()[3])
    assert worker != sweeping.pid
    sweeping.kill()
    sweeping.wait()
    os.kill(sleeper, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while Path(f"/proc/{worker}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{worker}").exists()


def test_no_worker_at_all_is_one_clear_error(monkeypatch):
    monkeypatch.setattr(run.sys, "executable", "/bin/false")
    with pytest.raises(WorkerFailedError, match="exited with code 1"):
        Worker("cpu", None)


def test_a_record_of_other_code_is_measured_again_and_stays_as_it_is(tmp_path):
    cells = sweep.cells([GRID])

    def started():
        seen = []
        cost.run(cells, tmp_path, on_start=seen.append)
        return seen

    assert started() == cells
    assert started() == []
    (path,) = (tmp_path / "records").glob("*.json")
    document = json.loads(path.read_bytes())
    document["environment"]["code_hash"] = "f" * 16
    path.write_text(json.dumps(document))
    changed = path.read_bytes()
    assert started() == cells
    assert path.read_bytes() == changed
    assert started() == []


@pytest.mark.parametrize("field", ["code_hash", "device", "driver", "cores", "threads", "torch"])
def test_a_result_stands_only_where_device_software_and_code_are_the_same(field):
    (case,) = sweep.cells([GRID])
    here = {"device": "a CPU", "code_hash": "0", "threads": 2, "torch": "2", "time_limit_s": 600.0}
    measurement = record.Measurement(case=case, status="ok", environment=here)
    assert run.stands(measurement, dict(here), Settings())
    assert not run.stands(measurement, {**here, field: "other"}, Settings())


@pytest.mark.parametrize(
    ("status", "limit", "again"),
    [
        ("ok", 600, False),
        ("oom", 600, False),
        ("unsupported", 600, False),
        ("diverged", 600, False),
        ("timeout", 600, False),
        ("timeout", 601, True),
        ("crashed", 600, True),
        ("wrong", 600, True),
        ("error", 600, True),
    ],
)
def test_results_stand_and_faults_are_tried_again(status, limit, again):
    (case,) = sweep.cells([GRID])
    here = {"device": "a CPU", "code_hash": "0", "time_limit_s": 600.0}
    measurement = record.Measurement(case=case, status=status, environment=here)
    assert run.stands(measurement, here, Settings(time_limit_s=limit)) is not again


def test_a_time_limit_shorter_than_the_ceilings_is_a_result(tmp_path, measured_ceilings):
    table = cost.run([GRID], tmp_path, time_limit_s=0.001)
    assert table["status"].tolist() == ["timeout"]


@pytest.mark.parametrize(
    ("sweep_", "options"), [([], {}), ([GRID], {"threads": 0}), ([GRID], {"time_limit_s": -1.0})]
)
def test_what_cannot_be_is_refused_in_python_too(tmp_path, sweep_, options):
    with pytest.raises(ValueError, match=r"no cells|threads|time limit"):
        cost.run(sweep_, tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_the_session_records_the_ceilings_and_their_drift(tmp_path, measured_ceilings):
    table = cost.run([GRID], tmp_path)
    (path,) = (tmp_path / "sessions").glob("*.json")
    session = json.loads(path.read_text())
    assert session["ceilings_start"]["matmul_flops_per_s_float32"] > 1e9
    assert session["ceilings_end"]["copy_bytes_per_s"] > 1e8
    assert session["stable"] == (session["drift"] <= 0.02)
    assert table["stable"].tolist() == [session["stable"]]
    assert table["session"].tolist() == [path.stem]


def test_a_full_disk_ends_the_sweep_and_spoils_nothing(tmp_path):
    cells = sweep.cells([GRID, Grid(level="op", phase="forward", lengths=[16, 32], archs="mamba2")])
    cost.run(cells[:1], tmp_path)
    (first,) = (tmp_path / "records").iterdir()
    before = first.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(case):
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))

    try:
        with pytest.raises(OSError, match=r"File too large.*records/"):
            cost.run(cells, tmp_path, on_start=fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [p.read_bytes() for p in (tmp_path / "records").iterdir()] == [before]
    assert not list(tmp_path.rglob("*.tmp"))
    RunDirectory(tmp_path).close()  # the lock is free again


def test_the_harness_adds_less_than_50_ms_a_cell(tmp_path):
    ends = []
    grid = Grid(
        level="op", phase="decode", positions=list(range(1, 12)), size="d64", archs="mamba2"
    )
    cost.run([grid], tmp_path, on_finish=lambda m, known: ends.append((time.perf_counter(), m)))
    added = [
        now - before - m.environment["cell_s"] for (before, _), (now, m) in itertools.pairwise(ends)
    ]
    assert statistics.median(added) < 0.05

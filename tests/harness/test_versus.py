"""Comparisons: ours, ours again and libraries' implementations in one process."""

import io
import json
import re
import time
from collections import Counter
from dataclasses import replace

import pytest
import torch
from rich.console import Console

import archs
from harness import ceilings, cost, record, report, run, sweep, timing, versus, workload
from harness.peers import PEERS, Peer
from harness.record import AGAIN, OURS
from harness.run import Launcher, Settings, WorkerFailedError
from harness.sweep import Grid
from harness.timing import Observation

CEILINGS = {"copy_bytes_per_s": 1e15, "matmul_flops_per_s_float32": 1e15, "exp2_per_s": 1e15}
GRID = Grid(level="op", phase="forward", lengths=64, size="d64", archs="mamba2")
BESIDE = [OURS, AGAIN, "ssd-minimal"]

# A listing of SSD that breaks as a file beside it says, then is ours.
LISTING = """
import os, pathlib, signal, time
from archs.ops.ssd import ssd

def ssd_minimal_discrete(x, log_decay, b, c, block_len, start=None):
    how = pathlib.Path(__file__).with_name("how").read_text()
    if how == "dies":
        os.kill(os.getpid(), signal.SIGSEGV)
    if how == "hangs":
        time.sleep(600)
    state = x.new_zeros(*x.shape[:1], *x.shape[2:], b.shape[3]) if start is None else start[:, 0]
    return ssd(x, log_decay, b, c, state, backend="torch")
"""


@pytest.fixture
def listing(tmp_path_factory, monkeypatch):
    """Says how the listing of SSD behaves in the workers that are started."""
    site = tmp_path_factory.mktemp("site")
    modules = site / "mamba_ssm" / "modules"
    modules.mkdir(parents=True)
    (site / "mamba_ssm" / "__init__.py").touch()
    (modules / "ssd_minimal.py").write_text(LISTING)
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setattr(Launcher, "measure_ceilings", lambda self, dtypes: CEILINGS)

    def behave(how):
        (modules / "how").write_text(how)

    behave("well")
    return behave


@pytest.fixture
def planted(monkeypatch):
    """Replaces the call of ssd-minimal in this process by one that calls it, and more."""

    def plant(call):
        real = PEERS["ssd-minimal"].call
        peer = replace(PEERS["ssd-minimal"], call=lambda *a, **kw: call(real, *a, **kw))
        monkeypatch.setitem(PEERS, "ssd-minimal", peer)

    return plant


def compared(grid=GRID, bounds=CEILINGS):
    """What comes of each implementation of one comparison in this process."""
    cells, _ = versus.joined(sweep.cells([grid]), "all", "cpu")
    (group,) = versus.groups(cells)
    results = versus.measure(group, "cpu", bounds)
    return {case.implementation: result for case, result in zip(group, results, strict=True)}


# Which cells are compared.


def test_each_operation_is_joined_by_itself_and_its_peers():
    grids = [
        Grid(level="op", phase=("forward", "backward"), lengths=(32, 64), size="d64"),
        Grid(level="block", phase="forward", lengths=32, size="d64"),
    ]
    cells = sweep.cells(grids)
    together, left_out = versus.joined(cells, "all", "cpu")
    assert [case for case in together if case.implementation == OURS] == cells
    counts = Counter((case.arch, case.implementation) for case in together if case.level == "op")
    assert counts == {
        (arch, name): 4
        for arch, names in {
            "transformer": (OURS, AGAIN, "sdpa-flash", "sdpa-math"),
            "mamba2": (OURS, AGAIN, "ssd-minimal"),
            "rwkv7": (OURS, AGAIN),
            "hyena": (OURS, AGAIN, "torch-fft"),
        }.items()
        for name in names
    }
    assert all(case.implementation == OURS for case in together if case.level == "block")
    assert left_out == dict.fromkeys(
        ("sdpa-cudnn", "sdpa-efficient", "flash-attn", "mamba_ssm", "fla", "flashfftconv"),
        "needs an NVIDIA GPU",
    )
    assert versus.joined(cells, (), "cpu") == (cells, {})


def test_single_peers_can_be_asked_for():
    together, left_out = versus.joined(sweep.cells([GRID]), ["ssd-minimal", "mamba_ssm"], "cpu")
    assert [case.implementation for case in together] == BESIDE
    assert left_out == {"mamba_ssm": "needs an NVIDIA GPU"}
    together, left_out = versus.joined(sweep.cells([GRID]), "ssd-minimal", "cpu")
    assert [case.implementation for case in together] == BESIDE
    assert left_out == {}
    twice, _ = versus.joined(
        sweep.cells([replace(GRID, implementation=[OURS, "ssd-minimal"])]), "all", "cpu"
    )
    assert twice == together


def test_only_attention_decodes_with_a_peer_and_the_reference_is_ours_alone():
    decode = Grid(level="op", phase="decode", positions=32, size="d64")
    together, _ = versus.joined(sweep.cells([decode]), "all", "cpu")
    assert {c.arch for c in together if c.implementation in PEERS} == {"transformer"}
    both = sweep.cells([replace(GRID, backend=["reference", "torch"])])
    together, _ = versus.joined(both, "all", "cpu")
    assert [case.backend for case in together] == ["reference", *["torch"] * 3]


def test_an_unknown_peer_is_named():
    with pytest.raises(ValueError, match=r"unknown peer 'mamba-ssm'.*did you mean 'mamba_ssm'"):
        versus.joined(sweep.cells([GRID]), ["mamba-ssm"], "cpu")


@pytest.mark.parametrize(
    ("grid", "names", "words"),
    [
        (GRID, ["ssd-minimal", "fla"], "peers fla: the sweep has no cell of wkv7 at level op"),
        (replace(GRID, level="block"), "all", "peers all: the sweep has no cell of an operation"),
        (replace(GRID, backend="reference"), "ssd-minimal", "no cell of ssd"),
    ],
)
def test_peers_with_nothing_beside_them_are_refused(grid, names, words):
    with pytest.raises(ValueError, match=words):
        versus.joined(sweep.cells([grid]), names, "cpu")


def test_cells_of_a_comparison_come_together_and_others_alone():
    grid = replace(GRID, lengths=(32, 64), replicates=2)
    cells = sweep.cells([grid])
    together, _ = versus.joined(cells, "all", "cpu")
    groups = versus.groups(together)
    assert [[case.implementation for case in group] for group in groups] == [BESIDE] * 4
    assert [(g[0].replicate, g[0].seq_len) for g in groups] == [(0, 32), (0, 64), (1, 32), (1, 64)]
    assert versus.groups(cells) == [[case] for case in cells]
    # Implementations that nobody asked to compare.
    alone = sweep.cells([replace(GRID, implementation=[OURS, "ssd-minimal"])])
    assert versus.groups(alone) == [[case] for case in alone]


def test_the_gpu_suite_is_of_constant_work_and_splits_by_operation():
    preset = sweep.preset("h100-ops")
    whole = sweep.cells(preset, "cuda")
    assert {c.batch * (c.seq_len or c.position) for c in whole} == {32768, 262144}
    assert {(c.level, c.dtype) for c in whole} == {("op", "bfloat16")}
    assert {(c.arch, c.size) for c in whole} == {
        *((arch, "d2048") for arch in sweep.ARCHS),
        ("transformer", "d2048h128"),
    }
    assert {c.phase for c in whole} == {"forward", "backward", "decode"}
    parts = [
        sweep.cells(sweep.narrowed(preset, op=[op]), "cuda") for op in sweep.OPERATIONS.values()
    ]
    assert {c.key for part in parts for c in part} == {c.key for c in whole}
    assert sum(map(len, parts)) == len(whole) == 50


def test_the_gpu_suite_times_our_kernels_beside_the_peers(monkeypatch):
    monkeypatch.setattr(Peer, "unavailable", lambda self, device: None)
    cells, _ = versus.joined(
        sweep.cells(sweep.narrowed(sweep.preset("h100-ops"), op=["ssd"]), "cuda"), "all", "cuda"
    )
    assert {case.backend for case in cells} == {"triton"}
    beside = {
        (group[0].phase, group[0].batch, group[0].seq_len): [c.implementation for c in group]
        for group in versus.groups(cells)
    }
    for shape in ((8, 4096), (1, 32768)):
        for phase in ("forward", "backward"):
            assert beside[phase, *shape] == [OURS, AGAIN, "mamba_ssm", "ssd-minimal"]
    assert beside["decode", 64, None] == [OURS, AGAIN]  # no peer has a step of its own
    block = archs.build_block("mamba2", width=2048)
    config = block.config
    assert (config.heads, config.head_dim, config.d_state, config.groups) == (64, 64, 128, 1)


# What is measured.


def test_every_implementation_is_checked_timed_and_paired(monkeypatch):
    seen = []
    real = timing.observe_interleaved
    monkeypatch.setattr(
        timing, "observe_interleaved", lambda *a, **kw: seen.append(real(*a, **kw)) or seen[-1]
    )
    found = compared()
    assert list(found) == BESIDE
    assert len(seen) == 1
    lengths = {len(result["samples"]["time_ms"]) for result in found.values()}
    assert len(lengths) == 1
    assert lengths.pop() >= timing.MIN_ROUNDS
    for result in found.values():
        assert result["status"] == "ok", result
        metrics = result["metrics"]
        assert 0 < metrics["relative_error"] < 1e-4
        assert metrics["timing_contract"] == "single-calls"
        assert metrics["compile_ms"] > 0
        assert metrics["peak_bytes"] >= 0
        assert 0 < metrics["roofline_fraction"] < 1
        assert metrics["time_ms_p20"] <= metrics["time_ms_p50"] <= metrics["time_ms_p80"]
    assert "ratio_to_ours" not in found[OURS]["metrics"]
    again = found[AGAIN]["metrics"]
    assert again["ratio_low"] <= again["ratio_to_ours"] <= again["ratio_high"]
    assert "verdict" not in again
    theirs = found["ssd-minimal"]["metrics"]
    ratio = timing.speedup(*(found[name]["samples"]["time_ms"] for name in (OURS, "ssd-minimal")))
    assert (theirs["ratio_to_ours"], theirs["ratio_low"], theirs["ratio_high"]) == ratio
    assert theirs["verdict"] in ("ahead", "level", "behind")


def test_a_peer_that_sleeps_is_slower_and_the_interval_says_so(planted):
    def slow(real, *arguments, **options):
        time.sleep(0.02)
        return real(*arguments, **options)

    planted(slow)
    found = compared()
    assert found["ssd-minimal"]["metrics"]["ratio_low"] > 2
    assert found["ssd-minimal"]["metrics"]["verdict"] == "ahead"


def test_a_peer_that_ours_is_behind_of(monkeypatch):
    """Times are made up: theirs takes half of ours, of which the rounds differ by 5 %."""

    def observe(functions, **_):
        found = {}
        for i, key in enumerate(functions):
            factor = (1, 1.001, 0.5)[i]
            times = [factor * (1 + 0.05 * (j % 3)) for j in range(20)]
            found[key] = Observation(timing.quantiles(times), {"time_ms": times})
        return found

    monkeypatch.setattr(timing, "observe_interleaved", observe)
    found = compared()
    assert found["ssd-minimal"]["metrics"]["verdict"] == "behind"
    assert found["ssd-minimal"]["metrics"]["ratio_to_ours"] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("low", "high", "noise", "expected"),
    [
        (1.011, 1.02, 0.0, "ahead"),
        (1.009, 1.02, 0.0, "level"),
        (1.011, 1.02, 0.01, "level"),
        (1.021, 1.03, 0.01, "ahead"),
        (0.98, 0.989, 0.0, "behind"),
        (0.98, 0.992, 0.0, "level"),
        (0.97, 0.979, 0.01, "behind"),
        (0.97, 0.985, 0.01, "level"),
    ],
)
def test_a_verdict_needs_an_interval_beyond_one_percent_and_twice_the_noise(
    low, high, noise, expected
):
    assert versus.verdict(low, high, noise) == expected


def test_noise_is_how_far_the_interval_of_ours_again_reaches():
    assert versus.noise_of(0.97, 1.01) == pytest.approx(0.03)
    assert versus.noise_of(0.99, 1.04) == pytest.approx(0.04)


BREAKING = {
    "wrong": (lambda real, *a, **kw: (1.001 * real(*a, **kw)[0], None), "relative error"),
    "oom": (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), "out of memory"),
    "unsupported": (NotImplementedError("none such"), "none such"),
    "error": (ZeroDivisionError("a bug"), "ZeroDivisionError: a bug"),
}


@pytest.mark.parametrize("status", BREAKING)
def test_one_that_breaks_leaves_the_others_to_go_on(planted, monkeypatch, status):
    how, words = BREAKING[status]
    real_observe, timed = timing.observe_interleaved, []

    def observe(functions, **options):
        timed.append(len(functions))
        return real_observe(functions, **options)

    monkeypatch.setattr(timing, "observe_interleaved", observe)

    def breaking(real, *arguments, **options):
        if isinstance(how, Exception):
            raise how
        return how(real, *arguments, **options)

    planted(breaking)
    found = compared()
    broken = found["ssd-minimal"]
    assert broken["status"] == status
    assert words in broken["reason"]
    assert "metrics" not in broken
    assert "samples" not in broken
    assert found[OURS]["status"] == found[AGAIN]["status"] == "ok"
    assert "ratio_to_ours" in found[AGAIN]["metrics"]
    assert timed == [2]


def test_a_device_that_is_left_in_an_error_ends_the_process(planted, monkeypatch):
    """What a broken kernel left is raised by whoever waits for the device next."""

    def broken(real, *arguments, **options):
        monkeypatch.setattr(versus, "_settle", settle)
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def settle(device):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    planted(broken)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        compared()


def test_one_that_goes_wrong_while_it_is_timed_has_no_time(planted, monkeypatch):
    off = []
    planted(lambda real, *a, **kw: ((1 + len(off)) * real(*a, **kw)[0], None))
    observe = timing.observe_interleaved
    monkeypatch.setattr(
        timing, "observe_interleaved", lambda *a, **kw: (observe(*a, **kw), off.append(1))[0]
    )
    found = compared()
    assert found["ssd-minimal"]["status"] == "wrong"
    assert "samples" not in found["ssd-minimal"]
    assert found[OURS]["status"] == "ok"


def test_beside_an_ours_that_was_not_measured_there_is_no_ratio(monkeypatch):
    real = workload.build

    def build(case, device):
        if case.implementation == OURS:
            raise MemoryError
        return real(case, device)

    monkeypatch.setattr(workload, "build", build)
    found = compared()
    assert found[OURS]["status"] == "oom"
    for name in (AGAIN, "ssd-minimal"):
        assert found[name]["metrics"]["time_ms_p50"] > 0
        assert not {"ratio_to_ours", "verdict"} & set(found[name]["metrics"])


def test_faster_than_the_roofline_is_an_error_here_too(monkeypatch):
    slow = {**CEILINGS, "matmul_flops_per_s_float32": 1e6}
    monkeypatch.setattr(ceilings, "measure", lambda device, dtypes: slow)
    for result in compared(bounds=slow).values():
        assert result["status"] == "error"
        assert "faster than the roofline" in result["reason"]


def test_rounds_fill_some_seconds_and_are_enough(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def taking(seconds):
        def call():
            now[0] += seconds

        return {"a": call, "b": call}

    found = {s: timing.affordable_rounds(taking(s)) for s in (1e-4, 0.02, 0.5, 2, 20)}
    assert found == {1e-4: 200, 0.02: 75, 0.5: 20, 2: 15, 20: 8}


# Records.


def swept(out, **options):
    """The records of a comparison in `out`, by implementation."""
    cost.run([GRID], out, peers="all", device="cpu", **options)
    return {m.case.implementation: m for m in record.load(out)[0]}


def comparisons(found):
    return {m.environment["comparison"] for m in found.values()}


def test_a_comparison_is_recorded_and_resumed_as_one(tmp_path, listing):
    found = swept(tmp_path)
    assert set(found) == set(BESIDE)
    assert {m.status for m in found.values()} == {"ok"}
    assert len(comparisons(found)) == 1
    assert len({m.environment["process"] for m in found.values()}) == 1
    assert found["ssd-minimal"].environment["peer"]["options"] == {"block_len": 64}
    assert "peer" not in found[OURS].environment

    started = []
    assert swept(tmp_path, on_start=started.append) == found
    assert started == []

    victim = next((tmp_path / "records").glob(f"{found[AGAIN].case.key}-*.json"))
    victim.unlink()
    again = swept(tmp_path, on_start=started.append)
    assert [case.implementation for case in started] == [OURS]
    assert len(comparisons(again)) == 1
    assert comparisons(again) != comparisons(found)


def test_a_cell_measured_alone_is_no_part_of_a_comparison_and_stands_for_itself(tmp_path, listing):
    cost.run([GRID], tmp_path, device="cpu")
    (alone,) = record.load(tmp_path)[0]
    found = swept(tmp_path)
    assert set(found) == set(BESIDE)
    assert found[OURS].environment["comparison"] is not None
    assert "comparison" not in alone.environment
    started = []
    cost.run([GRID], tmp_path, device="cpu", on_start=started.append)  # without peers, ours stands
    assert started == []


@pytest.mark.parametrize(
    ("ids", "stands"),
    [(("a", "a", "a"), True), (("a", "b", "a"), False), ((None, None, None), False)],
)
def test_a_comparison_stands_only_as_one(ids, stands):
    group, _ = versus.joined(sweep.cells([GRID]), "ssd-minimal", "cpu")
    latest = {
        case.key: record.Measurement(
            case=case, status="ok", environment={"comparison": id_} if id_ else {}
        )
        for case, id_ in zip(group, ids, strict=True)
    }
    assert run._stand(group, set(latest), latest) is stands
    assert not run._stand(group, set(latest) - {group[1].key}, latest)
    assert run._stand(group[:1], set(latest), latest)


def test_a_peer_that_kills_the_process_is_recorded_and_the_rest_compared(tmp_path, listing):
    listing("dies")
    found = swept(tmp_path)
    assert found["ssd-minimal"].status == "crashed"
    assert "SIGSEGV" in found["ssd-minimal"].reason
    assert "time_ms_p50" not in found["ssd-minimal"].metrics
    for name in (OURS, AGAIN):
        assert found[name].status == "ok"
    assert found[AGAIN].metrics["ratio_to_ours"] > 0
    assert len(comparisons(found)) == 1
    listing("well")
    again = swept(tmp_path)  # a fault is tried again, with all that it is compared to
    assert {m.status for m in again.values()} == {"ok"}
    assert comparisons(again) != comparisons(found)


def test_a_peer_that_hangs_is_a_timeout_and_the_rest_compared(tmp_path, listing):
    listing("hangs")
    found = swept(tmp_path, time_limit_s=5)
    assert found["ssd-minimal"].status == "timeout"
    assert found[OURS].status == found[AGAIN].status == "ok"
    started = []
    swept(tmp_path, time_limit_s=5, on_start=started.append)
    assert started == []


def test_what_fails_side_by_side_alone_fails_for_all(monkeypatch):
    """Each is well by itself: the comparison has no result, and no culprit."""
    cells, _ = versus.joined(sweep.cells([GRID]), "all", "cpu")
    asked = []

    def compare(self, cases):
        asked.append(len(cases))
        raise WorkerFailedError("oom", "killed by the kernel", "")

    def measure(self, case):
        return record.Measurement(
            case=case, status="ok", environment={}, metrics={"time_ms_p50": 1.0}
        )

    monkeypatch.setattr(Launcher, "_compare", compare)
    monkeypatch.setattr(Launcher, "measure", measure)
    found = Launcher(Settings(), "session").compare(cells)
    assert asked == [3]
    assert [m.status for m in found] == ["oom"] * 3
    assert found[0].reason == "side by side, not alone: killed by the kernel"
    assert all(m.metrics == {} for m in found)
    assert {m.environment["comparison"] for m in found} == {"session-1"}


def test_replicates_of_a_comparison_run_in_processes_of_their_own(tmp_path, listing):
    cost.run([replace(GRID, replicates=2)], tmp_path, device="cpu", peers="ssd-minimal")
    found = record.load(tmp_path)[0]
    processes = {(m.case.replicate, m.environment["process"]) for m in found}
    assert len(found) == 6
    assert len(processes) == len({process for _, process in processes}) == 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
def test_the_gpu_suite_runs(tmp_path):
    grids = sweep.narrowed(
        sweep.preset("h100-ops"), lengths=[1024], positions=[1024], batch=4, size="d256"
    )
    table = cost.run(grids, tmp_path, peers="all", device="cuda")
    ours = table[table["implementation"].isin([OURS, AGAIN])]
    assert set(ours["status"]) == {"ok"}, ours["reason"]
    assert set(table["status"]) <= {"ok", "unsupported"}, table[["implementation", "reason"]]
    assert (table.groupby("comparison")["process"].nunique() == 1).all()
    assert (table["roofline_fraction"].dropna() < 1.05).all()


# What is shown.


def shown(tables):
    console = Console(width=160, record=True, file=io.StringIO())
    for table in tables:
        console.print(table)
    return console.export_text()


def test_the_table_shows_ratios_noise_and_verdicts_and_no_time_of_a_wrong_one(tmp_path, listing):
    swept(tmp_path)
    cells = report.frame(tmp_path)
    text = shown(versus.tables(cells))
    rows = {line.split("│")[2].strip(): line for line in text.splitlines() if "│" in line}
    assert list(rows) == BESIDE
    assert "B 1 T 64" in rows[OURS]
    assert "(noise " in rows[AGAIN]
    theirs = cells[cells["implementation"] == "ssd-minimal"].iloc[0]
    assert f"{theirs['ratio_to_ours']:.3f}" in rows["ssd-minimal"]
    assert theirs["verdict"] in rows["ssd-minimal"]
    assert f"{theirs['roofline_fraction']:.1%}" in rows["ssd-minimal"]
    assert shown(report.tables(cells)) == ""  # it has no table of growth beside it

    cells.loc[theirs.name, "verdict"] = None
    assert "│ - " in shown(versus.tables(cells)).splitlines()[-2]
    cells.loc[theirs.name, "status"] = "wrong"
    text = shown(versus.tables(cells))
    (row,) = [line for line in text.splitlines() if "ssd-minimal" in line]
    assert [part.strip() for part in row.split("│")[2:-1]] == ["ssd-minimal", "wrong", *[""] * 5]


def test_ours_comes_first_and_then_ours_again(tmp_path):
    grid = replace(GRID, archs=["transformer", "mamba2"], lengths=(32, 64))
    cells, _ = versus.joined(sweep.cells([grid]), "all", "cpu")
    with record.RunDirectory(tmp_path) as directory:
        for case in cells:
            directory.write(record.Measurement(case=case, status="oom", environment={}))
    found = report.frame(tmp_path)["implementation"].tolist()
    assert found == 2 * [OURS, AGAIN, "sdpa-flash", "sdpa-math"] + 2 * BESIDE


def test_ours_again_is_on_no_curve(tmp_path, listing):
    swept(tmp_path)
    drawn = {common["implementation"] for common, _ in report.curves(report.frame(tmp_path))}
    assert drawn == {OURS, "ssd-minimal"}


def test_the_command_line_compares(tmp_path, listing, monkeypatch, capfd):
    from harness import __main__ as command_line

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run.signal, "signal", lambda *_: None)
    place = (
        "--preset h100-ops --phase forward --length 64 --tokens 64 --size d64 --device cpu "
        "--backend torch"
    )

    def call(*arguments):
        monkeypatch.setattr("sys.argv", ["seqscale", "cost", *place.split(), *arguments])
        with pytest.raises(SystemExit) as exit_:
            command_line.main()
        return exit_.value.code, *capfd.readouterr()

    code, out, err = call("--peers", "all", "--dry-run")
    assert code == 0, err
    assert "12 of 12 cells to measure" in out
    assert err.count("left out:") == 6
    assert "seqscale: left out: fla: needs an NVIDIA GPU\n" in err

    code, out, err = call("--peers", "all", "--op", "ssd")
    assert code == 0, err
    assert err.count("left out:") == 1
    assert "mamba2 op forward, d64, float32, torch: side by side" in out
    assert "3/3 mamba2 op forward T=64 B=1 d64 float32 torch ssd-minimal: " in err

    code, out, err = call("--peers", "fla", "--op", "wkv7", "--json")
    assert code == 0, err
    assert "left out: fla: needs an NVIDIA GPU" in err
    assert [cell["implementation"] for cell in json.loads(out)["cells"]] == [OURS, AGAIN]

    code, out, err = call("--implementation", "torch-fft", "--op", "long_conv", "--out", "runs/b")
    assert code == 0, err
    assert "op forward, d64, B = 1, float32, torch, torch-fft:" in out

    for arguments, words in (
        (("--peers", "fal"), "unknown peer 'fal'.*did you mean 'fla'"),
        (("--implementation", "sdpa-mat"), "unknown implementation 'sdpa-mat'.*'sdpa-math'"),
        (("--op", "attentoin"), "unknown op 'attentoin'.*did you mean 'attention'"),
        (("--op", "ssd", "--arch", "hyena"), "no architecture of the sweep has op ssd"),
        (("--implementation", "fla", "--arch", "hyena"), "'fla' is of wkv7"),
    ):
        code, out, err = call(*arguments)
        assert code == 2
        assert out == ""
        assert err.count("\n") == 1
        assert re.search(words, err), err

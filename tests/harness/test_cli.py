import json
import os
import random
import re
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest

from harness import record, report, run
from harness.peers import PEERS

SWEEP = """
[[grid]]
level = "op"
phase = "forward"
lengths = [32, 64]
size = "d64"
archs = ["mamba2", "hyena"]
"""
CEILINGS = {"copy_bytes_per_s": 1e15, "matmul_flops_per_s_float32": 1e15, "exp2_per_s": 1e15}


def seqscale(*arguments, cwd, **options):
    """The command line in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "harness", *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=200,
        **options,
    )


@pytest.fixture(autouse=True)
def sweep_file(tmp_path):
    (tmp_path / "sweep.toml").write_text(SWEEP)


def test_cost_status_export_plot(here, tmp_path):
    code, out, err = here("cost", "sweep.toml")
    assert code == 0, err
    assert "local exponent" in out
    assert "4/4 hyena op forward T=64" in err
    table = pd.read_csv(tmp_path / "runs" / "cost" / "cells.csv")
    assert table["status"].tolist() == ["ok"] * 4

    code, out, err = here("cost", "sweep.toml")
    assert code == 0, err
    assert "4 of 4 cells were there already" in err
    assert "op forward" not in err

    code, out, _ = here("status")
    assert code == 0
    assert "4 of 4 cells (4 ok); no sweep runs" in out

    for name in ("a.csv", "a.parquet", "a.jsonl"):
        code, out, err = here("export", "runs/cost", name)
        assert (code, out) == (0, f"{name}: 4 cells\n"), err
    pd.testing.assert_frame_equal(pd.read_csv("a.csv"), table)
    assert pd.read_parquet("a.parquet")["time_ms_p50"].tolist() == table["time_ms_p50"].tolist()
    packed = (tmp_path / "a.jsonl").read_bytes()
    here("export", "a.jsonl", "b.jsonl")
    assert (tmp_path / "b.jsonl").read_bytes() == packed
    loaded = report.frame(tmp_path / "a.jsonl")
    assert loaded["key"].tolist() == table["key"].tolist()
    assert loaded["stable"].tolist() == table["stable"].tolist() != [None] * 4

    code, out, err = here("plot")
    assert code == 0, err
    assert "no fit: 2 of 4 lengths" in out
    figures = re.findall(r"^runs/cost/figures/.*$", out, flags=re.MULTILINE)
    assert len(figures) == 7  # three figures of two files each, summary.md
    assert all((tmp_path / figure).exists() for figure in figures)
    code, out, err = here("plot", "a.jsonl", "--out", "elsewhere")
    assert code == 0, err
    assert {p.name for p in (tmp_path / "elsewhere").iterdir()} == {
        figure.rpartition("/")[2] for figure in figures
    }


def test_replicates_are_fitted_and_the_fits_come_as_json(here):
    lengths = [part for n in (16, 32, 64, 128) for part in ("--length", n)]
    code, out, err = here("cost", "sweep.toml", *lengths, "--replicates", "3", "--out", "runs/a")
    assert code == 0, err
    assert "fits and figures: seqscale plot runs/a" in out
    code, out, err = here("plot", "runs/a", "--json")
    assert code == 0, err
    document = json.loads(out)
    assert [row["arch"] for row in document["growth"]] == ["mamba2", "hyena"]
    assert [row["processes"] for row in document["growth"]] == [3, 3]
    assert all(row["tail_low"] < row["tail_value"] < row["tail_high"] for row in document["growth"])
    (pair,) = document["crossovers"]
    assert (pair["a"], pair["b"]) == ("mamba2", "hyena")
    assert len(document["figures"]) == 7
    code, out, err = here("plot", "runs/a")
    assert code == 0, err
    assert "tail exponent" in out
    assert "Mamba-2, Hyena" in out


def test_json_is_one_document_and_all_else_is_on_standard_error(here):
    code, out, err = here("cost", "sweep.toml", "--arch", "mamba2", "--length", "16", "--json")
    assert code == 0, err
    document = json.loads(out)
    assert document["statuses"] == {"ok": 1}
    (cell,) = document["cells"]
    assert cell["seq_len"] == 16
    assert cell["time_ms_p50"] > 0
    assert "mamba2 op forward T=16" in err
    for verb in ("status", "list", "doctor"):
        code, out, err = here(verb, "--json")
        assert code == 0, err
        assert json.loads(out)


def test_a_dry_run_estimates_and_measures_nothing(here, tmp_path):
    code, out, err = here("cost", "--preset", "quick", "--dry-run")
    assert code == 0, err
    assert "transformer op forward T=256" in out
    assert re.search(
        r"116 of 116 cells to measure: roughly [\d.]+ min on a two-core CPU and up to [\d,]+ MiB",
        out,
    )
    document = json.loads(here("cost", "sweep.toml", "--dry-run", "--json")[1])
    assert len(document["cells"]) == 4
    assert all(c["estimated_s"] > 0 and c["estimated_bytes"] > 0 for c in document["cells"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["sweep.toml"]


def test_list_names_architectures_presets_and_phases(here):
    code, out, err = here("list")
    assert code == 0, err
    for name in ("transformer", "mamba2", "rwkv7", "hyena", "quick", "cpu", "h100", "decode"):
        assert name in out
    assert "ssd: mamba_ssm, ssd-minimal" in out


def test_doctor_says_what_works_and_why_the_rest_does_not(here):
    code, out, err = here("doctor")
    assert code == 0, err
    for name in (
        "PyTorch",
        "CUDA",
        "Triton",
        "interpreter",
        "NVML",
        *(f"peer {name}" for name in PEERS),
    ):
        assert name in out
    assert re.search(r"^--  peer fla +(needs an NVIDIA GPU|not importable because)", out, re.M)
    found = {c["name"]: c for c in json.loads(here("doctor", "--json")[1])}
    assert found["PyTorch"]["works"]
    assert found["Triton interpreter"]["works"], found["Triton interpreter"]
    assert all(check["found"] for check in found.values())


def test_a_fault_is_exit_code_4_and_memory_or_time_that_run_out_is_0(here, faulty):
    narrow = ("--level", "block", "--phase", "forward", "--length", "16", "--size", "d64")
    (sweep,) = [line for line in SWEEP.splitlines() if "lengths" in line]
    with open("block.toml", "w") as file:  # noqa: PTH123
        file.write(f'[[grid]]\nlevel = "block"\nphase = "forward"\n{sweep}\n')
    code, out, err = here("cost", "block.toml", *narrow[2:], "--arch", "raises", "--arch", "mamba2")
    assert code == 4
    assert "1/2 raises block forward T=16 B=1 d64 float32 torch: error: ZeroDivisionError" in err
    assert "1 error: ZeroDivisionError: a bug" in out
    assert "Traceback" not in err
    code, _, err = here(
        "cost", "block.toml", *narrow, "--arch", "hang", "--arch", "hungry-cpp",
        "--time-limit", "2", "--out", "other",
    )  # fmt: skip
    assert code == 0, err
    assert "timeout" in err
    assert "oom" in err


WRONG_USAGE = [
    (("cost", "--preset", "quik"), "unknown preset 'quik'.*did you mean 'quick'"),
    (("cost",), "give a sweep file or --preset"),
    (("cost", "sweep.toml", "--preset", "quick"), "not both"),
    (("cost", "absent.toml"), "absent.toml: no such file"),
    (("cost", "folder"), "folder is a directory"),
    (("cost", "binary.toml"), "binary.toml: not a TOML file: not UTF-8"),
    (("cost", "typo.toml"), "typo.toml: grid 1: unknown key 'levle'.*did you mean 'level'"),
    (("cost", "type.toml"), "lengths must be whole numbers >= 1, got 'long'"),
    (("cost", "zero.toml"), "lengths must be whole numbers >= 1, got 0"),
    (("cost", "--preset", "quick", "--arch", "mambda2"), "did you mean 'mamba2'"),
    (("cost", "--preset", "quick", "--backend", "tritn"), "did you mean 'triton'"),
    (("cost", "--preset", "quick", "--level", "blok"), "did you mean 'block'"),
    (("cost", "--preset", "quick", "--phase", "forwrd"), "did you mean 'forward'"),
    (("cost", "--preset", "quick", "--dtype", "float23"), "did you mean 'float32'"),
    (("cost", "--preset", "quick", "--device", "cudo"), "did you mean 'cuda'"),
    (("cost", "--preset", "quick", "--size", "d100"), "width must be a multiple of head_dim"),
    (("cost", "--preset", "quick", "--size", "huge"), "write d256"),
    (("cost", "--preset", "quick", "--length", "0"), "got 0"),
    (("cost", "--preset", "quick", "--length", "-4"), "got -4"),
    (("cost", "--preset", "quick", "--length", "many"), 'unable to convert "many" into int'),
    (("cost", "--preset", "quick", "--batch", "0"), "batch must be a whole number >= 1"),
    (("cost", "--preset", "quick", "--threads", "0"), "threads must be 1 to"),
    (("cost", "--preset", "quick", "--time-limit", "0"), "time limit must be above 0"),
    (("cost", "--preset", "quick", "--time-limit", "inf"), "time limit must be above 0"),
    (("cost", "--preset", "quick", "--level", "op", "--position", "5"), "positions are for"),
    (("status", "sweep.toml"), "is a file: status takes a run directory"),
    (("cost", "--preset"), "--preset requires an argument"),
    (("cost", "--preste", "quick"), "Did you mean --preset"),
    (("plto",), 'Did you mean "plot"'),
    (("plot", "absent"), "absent is not there"),
    (("status", "absent"), "absent is not there"),
    (("export", "absent", "a.csv"), "absent is not there"),
    (("export", "folder", "a.xls"), "ends in .csv, .parquet, .jsonl"),
    (("export", "folder", "a.csv"), "folder holds no records"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG_USAGE)
def test_wrong_usage_is_one_line_and_exit_code_2_before_any_cell(
    here, tmp_path, arguments, message
):
    (tmp_path / "folder").mkdir()
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    (tmp_path / "typo.toml").write_text(SWEEP.replace("level", "levle"))
    (tmp_path / "type.toml").write_text(SWEEP.replace("[32, 64]", '"long"'))
    (tmp_path / "zero.toml").write_text(SWEEP.replace("32", "0"))
    before = sorted(tmp_path.rglob("*"))
    code, out, err = here(*arguments)
    assert code == 2
    assert out == ""
    assert re.fullmatch(rf"seqscale: .*{message}.*\n", err), err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("out", ["sweep.toml/run", "/proc/run", "sweep.toml"])
def test_output_that_cannot_be_written_is_exit_code_5_before_the_first_cell(here, out):
    code, printed, err = here("cost", "sweep.toml", "--out", out)
    assert code == 5
    assert printed == ""
    assert re.fullmatch(r"seqscale: .*\n", err), err


def test_a_dry_run_into_a_file_is_exit_code_5_too(here):
    code, printed, err = here("cost", "sweep.toml", "--dry-run", "--out", "sweep.toml")
    assert (code, printed) == (5, "")
    assert err == "seqscale: sweep.toml: not a directory\n"


def test_a_second_sweep_in_a_directory_is_refused_with_the_pid(here, tmp_path):
    with record.RunDirectory(tmp_path / "runs" / "cost"):
        code, _, err = here("cost", "sweep.toml")
        assert code == 5
        assert f"process {os.getpid()}" in err
        assert f"process {os.getpid()} is sweeping" in here("status")[1]


def test_records_that_are_none_are_named_and_measured_again(here, tmp_path):
    one = ("cost", "sweep.toml", "--arch", "mamba2", "--length", "16")
    assert here(*one)[0] == 0
    (path,) = (tmp_path / "runs/cost/records").iterdir()
    path.write_text("{")
    code, out, _ = here("status")
    assert code == 0
    assert "missing: mamba2 op forward T=16" in out
    assert f"no record: {path.relative_to(tmp_path)}: not JSON" in out
    code, _, err = here(*one)
    assert code == 0
    assert f"set aside, counted missing: {path.relative_to(tmp_path)} (not JSON" in err
    assert "1/1 mamba2 op forward T=16" in err
    assert "1 of 1 cells (1 ok)" in here("status")[1]


def test_damaged_files_beside_the_records_are_no_obstacle(here, tmp_path):
    one = ("cost", "sweep.toml", "--arch", "mamba2", "--length", "16")
    assert here(*one)[0] == 0
    run_directory = tmp_path / "runs/cost"
    (run_directory / "records" / "folder.json").mkdir()
    (run_directory / "folder.tmp").mkdir()
    for text in ("{", "", "[1]", '[{"foo": 1}]', '{"stable": 1}'):
        (run_directory / "plan.json").write_text(text)
        (run_directory / "sessions" / "x.json").write_text(text)
        code, out, err = here("status")
        assert code == 0, err
        assert "1 of 1 cells (1 ok)" in out
        assert "plan.json: not a plan" in out
        assert here("export", "runs/cost", "a.csv")[0] == 0
    assert here(*one)[0] == 0


def test_files_that_are_left_out_are_named(here, tmp_path):
    assert (
        here("cost", "sweep.toml", "--arch", "mamba2", "--length", "16", "--length", "24")[0] == 0
    )
    path = sorted((tmp_path / "runs/cost/records").iterdir())[0]
    path.write_text("{")
    for arguments in (("export", "runs/cost", "a.csv"), ("plot",)):
        code, _, err = here(*arguments)
        assert code == 0
        assert f"left out, no record: {path.relative_to(tmp_path)}: not JSON" in err


def test_a_broken_end_loses_nothing(here, monkeypatch):
    calls = []

    def measure(self, dtypes):
        calls.append(dtypes)
        if len(calls) == 2:
            raise run.WorkerFailedError("crashed", "killed by SIGKILL", "")
        return CEILINGS

    monkeypatch.setattr(run.Launcher, "measure_ceilings", measure)
    code, out, err = here("cost", "sweep.toml", "--arch", "mamba2", "--length", "16")
    assert code == 0, err
    assert len(calls) == 2
    assert "cells.csv" in out


@pytest.mark.parametrize(
    ("redirection", "code"),
    [("| true", 141), (">&-", 0), ("2>&-", 0), ("<&- >&-", 0)],
)
def test_standard_streams_that_are_not_there(tmp_path, redirection, code):
    (tmp_path / "sweep.toml").write_text(SWEEP.replace("[32, 64]", "[16]"))
    command = f"{sys.executable} -m harness cost sweep.toml --arch mamba2 {redirection}"
    script = f"{command}; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert len(list((tmp_path / "runs/cost/records").iterdir())) == 1


def test_no_character_breaks_the_output(tmp_path):
    variables = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = seqscale("list", cwd=tmp_path, env=variables)
    assert done.returncode == 0, done.stderr
    assert "presets" in done.stdout
    done = seqscale("status", "\x1b[31mred\nrun", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "\x1b" not in done.stderr


def test_killed_at_random_moments_a_sweep_resumes_where_it_was(tmp_path):
    """The whole program, killed with its worker at any moment, then run to its end."""
    (tmp_path / "sweep.toml").write_text(SWEEP.replace("[32, 64]", "[16, 24, 32, 40]"))
    command = [sys.executable, "-m", "harness", "cost", "sweep.toml"]
    records = tmp_path / "runs" / "cost" / "records"
    chance, seen = random.Random(0), {}
    for _ in range(4):
        sweeping = subprocess.Popen(
            command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        time.sleep(chance.uniform(1, 9))
        sweeping.kill()
        sweeping.wait()
        found = {p: p.read_bytes() for p in records.glob("*.json")} if records.exists() else {}
        assert all(json.loads(text) for text in found.values())
        assert all(found[path] == text for path, text in seen.items())
        seen = found
    done = seqscale("cost", "sweep.toml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = {p: p.read_bytes() for p in records.iterdir()}
    assert all(found[path] == text for path, text in seen.items())
    cases = [json.loads(text)["case"] for text in found.values()]
    assert len(cases) == 8
    assert {(c["arch"], c["seq_len"]) for c in cases} == {
        (arch, n) for arch in ("mamba2", "hyena") for n in (16, 24, 32, 40)
    }
    if seen:
        assert f"{len(seen)} of 8 cells were there already" in done.stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_sweep_and_its_worker(tmp_path, number, code):
    (tmp_path / "sweep.toml").write_text(SWEEP)
    sweeping = subprocess.Popen(
        [sys.executable, "-m", "harness", "cost", "sweep.toml", "--length", "4096"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell that runs the tests in the background lets them ignore SIGINT.
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 60
    while not list((tmp_path / "runs").rglob("sessions/*.json")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    (worker,) = subprocess.run(
        ["pgrep", "-P", str(sweeping.pid)], capture_output=True, text=True, check=True
    ).stdout.split()
    sweeping.send_signal(number)
    _, err = sweeping.communicate(timeout=60)
    assert sweeping.returncode == code
    assert f"stopped by {signal.Signals(number).name}: what is recorded stays" in err
    assert "Traceback" not in err
    assert subprocess.run(["ps", "-p", worker], capture_output=True).returncode == 1
    assert not list(tmp_path.rglob("*.tmp"))


def test_help_is_quick_and_does_not_import_torch(tmp_path):
    code = (
        "import sys; from harness.__main__ import app; app(['--help'], exit_on_error=False);"
        "sys.exit('torch' in sys.modules or 'pandas' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for verb in ("cost", "loss", "recall", "check", "prepare", "status", "list", "export", "plot"):
        assert verb in done.stdout

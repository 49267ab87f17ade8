import subprocess
import sys

import pandas as pd
import pytest

SWEEP = """
[[grid]]
level = "op"
phase = "forward"
lengths = [32, 64]
size = "d64"
"""


def seqscale(*arguments, cwd):
    return subprocess.run(
        [sys.executable, "-m", "harness", *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=200,
    )


def test_cost_then_plot(tmp_path):
    (tmp_path / "sweep.toml").write_text(SWEEP)
    done = seqscale("cost", "sweep.toml", "--arch", "mamba2", "--arch", "hyena", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "local exponent" in done.stdout
    assert "4/4 hyena op forward T=64" in done.stderr
    table = pd.read_csv(tmp_path / "runs" / "cost" / "cells.csv")
    assert table["status"].tolist() == ["ok"] * 4
    drawn = seqscale("plot", cwd=tmp_path)
    assert drawn.returncode == 0, drawn.stderr
    figures = drawn.stdout.split()
    assert figures
    assert all((tmp_path / figure).exists() for figure in figures)


def test_a_failed_cell_is_exit_code_4(tmp_path):
    (tmp_path / "sweep.toml").write_text(SWEEP + 'dtype = "bfloat16"\narchs = ["rwkv7"]\n')
    code = (
        "import archs.ops.wkv7 as w, harness.workload as workload, harness.__main__ as m, sys;"
        "workload.OPS['rwkv7'] = lambda *a: 1 / 0;"
        "sys.argv[1:] = ['cost', 'sweep.toml']; m.main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 4, done.stderr
    assert "error: ZeroDivisionError" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("cost", "--preset", "quik"), "did you mean 'quick'"),
        (("cost",), "give a sweep file or --preset"),
        (("cost", "absent.toml"), "absent.toml"),
        (("cost", "--preset", "quick", "--arch", "mambda2"), "did you mean 'mamba2'"),
        (("cost", "--preste", "quick"), "Did you mean --preset"),
        (("plto",), 'Did you mean "plot"'),
        (("plot", "absent"), "run seqscale cost"),
    ],
)
def test_wrong_usage_is_exit_code_2_and_no_traceback(tmp_path, arguments, message):
    done = seqscale(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_help_does_not_import_torch(tmp_path):
    code = (
        "import sys; from harness.__main__ import app; app(['--help'], exit_on_error=False);"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "cost" in done.stdout

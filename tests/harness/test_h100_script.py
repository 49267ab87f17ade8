"""The script for a GPU: its parts, each short enough for a queue."""

import os
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
PARTS = (
    "kernels", "long_kernels", "hopper", "tests", "attention_plans", "plans", "attention", "ssd",
    "wkv7", "long_conv", "cost",
)  # fmt: skip


def commands(tmp_path, **variables):
    """What the script runs, each with its time limit in seconds."""
    fake = tmp_path / "python"
    fake.write_text('#!/bin/sh\necho "${TRITON_INTERPRET-unset} $*" >> "$LOG"\n')
    limit = tmp_path / "timeout"
    limit.write_text('#!/bin/sh\necho "limit $1" >> "$LOG"\nshift\nexec "$@"\n')
    for script in (fake, limit):
        script.chmod(0o755)
    log = tmp_path / "log"
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(
        ["sh", "results/h100.sh", tmp_path / "out"],
        cwd=ROOT,
        env={**os.environ, "PATH": path, "PYTHON": str(fake), "LOG": str(log), **variables},
        check=True,
        capture_output=True,
    )
    return log.read_text()


def test_our_kernels_are_tested_before_anything_is_timed(tmp_path):
    said = commands(tmp_path, TRITON_INTERPRET="1")
    _, first, second, third, *later = re.findall(r"^unset (.*)", said, re.M)
    tested = [path.name for path in (ROOT / "tests/archs").glob("test_*_kernel.py")]
    assert len(tested) > 4
    for name in tested:
        assert f"tests/archs/{name}" in (second if name.startswith("test_long") else first)
    assert "tests/archs/test_attention_hopper.py" in third  # by itself: it might hang
    # Without the project's options, which name plug-ins.
    for line in (first, second, third):
        assert "-m pytest -o addopts= -m gpu" in line
    assert [name for line in later for name in PARTS if f"--peers all --op {name} " in line] == [
        "attention", "ssd", "wkv7", "long_conv",
    ]  # fmt: skip
    planned = re.findall(r"gpu_plans\.py --op (\w+)", said)
    assert planned == ["attention64", "attention128", "decode", "ssd", "wkv7", "long_conv"]
    assert "--preset h100 " in said


def test_every_part_takes_under_nine_minutes(tmp_path):
    for part in PARTS:
        folder = tmp_path / part
        folder.mkdir()
        limits = [int(n) for n in re.findall(r"^limit (\d+)", commands(folder, PARTS=part), re.M)]
        assert limits
        assert sum(limits) < 9 * 60

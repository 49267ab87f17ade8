import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from harness import baseline, guard_times, guards, measured, stored_check
from harness.baseline import BaselineError
from harness.environment import same_place
from harness.processes import Times
from test_baseline import CELLS, HERE
from test_baseline import measured as taken

PLACE = {**HERE, "device_type": "cpu"}


def of_pytest(tmp_path, times, process, here=PLACE, **changed):
    """A file of pytest-benchmark with what one process said."""
    benchmarks = [
        {
            "fullname": f"test_speed.py::test_speed[{name}]",
            "extra_info": {
                measured.PLACE: {
                    "cell": name,
                    "environment": here,
                    "status": "ok",
                    **of_cell[process],
                }
            },
            "stats": {"median": of_cell[process]["cell_ms"] / 1e3},
        }
        for name, of_cell in times.cells.items()
        if process < len(of_cell)
    ]
    path = tmp_path / f"{process}.json"
    path.write_text(json.dumps({"machine_info": {}, "benchmarks": benchmarks, **changed}))
    return path


@pytest.fixture
def kept():
    return baseline.taken(taken(seed=50), CELLS, "c0ffee", "2026-01-01", "first")


def compared(kept, paths):
    return stored_check.compare(kept, *measured.load(paths), "cpu")


def test_a_file_of_pytest_benchmark_gets_the_verdicts_of_our_own(tmp_path, kept):
    now = taken({"ssd forward": 1.3, "ssd backward": 0.7}, count=12, seed=9)
    now.environment = PLACE
    measured.save(now, CELLS, tmp_path / "ours.json")
    ours = compared(kept, [tmp_path / "ours.json"])
    theirs = compared(kept, [of_pytest(tmp_path, now, process) for process in range(12)])
    assert [str(row.verdict) for row in ours.rows] == ["REGRESSION", "IMPROVEMENT", "SAME"]
    assert ours.rows == theirs.rows


def test_what_was_saved_is_read(tmp_path):
    now = taken(count=7, faults={"gone": ("oom", "no memory")})
    now.environment = PLACE
    measured.save(now, [*CELLS, "gone"], tmp_path / "ours.json")
    times, names = measured.load([tmp_path / "ours.json"])
    assert times == now
    assert names == [*CELLS, "gone"]


def test_a_removed_benchmark_is_missing_and_a_number_that_is_none_fails(tmp_path, kept):
    now = taken(count=12, seed=9)
    del now.cells["attention forward"]
    for metrics in now.cells["ssd backward"]:
        metrics["cell_ms"] = float("nan")
    found = compared(kept, [of_pytest(tmp_path, now, process) for process in range(12)])
    assert {row.name: str(row.verdict) for row in found.rows} == {
        "ssd backward": "FAILED",
        "attention forward": "MISSING",
        "ssd forward": "SAME",
    }
    assert found.exit_code == 1


def test_a_benchmark_that_some_files_lack_fails(tmp_path, kept):
    now = taken(count=12, seed=9)
    del now.cells["ssd backward"][10:]  # it failed in the last two
    found = compared(kept, [of_pytest(tmp_path, now, process) for process in range(12)])
    assert (found.rows[0].name, str(found.rows[0].verdict)) == ("ssd backward", "FAILED")
    assert found.rows[0].why == "error: in 10 of 12 files"


def test_a_benchmark_that_was_not_right_to_its_end_fails(tmp_path, kept):
    files = [of_pytest(tmp_path, taken(count=12, seed=9), process) for process in range(12)]
    document = json.loads(files[5].read_text())
    document["benchmarks"][1]["extra_info"][measured.PLACE]["status"] = "wrong"
    files[5].write_text(json.dumps(document))
    found = compared(kept, files)
    assert (found.rows[0].name, str(found.rows[0].verdict)) == ("ssd backward", "FAILED")
    assert found.rows[0].why == f"wrong: in {files[5]}"


def test_two_benchmarks_of_a_cell_in_a_file_are_refused(tmp_path):
    path = of_pytest(tmp_path, taken(count=7), 0)
    document = json.loads(path.read_text())
    document["benchmarks"].append(document["benchmarks"][0])
    path.write_text(json.dumps(document))
    with pytest.raises(BaselineError, match="two benchmarks of 'ssd forward'"):
        measured.load([path])


def test_one_file_is_one_process_and_no_verdict(tmp_path, kept):
    found = compared(kept, [of_pytest(tmp_path, taken(count=12, seed=9), 0)])
    assert {str(row.verdict) for row in found.rows} == {"FAILED"}
    assert "1 processes: a verdict needs 7" in found.rows[0].why


def test_a_process_counts_once(tmp_path):
    files = [of_pytest(tmp_path, taken(count=12, seed=9), process) for process in range(2)]
    copy = tmp_path / "copy.json"
    copy.write_text(files[0].read_text())
    for again in (files[0], copy):
        with pytest.raises(BaselineError, match=f"{again} holds what {files[0]} does"):
            measured.load([*files, again])


def test_a_cell_that_is_named_twice_is_refused(tmp_path):
    now = taken(count=7)
    now.environment = PLACE
    measured.save(now, [*CELLS, CELLS[0]], tmp_path / "ours.json")
    with pytest.raises(BaselineError, match=r"ours\.json is no file of"):
        measured.load([tmp_path / "ours.json"])


ANY = [None, 5, "x", [], [3], {}, [{}], [None], [{"extra_info": None}], {"a": 5}, {"a": [{}]}]


@pytest.mark.parametrize("value", ANY)
def test_a_file_that_tells_too_little_is_refused(tmp_path, value):
    now = taken(count=7)
    now.environment = PLACE
    with pytest.raises(BaselineError, match=r"0\.json"):
        measured.load([of_pytest(tmp_path, now, 0, benchmarks=value)])
    with pytest.raises(BaselineError, match=r"0\.json"):
        measured.load([of_pytest(tmp_path, now, 0, here=value)])
    measured.save(now, CELLS, tmp_path / "ours.json")
    whole = json.loads((tmp_path / "ours.json").read_text())
    for key in whole:
        if (key, value) in (("faults", {}), ("names", [])):
            continue
        (tmp_path / "part.json").write_text(json.dumps({**whole, key: value}))
        with pytest.raises(BaselineError, match=r"part\.json"):
            measured.load([tmp_path / "part.json"])


def test_files_of_several_devices_are_refused(tmp_path):
    now = taken(count=7)
    files = [of_pytest(tmp_path, now, 0), of_pytest(tmp_path, now, 1, {**PLACE, "threads": 4})]
    with pytest.raises(BaselineError, match="is of another device"):
        measured.load(files)


@pytest.mark.parametrize("text", ["", "[]", '{"cells": {}, "schema": 1}', "\x00", "[" * 100_000])
def test_a_file_that_is_none_is_refused(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(BaselineError, match=r"a\.json"):
        measured.load([tmp_path / "a.json"])


def test_another_device_is_named(kept):
    now = taken(count=7)
    now.environment = {**PLACE, "torch": "2.11.0"}
    with pytest.raises(BaselineError, match=r"of another place: torch 2\.11\.0, not 2\.13\.0"):
        stored_check.compare(kept, now, CELLS, "cpu")


def test_an_empty_run_is_no_success(kept):
    assert stored_check.compare(kept, Times(), [], "cpu").exit_code == 3


def test_the_suite_writes_what_is_judged(tmp_path):
    """The command of the README, of one cell."""
    (name,) = [n for n in guards.names("cpu") if n.startswith("short_conv forward T")]
    root, path = Path(__file__).parents[2], tmp_path / "now.json"
    test = f"tests/benchmarks/test_speed.py::test_speed[{name}]"
    command = [sys.executable, "-m", "pytest", test, "--benchmark-json", path]
    # A worker of pytest-xdist would not time it.
    mine = {name: text for name, text in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(command, cwd=root, env=mine, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    times, names = measured.load([path])
    assert names == [name]
    assert times.ms(name)[0] > 0
    assert times.environment["threads"] > 0
    assert not same_place(times.environment, HERE)


def test_a_cell_is_timed_in_milliseconds(tmp_path):
    """By a call that cannot take less than 20 of them."""
    path = tmp_path / "guards.py"
    path.write_text(
        "import time\n"
        "from harness.guards import Guard\n"
        'GUARDS = [Guard("sleeps", lambda: time.sleep(0.02))]\n'
    )
    metrics, _ = guard_times.measure("sleeps", "cpu", path, anchors=False, checked=False)
    assert 20 <= metrics["cell_ms"] < 2000

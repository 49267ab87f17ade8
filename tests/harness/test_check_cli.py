"""`seqscale check`."""

import json
import math
from pathlib import Path

import pytest

from guarded import SLOW, commit
from harness import baseline, check, check_modes, measured, stored_check
from harness.judged import Report, Row
from harness.verdicts import Verdict
from test_baseline import CELLS, HERE
from test_baseline import measured as taken

PLACE = {**HERE, "device_type": "cpu"}


@pytest.fixture
def compared(tmp_path):
    """A baseline, and a file of what was measured now: `write(ratios)`."""
    kept = baseline.taken(taken(seed=50), CELLS, "c0ffee", "2026-01-01", "first")
    baseline.save(kept, tmp_path / "baseline.json")

    def write(ratios=None, change=lambda times: None, names=CELLS):
        now = taken(ratios, count=12, seed=9)
        now.environment = PLACE
        change(now)
        measured.save(now, names, tmp_path / "now.json")
        return ("check", "--from", "now.json", "--baseline", "baseline.json")

    return write


def test_unchanged_code_ends_with_zero(compared, here):
    code, out, err = here(*compared())
    assert (code, err) == (0, "")
    assert "3 SAME" in out


def test_a_slow_down_ends_with_one_and_is_named_with_its_bounds(compared, here):
    code, out, _ = here(*compared({"ssd forward": 1.3}), "--json")
    document = json.loads(out)
    assert (code, document["exit_code"]) == (1, 1)
    first = document["cells"][0]
    assert (first["name"], first["verdict"]) == ("ssd forward", "REGRESSION")
    assert 1.2 < first["change"]["low"] < first["change"]["ratio"] < first["change"]["high"] < 1.4


def test_a_file_is_judged_by_the_device_that_it_is_of(compared, here, tmp_path):
    """Of 0.1 ms, 10 % are nothing on a CPU, and something on a GPU."""

    def short(times):
        times.environment = {**PLACE, "device_type": "cuda"}
        for metrics in (m for of_cell in times.cells.values() for m in of_cell):
            metrics.update({name: ms / 100 for name, ms in metrics.items()})

    command = compared({"ssd forward": 1.3}, short)
    path = tmp_path / "baseline.json"
    document = json.loads(path.read_text())
    for cell in document["cells"].values():
        cell["ms"] /= 100
    path.write_text(json.dumps(document))
    code, out, _ = here(*command, "--json")
    assert (code, json.loads(out)["cells"][0]["name"]) == (1, "ssd forward")

    def on_a_cpu(times):
        short(times)
        times.environment = PLACE

    compared({"ssd forward": 1.3}, on_a_cpu)
    assert here(*command)[0] == 0


def test_only_chosen_cells_are_compared(compared, here):
    command = compared({"attention forward": 1.3})
    assert here(*command)[0] == 1
    assert here(*command, "--cell", "ssd*")[0] == 0
    code, out, err = here(*command, "--cell", "ssd*", "--cell", "atention forward")
    assert (code, out) == (2, "")
    assert "unknown cell 'atention forward'" in err
    assert "did you mean 'attention forward'?" in err


def test_several_files_follow_one_from(compared, here, tmp_path):
    """A slow file among them is not taken for something else."""
    compared({"ssd forward": 1.3})
    (tmp_path / "slow.json").write_text((tmp_path / "now.json").read_text())
    command = compared()
    files = ("--from", "now.json", "slow.json", *command[3:])
    code, out, err = here("check", *files)
    assert (code, out) == (3, "")
    assert "now.json is neither of seqscale check --save nor pytest-benchmark" in err


def test_files_for_others_are_written(compared, here, tmp_path, monkeypatch):
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    (tmp_path / "summary.md").write_text("before\n")
    files = ("--junit", "junit.xml", "--markdown", "summary.md")
    code, _, err = here(*compared({"ssd forward": 1.3}), *files)
    assert code == 1
    assert err.startswith("::error title=REGRESSION ssd forward::")
    assert 'failures="1"' in (tmp_path / "junit.xml").read_text()
    assert (tmp_path / "summary.md").read_text().startswith("before\n## ")
    compared()
    (tmp_path / "baseline.json").unlink()
    command = ("check", "--from", "now.json", "--baseline", "baseline.json", *files[:2])
    assert here(*command)[0] == 3
    assert 'errors="1"' in (tmp_path / "junit.xml").read_text()


@pytest.mark.parametrize(
    ("arguments", "code"), [(("--from", "none.json"), 3), (("--ab", "nowhere"), 2)]
)
def test_where_nothing_is_compared_that_is_told_too(here, repository, tmp_path, arguments, code):
    junit = repository / "junit.xml"
    junit.write_text('<testsuite tests="1"/>')  # of the last time
    found, out, err = here("check", *arguments, "--junit", "junit.xml", "--json")
    document = json.loads(out)
    assert (found, document["exit_code"]) == (code, code)
    assert err == f"seqscale: {document['summary']}\n"
    assert f'<error message="{document["summary"]}'[:40] in junit.read_text()


def test_a_check_that_is_stopped_leaves_no_report_of_the_last_one(here, repository, monkeypatch):
    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(check_modes, "report", stopped)
    (repository / "junit.xml").write_text('<testsuite tests="1"/>')
    assert here("check", "--ab", "HEAD", "--junit", "junit.xml")[0] == 130
    assert "the check did not come to its end" in (repository / "junit.xml").read_text()


def test_a_report_that_cannot_be_written_is_said_before_anything_is_measured(
    here, repository, monkeypatch
):
    monkeypatch.setattr(check_modes, "report", None)
    code, _, err = here("check", "--ab", "HEAD", "--junit", ".")
    assert code == 5
    assert err.startswith("seqscale: .: Is a directory")


def broken(times):
    times.faults["ssd forward"] = ("wrong", "relative error 1")


def invalid(times):
    times.cells["ssd forward"][0]["cell_ms"] = 0.0


def one_process(times):
    for name in times.cells:
        times.cells[name] = times.cells[name][:1]


def other_device(times):
    times.environment = {**PLACE, "device": "another"}


def another_cell(times):
    times.cells["hyena"] = times.cells["ssd forward"]


@pytest.mark.parametrize(
    ("change", "names", "code"),
    [
        (broken, CELLS, 1),
        (invalid, CELLS, 1),
        (one_process, CELLS, 1),
        (other_device, CELLS, 3),
        (lambda times: None, CELLS[:2], 1),  # a cell is gone
        (lambda times: None, (), 3),  # an empty run
        (another_cell, ("hyena",), 3),  # no cell in common
    ],
)
def test_what_cannot_pass_does_not(compared, here, change, names, code):
    found, out, err = here(*compared(change=change, names=names))
    assert found == code
    assert out + err


@pytest.mark.parametrize("value", [math.nan, 0, -1.0, None])
def test_a_baseline_with_a_number_that_is_none_does_not_pass(compared, here, tmp_path, value):
    command = compared()
    path = tmp_path / "baseline.json"
    document = json.loads(path.read_text())
    document["cells"]["ssd forward"]["ratios"][0] = value
    path.write_text(json.dumps(document))
    code, out, _ = here(*command)
    assert code == 1
    assert "FAILED" in out


@pytest.mark.parametrize("text", [None, "", "{", "{}"])
def test_without_a_baseline_nothing_is_compared(compared, here, tmp_path, text):
    command = compared()
    path = tmp_path / "baseline.json"
    path.unlink()
    if text is not None:
        path.write_text(text)
    code, out, err = here(*command)
    assert (code, out) == (3, "")
    assert err.startswith("seqscale: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--ab", "main", "--counters"), "--ab and --counters are different checks"),
        (("--calibrate",), "give --reason TEXT"),
        (("--update", "--reason", " "), "give --reason TEXT"),
        (("none.py", "--ab", "main"), "none.py: no such file of guards"),
        (("--ab", "main"), "lies in no git repository"),
        (("--device", "tpu"), "unknown device 'tpu'"),
        (("--pairs", "3"), "a verdict needs 7 pairs of processes, got 3"),
        (("--threads", "0"), "threads must be 1 to"),
        (("--time-limit", "1e300"), "the time limit must be"),
        (("--counters", "--cell", "ssd*"), "--cell means nothing to --counters"),
        (("--update", "--reason", "a", "--cell", "ssd*"), "--cell means nothing to --update"),
        (("--ab", "main", "--save", "a.json"), "--save means nothing to --ab"),
        (("--accept", "ssd"), "--accept means nothing to a check"),
        (("--junit", "none/a.xml"), "there is no folder none to write it into"),
    ],
)
def test_what_cannot_be_asked_is_said_in_a_line(here, arguments, said):
    code, out, err = here("check", *arguments)
    assert (code, out) == (2, "")
    assert said in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("mode", ["--calibrate", "--update"])
def test_a_baseline_is_neither_taken_nor_updated_on_a_dirty_tree(here, repository, mode):
    kept = baseline.taken(taken(seed=50), CELLS, "c0ffee", "2026-01-01", "first")
    path = repository / "baseline.json"
    if mode == "--update":
        baseline.save(kept, path)
    before = path.read_text() if path.exists() else None
    (repository / "src" / "mine.py").write_text(SLOW)
    command = ("check", "guards.py", mode, "--reason", "why", "--baseline", "baseline.json")
    code, _, err = here(*command)
    assert code == 1
    assert "src/mine.py): commit them first" in err
    assert (path.read_text() if path.exists() else None) == before


def test_a_baseline_that_is_there_is_not_taken_anew(here, repository):
    (repository / "baseline.json").write_text("{}")
    command = ("check", "guards.py", "--calibrate", "--reason", "why")
    code, _, err = here(*command, "--baseline", "baseline.json")
    assert (code, (repository / "baseline.json").read_text()) == (1, "{}")
    assert "--update rewrites what moved" in err


def test_each_file_of_guards_has_a_baseline_of_its_own(repository, monkeypatch):
    (repository / "bench").mkdir()
    folder, device = Path("results/check"), "a-cpu-2t-torch-2.13.0.json"
    places = {
        "guards.py": folder / f"guards-{device}",
        "bench/guards.py": folder / f"bench-guards-{device}",
        None: folder / device,
    }
    for path, place in places.items():
        assert stored_check.place(HERE, path and Path(path)) == place
    # The same wherever one stands.
    monkeypatch.chdir(repository / "bench")
    assert stored_check.place(HERE, Path("guards.py")) == repository / places["bench/guards.py"]
    assert stored_check.place(HERE, None) == repository / places[None]


def test_outside_of_a_repository_a_baseline_lies_beside_the_file_of_guards(tmp_path):
    place = stored_check.place(HERE, tmp_path / "guards.py")
    assert place == tmp_path / "results/check/guards-a-cpu-2t-torch-2.13.0.json"


def test_a_folder_without_anything_that_is_guarded_compares_nothing(here, repository):
    (repository / "guards.py").unlink()
    commit(repository)
    for cells in ((), ("--cell", "scan")):
        code, out, _ = here("check", "--ab", "HEAD", *cells)
        assert code == 3
        assert "nothing was compared: there is no cell" in out


def test_two_trees_are_compared_as_asked(here, repository, monkeypatch):
    seen = []

    def ab(reference, path, asked, *, cells, pairs, on_process):
        seen.append((reference, path, asked.threads, cells, pairs))
        return Report("now beside main", [Row(name="scan", verdict=Verdict.REGRESSION)])

    monkeypatch.setattr(check, "ab", ab)
    code, out, _ = here(
        *("check", "guards.py", "--ab", "main", "--threads", "1", "--pairs", "8", "--cell", "scan")
    )
    assert code == 1
    assert "REGRESSION" in out
    assert seen == [("main", Path("guards.py"), 1, ["scan"], 8)]

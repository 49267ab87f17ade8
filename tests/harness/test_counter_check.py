import copy
import json
import math
from pathlib import Path

import pytest
import torch

from harness import counter_check, counters
from harness.baseline import BaselineError
from harness.environment import installed_version

COUNTS = Path(__file__).parents[2] / "results" / "counters"
DOCUMENT = json.loads((COUNTS / "triton-3.7.1.json").read_text())
OPS, ARCHS = ("ssd",), (90,)


@pytest.fixture
def now():
    return copy.deepcopy(DOCUMENT)


def compared(now, old=DOCUMENT, ops=OPS):
    found = counter_check.compare(old, now, ops, ARCHS)
    return found.exit_code, {row.name: (str(row.verdict), row.why) for row in found.rows}


def of(document, kind, phase_or_kernel):
    """The row of our first kernel, or pass, of ssd."""
    return next(
        row
        for row in document[kind]
        if row["op"] == "ssd"
        and row["implementation"] == "triton"
        and phase_or_kernel in (row.get("phase"), row.get("kernel"))
        and row.get("arch", 90) == 90
    )


def test_the_same_counts_are_the_same(now):
    code, rows = compared(now)
    assert code == 0
    assert {verdict for verdict, _ in rows.values()} == {"SAME"}
    assert {name.split()[1] for name in rows} == {"triton", "torch"}


def change(name, amount):
    return lambda row: row.update({name: amount(row[name])})


@pytest.mark.parametrize(
    ("kind", "which", "how", "verdict"),
    [
        ("traffic", "forward", change("unique_bytes", lambda n: 1.02 * n), "REGRESSION"),
        ("traffic", "forward", change("unique_bytes", lambda n: 1.005 * n), "SAME"),
        ("traffic", "backward", change("launches", lambda n: n + 1), "REGRESSION"),
        ("traffic", "forward", change("requested_bytes", lambda n: 0.9 * n), "IMPROVEMENT"),
        ("traffic", "forward", lambda row: row["operations"].append({"flops": 1}), "REGRESSION"),
        ("traffic", "forward", change("relative_error", lambda e: 1.0), "FAILED"),
        ("traffic", "forward", change("relative_error", lambda e: None), "FAILED"),
        ("compiled", None, change("spills", lambda n: n + 8), "REGRESSION"),
        ("compiled", None, change("registers", lambda n: n + 8), "REGRESSION"),
        ("compiled", None, lambda row: row["opcodes"].update(HGMMA=0, HMMA=64), "REGRESSION"),
        ("compiled", None, lambda row: row["opcodes"].update(UTCHMMA=4), "IMPROVEMENT"),
        ("compiled", None, lambda row: row["opcodes"].update(FFMA=10**6), "SAME"),
    ],
)
def test_what_grew_is_found(now, kind, which, how, verdict):
    kernel = next(
        row["kernel"]
        for row in now["compiled"]
        if row["op"] == "ssd" and row["implementation"] == "triton" and row["opcodes"]["HGMMA"]
    )
    how(of(now, kind, which or kernel))
    code, rows = compared(now)
    changed = {found for found, _ in rows.values()} - {"SAME"}
    assert changed == ({verdict} if verdict != "SAME" else set())
    assert code == (verdict in ("REGRESSION", "FAILED"))


def test_a_kernel_that_is_gone_is_missing_and_one_more_is_new(now):
    ours = (r for r in now["compiled"] if r["op"] == "ssd" and r["implementation"] == "triton")
    gone = next(ours)
    now["compiled"] = [r for r in now["compiled"] if r["kernel"] != gone["kernel"]]
    code, rows = compared(now)
    assert code == 1
    assert any(found == "MISSING" and gone["kernel"] in name for name, (found, _) in rows.items())
    code, rows = compared(DOCUMENT, old=now)
    assert code == 0
    assert any(found == "NEW" and gone["kernel"] in name for name, (found, _) in rows.items())


def test_a_call_that_failed_fails(now):
    now["traffic"] = [row for row in now["traffic"] if row["op"] != "ssd"]
    named = {"op": "ssd", "implementation": "triton", "shape": "B 1"}
    now["left_out"] = [{**named, "failed": True, "reason": "it does not compile"}]
    code, rows = compared(now)
    assert code == 1
    assert rows["ssd triton (B 1)"] == ("FAILED", "it does not compile")


@pytest.mark.parametrize("value", [math.nan, math.inf, -1, 1e300, "5", None, True, [1]])
@pytest.mark.parametrize("kind", ["traffic", "compiled"])
def test_a_count_that_is_none_does_not_pass(kind, value):
    damaged = copy.deepcopy(DOCUMENT)
    name = "unique_bytes" if kind == "traffic" else "spills"
    row = next(r for r in damaged[kind] if r["op"] == "ssd" and r["implementation"] == "triton")
    row.update({name: value, "arch": 90})
    code, rows = compared(DOCUMENT, old=damaged)
    assert code == 1
    assert sum(verdict == "FAILED" for verdict, _ in rows.values()) == 1


@pytest.mark.parametrize("row", [None, 5, {}, {"op": "ssd", "implementation": "triton"}])
@pytest.mark.parametrize("kind", ["traffic", "compiled"])
def test_a_row_that_is_none_is_refused(now, kind, row):
    with pytest.raises(BaselineError, match="only part of one"):
        compared(DOCUMENT, old={**now, kind: [row]})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "there is no"),
        ("", "holds no counts"),
        ("[" * 100_000, "holds no counts"),
        ("{}", "holds no counts"),
        (json.dumps({**DOCUMENT, "traffic": []}), "holds no traffic"),
        (json.dumps({**DOCUMENT, "compiled": []}), "holds no compiled"),
    ],
)
def test_a_file_that_is_no_baseline_is_refused(tmp_path, text, said):
    path = tmp_path / "counts.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(BaselineError, match=said):
        counter_check.check(path, OPS, archs=ARCHS)


def test_other_versions_are_not_compared(now):
    now["versions"] = {**now["versions"], "triton": "3.6.0"}
    with pytest.raises(BaselineError, match=r"torch 2\.13\.0, triton 3\.7\.1, here are .*3\.6\.0"):
        compared(now)


@pytest.mark.skipif(
    {"torch": torch.__version__.partition("+")[0], "triton": installed_version("triton")}
    != DOCUMENT["versions"],
    reason="the committed counts are of other versions",
)
def test_the_committed_counts_are_those_of_this_code():
    found = counter_check.check(COUNTS, ("short_conv",), archs=counters.ARCHS)
    assert [str(row.verdict) for row in found.rows] == ["SAME"] * len(found.rows) != []
